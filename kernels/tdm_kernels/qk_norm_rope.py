"""RMSNorm of every head of q and k and their rotation in Triton, one pass over memory each way.

Shapes: B batch, T tokens, N heads, H head width (even where there is a table).

    n = x * rsqrt(mean_H x^2 + eps) * weight;  (a, b) -> (a cos - b sin, a sin + b cos) per pair

q and k may be any views with unit stride along H, such as slices of a packed projection: one launch
serves both, reading the rotary row of a token once. Everything is computed in fp32. The gradient of
a weight is summed by each program over its tokens and heads, then by torch over programs. While
torch.compile or torch.export traces, the reference is traced instead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdm_kernels import reference
from tdm_kernels.layout import (
    check_devices,
    check_rows,
    check_weight,
    next_power_of_2,
    on,
    rows_per_program,
    traced_as_reference,
    unit,
    warps_for,
    weight_grad,
)

BLOCK_N = 8  # heads of one program: divides 24, wastes 2 of 32 at 30


@triton.jit
def _tile(ptr, offsets, mask):
    """[BLOCK_N, BLOCK_H] fp32, zero where masked.

    Rows that all heads share are read as whole tiles too: in the tile's own layout, 16 bytes a
    thread and out of L1, instead of 2 bytes a thread and a trip through shared memory.
    """
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _turn(x, rope, SIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rotate the pairs of x by rope, both [BLOCK_N, BLOCK_H]; SIGN -1 turns back."""
    a, b = tl.split(tl.reshape(x, [BLOCK_N, BLOCK_H // 2, 2]))
    cos, sin = tl.split(tl.reshape(rope, [BLOCK_N, BLOCK_H // 2, 2]))
    sin *= SIGN
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [BLOCK_N, BLOCK_H])


@triton.jit
def _head_norm(
    x_ptr, x_offset, weight_ptr, rope, out_ptr, out_offset, shared, mask, eps,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One token of q or k; `shared` are the offsets of a row that all heads share."""
    x = _tile(x_ptr, x_offset, mask)
    if weight_ptr is not None:
        x *= tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
        x *= _tile(weight_ptr, shared, mask)
    if rope is not None:
        x = _turn(x, rope, 1.0, BLOCK_N, BLOCK_H)
    tl.store(out_ptr + out_offset, x, mask=mask)


@triton.jit
def _head_norm_backward(
    dout_ptr, dout_offset, x_ptr, x_offset, weight_ptr, rope, dx_ptr, dx_offset, dweight,
    shared, mask, eps, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write dx of one token and return dweight [BLOCK_N, BLOCK_H] with the token's share added."""
    g = _tile(dout_ptr, dout_offset, mask)
    if rope is not None:
        g = _turn(g, rope, -1.0, BLOCK_N, BLOCK_H)
    if weight_ptr is not None:
        x = _tile(x_ptr, x_offset, mask)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
        x *= rstd
        dweight += g * x
        g *= _tile(weight_ptr, shared, mask)
        g = rstd * (g - x * (tl.sum(g * x, axis=1, keep_dims=True) / H))
    tl.store(dx_ptr + dx_offset, g, mask=mask)
    return dweight


# T and `rows` change from call to call: specialising on them would compile the same code again.
@triton.jit(do_not_specialize=["T", "tail"])
def qk_norm_rope_kernel(
    q_ptr, k_ptr, weight_q_ptr, weight_k_ptr, tail_q_ptr, tail_k_ptr, rope_ptr,
    out_q_ptr, out_k_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, rope_batch, rope_row,
    T, tail, eps,
    N: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (row, j): heads j BLOCK_N onwards of one token, of q and, where given, of k."""
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    if tail_q_ptr is not None:
        weight_q_ptr = tl.where(t < tail, weight_q_ptr, tail_q_ptr)
        weight_k_ptr = tl.where(t < tail, weight_k_ptr, tail_k_ptr)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = (n < N) & (h < H)  # [BLOCK_N, BLOCK_H], like every tile below
    shared = tl.broadcast_to(h, [BLOCK_N, BLOCK_H])
    out = row.to(tl.int64) * (N * H) + n * H + h
    rope = None
    if rope_ptr is not None:
        rope = _tile(rope_ptr, b * rope_batch + t * rope_row + shared, mask)
    _head_norm(
        q_ptr, b * q_batch + t * q_row + n * q_head + h, weight_q_ptr, rope, out_q_ptr, out,
        shared, mask, eps, H, BLOCK_N, BLOCK_H,
    )  # fmt: skip
    if k_ptr is not None:
        _head_norm(
            k_ptr, b * k_batch + t * k_row + n * k_head + h, weight_k_ptr, rope, out_k_ptr, out,
            shared, mask, eps, H, BLOCK_N, BLOCK_H,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "rows"])
def qk_norm_rope_backward_kernel(
    dout_q_ptr, dout_k_ptr, q_ptr, k_ptr, weight_q_ptr, weight_k_ptr, rope_ptr, dq_ptr, dk_ptr,
    dweight_q_ptr, dweight_k_ptr,
    dout_q_batch, dout_q_row, dout_q_head, dout_k_batch, dout_k_row, dout_k_head,
    q_batch, q_row, q_head, k_batch, k_row, k_head, rope_batch, rope_row,
    T, rows, eps,
    N: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (i, j, b): `rows` tokens and BLOCK_N heads of sample b, one row of partial sums."""
    start = tl.program_id(0) * rows
    b = tl.program_id(2).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = (n < N) & (h < H)  # [BLOCK_N, BLOCK_H], like every tile below
    shared = tl.broadcast_to(h, [BLOCK_N, BLOCK_H])
    dweight_q = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dweight_k = dweight_q
    for i in range(0, tl.minimum(rows, T - start)):
        t = start.to(tl.int64) + i
        dx = (b * T + t) * (N * H) + n * H + h
        rope = None
        if rope_ptr is not None:
            rope = _tile(rope_ptr, b * rope_batch + t * rope_row + shared, mask)
        if dq_ptr is not None:
            dweight_q = _head_norm_backward(
                dout_q_ptr, b * dout_q_batch + t * dout_q_row + n * dout_q_head + h,
                q_ptr, b * q_batch + t * q_row + n * q_head + h, weight_q_ptr, rope, dq_ptr, dx,
                dweight_q, shared, mask, eps, H, BLOCK_N, BLOCK_H,
            )  # fmt: skip
        if dk_ptr is not None:
            dweight_k = _head_norm_backward(
                dout_k_ptr, b * dout_k_batch + t * dout_k_row + n * dout_k_head + h,
                k_ptr, b * k_batch + t * k_row + n * k_head + h, weight_k_ptr, rope, dk_ptr, dx,
                dweight_k, shared, mask, eps, H, BLOCK_N, BLOCK_H,
            )  # fmt: skip
    program = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    if dweight_q_ptr is not None:
        tl.store(dweight_q_ptr + program * H + h, tl.sum(dweight_q, axis=0), mask=h < H)
    if dweight_k_ptr is not None:
        tl.store(dweight_k_ptr + program * H + h, tl.sum(dweight_k, axis=0), mask=h < H)


@traced_as_reference
def qk_norm_rope(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    weight_q_H: Tensor | None = None,
    weight_k_H: Tensor | None = None,
    rope_BTNH: Tensor | None = None,
    *,
    tail: reference.Tail | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`reference.qk_norm_rope` in one launch; raises ValueError for a layout it cannot read."""
    _, tail_q, tail_k = tail or (0, None, None)
    check_devices(
        "qk_norm_rope", q_BTNH, k=k_BTNH, weight_q=weight_q_H, weight_k=weight_k_H, rope=rope_BTNH,
        tail_q=tail_q, tail_k=tail_k,
    )  # fmt: skip
    if tail is not None:
        return _two_parts(q_BTNH, k_BTNH, weight_q_H, weight_k_H, tail, eps)
    q, weight_q, rope = _checked("q", q_BTNH, weight_q_H, rope_BTNH)
    k, weight_k, _ = _checked("k", k_BTNH, weight_k_H, rope_BTNH)
    idle = [weight is None and rope is None for weight in (weight_q, weight_k)]
    if not any(idle) and q.shape == k.shape:
        return _run(q, k, weight_q, weight_k, rope, eps)
    out_q = q_BTNH if idle[0] else _run(q, None, weight_q, None, rope, eps)[0]
    return out_q, k_BTNH if idle[1] else _run(k, None, weight_k, None, rope, eps)[0]


def _two_parts(q, k, weight_q, weight_k, tail: reference.Tail, eps: float) -> tuple[Any, Any]:
    t, tail_q, tail_k = tail
    if q.shape != k.shape or weight_q is None or weight_k is None:
        raise ValueError("a tail needs q and k of one shape and both weights")
    if torch.is_grad_enabled():  # training has its rows in two tensors: it needs no tail
        return reference.qk_norm_rope(q, k, weight_q, weight_k, tail=tail, eps=eps)
    q, weight_q, _ = _checked("q", q, weight_q, None)
    k, weight_k, _ = _checked("k", k, weight_k, None)
    tails = (check_weight(f"tail_{n}", w, q.shape[3]) for n, w in (("q", tail_q), ("k", tail_k)))
    return _forward(q, k, weight_q, weight_k, None, eps, (t, *tails))


def _checked(name: str, x: Tensor, weight: Tensor | None, rope: Tensor | None) -> tuple:
    check_rows(name, x, ndim=4)
    b, t, _, h = x.shape
    if rope is not None and not (
        rope.dtype == torch.float32 and rope.shape in ((b, t, 1, h), (1, t, 1, h)) and h % 2 == 0
    ):
        raise ValueError(
            f"rope must be float32 [{b} or 1, {t}, 1, {h}] with an even width for {name}, "
            f"not {rope.dtype} {list(rope.shape)}"
        )
    weight = check_weight(f"weight_{name}", weight, h)
    return unit(x), weight, None if rope is None else unit(rope)


def _run(q, k, weight_q, weight_k, rope, eps: float) -> tuple[Any, Any]:
    inputs = (q, k, weight_q, weight_k)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _QKNormRope.apply(*inputs, rope, eps)
    return _forward(q, k, weight_q, weight_k, rope, eps)


def _forward(
    q, k, weight_q, weight_k, rope, eps: float, tail: tuple = (0, None, None)
) -> tuple[Any, Any]:
    b, t, num_heads, h = q.shape
    out_q = q.new_empty(q.shape)
    out_k = None if k is None else k.new_empty(k.shape)
    block = next_power_of_2(h)
    with on(q):
        qk_norm_rope_kernel[(b * t, -(-num_heads // BLOCK_N))](
            q, k, weight_q, weight_k, *tail[1:], rope, out_q, out_k,
            *_strides(q), *_strides(k), *_rope_strides(rope), t, tail[0], eps,
            N=num_heads, H=h, BLOCK_N=BLOCK_N, BLOCK_H=block,
            num_warps=warps_for(BLOCK_N * block, 8),
        )  # fmt: skip
    return out_q, out_k


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides over B, T and N."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def _rope_strides(rope: Tensor | None) -> tuple[int, int]:
    """Strides over B and T, 0 over B where one table serves all samples."""
    if rope is None:
        return 0, 0
    return rope.stride(0) if rope.shape[0] > 1 else 0, rope.stride(1)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, weight_q, weight_k, rope, eps):
        # A rotation alone is undone without looking at what was rotated.
        kept = [None if w is None else x for x, w in ((q, weight_q), (k, weight_k))]
        ctx.save_for_backward(*kept, weight_q, weight_k, rope)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return _forward(q, k, weight_q, weight_k, rope, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_q, dout_k):
        q, k, weight_q, weight_k, rope = ctx.saved_tensors
        douts = [None if g is None else unit(g) for g in (dout_q, dout_k)]
        like = next((g for g in douts if g is not None), None)
        if like is None:
            return (None,) * 6
        b, t, num_heads, h = like.shape
        dxs = [None if g is None else g.new_empty(g.shape) for g in douts]
        wanted = [dx is not None and ctx.needs_input_grad[2 + i] for i, dx in enumerate(dxs)]
        rows = rows_per_program(t, any(wanted))
        grid = (-(-t // rows), -(-num_heads // BLOCK_N), b)
        sums = [like.new_empty((*grid, h), dtype=torch.float32) if w else None for w in wanted]
        block = next_power_of_2(h)
        with on(like):
            qk_norm_rope_backward_kernel[grid](
                *douts, q, k, weight_q, weight_k, rope, *dxs, *sums,
                *_strides(douts[0]), *_strides(douts[1]), *_strides(q), *_strides(k),
                *_rope_strides(rope), t, rows, ctx.eps,
                N=num_heads, H=h, BLOCK_N=BLOCK_N, BLOCK_H=block,
                num_warps=warps_for(BLOCK_N * block, 8),
            )  # fmt: skip
        dweights = (weight_grad(s, w) for s, w in zip(sums, (weight_q, weight_k), strict=True))
        return (*dxs, *dweights, None, None)
