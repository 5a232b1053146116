"""`pack_linear` in C++ (csrc/cpu_products.cpp): fp32 rows over a weight that is cut into panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tdm_kernels import blocked_linear, reference
from tdm_kernels.layout import unit
from tdm_kernels.native import native_op
from tdm_kernels.quantized import version_of

_PANEL = 32  # kPanel of csrc/cpu.h
_MAX_PANELLED = 2**22  # weights: 16 MB


def pack_linear(
    weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor], *, gelu: bool = False
) -> Callable[..., Tensor]:
    """`reference.pack_linear` over a copy of the weight in the order the kernel reads it."""
    # Larger weights do not stay in the caches: the library's matrix product streams them as fast.
    if weight_FD.numel() <= _MAX_PANELLED:
        if weight_FD.dtype == torch.float32:
            return PanelLinear(weight_FD, bias_F, sources, gelu)
        if weight_FD.dtype == torch.bfloat16 and blocked_linear.available():
            return blocked_linear.BlockedLinear(weight_FD, bias_F, sources, gelu)
    return reference.pack_linear(weight_FD, bias_F, sources, gelu=gelu)


class PanelLinear:
    """x W^T + b from panels of W, remade after an in-place update of any of `sources`."""

    def __init__(
        self, weight_FD: Tensor, bias_F: Tensor | None, sources: Sequence[Tensor], gelu: bool
    ) -> None:
        self.weight, self.bias, self.sources = weight_FD, bias_F, tuple(sources)
        width, depth = weight_FD.shape
        self.panels = weight_FD.new_empty(-(-width // _PANEL) * _PANEL * depth)
        self.version = -1
        self.gelu = gelu
        self.plain = reference.pack_linear(weight_FD, bias_F, sources, gelu=gelu)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [..., F] for x [..., D]; half precision and autocast go to the library."""
        half = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if half or torch.compiler.is_compiling():
            return self.plain(x, out)
        panels = self.current()
        width, depth = self.weight.shape
        rows = unit(x if x.ndim == 3 else x.reshape(1, -1, depth))
        to = rows.new_empty((*rows.shape[:2], width)) if out is None or x.ndim != 3 else out
        native_op("linear")(rows, panels, self.bias, width, self.gelu, to)
        if to is out:
            return out
        y = to.view(*x.shape[:-1], width)
        return y if out is None else out.copy_(y)

    def current(self) -> Tensor:
        """Return the panels of the weight as it is now, always in the same memory."""
        version = version_of(self.sources)
        if version != self.version:
            native_op("pack_panels")(self.weight, self.panels)
            self.version = version
        return self.panels
