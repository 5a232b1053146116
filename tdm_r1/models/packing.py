"""Linears packed: siblings as one GEMM, in the model's dtype, under adapters, or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tdm_kernels import Ops
from tdm_kernels.quantized import ScaledLinear, ScaledRows
from torch import Tensor, nn

from tdm_r1.errors import ConfigError
from tdm_r1.models.lora_linear import AdaptedLinears, LoRALinear, base_of


def join_linears(linears: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Join linears that read the same input into one (weight, bias), detached.

    The parameters become views of the joint storage: no memory is added, and in-place updates of
    either are seen by both.
    """
    if len(linears) == 1:
        bias = linears[0].bias
        return linears[0].weight.detach(), None if bias is None else bias.detach()
    weight = _share([linear.weight for linear in linears])
    has_bias = linears[0].bias is not None
    return weight, _share([linear.bias for linear in linears]) if has_bias else None


def _share(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Make the parameters consecutive views, along the first axis, of one new tensor; return it."""
    joint = torch.cat([parameter.detach() for parameter in parameters])
    views = joint.split([parameter.shape[0] for parameter in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view
    return joint


class Packable(nn.Module):
    """A module with groups of sibling linears that, once packed, run as one GEMM each (inference).

    The packed path is taken only with grad off: its weights are detached, so a graph through it
    would silently lose the gradients of the parameters. Linears with adapters, whose bases are
    frozen, take it for training too.
    """

    groups: tuple[str, ...]
    activated: tuple[str, ...] = ()  # groups whose only reader is GELU: packed, they apply it

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[str, Callable[..., Tensor]] = {}

    def siblings(self, group: str) -> list[Any]:
        """Return the linears of a group, in output order; all read the same input."""
        raise NotImplementedError

    def joint(self, group: str) -> Callable[..., Tensor] | None:
        """Return the group as one linear if the packed path may be taken, else None."""
        packed = self.packed.get(group)
        if not torch.is_grad_enabled():
            return packed
        trained = isinstance(packed, AdaptedLinears) and not torch.compiler.is_compiling()
        return packed if trained else None

    def linear(self, group: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Apply a group of a single linear; `out`, for inference, receives the result."""
        packed = self.joint(group)
        if packed is not None:
            return packed(x, out)
        y = self.siblings(group)[0](x)
        return y if out is None else out.copy_(y)

    def pack(self, ops: Ops, *, adapters: bool = False) -> None:
        """Pack every group of plain linears; with `adapters`, of those that carry some too.

        The bases of the latter must be frozen.
        """
        for group in self.groups:
            linears = self.siblings(group)
            bases = [base_of(linear) for linear in linears]
            adapted = any(isinstance(linear, LoRALinear) for linear in linears)
            if adapted and (not adapters or group in self.activated):
                continue
            if bases and all(type(base) is nn.Linear for base in bases):
                weight, bias = join_linears(bases)
                sources = [p for base in bases for p in base.parameters()]
                packed = ops.pack_linear(weight, bias, sources, gelu=group in self.activated)
                self.packed[group] = AdaptedLinears(packed, weight, linears) if adapted else packed

    def unpack(self) -> None:
        """Give every packed linear its own storage again."""
        for group in self.packed:
            bases = [base_of(linear) for linear in self.siblings(group)]
            for parameter in (p for base in bases for p in base.parameters()):
                if len(bases) > 1:
                    parameter.data = parameter.data.clone()
        self.packed = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copied Parameter no longer shares storage with the joint weight: copies start unpacked.
        return {**self.__dict__, "packed": {}}


class Layer(nn.Module):
    """A block of a transformer, whose linears multiply 8-bit rows while `scaled` is set.

    Whoever makes the rows that a layer reads makes them with `ops_for` of that layer.
    """

    scaled: Ops | None = None
    precision = ""  # the format of those rows
    released = False  # whether its 8-bit weights are all that is left

    def ops_for(self, ops: Ops) -> Ops:
        """Return the ops of 8-bit rows where this layer has them, else `ops`; no gradients pass.

        Raises ConfigError for gradients through a layer that has released its weights.
        """
        if self.scaled is None or not torch.is_grad_enabled():
            return ops if self.scaled is None else self.scaled
        if self.released:
            raise ConfigError(
                f"gradients need whole weights, and these are left in {self.precision} alone"
            )
        return ops

    def pack_scaled(self, name: str, ops: Ops, precision: str) -> None:
        """Pack every linear in `precision`. Raises ConfigError, naming the layer, if one cannot."""
        for module in self.modules():
            if isinstance(module, Packable):
                try:
                    module.pack(ops)
                except ValueError as error:
                    raise ConfigError(f"{name} cannot run in {precision}: {error}") from error
                if set(module.packed) != {g for g in module.groups if module.siblings(g)}:
                    raise ConfigError(f"{name} cannot run in {precision} while it carries adapters")
        self.scaled, self.precision = ops, precision

    def release(self) -> dict[str, ScaledRows]:
        """Give back the memory of weights that the 8-bit ones stand for; return those by name.

        NaN stays in the place of a weight, of its shape.
        """
        names = {id(module): name for name, module in self.named_modules()}
        found: dict[str, ScaledRows] = {}
        for module in [m for m in self.modules() if isinstance(m, Packable)]:
            for group, packed in module.packed.items():
                assert isinstance(packed, ScaledLinear)
                first = 0
                for linear in module.siblings(group):
                    weight = linear.weight
                    found[f"{names[id(linear)]}.weight"] = packed.rows(first, first + len(weight))
                    first += len(weight)
                    weight.data = weight.new_full((), torch.nan).expand(weight.shape)
                packed.release()
        self.released = True
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scaled": None}  # copies start unpacked
