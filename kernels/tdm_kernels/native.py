"""The ops in C++ (csrc/): one pass over memory each, fp32 inside.

On a CPU all of them, with backward passes. On a CUDA device norms, gates and q and k, forward only,
in one launch each: for deployments without Triton.

Same functions as `reference`, for the layouts the models use: x [B, T, D], modulation
[B or 1, 1, D] or, for several modulations of one norm, [M, B or 1, 1, D]. Under autocast an op
returns what its reader would cast to: a norm autocast's dtype for the linear after it, q and k fp32
for attention. While torch.compile or torch.export traces, the reference is traced in their place:
compilers fuse it themselves.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdm_kernels import reference
from tdm_kernels.layout import (
    product_dtype,
    traced_as_reference,
    unit,
    vector_grad,
    weight_grad,
)

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).parent / "libtdm_kernels.so"
_NEWEST_OP = "attention_backward"  # of csrc/ops.cpp: a library without it is older than this file
_MAX_ROWS_BACKWARD = 256  # of attention: P and its gradient, 256 KB each, stay in the caches


@lru_cache
def load() -> str:
    """Load the library; return "" or why it cannot serve, logged as a warning if it is there."""
    if not LIBRARY.is_file():
        return "is not built: run `make native`"
    reason = ""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        reason = f"does not load: {error.__cause__ or error}"  # torch's own names the file alone
    else:
        if not hasattr(torch.ops.tdm_kernels, _NEWEST_OP):
            reason = "was built from older sources: run `make native`"
    if reason:
        logger.warning("the native library %s", reason)
    return reason


def instruction_set() -> str:
    """Name of the kernels this machine runs: "portable", "avx2" or "avx512"."""
    return native_op("instruction_set")()


def use_instruction_set(name: str) -> None:
    """Run other kernels than the fastest, to test and to time them.

    Raises RuntimeError for a set this machine lacks.
    """
    native_op("use_instruction_set")(name)


@lru_cache
def native_op(name: str) -> Any:
    """Return the op of csrc/ops.cpp; `load` has to have succeeded."""
    return getattr(torch.ops.tdm_kernels, name).default


@traced_as_reference
def norm_modulate(
    x_BTD: Tensor,
    scale_BTD: Tensor | None = None,
    shift_BTD: Tensor | None = None,
    *,
    weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`reference.norm_modulate` in one pass."""
    inputs = (unit(x_BTD), None, None, None, weight_D, scale_BTD, shift_BTD)
    return _run(inputs, eps, norm=True)[1]


