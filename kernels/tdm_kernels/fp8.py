"""Row-wise e4m3 in Triton: whatever feeds a linear, quantised while the row is in registers.

Shapes: M rows, D width, F feed-forward width or output features.

    scale = max(amax |y| / 448, 2^-126);  values = rne(y * 1/scale), y in fp32

y is the row itself, SwiGLU or GELU-tanh of rows: one kernel. The norms of norm.py end the same way.
A program holds a whole row in registers, as blocks of a width that divides 6144 and 10240: their
next powers of two would idle a quarter and more of the threads. While torch.compile or torch.export
traces, the reference is traced instead.

The linear multiplies by torch._scaled_mm (cuBLAS or CUTLASS), which asks for compute capability
8.9, as does the conversion to e4m3. On 8.9 itself Triton converts by way of fp16, truncated: what
lies less than 2^-10 of itself above a tie rounds down. That keeps within the error bound of
`reference_fp8.quantize_rows`, not to its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_kernels import quantized, reference_fp8
from tdm_kernels.glu import MAX_BLOCK, gelu_tanh_of, load_fp32, swiglu_of
from tdm_kernels.layout import (
    check_devices,
    check_rows,
    next_power_of_2,
    on,
    traced_as_reference,
    unit,
    warps_for,
)
from tdm_kernels.quantized import Quantized, ScaledLinear, check_product

PER_E4M3_MAX = tl.constexpr(reference_fp8.PER_E4M3_MAX)
SMALLEST_SCALE = tl.constexpr(quantized.SMALLEST_SCALE)


@triton.jit
def magnitude_bits(y):
    """|y| as integers of the same order, NaN above all: a float maximum would pass over NaN."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scale(bits):
    """The scale of a row, from its `magnitude_bits`."""
    amax = tl.max(bits).to(tl.float32, bitcast=True)
    scale = amax * PER_E4M3_MAX
    return tl.maximum(scale, SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_kernel(
    x_ptr, up_ptr, values_ptr, scale_ptr, x_row, up_row,
    F: tl.constexpr, GELU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per row of x; of silu(x) * up where `up_ptr` is given; of gelu(x) if GELU."""
    row = tl.program_id(0).to(tl.int64)
    bits = tl.zeros([BLOCK_F], tl.int32)
    blocks = tl.tuple(())
    for start in tl.static_range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        y = load_fp32(x_ptr, row * x_row + f, f < F)  # [BLOCK_F]
        if up_ptr is not None:
            y = swiglu_of(y, load_fp32(up_ptr, row * up_row + f, f < F))
        if GELU:
            y = gelu_tanh_of(y)
        bits = tl.maximum(bits, magnitude_bits(y))
        blocks = blocks + (y,)
    scale = row_scale(bits)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(len(blocks)):
        f = i * BLOCK_F + tl.arange(0, BLOCK_F)
        tl.store(values_ptr + row * F + f, blocks[i] * inverse, mask=f < F)


@traced_as_reference
def quantize_rows(x: Tensor) -> Quantized:
    """`reference_fp8.quantize_rows` in one pass; raises ValueError for what is no row of floats."""
    check_rows("x", x, ndim=max(x.ndim, 2))
    return _quantize(x, None)


@traced_as_reference
def swiglu_fp8(gate_BTF: Tensor, up_BTF: Tensor) -> Quantized:
    """`reference_fp8.swiglu_fp8` in one pass; raises ValueError for shapes that differ."""
    check_rows("gate", gate_BTF)
    check_rows("up", up_BTF, like=gate_BTF)
    check_devices("swiglu_fp8", gate_BTF, up=up_BTF)
    return _quantize(gate_BTF, up_BTF)


@traced_as_reference
def gelu_tanh_fp8(x_BTF: Tensor) -> Quantized:
    """`reference_fp8.gelu_tanh_fp8` in one pass."""
    check_rows("x", x_BTF)
    return _quantize(x_BTF, None, gelu=True)


def scaled_linear(x: Quantized, weight_FD: Quantized, bias_F: Tensor | None = None) -> Tensor:
    """`reference_fp8.scaled_linear` by torch._scaled_mm, which tracers know; same ValueErrors."""
    check_product(x, weight_FD, bias_F)
    y_MF = torch._scaled_mm(
        x.values.flatten(0, -2),
        weight_FD.values.t(),
        scale_a=x.scale.flatten(0, -2),
        scale_b=weight_FD.scale.t(),
        bias=None if bias_F is None else bias_F.bfloat16(),
        out_dtype=torch.bfloat16,
    )
    return y_MF.unflatten(0, x.shape[:-1])


def pack_linear_fp8(
    weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor], *, gelu: bool = False
) -> Callable[..., Tensor | Quantized]:
    """`reference_fp8.pack_linear_fp8` over the ops above."""
    activate = gelu_tanh_fp8 if gelu else None
    return ScaledLinear(weight_FD, bias_F, sources, quantize_rows, scaled_linear, activate)


def _quantize(x: Tensor, up: Tensor | None, gelu: bool = False) -> Quantized:
    # Leading axes whose strides do not merge into one are copied.
    x_MF = unit(x.flatten(0, -2))
    up_MF = None if up is None else unit(up.flatten(0, -2))
    rows, width = x_MF.shape
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block = min(MAX_BLOCK, next_power_of_2(width))
    with on(x):
        quantize_kernel[(rows,)](
            x_MF, up_MF, values, scale, x_MF.stride(0), 0 if up_MF is None else up_MF.stride(0),
            F=width, GELU=gelu, BLOCK_F=block, num_warps=warps_for(block, 8),
        )  # fmt: skip
    return Quantized(values, scale)
