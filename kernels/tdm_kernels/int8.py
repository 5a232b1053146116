"""Row-wise int8 where e4m3 is missing: rows of any backend's ops, the linear that reads them.

Shapes: M rows, B batch, T tokens, D width, F output features.

    scale = max(amax |x| / 127, 2^-126);  values = rne(x * 1/scale), in -127..127
    y = (values_x values_W^T) scale_x scale_W + b

The product is torch._int_mm, int8 into int32, on a CPU and on CUDA: exact, for D up to 133144. What
follows it is fp32, and rounded once to the dtype of x. Rows are quantised in plain PyTorch, as they
leave the op that makes them: rounded to the dtype of the activations first, unlike those of
`reference_fp8`. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_kernels.quantized import SMALLEST_SCALE, Quantized, ScaledLinear, check_product

PER_INT8_MAX = 1 / 127
# torch._int_mm on CUDA: "self.size(0) needs to be greater than 16".
FEWEST_ROWS = 17


def quantize_rows(x: Tensor) -> Quantized:
    """Return x [..., D] in int8: scale = max(amax_D |x| / 127, 2^-126), values = rne(x * 1/scale).

    Symmetric: -128 is not used. The error of an element is at most scale / 2. Weights [F, D] get a
    scale per output. Zeros stay zero. A row that holds NaN or an infinity dequantises to NaN as a
    whole, by its scale, and so does its product.
    """
    rows = x.float()
    scale = (rows.abs().amax(-1, keepdim=True) * PER_INT8_MAX).clamp(min=SMALLEST_SCALE)
    values = (rows * scale.reciprocal()).round().nan_to_num(0.0)
    return Quantized(values.to(torch.int8).contiguous(), scale, x.dtype)


def scaled_linear(x: Quantized, weight_FD: Quantized, bias_F: Tensor | None = None) -> Tensor:
    """Return x W^T + b as [..., F] in the dtype of x: summed in int32, then scaled, in fp32.

    Raises ValueError unless F and D are multiples of 8, what CUDA asks of int8, x has rows of D,
    and b is [F].
    """
    check_product(x, weight_FD, bias_F)
    x_MD = x.values.flatten(0, -2)
    num_rows = len(x_MD)
    if num_rows < FEWEST_ROWS:
        x_MD = F.pad(x_MD, (0, 0, 0, FEWEST_ROWS - num_rows))
    sums_MF = torch._int_mm(x_MD, weight_FD.values.t())[:num_rows]
    y_MF = sums_MF.float() * x.scale.flatten(0, -2) * weight_FD.scale.t()
    if bias_F is not None:
        y_MF = y_MF + bias_F.float()
    return y_MF.to(x.dtype).unflatten(0, x.shape[:-1])


def forms(ops: Any) -> dict[str, Callable]:
    """Return, by name, what stands in for those of `ops` that feed a linear, and for the linear."""

    def norm_modulate(*args: Any, **kwargs: Any) -> Quantized:
        return quantize_rows(ops.norm_modulate(*args, **kwargs))

    def gate_residual_norm(*args: Any, **kwargs: Any) -> tuple[Tensor, Quantized]:
        h_BTD, y_BTD = ops.gate_residual_norm(*args, **kwargs)
        return h_BTD, quantize_rows(y_BTD)

    def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Quantized:
        return quantize_rows(ops.swiglu(gate_BTF, up_BTF))

    def gelu_tanh(x_BTF: Tensor) -> Quantized:
        return quantize_rows(ops.gelu_tanh(x_BTF))

    def pack_linear(
        weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor], *, gelu: bool = False
    ) -> ScaledLinear:
        activate = gelu_tanh if gelu else None
        return ScaledLinear(weight_FD, bias_F, sources, quantize_rows, scaled_linear, activate)

    made = norm_modulate, gate_residual_norm, swiglu, gelu_tanh, pack_linear
    return {form.__name__: form for form in made}
