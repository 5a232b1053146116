"""A directory in diffusers format <-> one of our transformers, strictly."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.files import save_tensors
from tdm_r1.models.layers import Transformer, name_some
from tdm_r1.models.sd3 import SD3Config, SD3Transformer
from tdm_r1.models.zimage import ZImageConfig, ZImageTransformer

CLASSES: dict[str, tuple[Any, Any]] = {
    "SD3Transformer2DModel": (SD3Config, SD3Transformer),
    "ZImageTransformer2DModel": (ZImageConfig, ZImageTransformer),
}
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def load_transformer(
    path: str | Path,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Build the transformer of a model directory (or of its `transformer` folder) and load it.

    dtype None keeps the dtype of the file. Raises LoadError when the directory, its config or its
    weights are missing, damaged or of another model, naming every tensor that is missing, extra or
    misshapen.
    """
    model, folder = empty_transformer(path, backend=backend)
    tensors = read_weights(folder)
    check_tensors(model, tensors, folder)
    model.load_state_dict(tensors, assign=True)
    return model.to(device=device, dtype=dtype or model.dtype)


def empty_transformer(path: str | Path, *, backend: str = "auto") -> tuple[Transformer, Path]:
    """Build a directory's transformer on the meta device: names and shapes, but no weights.

    Also returns the folder that its config.json is in. Raises LoadError when that file is missing,
    damaged or of another model.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config = read_json(folder / "config.json")
    class_name = config.get("_class_name")
    if class_name not in CLASSES:
        raise LoadError(
            f"{folder / 'config.json'} describes {class_name!r}; supported: {sorted(CLASSES)}"
        )
    config_class, model_class = CLASSES[class_name]
    try:
        parsed = config_class.from_dict(config)
    except ConfigError as error:
        raise LoadError(f"{folder / 'config.json'}: {error}") from error
    # On the meta device nothing is allocated or initialised only to be overwritten.
    with torch.device("meta"):
        return model_class(parsed, backend=backend), folder


def save_transformer(
    model: Transformer, path: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write config.json and the weights as diffusers' `from_pretrained` reads them.

    Raises ConfigError for a model that still carries adapters: merge or save those on their own;
    and for one whose weights are left in 8 bits alone.
    """
    model.check_whole("saved")
    state = model.state_dict()
    adapters = [name for name in state if ".lora_A." in name or ".base_layer." in name]
    if adapters:
        raise ConfigError(f"merge the adapters before saving the model: {name_some(adapters)}")
    class_name = next(name for name, (_, kind) in CLASSES.items() if isinstance(model, kind))
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": class_name, **asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    # Copies: tensors of a frozen model are views of joint storage, which the format cannot express.
    tensors = {name: value.to("cpu", dtype, copy=True) for name, value in state.items()}
    save_tensors(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; LoadError names the file if it is missing or not one."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise LoadError(f"{path} must hold a JSON object")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a folder, from one safetensors file or from the shards of an index."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if (folder / WEIGHTS_NAME).is_file() or not index.is_file():
        return read_safetensors(folder / WEIGHTS_NAME)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise LoadError(f"{index} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors.update(read_safetensors(folder / shard))
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read one safetensors file; LoadError names the file if it is missing or damaged."""
    if not path.is_file():
        raise LoadError(f"weights file {path} does not exist")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise LoadError(f"weights file {path} is damaged: {error}") from error


def check_tensors(model: Transformer, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise LoadError listing every tensor that is missing, extra or misshapen."""
    if found := misfits(model.state_dict(), tensors):
        raise LoadError(f"weights in {folder} do not fit its config.json; {'; '.join(found)}")


def misfits(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Say which tensors are missing, which are extra and which misshapen; empty if none is."""
    shared = [name for name in expected if name in tensors]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "not part of this model": [name for name in tensors if name not in expected],
        "of the wrong shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in shared
            if tensors[name].shape != expected[name].shape
        ],
    }
    return [f"{kind}: {name_some(names)}" for kind, names in problems.items() if names]
