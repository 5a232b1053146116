"""LoRA files in the layouts of diffusers, PEFT and ComfyUI: read and written.

| layout | key of A, key of B | scale |
|---|---|---|
| diffusers | transformer.<module>.lora_A.weight, .lora_B.weight | JSON in the file's header |
| peft | base_model.model.<module>.lora_A.weight, ... | adapter_config.json beside the file |
| comfyui | diffusion_model.<its module>.lora_A.weight, ... | <its module>.alpha tensors |

ComfyUI reads no header and no JSON: given a file of the other layouts it takes the scale for 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from tdm_r1.errors import ConfigError, LoadError, closest
from tdm_r1.files import save_tensors
from tdm_r1.models.layers import name_some
from tdm_r1.models.lora import LoraTensors, adapter_tensors
from tdm_r1.models.lora_comfyui import from_comfyui, to_comfyui

LAYOUTS = ("diffusers", "peft", "comfyui")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
METADATA_KEY = "lora_adapter_metadata"
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
_PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<a>lora_A(?:\.\w+)?\.weight|lora[._]down\.weight)"
    r"|(?P<b>lora_B(?:\.\w+)?\.weight|lora[._]up\.weight)|(?P<alpha>alpha))"
)


def save_lora(
    path: str | Path,
    model: nn.Module,
    adapter: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one adapter of a model as diffusers' `load_lora_weights` reads it: see `write_lora`."""
    return write_lora(path, adapter_tensors(model, adapter), metadata=metadata, dtype=dtype)


def write_lora(
    path: str | Path,
    tensors: Mapping[str, LoraTensors],
    layout: str = "diffusers",
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write adapters, scale included; returns the file.

    `path` is a .safetensors file, or a directory for the layout's own file name; PEFT reads a
    directory alone, so "peft" takes nothing else. `metadata` adds header entries of the caller's
    own; `dtype` None keeps each tensor's. Raises ConfigError for an unknown layout, for no tensors,
    and for a module that the layout has no name for.
    """
    if layout not in LAYOUTS:
        hint = closest(layout, LAYOUTS)
        raise ConfigError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}.{hint}")
    if not tensors:
        raise ConfigError("there is no adapter to write")
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / (PEFT_NAME if layout == "peft" else WEIGHTS_NAME)
    elif layout == "peft":
        raise ConfigError(f"layout 'peft' is a directory of two files; {path} names one file")
    header = {"format": "pt", **(metadata or {})}
    if layout == "comfyui":
        prefix, tensors = "diffusion_model.", to_comfyui(tensors)
    else:
        prefix = "transformer." if layout == "diffusers" else "base_model.model."
    values: dict[str, Tensor] = {}
    for name, (a, b, scale) in tensors.items():
        values[f"{prefix}{name}.lora_A.weight"] = a.detach().to("cpu", dtype).contiguous()
        values[f"{prefix}{name}.lora_B.weight"] = b.detach().to("cpu", dtype).contiguous()
        if layout == "comfyui":
            values[f"{prefix}{name}.alpha"] = torch.tensor(scale * a.shape[0])
    if layout == "diffusers":
        settings = _settings(tensors)
        header[METADATA_KEY] = json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(values, path, metadata=header)
    if layout == "peft":
        config = {"peft_type": "LORA", "base_model_name_or_path": None, **_settings(tensors)}
        path.with_name("adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


def load_lora_file(path: str | Path) -> dict[str, LoraTensors]:
    """Read a LoRA safetensors file (or the directory that holds one): module name -> (A, B, scale).

    Reads the three layouts above, with or without an adapter name before ".weight", and
    "lora.down" / "lora.up". Tensors keep the file's dtype. The scale is alpha / r with alpha from,
    in order: a "<module>.alpha" tensor, the file's adapter metadata, an adapter_config.json beside
    it; without any it is 1, as in diffusers. Raises LoadError for an unreadable file, a key of
    another layout, half a pair, or two adapters for one module.
    """
    path = find_lora_file(path)
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
            part = parts.setdefault(match["module"], {})
            if kind in part:
                unknown.append(f"{key} (a second adapter)")
            part[kind] = tensor
    unknown += [
        f"{name} (half a pair)" for name, part in parts.items() if not {"a", "b"} <= set(part)
    ]
    if unknown or not parts:
        raise LoadError(f"{path} is not a LoRA of a transformer: {name_some(unknown) or 'empty'}")
    config = _adapter_config(path, header)
    return from_comfyui(
        {
            name: LoraTensors(part["a"], part["b"], _scale(name, part, config))
            for name, part in parts.items()
        }
    )


def _settings(tensors: Mapping[str, LoraTensors]) -> dict[str, Any]:
    """PEFT's LoraConfig for these adapters: the most frequent rank and alpha, patterns for others.

    A pattern is matched against the end of a module's name, so a full name matches itself.
    """
    ranks = {name: entry.a_rI.shape[0] for name, entry in tensors.items()}
    alphas = {name: entry.scale * entry.a_rI.shape[0] for name, entry in tensors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        "target_modules": sorted(tensors),
    }


def find_lora_file(path: str | Path) -> Path:
    """Return the file that a LoRA given as a file or as its directory is in; `~` is the home.

    Raises LoadError for a directory without one.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    for name in (WEIGHTS_NAME, PEFT_NAME):
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
        elif path.name == PEFT_NAME and beside.is_file():
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
