"""Rows in e4m3 or int8 with their scales, and the linear that reads them, whoever multiplies.

Shapes: B batch, T tokens, D width, F output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of zeros, and of numbers too small to scale, keep a scale with a finite reciprocal.
SMALLEST_SCALE = 2.0**-126
# What both sides of a weight are multiples of: tensor cores ask for it.
MULTIPLES = {torch.float8_e4m3fn: 16, torch.int8: 8}
# The first compute capability whose tensor cores multiply e4m3.
E4M3_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Quantized:
    """Rows in 8 bits, each with its scale: stands for values * scale.

    values [..., D] float8_e4m3fn or int8, contiguous; scale [..., 1] fp32. Has a shape, a length,
    and items along the first axis, as a tensor has: both modulations of one norm unpack. `dtype` is
    that of a linear's results for these rows.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor it stands for."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Quantized:
        return Quantized(self.values[index], self.scale[index], self.dtype)

    def dequantize(self) -> Tensor:
        """Return values * scale in fp32."""
        return self.values.float() * self.scale


@dataclass(frozen=True)
class ScaledRows:
    """Some rows of a weight in 8 bits, where they lie, and the `quantize_rows` that makes them."""

    live: Quantized
    quantize: Callable[[Tensor], Quantized]

    def write(self, weight_FD: Tensor) -> Quantized:
        """Replace them by those of `weight_FD`, in place; return what was written."""
        fresh = self.quantize(weight_FD)
        self.live.values.copy_(fresh.values)
        self.live.scale.copy_(fresh.scale)
        return fresh


class ScaledLinear:
    """A linear over W in 8 bits, quantised anew after an in-place update of any of `sources`.

    `quantize` and `multiply` are a format's quantize_rows and scaled_linear on some backend;
    `activate`, if given, its GELU-tanh, applied to the result.
    """

    def __init__(
        self,
        weight_FD: Tensor,
        bias_F: Tensor | None,
        sources: Sequence[Tensor],
        quantize: Callable[[Tensor], Quantized],
        multiply: Callable[[Quantized, Quantized, Tensor | None], Tensor],
        activate: Callable[[Tensor], Quantized] | None = None,
    ) -> None:
        self.weight: Tensor | None = weight_FD
        self.bias, self.sources = bias_F, tuple(sources)
        self.quantize, self.multiply, self.activate = quantize, multiply, activate
        self.version = version_of(self.sources)
        self.quantized = quantize(weight_FD)
        check_product(self.quantized, self.quantized, bias_F)

    def rows(self, first: int, last: int) -> ScaledRows:
        """Return the rows from `first` to before `last`, in place."""
        live = Quantized(self.quantized.values[first:last], self.quantized.scale[first:last])
        return ScaledRows(live, self.quantize)

    def release(self) -> None:
        """Let go of W: from now on `rows` alone is how it changes."""
        self.weight, self.sources = None, ()

    def __call__(self, x: Tensor | Quantized, out: Tensor | None = None) -> Tensor | Quantized:
        """Return [..., F] for x [..., D], in `out` if given; with `activate`, its 8-bit rows.

        A CUDA graph replays without this: `current` before. Raises ValueError for `out` and
        `activate` together, which nothing could hold.
        """
        if out is not None and self.activate is not None:
            raise ValueError("out cannot receive activated rows: they leave in 8 bits")
        rows = x if isinstance(x, Quantized) else self.quantize(x)
        y = self.multiply(rows, self.current(), self.bias)
        if self.activate is not None:
            return self.activate(y)
        return y if out is None else out.copy_(y)

    def current(self) -> Quantized:
        """Return the weight as it is now."""
        if self.weight is None:
            return self.quantized
        if torch.compiler.is_compiling():
            # A trace sees no versions, and must not keep the weight of its first call.
            return self.quantize(self.weight)
        if self.version != (version := version_of(self.sources)):
            # In place: CUDA graphs have recorded the addresses.
            self.rows(0, len(self.quantized)).write(self.weight)
            self.version = version
        return self.quantized


def version_of(sources: Sequence[Tensor]) -> int:
    """Return a number that every in-place update of a source raises.

    Inference tensors keep no count: updates of theirs go unseen.
    """
    return sum(0 if source.is_inference() else source._version for source in sources)


def check_product(x: Quantized, weight_FD: Quantized, bias_F: Tensor | None) -> None:
    """Raise ValueError for what `scaled_linear` cannot multiply."""
    shape = tuple(weight_FD.shape)
    multiple = MULTIPLES[weight_FD.values.dtype]
    if len(shape) != 2 or shape[0] % multiple or shape[1] % multiple:
        raise ValueError(f"weight must be [F, D], multiples of {multiple}, not {list(shape)}")
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x must have rows of {shape[1]}, not the shape {list(x.shape)}")
    if bias_F is not None and bias_F.shape != shape[:1]:
        raise ValueError(f"bias must be [{shape[0]}], not {list(bias_F.shape)}")
