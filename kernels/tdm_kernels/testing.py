"""How a fast op is held to the reference, for tests and benches: twice its error, plus 2 ulp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-8}


def allowed_error(like: Tensor, exact: Tensor) -> Tensor:
    """Return twice the error against fp64 of the reference in its dtype, plus 2 ulp."""
    size = exact.abs().max().clamp(min=1.0)
    return 2 * (like.double() - exact).abs().max() + 2 * ULP[like.dtype] * size


@contextmanager
def in_double() -> Iterator[None]:
    """Lift the reference's fp32 to fp64: inside, `Tensor.float` is `Tensor.double`."""
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield
