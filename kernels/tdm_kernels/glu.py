"""SwiGLU and GELU-tanh in Triton, one pass over memory each way, fp32 inside.

Shapes: B batch, T tokens, F feed-forward width. Inputs may be strided over tokens, such as the two
halves of one packed projection. While torch.compile or torch.export traces, the reference is traced
instead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdm_kernels.layout import (
    check_devices,
    check_rows,
    next_power_of_2,
    on,
    traced_as_reference,
    unit,
    warps_for,
)

MAX_BLOCK = 2048  # elements of a row one program takes: divides 6144 and 10240
# gelu(x) = x sigmoid(2 u), with 2 u = x (LINEAR + CUBIC x^2): tanh would cost more and lose digits.
LINEAR = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715 * 1.5957691216057308)


@triton.jit
def _place(F: tl.constexpr, BLOCK_F: tl.constexpr):
    """Row of this program, its columns [BLOCK_F], and which of those exist."""
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    return tl.program_id(0).to(tl.int64), f, f < F


@triton.jit
def load_fp32(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def swiglu_of(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def gelu_tanh_of(x):
    return x * tl.sigmoid(x * (LINEAR + CUBIC * x * x))


@triton.jit
def swiglu_kernel(
    gate_ptr, up_ptr, out_ptr, gate_row, up_row, F: tl.constexpr, BLOCK_F: tl.constexpr
):
    row, f, mask = _place(F, BLOCK_F)
    gate = load_fp32(gate_ptr, row * gate_row + f, mask)
    up = load_fp32(up_ptr, row * up_row + f, mask)
    tl.store(out_ptr + row * F + f, swiglu_of(gate, up), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_row, gate_row, up_row,
    F: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row, f, mask = _place(F, BLOCK_F)
    dy = load_fp32(dy_ptr, row * dy_row + f, mask)
    gate = load_fp32(gate_ptr, row * gate_row + f, mask)
    s = tl.sigmoid(gate)
    if dgate_ptr is not None:
        up = load_fp32(up_ptr, row * up_row + f, mask)
        tl.store(dgate_ptr + row * F + f, dy * up * s * (1.0 + gate * (1.0 - s)), mask=mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + row * F + f, dy * gate * s, mask=mask)


@triton.jit
def gelu_tanh_kernel(x_ptr, out_ptr, x_row, F: tl.constexpr, BLOCK_F: tl.constexpr):
    row, f, mask = _place(F, BLOCK_F)
    x = load_fp32(x_ptr, row * x_row + f, mask)
    tl.store(out_ptr + row * F + f, gelu_tanh_of(x), mask=mask)


@triton.jit
def gelu_tanh_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, dy_row, x_row, F: tl.constexpr, BLOCK_F: tl.constexpr
):
    row, f, mask = _place(F, BLOCK_F)
    dy = load_fp32(dy_ptr, row * dy_row + f, mask)
    x = load_fp32(x_ptr, row * x_row + f, mask)
    s = tl.sigmoid(x * (LINEAR + CUBIC * x * x))
    slope = s + x * s * (1.0 - s) * (LINEAR + 3.0 * CUBIC * x * x)
    tl.store(dx_ptr + row * F + f, dy * slope, mask=mask)


@traced_as_reference
def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """`reference.swiglu` in one pass; raises ValueError for shapes that differ."""
    check_rows("gate", gate_BTF)
    check_rows("up", up_BTF, like=gate_BTF)
    check_devices("swiglu", gate_BTF, up=up_BTF)
    if torch.is_grad_enabled() and (gate_BTF.requires_grad or up_BTF.requires_grad):
        return _SwiGLU.apply(gate_BTF, up_BTF)
    return _swiglu(gate_BTF, up_BTF)


@traced_as_reference
def gelu_tanh(x_BTF: Tensor) -> Tensor:
    """`reference.gelu_tanh` in one pass."""
    check_rows("x", x_BTF)
    if torch.is_grad_enabled() and x_BTF.requires_grad:
        return _Gelu.apply(x_BTF)
    return _gelu(x_BTF)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor | None, ...]) -> None:
    """Run over rows: `inputs` [B, T, F] of any strides, `outputs` contiguous."""
    # Leading axes whose strides do not merge into one are copied.
    flat = [unit(x.flatten(0, 1)) for x in inputs]
    num_rows, width = flat[0].shape
    block = min(MAX_BLOCK, next_power_of_2(width))
    with on(flat[0]):
        kernel[(num_rows, -(-width // block))](
            *flat, *outputs, *(x.stride(0) for x in flat),
            F=width, BLOCK_F=block, num_warps=warps_for(block, 16),
        )  # fmt: skip


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    _launch(swiglu_kernel, (gate, up), (out,))
    return out


def _gelu(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _launch(gelu_tanh_kernel, (x,), (out,))
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        grads = tuple(
            x.new_empty(x.shape) if needed else None
            for x, needed in zip(saved, ctx.needs_input_grad, strict=True)
        )
        _launch(swiglu_backward_kernel, (dy, *saved), grads)
        return grads


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        _launch(gelu_tanh_backward_kernel, (dy, x), (dx,))
        return dx
