"""Linears in bf16 on a CPU, for inference: oneDNN's product over a weight it has reordered once.

F.linear hands the same product a plain weight, which is then reordered at every call; and what
follows a linear reads its rows from memory again, where the product can apply GELU as it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tdm_kernels import reference
from tdm_kernels.layout import product_dtype
from tdm_kernels.quantized import version_of

_OPS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")


@lru_cache
def available() -> bool:
    """Whether this PyTorch has the ops, which are not public, and this CPU multiplies bf16."""
    ops = torch.ops.mkldnn
    return all(hasattr(ops, name) for name in _OPS) and ops._is_mkldnn_bf16_supported()


class BlockedLinear:
    """x W^T + b with fp32 sums, through GELU if asked before the only rounding, to bf16.

    The reordered weight is remade after an in-place update of any of `sources`.
    """

    def __init__(
        self, weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor], gelu: bool
    ) -> None:
        self.weight, self.bias, self.sources = weight_FD, bias_F, tuple(sources)
        self.blocked: Tensor | None = None
        self.version = -1
        self.epilogue: tuple[str, list[float], str]
        self.epilogue = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.plain = reference.pack_linear(weight_FD, bias_F, sources, gelu=gelu)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [..., F] in bf16 for x [..., D], of bf16 or under autocast to it."""
        if product_dtype(x) != torch.bfloat16 or torch.compiler.is_compiling():
            return self.plain(x, out)
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        multiply = torch.ops.mkldnn._linear_pointwise
        y = multiply(rows, self.current(), self.bias, *self.epilogue)
        y = y.view(*x.shape[:-1], len(self.weight))
        return y if out is None else out.copy_(y)

    def current(self) -> Tensor:
        """Return the weight as it is now, in the order that the product likes."""
        version = version_of(self.sources)
        if self.blocked is None or version != self.version:
            self.blocked = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.version = version
        return self.blocked
