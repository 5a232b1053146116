"""Attention over text and image rows together, in Triton: one pass, nothing of size [T, S] stored.

Shapes: B batch, T query rows, S key rows, N heads, H head width (a power of two from 16 to 128).

    out = softmax(q k^T / sqrt(H)) v, keys from a sample's length on left out

A program takes BLOCK_T rows of one head and walks the keys in tiles: m is the running maximum of a
row's logits, total the sum of 2^((logit - m) scale); both sums are rescaled where m grows. m itself
is not scaled: a GPU fuses logit * scale - m', whose product is then not rounded as m' was, and the
difference at a large maximum is far from zero. q, k and v may be any views with unit stride along
H, such as slices of a packed projection. Logits and sums are fp32; the weights enter the second
product in v's dtype, as they do in any library. There is no backward pass: a call that needs
gradients goes to the library as a whole. While torch.compile or torch.export traces, the reference
is traced instead.
Source: FlashAttention-2, arXiv 2307.08691.

On the GPUs of `CUDNN` calls of half precision without lengths go to the library too, which is asked
for cuDNN's kernel: at 4096 rows of an H100 its authors' rivals measure 609 TFLOP/s where Triton has
389 for H = 128, and 408 against 400 for H = 64 (FlashAttention-3, arXiv 2407.08608, figure 5); on a
B200 it leads FlashAttention-4 on every shape of eleven diffusion models (sglang pull 33655). Not
measured here: `python -m bench.ops --only joint_attention` times both.
"""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tdm_kernels import reference
from tdm_kernels.layout import (
    ATTENTION_HEAD_DIMS,
    check_devices,
    check_rows,
    on,
    traced_as_reference,
    unit,
)

logger = logging.getLogger(__name__)

LOG2_E = 1 / math.log(2)
CUDNN = ((9, 0), (10, 0), (10, 3))  # compute capabilities where its attention is ahead of Triton's
CUDNN_VERSION = 91501  # from which on PyTorch prefers it there (pytorch issue 169849)
_PREFERRED = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # fmt: skip
_failed: set[tuple] = set()  # shapes that the library raised an error for
# (BLOCK_T, BLOCK_S, num_warps, num_stages) by half precision and H, narrower heads as 64. Larger
# tiles spill: except on sm_90 and sm_100 a warp holds the whole tile of keys in registers.
CONFIGS = {
    (True, 64): (128, 64, 8, 3),
    (True, 128): (128, 32, 8, 3),
    (False, 64): (32, 32, 8, 2),
    (False, 128): (32, 16, 8, 2),
}


@triton.jit
def _attend(
    q, k_ptr, v_ptr, first, last, length, k_row, v_row, scale, m, total, acc,
    H: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys first to last, in whole tiles; MASKED: none from `length` on."""
    s = tl.arange(0, BLOCK_S)
    h = tl.arange(0, H)[None, :]
    k_offset = s[:, None].to(tl.int64) * k_row + h  # [BLOCK_S, H]
    v_offset = s[:, None].to(tl.int64) * v_row + h
    row = tl.full([], 0, tl.int64) + first  # `start`, wide enough to be multiplied by a stride
    for start in range(first, last, BLOCK_S):
        k_tile = k_ptr + row * k_row + k_offset
        v_tile = v_ptr + row * v_row + v_offset
        if MASKED:
            # What lies beyond may be NaN, which a zero weight would not hide.
            inside = start + s < length
            k = tl.load(k_tile, mask=inside[:, None], other=0.0)
            v = tl.load(v_tile, mask=inside[:, None], other=0.0)
        else:
            k, v = tl.load(k_tile), tl.load(v_tile)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        if MASKED:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        m_next = tl.maximum(m, tl.max(logits, axis=1))
        p = tl.exp2((logits - m_next[:, None]) * scale)
        shrink = tl.exp2((m - m_next) * scale)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = m_next
        row += BLOCK_S
    return m, total, acc


# T and S change from call to call: specialising on them would compile the same code again.
@triton.jit(do_not_specialize=["T", "S"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    T, S, scale,
    H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, n, b): BLOCK_T query rows of head n. `scale` turns logits into powers of two."""
    b, n = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    h = tl.arange(0, H)[None, :]
    mask = t < T
    t = t.to(tl.int64)
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    q = tl.load(q_ptr + b * q_batch + n * q_head + t * q_row + h, mask=mask, other=0.0)
    k_ptr += b * k_batch + n * k_head
    v_ptr += b * v_batch + n * v_head
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, H], tl.float32)
    whole = length // BLOCK_S * BLOCK_S
    m, total, acc = _attend(
        q, k_ptr, v_ptr, 0, whole, length, k_row, v_row, scale, m, total, acc,
        H, BLOCK_S, False, PRECISION,
    )  # fmt: skip
    m, total, acc = _attend(
        q, k_ptr, v_ptr, whole, length, length, k_row, v_row, scale, m, total, acc,
        H, BLOCK_S, True, PRECISION,
    )  # fmt: skip
    out = ((b * T + t) * num_heads + n) * H + h
    tl.store(out_ptr + out, acc / total[:, None], mask=mask)


