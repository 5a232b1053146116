"""Every op of the models in plain PyTorch: the specification of any faster backend.

Shapes: B batch, T tokens, S key tokens, D width, N heads, H head width, F feed-forward width.

All ops compute in fp32 whatever they are given, return the dtype of their first argument, accept
any strides, are differentiable, and can be compiled and exported. Modulation tensors (`scale`,
`shift`, `gate`) broadcast against [B, T, D], usually as [B, 1, D], and arrive finished: `scale`
already holds 1 + s and `gate` its tanh where the model has one, because that work is shared by all
tokens and done once for all steps. `norm_modulate` also takes two modulations of one norm, scale
and shift [2, B, 1, D], and then returns [2, B, T, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tail = tuple[int, Tensor, Tensor]


class GroupNorm(NamedTuple):
    """The parameters of `torch.nn.functional.group_norm`."""

    weight_C: Tensor
    bias_C: Tensor
    groups: int
    eps: float


# 2 u = x (_GELU_LINEAR + _GELU_CUBIC x^2), with u the argument of GELU's tanh.
_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


def norm_modulate(
    x_BTD: Tensor,
    scale_BTD: Tensor | None = None,
    shift_BTD: Tensor | None = None,
    *,
    weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Return norm(x) * scale + shift.

    norm is LayerNorm without affine parameters when `weight_D` is None (SD3), else RMSNorm with
    that weight (Z-Image): x * rsqrt(mean(x^2) + eps) * weight.
    """
    y_BTD = _norm(x_BTD.float(), weight_D, eps)
    if scale_BTD is not None:
        if shift_BTD is not None:
            y_BTD = torch.addcmul(shift_BTD.float(), y_BTD, scale_BTD.float())
        else:
            y_BTD = y_BTD * scale_BTD.float()
    return y_BTD.to(x_BTD.dtype)


