"""Low-rank adapters: several named ones per linear for training, merged ones for inference.

An adapter adds scale * B A to a weight W [out, in], with A [r, in], B [out, r], scale = alpha / r.
The linears that carry them: lora_linear.py.
Files of adapters: lora_files.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdm_r1.errors import ConfigError, LoadError, closest
from tdm_r1.models.layers import Transformer, name_some
from tdm_r1.models.lora_linear import LoRALinear, Rows

# The linears the published TDM-R1 adapters train, as suffixes of module names.
TARGETS = {
    "sd3": tuple(
        f"attn.{name}"
        for name in (
            "to_q",
            "to_k",
            "to_v",
            "add_k_proj",
            "add_v_proj",
            "add_q_proj",
            "to_out.0",
            "to_add_out",
        )
    ),
    "zimage": tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
}


class LoraTensors(NamedTuple):
    """One module's update scale * B A."""

    a_rI: Tensor
    b_Or: Tensor
    scale: float


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield (name, module) of every linear that carries adapters, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def inject(
    model: nn.Module,
    adapter_names: Sequence[str],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    init: str = "gaussian",
) -> None:
    """Give every targeted linear one adapter per name; all start inactive and trainable.

    A target is a module name or a dotted suffix of one ("attn.to_q" does not match "attn2.to_q").
    init: "gaussian" (A ~ N(0, 1/r^2)) or "kaiming"; B is zero. The base's `requires_grad` is left
    alone. Raises ConfigError for a target that matches nothing, a bad rank, alpha, init or name, or
    a name already in use.
    """
    if init not in ("gaussian", "kaiming"):
        raise ConfigError(f"init={init!r} must be 'gaussian' or 'kaiming'")
    if rank < 1 or alpha <= 0:
        raise ConfigError(f"rank={rank} must be at least 1 and alpha={alpha} positive")
    found = find_targets(model, targets)
    for name in adapter_names:
        if not name.isidentifier():
            raise ConfigError(f"adapter name {name!r} must be a plain identifier")
        if any(isinstance(m, LoRALinear) and name in m.ranks for m in found.values()):
            raise ConfigError(f"adapter {name!r} is already in use")
    if isinstance(model, Transformer):
        # A packed weight bypasses the modules that are about to be wrapped.
        model.unfreeze()
    for path, module in found.items():
        if not isinstance(module, LoRALinear):
            parent, _, leaf = path.rpartition(".")
            module = LoRALinear(module)
            model.get_submodule(parent)._modules[leaf] = module
        for name in adapter_names:
            module.add_adapter(name, rank, alpha, init)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Activate one adapter everywhere, or none (the base model). Leaves `requires_grad` alone."""
    modules = [module for _, module in lora_modules(model)]
    _check_adapters(modules, [name])
    for module in modules:
        module.select(name if name in module.ranks else None)


def set_rows(model: nn.Module, rows: Rows) -> None:
    """Give runs of consecutive samples an adapter each (None: the base), until the next choice.

    One batch then asks several models that share their base. The model computes without gradients,
    for as many samples as `rows` counts, their times one step (K = 1). Raises ConfigError for an
    unknown adapter.
    """
    modules = [module for _, module in lora_modules(model)]
    _check_adapters(modules, [name for name, _ in rows])
    for module in modules:
        module.select_rows(rows)


def _check_adapters(modules: Sequence[LoRALinear], names: Iterable[str | None]) -> None:
    known = {adapter for module in modules for adapter in module.ranks}
    for name in names:
        if name is not None and name not in known:
            raise ConfigError(f"no adapter {name!r}; known: {sorted(known)}.{closest(name, known)}")


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return an adapter's parameters as "<module>.lora_A.weight" and "<module>.lora_B.weight".

    Keys do not hold the adapter's name, so two adapters of one model compare key by key.
    """
    parameters: dict[str, nn.Parameter] = {}
    for path, module in lora_modules(model):
        if name in module.ranks:
            parameters[f"{path}.lora_A.weight"] = module.lora_A[name]
            parameters[f"{path}.lora_B.weight"] = module.lora_B[name]
    if not parameters:
        raise ConfigError(f"no adapter {name!r} in this model")
    return parameters


def adapter_tensors(model: nn.Module, name: str) -> dict[str, LoraTensors]:
    """Return an adapter in the form `merge_lora` takes, detached and not copied."""
    return {
        path: LoraTensors(
            module.lora_A[name].detach(), module.lora_B[name].detach(), module.scale(name)
        )
        for path, module in lora_modules(model)
        if name in module.ranks
    }


def merge_lora(
    model: nn.Module, tensors: Mapping[str, tuple[Tensor, Tensor, float]], scale: float = 1.0
) -> None:
    """Fold W += scale * s * B A into every named linear, in fp32, then round once to W's dtype.

    `tensors` maps a module name to (A, B, s), s = alpha / r. Every entry must fit: otherwise
    LoadError names all that do not and the model is unchanged. A frozen model stays frozen.
    """
    weights = check_lora(model, tensors)
    with torch.no_grad():
        for name, (a, b, s) in tensors.items():
            # In place: a frozen model's packed weights are the same memory.
            weight = weights[name]
            delta = torch.mm(b.to(weight.device).float(), a.to(weight.device).float())
            weight.copy_(weight.float().add_(delta, alpha=scale * s))


def check_lora(
    model: nn.Module, tensors: Mapping[str, tuple[Tensor, Tensor, float]]
) -> dict[str, Tensor]:
    """Return the weight that each entry of `merge_lora`'s `tensors` belongs to.

    Raises LoadError naming every entry without a linear, and every one that its linear cannot take;
    ConfigError for a model whose weights are left in 8 bits alone.
    """
    if isinstance(model, Transformer):
        model.check_whole("merged with a LoRA")
    modules = dict(model.named_modules())
    wrong, weights = [], {}
    for name, (a, b, _) in tensors.items():
        module = modules.get(name)
        linear = module.base_layer if isinstance(module, LoRALinear) else module
        if not isinstance(linear, nn.Linear):
            wrong.append(f"{name} (no such linear)")
        elif (b.shape[0], a.shape[1]) != tuple(linear.weight.shape) or a.shape[0] != b.shape[1]:
            wrong.append(
                f"{name} (B {tuple(b.shape)} A {tuple(a.shape)}: {tuple(linear.weight.shape)})"
            )
        else:
            weights[name] = linear.weight
    if wrong:
        raise LoadError(f"LoRA does not fit this model: {name_some(wrong)}")
    return weights


def find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """Return the linears (wrapped or not) that some target names, in registration order.

    A target is a module name or a dotted suffix of one. Raises ConfigError for one that matches
    nothing, and for no targets at all.
    """
    found: dict[str, Any] = {}
    unused = set(targets)
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, LoRALinear)) or name.endswith(".base_layer"):
            continue
        names.append(name)
        hits = [t for t in targets if name == t or name.endswith(f".{t}")]
        unused.difference_update(hits)
        if hits:
            found[name] = module
    if unused or not found:
        wrong = sorted(unused)
        hint = closest(wrong[0], names) if wrong else ""
        raise ConfigError(f"LoRA targets {wrong} match no linear of this model.{hint}")
    return found
