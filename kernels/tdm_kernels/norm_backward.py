"""The backward pass of `norm`: every gradient of a row from one pass over it.

Shapes and formulas: `norm.py`. Sums over tokens are kept in fp32, a partial sum per program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_kernels.layout import (
    next_power_of_2,
    on,
    rows_per_program,
    unit,
    vector_strides,
    warps_for,
)


@triton.jit
def load_row(ptr, d, mask):
    """[BLOCK_D] fp32, zero beyond the row's end."""
    return tl.load(ptr + d, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "rows"])
def residual_norm_backward_kernel(
    dh_ptr, dy_ptr, h_ptr, branch_ptr, gate_ptr, branch_weight_ptr, weight_ptr, scale_ptr,
    stats_ptr, dx_ptr, dbranch_ptr, dgate_ptr, dbranch_weight_ptr, dweight_ptr, dscale_ptr,
    dshift_ptr,
    dh_batch, dh_row, dy_set, dy_batch, dy_row, h_batch, h_row, branch_batch, branch_row,
    gate_batch, scale_set, scale_batch, sum_set,
    T, rows,
    D: tl.constexpr, NUM_SETS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, b) takes `rows` tokens of sample b and writes row (b, i) of each partial sum."""
    start = tl.program_id(0) * rows
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D], like every vector below
    mask = d < D
    dgate = tl.zeros([BLOCK_D], tl.float32)
    dbranch_weight, dweight, dscale, dshift = dgate, dgate, dgate, dgate
    dscale_2, dshift_2 = dgate, dgate
    for i in range(0, tl.minimum(rows, T - start)):
        t = start.to(tl.int64) + i
        stats = (b * T + t) * 3
        if dy_ptr is not None:
            n = load_row(h_ptr + b * h_batch + t * h_row, d, mask)
            if weight_ptr is None:
                n = tl.where(mask, n - tl.load(stats_ptr + stats), 0.0)
            rstd = tl.load(stats_ptr + stats + 1)
            n *= rstd
            g = load_row(dy_ptr + b * dy_batch + t * dy_row, d, mask)
            if scale_ptr is not None:
                # Gradients of scale and gate lack their weight's factor until after the loop.
                dscale += g * n
                dshift += g
                g *= load_row(scale_ptr + b * scale_batch, d, mask)
            if NUM_SETS == 2:
                dy = load_row(dy_ptr + dy_set + b * dy_batch + t * dy_row, d, mask)
                dscale_2 += dy * n
                dshift_2 += dy
                g += dy * load_row(scale_ptr + scale_set + b * scale_batch, d, mask)
            if weight_ptr is None:
                g -= tl.sum(g) / D
            else:
                dweight += g * n
                g *= load_row(weight_ptr, d, mask)
            g = rstd * (g - n * (tl.sum(g * n) / D))
            if dh_ptr is not None:
                g += load_row(dh_ptr + b * dh_batch + t * dh_row, d, mask)
        else:
            g = load_row(dh_ptr + b * dh_batch + t * dh_row, d, mask)
        if dx_ptr is not None:
            tl.store(dx_ptr + (b * T + t) * D + d, g, mask=mask)
        if branch_ptr is not None:
            n = load_row(branch_ptr + b * branch_batch + t * branch_row, d, mask)
            if branch_weight_ptr is not None:
                n *= tl.load(stats_ptr + stats + 2)
            dgate += g * n
        if gate_ptr is not None:
            g *= load_row(gate_ptr + b * gate_batch, d, mask)
        if branch_weight_ptr is not None:
            rstd = tl.load(stats_ptr + stats + 2)
            dbranch_weight += g * n
            g *= load_row(branch_weight_ptr, d, mask)
            g = rstd * (g - n * (tl.sum(g * n) / D))
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + (b * T + t) * D + d, g, mask=mask)
    out = (b * tl.num_programs(0) + tl.program_id(0)) * D + d
    if dgate_ptr is not None:
        if branch_weight_ptr is not None:
            dgate *= load_row(branch_weight_ptr, d, mask)
        tl.store(dgate_ptr + out, dgate, mask=mask)
    if dbranch_weight_ptr is not None:
        tl.store(dbranch_weight_ptr + out, dbranch_weight, mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + out, dweight, mask=mask)
    if dscale_ptr is not None:
        weight = load_row(weight_ptr, d, mask) if weight_ptr is not None else 1.0
        tl.store(dscale_ptr + out, dscale * weight, mask=mask)
        if NUM_SETS == 2:
            tl.store(dscale_ptr + sum_set + out, dscale_2 * weight, mask=mask)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + out, dshift, mask=mask)
        if NUM_SETS == 2:
            tl.store(dshift_ptr + sum_set + out, dshift_2, mask=mask)


def row_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides over B and T."""
    return (0, 0) if x is None else x.stride()[-3:-1]


def residual_norm_backward(
    ctx: Any, dh: Tensor | None, dy: Tensor | None
) -> dict[str, Tensor | None]:
    """Gradients of the rows, and partial sums [M, B, num_blocks, D] of the vectors' gradients."""
    h, branch, gate, branch_weight, weight, scale, shift, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dh, dy = (None if g is None else unit(g) for g in (dh, dy))
    like = dh if dh is not None else h
    b, t, d = like.shape
    with_norm, block = dy is not None, next_power_of_2(d)
    sets = scale.shape[0] if with_norm and scale is not None and scale.ndim == 4 else 1
    wanted = {
        "dgate": (1, gate is not None and needs[2]),
        "dbranch_weight": (1, branch_weight is not None and needs[3]),
        "dweight": (1, with_norm and weight is not None and needs[4]),
        "dscale": (sets, with_norm and scale is not None and needs[5]),
        "dshift": (sets, with_norm and shift is not None and needs[6]),
    }
    rows = rows_per_program(t, any(want for _, want in wanted.values()))
    num_blocks = -(-t // rows)
    sums = {
        name: like.new_empty((m, b, num_blocks, d), dtype=torch.float32) if want else None
        for name, (m, want) in wanted.items()
    }
    # Without a norm the gradient of x is that of h as it came.
    dx = like.new_empty(like.shape) if with_norm and needs[0] else None
    dbranch = None
    if ctx.branch_dtype is not None and needs[1]:
        dbranch = like.new_empty(like.shape, dtype=ctx.branch_dtype)
    with on(like):
        residual_norm_backward_kernel[(num_blocks, b)](
            dh, dy, h, branch, gate, branch_weight, weight if with_norm else None,
            scale if with_norm else None, stats, dx, dbranch, *sums.values(),
            *row_strides(dh), 0 if dy is None else dy.stride(0), *row_strides(dy),
            *row_strides(h), *row_strides(branch), vector_strides(gate)[1],
            *vector_strides(scale), b * num_blocks * d, t, rows,
            D=d, NUM_SETS=sets, BLOCK_D=block, num_warps=warps_for(block, 8),
        )  # fmt: skip
    return {"dx": dx if with_norm else dh, "dbranch": dbranch, **sums}
