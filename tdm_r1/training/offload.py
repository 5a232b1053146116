"""VAE and rewards on the GPU only while pictures are decoded and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Offload:
    """Keeps `parts` on the CPU; `with offload():` has them on `device`. Disabled, it moves nothing.

    A part is moved by its own `to(device)`; one without it has nothing to move (a plain function).
    """

    def __init__(self, parts: Sequence[Any], device: torch.device, *, enabled: bool) -> None:
        moves = [getattr(part, "to", None) for part in parts]
        self.moves: list[Callable[..., Any]] = [move for move in moves if callable(move)]
        self.device, self.enabled = device, enabled
        self._move(torch.device("cpu"))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Bring the parts in, and send them back whatever happens."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for move in self.moves if self.enabled else ():
            move(device)