def gate_residual(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BTD: Tensor | None = None,
    *,
    branch_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Return x + gate * branch, the branch RMS-normalised first if `branch_weight_D` is given.

    Of several branches [M, B, T, D] with gates [M, B, 1, D] all are added; they take no weight.
    """
    branch_BTD = branch_BTD.float()
    if branch_BTD.ndim == 4:
        assert gate_BTD is not None and branch_weight_D is None
        return (x_BTD.float() + (gate_BTD.float() * branch_BTD).sum(dim=0)).to(x_BTD.dtype)
    if branch_weight_D is not None:
        branch_BTD = _norm(branch_BTD, branch_weight_D, eps)
    if gate_BTD is None:
        return (x_BTD.float() + branch_BTD).to(x_BTD.dtype)
    return torch.addcmul(x_BTD.float(), gate_BTD.float(), branch_BTD).to(x_BTD.dtype)


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
    """Return (h, y): h = gate_residual(x, branch, gate) and y = norm_modulate(h, scale, shift)."""
    h_BTD = gate_residual(x_BTD, branch_BTD, gate_BTD, branch_weight_D=branch_weight_D, eps=eps)
    return h_BTD, norm_modulate(h_BTD, scale_BTD, shift_BTD, weight_D=weight_D, eps=eps)


def qk_norm_rope(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    weight_q_H: Tensor | None = None,
    weight_k_H: Tensor | None = None,
    rope_BTNH: Tensor | None = None,
    *,
    tail: Tail | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return q and k, RMS-normalised per head (given weights), then rotated (given a table).

    `rope_BTNH` is fp32 [B or 1, T, 1, H], contiguous, (cos w, sin w) for each adjacent pair along
    H: the pair (a, b) becomes (a cos w - b sin w, a sin w + b cos w), that is (a + ib) exp(iw).
    `tail` (t, weight_q, weight_k): rows from t on have weights of their own, as SD3's text has
    beside its image. q and k then have as many rows, both weights are given, and there is no table.
    """
    if tail is not None:
        t, *weights = tail
        image = qk_norm_rope(q_BTNH[:, :t], k_BTNH[:, :t], weight_q_H, weight_k_H, eps=eps)
        text = qk_norm_rope(q_BTNH[:, t:], k_BTNH[:, t:], *weights, eps=eps)
        q_BTNH, k_BTNH = (torch.cat(rows, dim=1) for rows in zip(image, text, strict=True))
        return q_BTNH, k_BTNH
    return (
        _norm_rotate(q_BTNH, weight_q_H, rope_BTNH, eps),
        _norm_rotate(k_BTNH, weight_k_H, rope_BTNH, eps),
    )


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return (F.silu(gate_BTF.float()) * up_BTF.float()).to(gate_BTF.dtype)


def gelu_tanh(x_BTF: Tensor) -> Tensor:
    """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    eager_cpu = x_BTF.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager_cpu and x_BTF.dtype == torch.float32 and not x_BTF.requires_grad:
        # The same function as x sigmoid(2 u): on a CPU tanh costs six times what sigmoid does.
        return (
            x_BTF.square().mul_(_GELU_CUBIC).add_(_GELU_LINEAR).mul_(x_BTF).sigmoid_().mul_(x_BTF)
        )
    # PyTorch's kernel evaluates half precision in fp32: an explicit cast would only add copies.
    return F.gelu(x_BTF, approximate="tanh")


def joint_attention(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, lengths_B: Tensor | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(H)) v as [B, T, N * H].

    Every row of sample b attends its first `lengths_B[b]` keys (int32 or int64, 1 to S), all keys
    without lengths. Later rows of k and v weigh nothing, but must be finite here.
    """
    mask_B11S = None
    if lengths_B is not None:
        keys_S = torch.arange(k_BSNH.shape[1], device=lengths_B.device)
        mask_B11S = (keys_S < lengths_B[:, None])[:, None, None]
    half = q_BTNH.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if q_BTNH.device.type != "cpu" or not half or torch.compiler.is_exporting():
        return _attend(q_BTNH, k_BSNH, v_BSNH, mask_B11S)
    # On the CPU half precision only costs: the bf16 backward measured 4x slower than fp32.
    with torch.autocast("cpu", enabled=False):
        out = _attend(q_BTNH.float(), k_BSNH.float(), v_BSNH.float(), mask_B11S)
    return out.to(q_BTNH.dtype)


def pack_linear(
    weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor], *, gelu: bool = False
) -> Callable[..., Tensor]:
    """Return (x, out=None) -> x W^T + b, through `gelu_tanh` if asked, for inference.

    Whatever is prepared is prepared once. `out` [..., F], any view with unit stride along F,
    receives the result where it is given. `sources` are the parameters whose storage the weight
    shares: an implementation that keeps a copy watches their versions.
    """
    return partial(linear, weight=weight_FD, bias=bias_F, gelu=gelu)


def linear(
    x: Tensor, out: Tensor | None = None, *, weight: Tensor, bias: Tensor | None, gelu: bool
) -> Tensor:
    """What `pack_linear` returns, its weight not yet bound."""
    y = F.linear(x, weight, bias)
    if gelu:
        y = gelu_tanh(y)
    return y if out is None else out.copy_(y)


def pack_conv(
    weight_OCKK: Tensor,
    bias_O: Tensor | None,
    sources: Sequence[Tensor],
    *,
    norm: GroupNorm | None = None,
    upsample: bool = False,
) -> Callable[..., Tensor]:
    """Return (x, residual=None) -> W * up(act(x)) + b + residual, for inference.

    x [B, H, W, C] and the result [B, H, W, O] are images, channels last; K is odd, what lies beyond
    an edge is 0. act is SiLU after `norm` where that is given, else nothing; up repeats every pixel
    twice both ways, if asked. The whole computes in x's dtype. `sources` are the parameters whose
    storage the weight shares, as for `pack_linear`.
    """
    return partial(conv, weight=weight_OCKK, bias=bias_O, norm=norm, upsample=upsample)


