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

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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

LIBRARY = Path(__file__).parent / "libtdm_kernels.so"
_PANEL = 32  # kPanel of csrc/cpu.h
_MAX_PANELLED = 2**22  # weights: 16 MB


@lru_cache
def load() -> str:
    """Load the library; return "" or why it cannot serve."""
    if not LIBRARY.is_file():
        return "is not built: run `make native`"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"does not load: {error}"
    return ""


def instruction_set() -> str:
    """Name of the kernels this machine runs: "portable", "avx2" or "avx512"."""
    return _op("instruction_set")()


def use_instruction_set(name: str) -> None:
    """Run other kernels than the fastest, to test and to time them.

    Raises RuntimeError for a set this machine lacks.
    """
    _op("use_instruction_set")(name)


@lru_cache
def _op(name: str) -> Any:
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
    if _wants_grad(*inputs):
        return _ResidualNorm.apply(*inputs, eps, norm)
    return _forward(inputs, eps, norm, None)


def _forward(inputs: tuple, eps: float, norm: bool, stats: Tensor | None) -> tuple[Any, Any]:
    x, branch, gate, branch_weight, weight, scale, shift = inputs
    shift = None if scale is None else shift
    h = None if branch is None else x.new_empty(x.shape)
    y = None
    if norm:
        shape = x.shape if scale is None or scale.ndim == 3 else (scale.shape[0], *x.shape)
        y = x.new_empty(shape, dtype=product_dtype(x))
    vectors = [gate, branch_weight, weight, scale, shift]
    if not x.is_cuda:  # those kernels read any type: a cast would be a launch of its own
        vectors = [_float(vector) for vector in vectors]
    _op("residual_norm")(x, branch, *vectors, eps, h, y, stats)
    return h, y


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
        weights = (_float(gate), _float(branch_weight), _float(weight), _float(scale))
        sums_out = (dgate, dbranch_weight, dweight, dscale, dshift)
        _op("residual_norm_backward")(dh, dy, h, branch, *weights, stats, dx, dbranch, *sums_out)
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
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`reference.qk_norm_rope`: norm and rotation of a head in one pass."""
    if q_BTNH.is_cuda:
        return _cuda_heads(q_BTNH, k_BTNH, weight_q_H, weight_k_H, rope_BTNH, eps)
    q = _head_norm(q_BTNH, weight_q_H, rope_BTNH, eps)
    return q, _head_norm(k_BTNH, weight_k_H, rope_BTNH, eps)


def _cuda_heads(q, k, weight_q, weight_k, rope, eps: float) -> tuple[Tensor, Tensor]:
    """q and k in one launch, unless one has nothing to do or another number of tokens."""
    if _wants_grad(q, k, weight_q, weight_k):
        raise RuntimeError("the CUDA kernels have no backward pass")
    idle = [weight is None and rope is None for weight in (weight_q, weight_k)]
    if not any(idle) and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]:
        return _head_norms(q, k, weight_q, weight_k, rope, eps)
    out_q = q if idle[0] else _head_norms(q, None, weight_q, None, rope, eps)[0]
    return out_q, k if idle[1] else _head_norms(k, None, weight_k, None, rope, eps)[0]


def _head_norms(q, k, weight_q, weight_k, rope, eps: float) -> tuple[Tensor, Any]:
    out_q, out_k = q.new_empty(q.shape), None if k is None else k.new_empty(k.shape)
    k = None if k is None else unit(k)
    _op("head_norms")(unit(q), k, weight_q, weight_k, rope, eps, out_q, out_k)
    return out_q, out_k


def _head_norm(x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float) -> Tensor:
    if weight is None and rope is None:
        return x
    x = unit(x)
    if _wants_grad(x, weight):
        return _HeadNorm.apply(x, weight, rope, eps)
    return _head_norm_forward(x, weight, rope, eps)


def _head_norm_forward(x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float) -> Tensor:
    # Autocast's attention computes in fp32 on a CPU: handing it fp32 saves the cast.
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
    out = x.new_empty(x.shape, dtype=dtype)
    _op("head_norm")(x, _float(weight), rope, eps, out)
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
        _op("head_norm_backward")(unit(dout), x, _float(weight), rope, ctx.eps, dx, sums)
        return dx, weight_grad(sums, weight), None, None


@traced_as_reference
def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """`reference.swiglu` in one pass."""
    gate, up = gate_BTF.contiguous(), up_BTF.to(gate_BTF.dtype).contiguous()
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return _swiglu(gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _op("swiglu")(gate, up, out)
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
        _op("swiglu_backward")(dy.contiguous(), gate, up, dgate, dup)
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
    _op("gelu")(x, out)
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
        _op("gelu_backward")(dy.contiguous(), x, dx)
        return dx


def joint_attention(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, mask_B11S: Tensor | None = None
) -> Tensor:
    """`reference.joint_attention`; masks and gradients go to the library's kernel."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTNH, k_BSNH, v_BSNH))
    if mask_B11S is not None or grad or torch.compiler.is_compiling():
        return reference.joint_attention(q_BTNH, k_BSNH, v_BSNH, mask_B11S)
    q, k, v = unit(q_BTNH), unit(k_BSNH), unit(v_BSNH)
    out = q.new_empty(q.shape)
    _op("attention")(q, k, v, out)
    return out.flatten(2)


def pack_linear(
    weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """`reference.pack_linear` over a copy of the weight in the order the kernel reads it."""
    # Larger weights do not stay in the caches: the library's matrix product streams them as fast.
    if weight_FD.dtype != torch.float32 or weight_FD.numel() > _MAX_PANELLED:
        return reference.pack_linear(weight_FD, bias_F, sources)
    return PanelLinear(weight_FD, bias_F, sources)


class PanelLinear:
    """x W^T + b from panels of W, remade after an in-place update of any of `sources`."""

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor]) -> None:
        self.weight, self.bias, self.sources = weight_FD, bias_F, tuple(sources)
        width, depth = weight_FD.shape
        self.panels = weight_FD.new_empty(-(-width // _PANEL) * _PANEL * depth)
        self.version = -1

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., F] for x [..., D]; half precision and autocast go to the library."""
        half = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if half or torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        version = sum(source._version for source in self.sources)
        if version != self.version:
            _op("pack_panels")(self.weight, self.panels)
            self.version = version
        width, depth = self.weight.shape
        rows = x if x.ndim == 2 and x.stride(1) == 1 else x.reshape(-1, depth)
        out = rows.new_empty((len(rows), width))
        _op("linear")(unit(rows), self.panels, self.bias, width, out)
        return out.view(*x.shape[:-1], width)


def _wants_grad(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _float(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else x.float()
