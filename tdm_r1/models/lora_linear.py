"""Linears with named adapters: one by one, and siblings of one input as a few large products.

Shapes: R rows of all samples, D width of the input, F that of all outputs, r the ranks of all
adapters side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tdm_kernels.layout import product_dtype
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Consecutive samples of a batch: (adapter or None for the base alone, how many samples).
Rows = Sequence[tuple[str | None, int]]


class LoRALinear(nn.Module):
    """A linear and its named adapters: at most one of them active, or one for each run of rows.

    y = W x + b + scale * B (A x). The adapter's own dtype holds its two products, so fp32 adapters
    on a bf16 base train in fp32 unless autocast says otherwise.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.active: str | None = None
        self.rows: Rows | None = None

    def add_adapter(self, name: str, rank: int, alpha: float, init: str) -> None:
        """Add an adapter whose B is zero, so it changes nothing until it is trained."""
        weight = self.base_layer.weight
        # fp32 master weights whatever the base is stored in: adapters are what the optimiser steps.
        a = torch.empty(rank, weight.shape[1], device=weight.device)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=5**0.5)
        self.lora_A[name] = nn.Parameter(a)
        self.lora_B[name] = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.ranks[name], self.alphas[name] = rank, alpha

    def select(self, name: str | None) -> None:
        """Make one adapter active for all rows, or none."""
        self.active, self.rows = name, None

    def select_rows(self, rows: Rows) -> None:
        """Give every run of consecutive samples its own adapter, or none; without gradients."""
        self.active = None
        self.rows = tuple((name if name in self.ranks else None, count) for name, count in rows)

    def scale(self, name: str) -> float:
        """Return alpha / r of an adapter."""
        return self.alphas[name] / self.ranks[name]

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(product_dtype(x))  # once for the base and the adapter, where autocast would
        out = self.base_layer(x)
        if self.rows is not None:
            return self._add_rows(out, x, self.rows)
        if self.active is None:
            return out
        return torch.add(
            out, self._update(x, self.active, out.dtype), alpha=self.scale(self.active)
        )

    def _add_rows(self, out: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """Add each run's update in place. x is [B, ..., D], or [1, B, D] for one step's times."""
        assert not torch.is_grad_enabled(), "rows of different adapters have no graph"
        x_RD, out_RF = x.flatten(0, -2), out.flatten(0, -2)
        for run, (name, _) in zip(runs_of(rows, len(x_RD)), rows, strict=True):
            if name is not None:
                out_RF[run].add_(self._update(x_RD[run], name, out.dtype), alpha=self.scale(name))
        return out_RF.view(out.shape)

    def _update(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """B (A x), in the dtype it is added to."""
        a, b = self.lora_A[name], self.lora_B[name]
        # Autocast chooses the dtype of products itself: a cast up would only be undone.
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
        return F.linear(F.linear(x, a), b).to(dtype)


class Part(NamedTuple):
    """One adapter of one of several siblings: y[:, first:end] += scale * B (A x)."""

    first: int
    end: int
    a_rD: Tensor
    b_Fr: Tensor
    scale: float


class AdaptedLinears:
    """Siblings of which some carry adapters: their bases are one product, all A of a run another.

    `base` computes x W^T + b for the joint weight [F, D] of all bases. They are frozen: gradients
    reach x and the adapters. The choice of adapters is the siblings' own, at every call.
    """

    def __init__(
        self, base: Callable[..., Tensor], weight_FD: Tensor, siblings: Sequence[nn.Module]
    ) -> None:
        self.base, self.weight = base, weight_FD
        self.linears: list[tuple[int, int, LoRALinear]] = []
        first = 0
        for linear in siblings:
            end = first + base_of(linear).weight.shape[0]
            if isinstance(linear, LoRALinear):
                self.linears.append((first, end, linear))
            first = end

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [..., F] of x [..., D]; `out`, without gradients, receives it."""
        x = x.to(product_dtype(x))  # once for the bases and the adapters, where autocast would
        if torch.is_grad_enabled():
            assert self.linears[0][2].rows is None, "rows of different adapters have no graph"
            parts = self.parts([linear.active for _, _, linear in self.linears])
            return _Adapted.apply(x, self, parts, *(t for p in parts for t in (p.a_rD, p.b_Fr)))
        y = self.base(x)
        y_RF, x_RD = y.flatten(0, -2), x.flatten(0, -2)
        for run, names in self.runs(len(x_RD)):
            add_updates(y_RF[run], x_RD[run], self.parts(names))
        return y if out is None else out.copy_(y)

    def parts(self, names: Sequence[str | None]) -> list[Part]:
        """Return what the adapters of these names, one for each sibling that has any, add."""
        return [
            Part(first, end, linear.lora_A[name], linear.lora_B[name], linear.scale(name))
            for (first, end, linear), name in zip(self.linears, names, strict=True)
            if name is not None
        ]

    def runs(self, num_rows: int) -> Iterator[tuple[slice, list[str | None]]]:
        """Yield runs of rows, and every sibling's adapter there."""
        chosen = [linear.rows for _, _, linear in self.linears]
        if chosen[0] is None:
            yield slice(0, num_rows), [linear.active for _, _, linear in self.linears]
            return
        yield from zip(
            runs_of(chosen[0], num_rows),
            ([name for name, _ in run] for run in zip(*chosen, strict=True)),
            strict=True,
        )


def base_of(linear: nn.Module) -> Any:
    """Return the plain linear under an adapter's wrapper, or the linear itself."""
    return linear.base_layer if isinstance(linear, LoRALinear) else linear


def runs_of(rows: Rows, num_rows: int) -> Iterator[slice]:
    """Yield the rows of every run of samples; the rows of a sample lie together."""
    per_sample, rest = divmod(num_rows, sum(count for _, count in rows))
    assert not rest, f"{num_rows} rows are not those of {rows}"
    first = 0
    for _, count in rows:
        yield slice(first, first + count * per_sample)
        first += count * per_sample


def add_updates(y_RF: Tensor, x_RD: Tensor, parts: Sequence[Part]) -> Tensor | None:
    """Add what `parts` say to y, in place; return x A^T of all of them [R, r]. No gradients."""
    if not parts:
        return None
    dtype = adapter_dtype(x_RD, parts[0].a_rD)
    h_Rr = torch.mm(x_RD.to(dtype), joined(parts, dtype).t())
    for part, h in zip(parts, h_Rr.split([len(p.a_rD) for p in parts], dim=1), strict=True):
        y, b = y_RF[:, part.first : part.end], part.b_Fr.to(dtype)
        if y.dtype == dtype:
            y.addmm_(h, b.t(), alpha=part.scale)
        else:
            y.add_(torch.mm(h, b.t()).to(y.dtype), alpha=part.scale)
    return h_Rr


def joined(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """Return every part's A, one under the other, [r, D]."""
    return torch.cat([part.a_rD.to(dtype) for part in parts])


def adapter_dtype(x: Tensor, a: Tensor) -> torch.dtype:
    """Return the dtype of an adapter's two products: autocast's, or else the adapter's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype


class _Adapted(torch.autograd.Function):
    """Gradients of `AdaptedLinears` in x, and in every A and B; products in their own dtypes."""

    @staticmethod
    def forward(ctx, x, group, parts, *tensors):
        y = group.base(x)
        x_RD = x.flatten(0, -2)
        h_Rr = add_updates(y.flatten(0, -2), x_RD, parts)
        ctx.save_for_backward(x_RD, h_Rr, *tensors)
        ctx.group, ctx.shape = group, x.shape
        ctx.places = [(part.first, part.end, part.scale) for part in parts]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_RD, h_Rr, *tensors = ctx.saved_tensors
        parts = [
            Part(first, end, a, b, scale)
            for (first, end, scale), a, b in zip(
                ctx.places, tensors[::2], tensors[1::2], strict=True
            )
        ]
        dy_RF = dy.flatten(0, -2)
        dx_RD = None
        if ctx.needs_input_grad[0]:
            dx_RD = torch.mm(dy_RF.to(x_RD.dtype), ctx.group.weight.to(x_RD.dtype))
        grads: list[Tensor] = []
        if parts:
            dtype = h_Rr.dtype
            dh_Rr, ranks = torch.empty_like(h_Rr), [len(part.a_rD) for part in parts]
            for part, h, dh in zip(parts, h_Rr.split(ranks, 1), dh_Rr.split(ranks, 1), strict=True):
                d = dy_RF[:, part.first : part.end].to(dtype)
                torch.mm(d, part.b_Fr.to(dtype) * part.scale, out=dh)
                grads.append(torch.mm(d.t(), h).to(part.b_Fr.dtype) * part.scale)
            da_rD = torch.mm(dh_Rr.t(), x_RD.to(dtype)).to(parts[0].a_rD.dtype)
            grads = [g for pair in zip(da_rD.split(ranks), grads, strict=True) for g in pair]
            if dx_RD is not None:
                a_rD = joined(parts, dtype)
                if dx_RD.dtype == dtype:
                    dx_RD.addmm_(dh_Rr, a_rD)
                else:
                    dx_RD += torch.mm(dh_Rr, a_rD).to(dx_RD.dtype)
        return (None if dx_RD is None else dx_RD.view(ctx.shape)), None, None, *grads