def conv(
    x_BHWC: Tensor,
    residual_BHWO: Tensor | None = None,
    *,
    weight: Tensor,
    bias: Tensor | None,
    norm: GroupNorm | None,
    upsample: bool,
) -> Tensor:
    """What `pack_conv` returns, its weight not yet bound."""
    x = x_BHWC.movedim(-1, 1)  # to the library, NCHW in the memory format channels_last
    if norm is not None:
        x = F.silu(F.group_norm(x, norm.groups, norm.weight_C, norm.bias_C, norm.eps))
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    y_BHWO = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2).movedim(1, -1)
    return y_BHWO if residual_BHWO is None else y_BHWO + residual_BHWO


def record(call: Callable[..., Tensor], sources: Iterable[Tensor]) -> Callable[..., Tensor]:
    """Return what computes `call`, for inference, perhaps from a recording of the ops it runs.

    `call` runs ops of one `Ops` and makes views, nothing else; its first argument is a tensor, the
    others are tensors or values. `sources` are the weights it reads: a recording watches their
    versions.
    """
    return call


def solver_step(
    x_BChw: Tensor,
    out_Bnf: Tensor,
    m_prev_BChw: Tensor | None = None,
    *,
    sigma: float,
    c_x: float,
    c_m: float,
    c_prev: float = 0.0,
    sign: float = 1.0,
    patch: int,
) -> tuple[Tensor, Tensor]:
    """Return (x_next, m) of one sampling step, from the patches a transformer returned.

    v = sign * unpatchify(out) is the velocity; the rest is `advance`. x and m_prev are fp32 latents
    [B, C, h, w], and so are the results. For inference: no implementation needs a backward pass.
    """
    v_BChw = to_velocity(out_Bnf, *x_BChw.shape[2:], patch=patch, sign=sign)
    return advance(x_BChw, v_BChw, m_prev_BChw, sigma=sigma, c_x=c_x, c_m=c_m, c_prev=c_prev)


def advance(
    x: Tensor,
    v: Tensor,
    m_prev: Tensor | None = None,
    *,
    sigma: float,
    c_x: float,
    c_m: float,
    c_prev: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (c_x x + c_m m + c_prev m_prev, m), with m = x - sigma v the x0 prediction.

    One step of a linear multistep solver; m_prev is the prediction of the step before (None: first
    order). All of one shape and dtype.
    """
    m = x - sigma * v
    x_next = c_x * x + c_m * m
    return (x_next if m_prev is None else x_next + c_prev * m_prev), m


def to_velocity(out_Bnf: Tensor, height: int, width: int, *, patch: int, sign: float) -> Tensor:
    """Return v = sign * unpatchify(out), fp32 [B, C, height, width]."""
    v_BChw = unpatchify(out_Bnf, height, width, patch).float()
    return v_BChw if sign == 1 else v_BChw * sign


def unpatchify(x_Bnf: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Return [B, C, height, width] of row-major patches [B, n, p p C], channel fastest."""
    b = x_Bnf.shape[0]
    x = x_Bnf.reshape(b, height // patch, width // patch, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """LayerNorm without a weight, RMSNorm with one, over the last axis of an fp32 tensor."""
    if weight is None:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(x, x.shape[-1:], weight.float(), eps)


def _norm_rotate(x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float) -> Tensor:
    if weight is None and rope is None:
        return x
    y = x.float()
    if weight is not None:
        y = _norm(y, weight, eps)
    if rope is not None:
        y = _rotate(y.unflatten(-1, (-1, 2)), rope.unflatten(-1, (-1, 2))).flatten(-2)
    return y.to(x.dtype)


def _rotate(pairs: Tensor, turns: Tensor) -> Tensor:
    """Multiply [..., 2] by [..., 2] as complex numbers."""
    if not torch.compiler.is_compiling():
        # Eager: one complex product, 5 to 13 times faster than any real form on a CPU.
        product = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(turns)
        return torch.view_as_real(product)
    # Compilers and exporters: real arithmetic, which they can fuse, and complex they cannot.
    (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