@traced_as_reference
def joint_attention(
    q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, lengths_B: Tensor | None = None
) -> Tensor:
    """`reference.joint_attention` in one launch; reads no key beyond a length.

    Raises ValueError for a layout or head width it cannot read. Lengths stay on the device and are
    not looked at here.
    """
    q, k, v = _checked(q_BTNH, k_BSNH, v_BSNH, lengths_B)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return reference.joint_attention(q, k, v, lengths_B)
    half = q.dtype != torch.float32
    if half and lengths_B is None and q.numel() and _leaves_to_cudnn(q.device):
        shape = (q.device, q.dtype, q.shape, k.shape)
        if shape not in _failed:
            try:
                return cudnn_attention(q, k, v)
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, not the shape
                raise
            except RuntimeError as error:
                _failed.add(shape)
                logger.warning("cuDNN's attention failed, Triton's takes over: %s", error)
    return triton_attention(q, k, v, lengths_B)


def cudnn_attention(q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
    """`reference.joint_attention` of the library, by cuDNN's kernel where that takes the shape."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    _settle_order(q.device)
    with sdpa_kernel(_PREFERRED, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


@cache
def _settle_order(device: torch.device) -> None:
    """Let the library choose its own order of backends, which it does once, at its first choice.

    Inside of `sdpa_kernel` that would come to nothing: what is restored is the order from before.
    """
    rows = torch.empty(1, 1, 1, 16, device=device, dtype=torch.float16)
    torch._fused_sdp_choice(rows, rows, rows)


@cache
def _leaves_to_cudnn(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in CUDNN:
        return False
    return (torch.backends.cudnn.version() or 0) >= CUDNN_VERSION


def triton_attention(q: Tensor, k: Tensor, v: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """`joint_attention` of operands that it has checked, by the kernel above."""
    b, t, num_heads, h = q.shape
    out = q.new_empty((b, t, num_heads * h))
    half = q.dtype != torch.float32
    block_t, block_s, num_warps, num_stages = CONFIGS[half, max(h, 64)]
    with on(q):
        attention_kernel[(-(-t // block_t), num_heads, b)](
            q, k, v, lengths_B, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            t, k.shape[1], LOG2_E / math.sqrt(h),
            H=h, BLOCK_T=block_t, BLOCK_S=block_s, PRECISION="tf32" if half else "ieee",
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out


def _checked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
    check_rows("q", q, ndim=4)
    check_rows("k", k, ndim=4)
    check_rows("v", v, like=k, ndim=4)
    check_devices("joint_attention", q, k=k, v=v, lengths=lengths)
    b, _, num_heads, h = q.shape
    if h not in ATTENTION_HEAD_DIMS:
        raise ValueError(f"heads must be one of {ATTENTION_HEAD_DIMS} wide, not {h}")
    if k.shape != (b, k.shape[1], num_heads, h) or not k.shape[1]:
        raise ValueError(f"k must be [{b}, 1 or more, {num_heads}, {h}], not {list(k.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if lengths is not None and (
        lengths.shape != (b,) or lengths.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"lengths must be {b} int32 or int64 numbers, not {lengths.dtype} {list(lengths.shape)}"
        )
    return unit(q), unit(k), unit(v)
