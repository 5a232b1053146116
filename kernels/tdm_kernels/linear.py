"""Linear layers for inference on a GPU: the library's GEMM, with what it can do on its way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tdm_kernels import reference
from tdm_kernels.layout import product_dtype


def pack_linear(
    weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor], *, gelu: bool = False
) -> Callable[..., Tensor]:
    """`reference.pack_linear`: bias and GELU in the GEMM's epilogue, `out` written by the GEMM."""
    return partial(_linear, weight=weight_FD, bias=bias_F, gelu=gelu)


def _linear(
    x: Tensor, out: Tensor | None = None, *, weight: Tensor, bias: Tensor | None, gelu: bool
) -> Tensor:
    autocast = product_dtype(x) != x.dtype or x.dtype != weight.dtype
    if bias is None or autocast or torch.compiler.is_compiling():
        return reference.linear(x, out, weight=weight, bias=bias, gelu=gelu)
    assert bias is not None
    rows = x.reshape(-1, x.shape[-1])
    if out is None and gelu and not x.is_cpu:  # on a CPU this op's GELU is the exact one, no tanh
        y = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        return y.view(*x.shape[:-1], -1)
    if gelu or out is None or out.dtype != x.dtype or not _uniform(out):
        return reference.linear(x, out, weight=weight, bias=bias, gelu=gelu)
    torch.addmm(bias, rows, weight.t(), out=out.view(len(rows), -1))
    return out


def _uniform(out: Tensor) -> bool:
    """Whether the rows of all samples are equally far apart: one matrix for a GEMM to write."""
    return len(out) == 1 or out.stride(0) == out.shape[1] * out.stride(1)
