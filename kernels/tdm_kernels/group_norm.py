"""GroupNorm and SiLU of images channels last, in Triton: what comes before a VAE's convolutions.

Shapes: B batch, H W pixels, P = H W, C channels, G groups of K = C / G channels, S slices of the
pixels.

    y = silu((x - mean_g) / sqrt(var_g + eps) * weight + bias)

Three kernels read x twice and write y once. Each slice gives every channel's mean and its sum of
squared differences from it; they are joined into the mean and scale of each channel of an image
(Chan, Golub and LeVeque, 1979); these are applied. Means are summed as differences from one of
their values, so that a large one costs no digits. The convolution is the library's, for inference
only. The slices depend on P and K alone: a picture is the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_kernels import reference
from tdm_kernels.layout import (
    check_devices,
    check_rows,
    check_weight,
    next_power_of_2,
    on,
    product_dtype,
)
from tdm_kernels.native import wants_grad
from tdm_kernels.reference import GroupNorm

TILE = 4096  # elements a program holds at once, 16 a thread
MAX_SLICES, MIN_SLICE = 512, 32  # programs per image, and pixels of one
MAX_JOINED = 8192  # moments of a group that one program joins, 64 a thread
APPLIED = 4  # tiles a program normalises with one scale and shift


# P and `rows` change with a picture's size: specialising on them would compile the code again.
@triton.jit(do_not_specialize=["P", "rows"])
def group_moments_kernel(
    x_ptr, moments_ptr, P, rows,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (slice s, image b): moments [B, S, 2, C] of `rows` pixels, fp32."""
    s, b = tl.program_id(0), tl.program_id(1)
    start = s * rows
    count = tl.minimum(rows, P - start)
    c = tl.arange(0, BLOCK_C)[None, :]
    p = tl.arange(0, BLOCK_P)[:, None]
    x_ptr += (b.to(tl.int64) * P + start) * C
    first = tl.load(x_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in range(0, count, BLOCK_P):
        mask = (i + p < count) & (c < C)
        x = tl.load(x_ptr + (i + p) * C + c, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, x - first, 0.0)
        total += difference
        squares += difference * difference
    total = tl.sum(total, 0, keep_dims=True)
    squares = tl.sum(squares, 0, keep_dims=True)
    moments_ptr += (b.to(tl.int64) * tl.num_programs(0) + s) * 2 * C
    tl.store(moments_ptr + c, first + total / count, mask=c < C)
    tl.store(moments_ptr + C + c, squares - total * total / count, mask=c < C)


@triton.jit(do_not_specialize=["P", "rows", "S"])
def group_affine_kernel(
    moments_ptr, weight_ptr, affine_ptr, P, rows, S, eps,
    C: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (group g, image b): affine [B, 2, C], the channels' mean and scale, fp32."""
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = tl.arange(0, BLOCK_S)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (s < S) & (k < K)  # [BLOCK_S, BLOCK_K]
    place = moments_ptr + ((b * S + s) * 2) * C + g * K + k
    means = tl.load(place, mask=mask, other=0.0)
    squares = tl.load(place + C, mask=mask, other=0.0)
    count = tl.where(mask, tl.minimum(rows, P - s * rows), 0).to(tl.float32)
    size = P.to(tl.float32) * K
    pivot = tl.load(moments_ptr + b * S * 2 * C + g * K)
    mean = pivot + tl.sum(count * (means - pivot)) / size
    difference = means - mean
    rstd = tl.rsqrt(tl.sum(squares + count * difference * difference) / size + eps)
    c = tl.arange(0, BLOCK_K)
    weight = tl.load(weight_ptr + g * K + c, mask=c < K, other=0.0).to(tl.float32)
    affine_ptr += b * 2 * C + g * K
    tl.store(affine_ptr + c, tl.zeros([BLOCK_K], tl.float32) + mean, mask=c < K)
    tl.store(affine_ptr + C + c, rstd * weight, mask=c < K)


@triton.jit(do_not_specialize=["P"])
def affine_silu_kernel(
    x_ptr, affine_ptr, bias_ptr, y_ptr, P,
    C: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, image b): silu((x - mean) * scale + bias) of TILES times BLOCK_P pixels."""
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * (TILES * BLOCK_P)
    c = tl.arange(0, BLOCK_C)[None, :]
    p = tl.arange(0, BLOCK_P)[:, None]
    mean = tl.load(affine_ptr + b * 2 * C + c, mask=c < C, other=0.0)
    scale = tl.load(affine_ptr + b * 2 * C + C + c, mask=c < C, other=0.0)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    x_ptr += (b * P + start) * C
    y_ptr += (b * P + start) * C
    for i in range(0, TILES * BLOCK_P, BLOCK_P):
        mask = (start + i + p < P) & (c < C)
        x = tl.load(x_ptr + (i + p) * C + c, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean) * scale + bias
        tl.store(y_ptr + (i + p) * C + c, y / (1.0 + tl.exp(-y)), mask=mask)


def group_norm_silu(x_BHWC: Tensor, norm: GroupNorm) -> Tensor:
    """Return SiLU of GroupNorm, [B, H, W, C] contiguous in x's dtype; ValueError for other shapes.

    Computes in fp32. For inference: what it returns has no gradient.
    """
    check_rows("x", x_BHWC, ndim=4)
    check_devices("group_norm_silu", x_BHWC, weight=norm.weight_C, bias=norm.bias_C)
    b, h, w, c = x_BHWC.shape
    weight, bias = check_weight("weight", norm.weight_C, c), check_weight("bias", norm.bias_C, c)
    if c % norm.groups:
        raise ValueError(f"{c} channels are no {norm.groups} groups")
    x, pixels, width = x_BHWC.contiguous(), h * w, c // norm.groups
    y = torch.empty_like(x)
    if not x.numel():
        return y
    block_c, block_k = next_power_of_2(c), next_power_of_2(width)
    most = max(1, min(MAX_SLICES, MAX_JOINED // block_k))
    rows = max(MIN_SLICE, -(-pixels // most))
    slices = -(-pixels // rows)
    moments = x.new_empty((b, slices, 2, c), dtype=torch.float32)
    affine = x.new_empty((b, 2, c), dtype=torch.float32)
    block_p = max(1, TILE // block_c)
    tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 8}
    with on(x):
        group_moments_kernel[(slices, b)](x, moments, pixels, rows, C=c, **tile)
        group_affine_kernel[(norm.groups, b)](
            moments, weight, affine, pixels, rows, slices, norm.eps,
            C=c, K=width, BLOCK_S=next_power_of_2(slices), BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
        affine_silu_kernel[(-(-pixels // (APPLIED * block_p)), b)](
            x, affine, bias, y, pixels, C=c, TILES=APPLIED, **tile
        )
    return y


def pack_conv(
    weight_OCKK: Tensor,
    bias_O: Tensor | None,
    sources: Sequence[Tensor],
    *,
    norm: GroupNorm | None = None,
    upsample: bool = False,
) -> Callable[..., Tensor]:
    """`reference.pack_conv`, the norm and SiLU in two passes over x, the convolution the library's.

    Under autocast, for gradients and while torch.compile or torch.export traces, the reference.
    """
    plain = reference.pack_conv(weight_OCKK, bias_O, sources, norm=norm, upsample=upsample)
    if norm is None:
        return plain
    product = reference.pack_conv(weight_OCKK, bias_O, sources, upsample=upsample)

    def call(x_BHWC: Tensor, residual_BHWO: Tensor | None = None) -> Tensor:
        autocast = product_dtype(x_BHWC) != x_BHWC.dtype
        grad = wants_grad(x_BHWC, weight_OCKK, norm.weight_C, norm.bias_C)
        if autocast or grad or torch.compiler.is_compiling():
            return plain(x_BHWC, residual_BHWO)
        return product(group_norm_silu(x_BHWC, norm), residual_BHWO)

    return call
