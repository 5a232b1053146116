"""New weights for a frozen transformer, written over the old ones.

Nothing moves: packed linears, recordings and CUDA graphs read the new weights where they read the
old. What is made of them besides (kernels' panels, 8-bit rows) is made anew in place; a weight that
is left in 8 bits alone is folded as any other, rounded to the model's dtype and quantised.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tdm_kernels.quantized import Quantized, version_of
from torch import Tensor

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.models.layers import Transformer, name_some
from tdm_r1.models.loading import misfits
from tdm_r1.models.lora import lora_modules


@dataclass(frozen=True)
class Update:
    """What an update did: all `num_tensors` were accounted for, `num_written` had changed.

    `checksum` is the sum, modulo 2^64, of the bits of all that was written.
    """

    num_tensors: int
    num_written: int
    checksum: int


class Source(NamedTuple):
    """Where a weight comes from: W, or W + scale * B A."""

    weight: Tensor
    a_rI: Tensor | None = None
    b_Or: Tensor | None = None
    scale: float = 0.0

    def value(self, like: Tensor) -> Tensor:
        """Return the weight in `like`'s dtype, on its device; folded in fp32 and rounded once."""
        if self.a_rI is None or self.b_Or is None:
            return self.weight.to(like.device, like.dtype)
        a, b = self.a_rI.to(like.device).float(), self.b_Or.to(like.device).float()
        weight = self.weight.to(like.device).float()
        return torch.add(weight, torch.mm(b, a), alpha=self.scale).to(like.dtype)

    def stamp(self, trained: bool) -> Stamp | None:
        """Tell this state from others; None if it cannot be told.

        An optimizer may write past the version counter, so what is trained counts as changed.
        """
        tensors = [x for x in (self.weight, self.a_rI, self.b_Or) if x is not None]
        if trained:
            return None
        states = [(weakref.ref(x), x.data_ptr(), version_of((x,))) for x in tensors]
        return Stamp(self.scale, tuple(states))


class Stamp(NamedTuple):
    """The state of a source: its scale, and which tensors it has, where, in which version."""

    scale: float
    tensors: tuple[tuple[weakref.ref, int, int], ...]

    def same(self, other: Stamp) -> bool:
        """Whether nothing changed in between; a tensor that is gone may have left its address."""
        if (self.scale, len(self.tensors)) != (other.scale, len(other.tensors)):
            return False
        return all(
            mine() is not None and mine() is theirs() and state == others
            for (mine, *state), (theirs, *others) in zip(self.tensors, other.tensors, strict=True)
        )


def sources_of(model: torch.nn.Module, adapter: str | None) -> dict[str, tuple[Source, bool]]:
    """Return every weight of a model with `adapter` folded in, by the plain model's names.

    The second of each pair says whether something of it is being trained.
    """
    found: dict[str, tuple[Source, bool]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_A." not in name and ".lora_B." not in name:
            source = Source(tensor)
            found[name.replace(".base_layer.", ".")] = source, tensor.requires_grad
    for path, module in lora_modules(model):
        if adapter is not None and adapter in module.ranks:
            weight, a, b = module.base_layer.weight, module.lora_A[adapter], module.lora_B[adapter]
            folded = Source(weight, a, b, module.scale(adapter))
            found[f"{path}.weight"] = folded, any(x.requires_grad for x in (weight, a, b))
    return found


class LiveWeights:
    """The weights of a frozen transformer, to be replaced as often as training asks."""

    def __init__(self, transformer: Transformer) -> None:
        """Raises ConfigError for a transformer that is not frozen, or holds no weights."""
        if not transformer.frozen or not transformer.weights:
            raise ConfigError(
                "only a frozen transformer of PyTorch weights can be updated in place:"
                " call freeze() first"
            )
        self.transformer, self.released = transformer, transformer.released
        self.tensors = transformer.state_dict()
        self.places = _places(transformer)
        self.stamps: dict[str, tuple[Stamp, int] | None] = {}

    def is_of(self, transformer: Transformer) -> bool:
        """Whether these are the weights of `transformer`, as they lie now."""
        if self.transformer is not transformer or self.released is not transformer.released:
            return False
        return self.places == _places(transformer)  # moving or packing makes new tensors

    def update(self, source: Any) -> Update:
        """Take the weights of `source`, and prove that each one arrived.

        `source` is a role (anything with a `transformer` and an `adapter`, a name or None), a
        transformer, or a mapping of all its weights by name. Raises LoadError naming every weight
        that is missing, extra or misshapen, before anything is written, and for a weight that does
        not read back as written; ConfigError for weights that are the live ones themselves.
        """
        if isinstance(source, Mapping):
            found = {name: (Source(tensor), True) for name, tensor in source.items()}
        else:
            model = getattr(source, "transformer", source)
            if not isinstance(model, Transformer):
                raise ConfigError(
                    f"weights come from a role, a transformer or a mapping, not {type(source)}"
                )
            found = sources_of(model, getattr(source, "adapter", None))
        self._check({name: source.weight for name, (source, _) in found.items()})
        with torch.no_grad():
            wrote = self._write(found)
            self.transformer.refresh()
            return self._verify(wrote)

    def _check(self, weights: dict[str, Tensor]) -> None:
        if problems := misfits(self.tensors, weights):
            raise LoadError(f"these weights are not of this model; {'; '.join(problems)}")
        places = {x.untyped_storage().data_ptr() for x in self.tensors.values()}
        shared = [n for n, x in weights.items() if x.untyped_storage().data_ptr() in places]
        if shared:
            raise ConfigError(f"an update cannot read what it writes: {name_some(shared)}")

    def _write(self, found: dict[str, tuple[Source, bool]]) -> dict[str, Tensor]:
        """Write what changed; returns the sums of its bits by name, still on the device."""
        sums: dict[str, Tensor] = {}
        for name, live in self.tensors.items():
            source, trained = found[name]
            stamp = source.stamp(trained)
            known = self.stamps.get(name)
            if stamp and known and known[1] == version_of((live,)) and stamp.same(known[0]):
                continue
            value = source.value(live)
            if name in self.released:
                sums[name] = _sum_of_bits(self.released[name].write(value))
            else:
                live.copy_(value)
                sums[name] = _sum_of_bits(value)
            self.stamps[name] = None if stamp is None else (stamp, version_of((live,)))
        return sums

    def _verify(self, wrote: dict[str, Tensor]) -> Update:
        """Read all that was written once more: views that overlap by mistake show now."""
        if not wrote:
            return Update(len(self.tensors), 0, 0)
        expected = torch.stack(list(wrote.values())).tolist()
        lives = [r.live if (r := self.released.get(n)) else self.tensors[n] for n in wrote]
        got = torch.stack([_sum_of_bits(live) for live in lives]).tolist()
        pairs = zip(wrote, expected, got, strict=True)
        if lost := [name for name, a, b in pairs if a != b]:
            raise LoadError(f"weights did not arrive as they were written: {name_some(lost)}")
        return Update(len(self.tensors), len(wrote), sum(expected) % 2**64)


def _places(transformer: Transformer) -> list[int]:
    return [tensor.data_ptr() for tensor in transformer.state_dict().values()]


def _sum_of_bits(x: Tensor | Quantized) -> Tensor:
    """Sum of the elements' bits as int64: the same for the same elements in any order."""
    if isinstance(x, Quantized):
        return _sum_of_bits(x.values) + _sum_of_bits(x.scale)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.view(whole).sum(dtype=torch.int64)