@traced_as_reference
def gate_residual(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BTD: Tensor | None = None,
    *,
    branch_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`reference.gate_residual` in one pass."""
    inputs = (unit(x_BTD), unit(branch_BTD), gate_BTD, branch_weight_D, None, None, None)
    return _run(inputs, eps, norm=False)[0]


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
    x_BTD, branch_BTD = unit(x_BTD), unit(branch_BTD)
    inputs = (x_BTD, branch_BTD, gate_BTD, branch_weight_D, weight_D, scale_BTD, shift_BTD)
    return _run(inputs, eps, norm=True)


def _run(inputs: tuple, eps: float, *, norm: bool) -> tuple[Any, Any]:
    """(h, y); h is None without a branch, y without a norm."""
    if inputs[1] is not None and inputs[1].ndim == 4:
        # Two branches one after the other: in cache, a pass over a row costs little.
        x, (first, branch), (gate, last), *rest = inputs
        x, _ = _run((x, first, gate, None, None, None, None), eps, norm=False)
        inputs = (x, branch, last, *rest)
    if wants_grad(*inputs):
        return _ResidualNorm.apply(*inputs, eps, norm)
    return _forward(inputs, eps, norm, None)


def _forward(inputs: tuple, eps: float, norm: bool, stats: Tensor | None) -> tuple[Any, Any]:
    x, branch, gate, branch_weight, weight, scale, shift = inputs
    shift = None if scale is None else shift
    h = None if branch is None else torch.empty_like(x)
    y = _normed_like(x, scale) if norm else None
    vectors = [gate, branch_weight, weight, scale, shift]
    if not x.is_cuda:  # those kernels read any type: a cast would be a launch of its own
        vectors = [_float(vector) for vector in vectors]
    native_op("residual_norm")(x, branch, *vectors, eps, h, y, stats)
    return h, y


def _normed_like(x: Tensor, scale: Tensor | None) -> Tensor:
    dtype = product_dtype(x)
    if scale is not None and scale.ndim == 4:
        return x.new_empty((scale.shape[0], *x.shape), dtype=dtype)
    # At tiny shapes every microsecond of a call counts: this is the quickest way to a tensor.
    return torch.empty_like(x) if dtype == x.dtype else torch.empty_like(x, dtype=dtype)


class _ResidualNorm(torch.autograd.Function):
    """Gradients of h = x + gate branch' and y = norm(h) scale + shift, from one backward pass."""

    @staticmethod
    def forward(ctx, x, branch, gate, branch_weight, weight, scale, shift, eps, norm):
        inputs = (x, branch, gate, branch_weight, weight, scale, shift)
        stats = x.new_empty((x.shape[0] * x.shape[1], 3), dtype=torch.float32)
        h, y = _forward(inputs, eps, norm, stats)
        # Without a norm the backward pass does not read h.
        ctx.save_for_backward(
            x if h is None else h, branch, gate, branch_weight, weight, scale, shift, stats
        )
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dy):
        h, branch, gate, branch_weight, weight, scale, shift, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if dh is None and dy is None:
            return (None,) * 9
        dh, dy = (None if g is None else unit(g) for g in (dh, dy))
        b, _, d = h.shape
        dx = h.new_empty(h.shape) if needs[0] else None
        dbranch = branch.new_empty(branch.shape) if branch is not None and needs[1] else None
        sets = scale.shape[0] if scale is not None and scale.ndim == 4 else 1

        def sums(wanted: bool, *shape: int) -> Tensor | None:
            return h.new_zeros(shape, dtype=torch.float64) if wanted else None

        dgate = sums(gate is not None and needs[2], 1, b, 1, d)
        dbranch_weight = sums(branch_weight is not None and needs[3], b, d)
        with_norm = dy is not None
        dweight = sums(with_norm and weight is not None and needs[4], b, d)
        scaled = with_norm and scale is not None
        dscale = sums(scaled and needs[5], sets, b, 1, d)
        dshift = sums(scaled and shift is not None and needs[6], sets, b, 1, d)
        weights = [_float(gate), _float(branch_weight)]
        weights += [_float(weight), _float(scale)] if with_norm else [None, None]
        sums_out = (dgate, dbranch_weight, dweight, dscale, dshift)
        native_op("residual_norm_backward")(
            dh, dy, h, branch, *weights, stats, dx, dbranch, *sums_out
        )
        return (
            dx, dbranch, vector_grad(dgate, gate), weight_grad(dbranch_weight, branch_weight),
            weight_grad(dweight, weight), vector_grad(dscale, scale), vector_grad(dshift, shift),
            None, None,
        )  # fmt: skip


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
    """`reference.qk_norm_rope`: norm and rotation of a head in one pass."""
    weights = (weight_q_H, weight_k_H)
    grad = torch.is_grad_enabled()
    if tail is not None and grad:  # what is written in parts has no graph
        return reference.qk_norm_rope(q_BTNH, k_BTNH, *weights, tail=tail, eps=eps)
    idle = rope_BTNH is None and (weight_q_H is None or weight_k_H is None)
    if grad or idle:
        q = _head_norm(q_BTNH, weight_q_H, rope_BTNH, eps)
        return q, _head_norm(k_BTNH, weight_k_H, rope_BTNH, eps)
    t, tail_q, tail_k = (0, None, None) if tail is None else tail
    q, k = unit(q_BTNH), unit(k_BTNH)
    out = _heads_like(q), _heads_like(k)
    tails = (t, _float(tail_q), _float(tail_k))
    native_op("qk_norm")(q, k, _float(weight_q_H), _float(weight_k_H), *tails, rope_BTNH, eps, *out)
    return out


