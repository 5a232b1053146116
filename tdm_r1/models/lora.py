"""Low-rank adapters: several named ones per linear for training, merged ones for inference.

An adapter adds scale * B A to a weight W [out, in], with A [r, in], B [out, r], scale = alpha / r.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_r1.errors import ConfigError, LoadError, closest
from tdm_r1.models.layers import Transformer, name_some

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
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
_PREFIXES = ("base_model.model.", "transformer.")
_PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<a>lora_A(?:\.\w+)?\.weight|lora[._]down\.weight)"
    r"|(?P<b>lora_B(?:\.\w+)?\.weight|lora[._]up\.weight)|(?P<alpha>alpha))"
)


class LoraTensors(NamedTuple):
    """One module's update scale * B A."""

    a_rI: Tensor
    b_Or: Tensor
    scale: float


class LoRALinear(nn.Module):
    """A linear and its named adapters, at most one of which is active.

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
        self.select(None)

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
        """Make one adapter active, or none."""
        self.active = name

    def scale(self, name: str) -> float:
        """Return alpha / r of an adapter."""
        return self.alphas[name] / self.ranks[name]

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        name = self.active
        if name is None:
            return out
        a, b = self.lora_A[name], self.lora_B[name]
        low = F.linear(x.to(a.dtype), a) * self.scale(name)
        return out + F.linear(low, b).to(out.dtype)


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
    found = _find_targets(model, targets)
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
    known = {adapter for _, module in lora_modules(model) for adapter in module.ranks}
    if name is not None and name not in known:
        raise ConfigError(f"no adapter {name!r}; known: {sorted(known)}.{closest(name, known)}")
    for _, module in lora_modules(model):
        module.select(name if name in module.ranks else None)


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
    modules = dict(model.named_modules())
    wrong, updates = [], []
    for name, (a, b, s) in tensors.items():
        module = modules.get(name)
        linear = module.base_layer if isinstance(module, LoRALinear) else module
        if not isinstance(linear, nn.Linear):
            wrong.append(f"{name} (no such linear)")
        elif (b.shape[0], a.shape[1]) != tuple(linear.weight.shape) or a.shape[0] != b.shape[1]:
            wrong.append(
                f"{name} (B {tuple(b.shape)} A {tuple(a.shape)}: {tuple(linear.weight.shape)})"
            )
        else:
            updates.append((linear.weight, a, b, scale * s))
    if wrong:
        raise LoadError(f"LoRA does not fit this model: {name_some(wrong)}")
    with torch.no_grad():
        for weight, a, b, s in updates:
            # In place: a frozen model's packed weights are the same memory.
            delta = torch.mm(b.to(weight.device).float(), a.to(weight.device).float())
            weight.copy_(weight.float().add_(delta, alpha=s))


def save_lora(
    path: str | Path,
    model: nn.Module,
    adapter: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one adapter as diffusers' `load_lora_weights` reads it, scale included.

    `path` is a .safetensors file, or a directory for the default file name; returns the file. Rank
    and alpha go into the header's adapter metadata; `metadata` adds entries of the caller's own.
    `dtype` None keeps the adapter's.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / WEIGHTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"transformer.{key}": value.detach().to("cpu", dtype).contiguous()
        for key, value in adapter_parameters(model, adapter).items()
    }
    # One (rank, alpha) per adapter: `inject` gives all its modules the same.
    carriers = {name: module for name, module in lora_modules(model) if adapter in module.ranks}
    first = next(iter(carriers.values()))
    config = {
        "transformer.r": first.ranks[adapter],
        "transformer.lora_alpha": first.alphas[adapter],
        "transformer.target_modules": sorted(carriers),
    }
    header = {"format": "pt", **(metadata or {}), METADATA_KEY: json.dumps(config)}
    safetensors.torch.save_file(tensors, path, metadata=header)
    return path


def load_lora_file(path: str | Path) -> dict[str, LoraTensors]:
    """Read a LoRA safetensors file (or the directory that holds one): module name -> (A, B, scale).

    Key layouts: "transformer.<module>.lora_A.weight", "base_model.model.<module>.lora_A.weight",
    with or without an adapter name before ".weight", and "lora.down" / "lora.up". The scale is
    alpha / r with alpha from, in order: a "<module>.alpha" tensor, the file's adapter metadata, an
    adapter_config.json beside it; without any it is 1, as in diffusers. Raises LoadError for an
    unreadable file, a key of another layout, or half a pair.
    """
    path = _find_lora_file(Path(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            raw = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise LoadError(f"cannot read LoRA file {path}: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in raw.items():
        match = _PART.fullmatch(_strip_prefix(key))
        if match is None or key.startswith("text_encoder"):
            unknown.append(key)
        else:
            kind = next(kind for kind in ("a", "b", "alpha") if match[kind])
            parts.setdefault(match["module"], {})[kind] = tensor
    unknown += [
        f"{name} (half a pair)" for name, part in parts.items() if not {"a", "b"} <= set(part)
    ]
    if unknown or not parts:
        raise LoadError(f"{path} is not a LoRA of a transformer: {name_some(unknown) or 'empty'}")
    config = _adapter_config(path, header)
    return {
        name: LoraTensors(part["a"], part["b"], _scale(name, part, config))
        for name, part in parts.items()
    }


def _find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """Return the linears (wrapped or not) that some target names, in registration order."""
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


def _find_lora_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (WEIGHTS_NAME, "adapter_model.safetensors"):
        if (path / name).is_file():
            return path / name
    raise LoadError(f"no {WEIGHTS_NAME} in {path}")


def _strip_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _adapter_config(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's adapter settings, from the file's header or from the file beside it."""
    beside = path.parent / "adapter_config.json"
    try:
        if METADATA_KEY in header:
            config = json.loads(header[METADATA_KEY])
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            config = json.loads(beside.read_text())
        else:
            return {}
    except ValueError as error:
        raise LoadError(f"adapter metadata of {path} is not JSON: {error}") from error
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if config.get("use_dora"):
        raise LoadError(f"{path} is a DoRA adapter, which cannot be merged as a LoRA")
    return config


def _scale(name: str, part: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
    rank = part["a"].shape[0]
    if "alpha" in part:
        return float(part["alpha"]) / rank
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            alpha = value
    if alpha is None:
        return 1.0
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
