"""Norms, gates and residuals in Triton: one kernel forward, one backward, one pass each.

Shapes: B batch, T tokens, D width, M modulations of one norm (1 or 2), or as many branches.

    h = x + gate * branch'      branch' = branch, or branch * rsqrt(mean branch^2 + eps) * weight
    y_m = norm(h) * scale_m + shift_m

norm is RMSNorm with a weight, LayerNorm without. `norm_modulate` has no branch (h = x) and
`gate_residual` no norm. A program holds a whole row in registers. Rows may be strided over B and T;
modulations are [B or 1, 1, D] or [M, B or 1, 1, D] with any leading strides. Everything is computed
in fp32; y may be stored in e4m3, a scale per row (inference). Gradients that sum over tokens are
summed in fp32 over a few rows by each program, then by torch over programs: no atomics, the same
bits in every run. While torch.compile or torch.export traces, the reference is traced instead:
compilers fuse it themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdm_kernels.fp8 import magnitude_bits, row_scale
from tdm_kernels.layout import (
    check_devices,
    check_rows,
    check_vectors,
    check_weight,
    next_power_of_2,
    on,
    product_dtype,
    traced_as_reference,
    unit,
    vector_grad,
    vector_strides,
    warps_for,
    weight_grad,
)
from tdm_kernels.norm_backward import load_row, residual_norm_backward, row_strides
from tdm_kernels.quantized import Quantized

MAX_SETS = 2  # modulations of one norm: the kernels spell out their gradients


# T and `rows` change from call to call: specialising on them would compile the same code again.
@triton.jit(do_not_specialize=["T"])
def residual_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, branch_weight_ptr, weight_ptr, scale_ptr, shift_ptr,
    h_ptr, y_ptr, y_scale_ptr, stats_ptr,
    x_batch, x_row, branch_set, branch_batch, branch_row, gate_set, gate_batch,
    scale_set, scale_batch, shift_set, shift_batch, y_set,
    T, eps,
    D: tl.constexpr, NUM_SETS: tl.constexpr, NUM_BRANCHES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row. h and y are contiguous; stats is [B * T, 3]: mean, 1/sigma, 1/rms.

    With `y_scale_ptr`, [M, B * T], y is e4m3.
    """
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    row = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D], like every vector below
    mask = d < D
    h = load_row(x_ptr + b * x_batch + t * x_row, d, mask)
    if branch_ptr is not None:
        for m in tl.static_range(NUM_BRANCHES):
            branch = load_row(
                branch_ptr + m * branch_set + b * branch_batch + t * branch_row, d, mask
            )
            if branch_weight_ptr is not None:
                rstd = tl.rsqrt(tl.sum(branch * branch) / D + eps)
                branch = branch * rstd * load_row(branch_weight_ptr, d, mask)
                if stats_ptr is not None:
                    tl.store(stats_ptr + row * 3 + 2, rstd)
            if gate_ptr is not None:
                branch *= load_row(gate_ptr + m * gate_set + b * gate_batch, d, mask)
            h += branch
        tl.store(h_ptr + row * D + d, h, mask=mask)
        # The norm reads h as it is stored, so that the backward pass sees the same row.
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
    if y_ptr is not None:
        if weight_ptr is None:
            mean = tl.sum(h) / D
            h = tl.where(mask, h - mean, 0.0)
            if stats_ptr is not None:
                tl.store(stats_ptr + row * 3, mean)
        rstd = tl.rsqrt(tl.sum(h * h) / D + eps)
        if stats_ptr is not None:
            tl.store(stats_ptr + row * 3 + 1, rstd)
        h *= rstd
        if weight_ptr is not None:
            h *= load_row(weight_ptr, d, mask)
        for m in tl.static_range(NUM_SETS):
            y = h
            if scale_ptr is not None:
                y = h * load_row(scale_ptr + m * scale_set + b * scale_batch, d, mask)
                if shift_ptr is not None:
                    y += load_row(shift_ptr + m * shift_set + b * shift_batch, d, mask)
            if y_scale_ptr is not None:
                scale = row_scale(magnitude_bits(y))
                y *= tl.div_rn(1.0, scale)
                tl.store(y_scale_ptr + m * (y_set // D) + row, scale)
            tl.store(y_ptr + m * y_set + row * D + d, y, mask=mask)


@traced_as_reference
def norm_modulate(
    x_BTD: Tensor,
    scale_BTD: Tensor | None = None,
    shift_BTD: Tensor | None = None,
    *,
    weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`reference.norm_modulate` in one pass; raises ValueError for a layout it cannot read."""
    inputs = (x_BTD, None, None, None, weight_D, scale_BTD, shift_BTD)
    return _run("norm_modulate", inputs, eps)[1]


@traced_as_reference
def gate_residual(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BTD: Tensor | None = None,
    *,
    branch_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`reference.gate_residual` in one pass; raises ValueError for a layout it cannot read."""
    inputs = (x_BTD, branch_BTD, gate_BTD, branch_weight_D, None, None, None)
    return _run("gate_residual", inputs, eps)[0]


@traced_as_reference
def gate_residual_norm(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BTD: Tensor | None = None,
    scale_BTD: Tensor | None = None,
    shift_BTD: Tensor | None = None,
    *,
    branch_weight_D: Tensor | None = None,
    weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`reference.gate_residual_norm`: the residual row is normalised while it is in registers."""
    inputs = (x_BTD, branch_BTD, gate_BTD, branch_weight_D, weight_D, scale_BTD, shift_BTD)
    return _run("gate_residual_norm", inputs, eps)


@traced_as_reference
def norm_modulate_fp8(
    x_BTD: Tensor,
    scale_BTD: Tensor | None = None,
    shift_BTD: Tensor | None = None,
    *,
    weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Quantized:
    """`reference_fp8.norm_modulate_fp8`: the row is quantised while it is in registers."""
    inputs = (x_BTD, None, None, None, weight_D, scale_BTD, shift_BTD)
    return _forward(_checked("norm_modulate_fp8", *inputs), eps, True, None, fp8=True)[1]


@traced_as_reference
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
    """`reference_fp8.gate_residual_norm_fp8`: the row stays in registers from branch to e4m3."""
    inputs = (x_BTD, branch_BTD, gate_BTD, branch_weight_D, weight_D, scale_BTD, shift_BTD)
    return _forward(_checked("gate_residual_norm_fp8", *inputs), eps, True, None, fp8=True)


def _run(op: str, inputs: tuple, eps: float) -> tuple[Any, Any]:
    """(h, y); h is None without a branch, y without a norm."""
    norm = op != "gate_residual"
    inputs, grad = _checked(op, *inputs), torch.is_grad_enabled()
    if grad and inputs[1] is not None and inputs[1].ndim == 4:
        # Two branches are one pass only without gradients; with them, one after the other.
        x, (first, branch), (gate, last), *rest = inputs
        inputs = (gate_residual(x, first, gate, eps=eps), branch, last, *rest)
    if grad and any(t is not None and t.requires_grad for t in inputs):
        return _ResidualNorm.apply(*inputs, eps, norm)
    return _forward(inputs, eps, norm, None)


def _checked(op: str, x, branch, gate, branch_weight, weight, scale, shift) -> tuple:
    check_rows("x", x)
    check_devices(
        op, x, branch=branch, gate=gate, branch_weight=branch_weight, weight=weight, scale=scale,
        shift=shift,
    )  # fmt: skip
    num_branches = 1
    if branch is not None:
        num_branches = 1 if branch.ndim == 3 else branch.shape[0]
        for rows in (branch,) if branch.ndim == 3 else branch:
            check_rows("branch", rows, like=x)
        branch = unit(branch)
        if num_branches > 1:
            fits = gate is not None and gate.ndim == 4 and len(gate) == num_branches <= MAX_SETS
            if not fits or branch_weight is not None:
                raise ValueError("two branches need two gates and take no weight")
    if scale is None:
        shift = None
    elif shift is not None and (shift.ndim, shift.shape[:-3]) != (scale.ndim, scale.shape[:-3]):
        raise ValueError(
            f"shift must hold as many sets as scale, not {list(shift.shape)} to {list(scale.shape)}"
        )
    d = x.shape[-1]
    return (
        unit(x), branch, check_vectors("gate", gate, x, num_branches),
        check_weight("branch_weight", branch_weight, d), check_weight("weight", weight, d),
        check_vectors("scale", scale, x, MAX_SETS), check_vectors("shift", shift, x, MAX_SETS),
    )  # fmt: skip


def _forward(
    inputs: tuple, eps: float, norm: bool, stats: Tensor | None, fp8: bool = False
) -> tuple[Any, Any]:
    x, branch, gate, branch_weight, weight, scale, shift = inputs
    b, t, d = x.shape
    sets = scale.shape[:-3] if scale is not None else ()
    several = branch is not None and branch.ndim == 4
    h = None if branch is None else x.new_empty(x.shape)
    dtype = torch.float8_e4m3fn if fp8 else product_dtype(x)
    y: Any = x.new_empty((*sets, b, t, d), dtype=dtype) if norm else None
    y_scale = x.new_empty((*sets, b, t, 1), dtype=torch.float32) if fp8 else None
    block = next_power_of_2(d)
    with on(x):
        residual_norm_kernel[(b * t,)](
            x, branch, gate, branch_weight, weight, scale, shift, h, y, y_scale, stats,
            *row_strides(x), branch.stride(0) if several else 0, *row_strides(branch),
            *vector_strides(gate), *vector_strides(scale), *vector_strides(shift),
            x.numel(), t, eps,
            D=d, NUM_SETS=sets[0] if sets else 1, NUM_BRANCHES=len(branch) if several else 1,
            BLOCK_D=block, num_warps=warps_for(block, 16),
        )  # fmt: skip
    return h, y if y_scale is None else Quantized(y, y_scale)


class _ResidualNorm(torch.autograd.Function):
    """Gradients of h = x + gate branch' and y = norm(h) scale + shift, from one backward pass."""

    @staticmethod
    def forward(ctx, x, branch, gate, branch_weight, weight, scale, shift, eps, norm):
        inputs = (x, branch, gate, branch_weight, weight, scale, shift)
        stats = None
        if norm or branch_weight is not None:
            stats = x.new_empty((x.shape[0] * x.shape[1], 3), dtype=torch.float32)
        h, y = _forward(inputs, eps, norm, stats)
        ctx.branch_dtype = None if branch is None else branch.dtype
        # What no gradient reads is not kept alive.
        reads_branch = branch_weight is not None or (gate is not None and ctx.needs_input_grad[2])
        kept = (x if h is None else h) if norm else None
        ctx.save_for_backward(
            kept, branch if reads_branch else None, *inputs[2:6], shift, stats
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dy):
        if dh is None and dy is None:
            return (None,) * 9
        gate, branch_weight, weight, scale, shift = ctx.saved_tensors[2:7]
        grads = residual_norm_backward(ctx, dh, dy)
        return (
            grads["dx"], grads["dbranch"], vector_grad(grads["dgate"], gate),
            weight_grad(grads["dbranch_weight"], branch_weight),
            weight_grad(grads["dweight"], weight), vector_grad(grads["dscale"], scale),
            vector_grad(grads["dshift"], shift), None, None,
        )  # fmt: skip
