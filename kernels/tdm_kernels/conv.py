"""`pack_conv` in C++ (csrc/cpu_conv.cpp): GroupNorm, SiLU, upsampling and residual on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_kernels import reference
from tdm_kernels.native import native_op, wants_grad
from tdm_kernels.quantized import version_of
from tdm_kernels.reference import GroupNorm

_PANEL = 16  # kConvPanel of csrc/cpu.h
# Weights: larger ones leave the caches, where the library is faster for as many products.
_MAX_PANELLED, _MAX_UPSAMPLING = 2**17, 2**22


def pack_conv(
    weight_OCKK: Tensor,
    bias_O: Tensor | None,
    sources: Sequence[Tensor],
    *,
    norm: GroupNorm | None = None,
    upsample: bool = False,
) -> Callable[..., Tensor]:
    """`reference.pack_conv` over panels of the weight, for fp32."""
    kernel = tuple(weight_OCKK.shape[2:])
    fits = kernel == (3, 3) or (kernel == (1, 1) and not upsample)
    large = weight_OCKK.numel() > (_MAX_UPSAMPLING if upsample else _MAX_PANELLED)
    if weight_OCKK.dtype != torch.float32 or large or not fits:
        return reference.pack_conv(weight_OCKK, bias_O, sources, norm=norm, upsample=upsample)
    return PanelConv(weight_OCKK, bias_O, sources, norm, upsample)


class PanelConv:
    """A convolution from panels of W, remade after an in-place update of any of `sources`."""

    def __init__(
        self,
        weight_OCKK: Tensor,
        bias_O: Tensor | None,
        sources: Sequence[Tensor],
        norm: GroupNorm | None,
        upsample: bool,
    ) -> None:
        self.weight, self.bias, self.sources = weight_OCKK, bias_O, tuple(sources)
        self.norm, self.upsample = norm, upsample
        self.panels: Tensor | None = None
        self.version = -1
        self.plain = reference.pack_conv(weight_OCKK, bias_O, sources, norm=norm, upsample=upsample)

    def __call__(self, x_BHWC: Tensor, residual_BHWO: Tensor | None = None) -> Tensor:
        """Return [B, H, W, O]; half precision, autocast and gradients go to the library."""
        half = x_BHWC.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if half or wants_grad(x_BHWC, self.weight) or torch.compiler.is_compiling():
            return self.plain(x_BHWC, residual_BHWO)
        packed = self.current()
        x = x_BHWC.contiguous()
        b, h, w, c = x.shape
        scale_BC = shift_BC = None
        if self.norm is not None:
            scale_BC, shift_BC = x.new_empty((b, c)), x.new_empty((b, c))
            native_op("group_affine")(x, *self.norm, scale_BC, shift_BC)
        times = 2 if self.upsample else 1
        out_BHWO = x.new_empty((b, times * h, times * w, self.weight.shape[0]))
        residual = None if residual_BHWO is None else residual_BHWO.contiguous()
        kernel = self.weight.shape[-1]
        native_op("conv")(
            x, scale_BC, shift_BC, packed, self.bias, residual, kernel, self.upsample, out_BHWO
        )
        return out_BHWO

    def current(self) -> Tensor:
        """Return the panels of the weight as it is now, always in the same memory."""
        version = version_of(self.sources)
        if self.panels is None or version != self.version:
            fresh = panels(self.weight.detach(), self.upsample)
            if self.panels is None:
                # Made in inference mode, they could not be written to outside of it.
                with torch.inference_mode(False):
                    self.panels = torch.empty_like(fresh)
            self.panels.copy_(fresh)
            self.version = version
        return self.panels


def panels(weight_OCKK: Tensor, upsample: bool) -> Tensor:
    """W in the order `Conv` of csrc/cpu.h reads it.

    Nearest upsampling hands neighbouring taps the same pixel: one output in four sees a 2 x 2
    kernel, its weights sums of the 3 x 3 kernel's (four products where there were nine).
    """
    if not upsample:
        return _panels(weight_OCKK)
    phases = [_halved(_halved(weight_OCKK, 2, dy), 3, dx) for dy in (0, 1) for dx in (0, 1)]
    return torch.cat([_panels(phase) for phase in phases])


def _halved(weight: Tensor, axis: int, phase: int) -> Tensor:
    """3 taps along `axis` -> the 2 of outputs at even (phase 0) or odd (1) places."""
    first, middle, last = weight.unbind(axis)
    pair = (first, middle + last) if phase == 0 else (first + middle, last)
    return torch.stack(pair, axis)


def _panels(weight_OCKK: Tensor) -> Tensor:
    rows = weight_OCKK.permute(2, 3, 1, 0).flatten(0, 2)  # [K K C, O]
    rows = F.pad(rows, (0, -rows.shape[1] % _PANEL))
    return rows.unflatten(1, (-1, _PANEL)).transpose(0, 1).flatten().contiguous()
