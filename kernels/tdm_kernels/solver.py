"""A sampling step in Triton: patches to velocity, prediction and next latents in one pass.

Shapes: B batch, C latent channels, h w latent height and width, p patch size, n patches, f = p p C.

    v = sign unpatchify(out)        m = x - sigma v        x' = c_x x + c_m m + c_prev m_prev

A program takes a piece of one latent row, all its channels: patches are read along channels and
latents along w, 16 bytes at a time each. For inference only. While torch.compile or torch.export
traces, the reference is traced instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_kernels.layout import (
    check_devices,
    check_rows,
    next_power_of_2,
    on,
    traced_as_reference,
)

MAX_ELEMENTS = 2048  # of a program, in latents


@triton.jit
def solver_step_kernel(
    x_ptr, out_ptr, m_prev_ptr, next_ptr, m_ptr,
    num_rows, width, velocity, c_x, c_m, c_prev,
    C: tl.constexpr, PATCH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (row y, i, b): BLOCK_W positions of row y. `velocity` is sigma with v's sign."""
    y, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (w < width) & (c < C)  # [BLOCK_W, BLOCK_C], like every tile below
    x_offset = ((b * C + c) * num_rows + y) * width + w
    patch = (b * (num_rows // PATCH) + y // PATCH) * (width // PATCH) + w // PATCH
    inside = (y % PATCH) * PATCH + w % PATCH
    v = tl.load(out_ptr + (patch * (PATCH * PATCH) + inside) * C + c, mask=mask, other=0.0)
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0)
    m = x - velocity * v.to(tl.float32)
    x = c_x * x + c_m * m
    if m_prev_ptr is not None:
        x += c_prev * tl.load(m_prev_ptr + x_offset, mask=mask, other=0.0)
    tl.store(next_ptr + x_offset, x, mask=mask)
    tl.store(m_ptr + x_offset, m, mask=mask)


@traced_as_reference
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
    """`reference.solver_step` in one pass; raises ValueError for shapes that do not fit."""
    x, out = x_BChw.contiguous(), out_Bnf.contiguous()
    m_prev = None if m_prev_BChw is None else m_prev_BChw.contiguous()
    _check(x, out, m_prev, patch)
    b, num_channels, height, width = x.shape
    x_next, m = torch.empty_like(x), torch.empty_like(x)
    block_c = next_power_of_2(num_channels)
    block_w = max(1, min(next_power_of_2(width), MAX_ELEMENTS // block_c))
    with on(x):
        solver_step_kernel[(height, -(-width // block_w), b)](
            x, out, m_prev, x_next, m, height, width, sigma * sign, c_x, c_m, c_prev,
            C=num_channels, PATCH=patch, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return x_next, m


def _check(x: Tensor, out: Tensor, m_prev: Tensor | None, patch: int) -> None:
    check_rows("out", out)
    check_devices("solver_step", x, out=out, m_prev=m_prev)
    for name, latents in (("x", x), ("m_prev", m_prev)):
        if latents is not None and (latents.dtype != torch.float32 or latents.shape != x.shape):
            raise ValueError(
                f"{name} must be float32 {list(x.shape)}, not {latents.dtype} {list(latents.shape)}"
            )
    if x.ndim != 4 or x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"x must be [B, C, h, w] in whole patches of {patch}, not {list(x.shape)}")
    b, num_channels, height, width = x.shape
    fits = (b, height * width // patch**2, num_channels * patch**2)
    if out.shape != fits:
        raise ValueError(f"out must be {list(fits)}, not {list(out.shape)}")