def _head_norm(x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float) -> Tensor:
    if weight is None and rope is None:
        return x
    x = unit(x)
    if wants_grad(x, weight):
        return _HeadNorm.apply(x, weight, rope, eps)
    return _head_norm_forward(x, weight, rope, eps)


def _heads_like(x: Tensor) -> Tensor:
    # Autocast's attention computes in fp32 on a CPU: handing it fp32 saves the cast.
    if torch.is_autocast_enabled("cpu"):
        return torch.empty_like(x, dtype=torch.float32)
    return torch.empty_like(x)


def _head_norm_forward(x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float) -> Tensor:
    out = _heads_like(x)
    native_op("head_norm")(x, _float(weight), rope, eps, out)
    return out


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rope, eps):
        ctx.save_for_backward(x, weight, rope)
        ctx.eps = eps
        return _head_norm_forward(x, weight, rope, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, rope = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        wanted = weight is not None and ctx.needs_input_grad[1]
        sums = x.new_zeros((x.shape[0], x.shape[3]), dtype=torch.float64) if wanted else None
        native_op("head_norm_backward")(unit(dout), x, _float(weight), rope, ctx.eps, dx, sums)
        return dx, weight_grad(sums, weight), None, None


@traced_as_reference
def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """`reference.swiglu` in one pass."""
    up_BTF = up_BTF.to(gate_BTF.dtype)
    if torch.is_grad_enabled() and (gate_BTF.requires_grad or up_BTF.requires_grad):
        return _SwiGLU.apply(gate_BTF.contiguous(), up_BTF.contiguous())
    return _swiglu(unit(gate_BTF), unit(up_BTF))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    native_op("swiglu")(gate, up, out)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        native_op("swiglu_backward")(dy.contiguous(), gate, up, dgate, dup)
        return dgate, dup


@traced_as_reference
def gelu_tanh(x_BTF: Tensor) -> Tensor:
    """`reference.gelu_tanh` in one pass."""
    x = x_BTF.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x)
    return _gelu(x)


def _gelu(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    native_op("gelu")(x, out)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        native_op("gelu_backward")(dy.contiguous(), x, dx)
        return dx


def joint_attention(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, lengths_B: Tensor | None = None
) -> Tensor:
    """`reference.joint_attention`; reads no key beyond a length.

    Gradients of more than 256 rows go to the library, whose backward pass is cut into tiles.
    """
    grad = wants_grad(q_BTNH, k_BSNH, v_BSNH)
    long = max(q_BTNH.shape[1], k_BSNH.shape[1]) > _MAX_ROWS_BACKWARD
    if torch.compiler.is_compiling() or (grad and long):
        return reference.joint_attention(q_BTNH, k_BSNH, v_BSNH, lengths_B)
    q, k, v = unit(q_BTNH), unit(k_BSNH), unit(v_BSNH)
    lengths = None if lengths_B is None else lengths_B.to(torch.int64).contiguous()
    out = _Attention.apply(q, k, v, lengths) if grad else _attend(q, k, v, lengths)
    return out.flatten(2)


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    out = q.new_empty(q.shape)
    native_op("attention")(q, k, v, lengths, out)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths):
        ctx.save_for_backward(q, k, v, lengths)
        return _attend(q, k, v, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, lengths = ctx.saved_tensors
        grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        native_op("attention_backward")(unit(dout), q, k, v, lengths, *grads)
        return *grads, None


def wants_grad(*inputs: Tensor | None) -> bool:
    """Return whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _float(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else x.float()
