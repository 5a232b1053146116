"""The e4m3 forms of the ops in plain PyTorch: the specification of any faster backend.

Ops that end in `_fp8` stand in for the op of that name in `reference` where the linear behind it
multiplies e4m3, one scale per row. They take the same arguments and return `Quantized` rows, which
unpack and tell their shape as a tensor does: `registry.select(..., rows="fp8")` binds them to the
same fields of `Ops`, and a model's blocks keep their calls. A keyword on each op would reach every
call site and every backend, and no backend could say beforehand that it lacks it; fields of their
own would put the choice at every call. They are for inference: no gradient passes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_kernels.quantized import SMALLEST_SCALE, Quantized, ScaledLinear, check_product
from tdm_kernels.reference import gate_residual, gelu_tanh, norm_modulate, swiglu

# A row's largest magnitude becomes the largest e4m3 number. Times this, not divided by 448: devices
# differ in how they round a division by a constant.
PER_E4M3_MAX = 1 / 448


def quantize_rows(x: Tensor) -> Quantized:
    """Return x [..., D] in e4m3: scale = max(amax_D |x| / 448, 2^-126), values = rne(x * 1/scale).

    Of fp32 values directly, never by way of half precision; weights [F, D] get a scale per output.
    The error of an element is at most max(|x| 2^-4, scale 2^-10), half the distance between e4m3
    neighbours. Zeros stay zero. A row that holds NaN is NaN as a whole; one that holds an infinity
    has scale infinity and a NaN value, so it dequantises to NaN, and so does its product.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) * PER_E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return Quantized((x * scale.reciprocal()).to(torch.float8_e4m3fn).contiguous(), scale)


def norm_modulate_fp8(
    x_BTD: Tensor,
    scale_BTD: Tensor | None = None,
    shift_BTD: Tensor | None = None,
    *,
    weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Quantized:
    """Return quantize_rows(norm_modulate(x, scale, shift))."""
    y_BTD = norm_modulate(x_BTD.float(), scale_BTD, shift_BTD, weight_D=weight_D, eps=eps)
    return quantize_rows(y_BTD)


def gate_residual_norm_fp8(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BTD: Tensor | None = None,
    scale_BTD: Tensor | None = None,
    shift_BTD: Tensor | None = None,
    *,
    branch_weight_D: Tensor | None = None,
    weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Quantized]:
    """Return (h, quantize_rows(y)), h and y those of gate_residual_norm."""
    h_BTD = gate_residual(x_BTD, branch_BTD, gate_BTD, branch_weight_D=branch_weight_D, eps=eps)
    return h_BTD, norm_modulate_fp8(h_BTD, scale_BTD, shift_BTD, weight_D=weight_D, eps=eps)


def swiglu_fp8(gate_BTF: Tensor, up_BTF: Tensor) -> Quantized:
    """Return quantize_rows(swiglu(gate, up)); Z-Image's rows exceed what fp16 can hold."""
    return quantize_rows(swiglu(gate_BTF.float(), up_BTF))


def gelu_tanh_fp8(x_BTF: Tensor) -> Quantized:
    """Return quantize_rows(gelu_tanh(x))."""
    return quantize_rows(gelu_tanh(x_BTF.float()))


def scaled_linear(x: Quantized, weight_FD: Quantized, bias_F: Tensor | None = None) -> Tensor:
    """Return x W^T + b as bf16 [..., F]: products summed in fp32, then scaled by row and column.

    Raises ValueError unless F and D are multiples of 16, what tensor cores ask of e4m3, x has rows
    of D, and b is [F].
    """
    check_product(x, weight_FD, bias_F)
    y = F.linear(x.values.float(), weight_FD.values.float()) * x.scale * weight_FD.scale.mT
    return (y if bias_F is None else y + bias_F.float()).bfloat16()


def pack_linear_fp8(
    weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor], *, gelu: bool = False
) -> Callable[..., Tensor | Quantized]:
    """Return (x, out=None) -> scaled_linear(x, quantize_rows(W), b), or gelu_tanh_fp8 of that.

    Plain rows x, as attention's are, are quantised first. Raises ValueError as scaled_linear does,
    and for `out` with `gelu`. `sources` are those of `pack_linear`.
    """
    activate = gelu_tanh_fp8 if gelu else None
    return ScaledLinear(weight_FD, bias_F, sources, quantize_rows, scaled_linear, activate)
