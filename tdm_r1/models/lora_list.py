"""The published TDM and TDM-R1 checkpoints: adapters as a bare list of tensors.

`tdmr1_zimage_ema.ckpt` and `tdm_sd3-5_lora.ckpt` are torch files of one dict whose `ema_parameters`
is a LIST in the order of PEFT's `named_parameters`: module by module as registered, A before B.
Nothing but that order says which tensor belongs where, so counts and every shape are checked.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tdm_r1.errors import LoadError
from tdm_r1.models.layers import Transformer
from tdm_r1.models.lora import TARGETS, LoRALinear, LoraTensors, find_targets
from tdm_r1.models.lora_files import load_lora_file
from tdm_r1.models.sd3 import SD3Config, SD3Transformer
from tdm_r1.models.zimage import ZImageConfig, ZImageTransformer

KEY = "ema_parameters"
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SCALE = 2.0  # alpha / r = 64 / 32, which the file itself does not say

# What the published lists belong to, by their length.
PUBLISHED: dict[int, Callable[[], Transformer]] = {
    272: lambda: ZImageTransformer(ZImageConfig()),
    382: lambda: SD3Transformer(
        SD3Config(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    ),
}


def load_lora(path: str | Path, model: Transformer | None = None) -> dict[str, LoraTensors]:
    """Read adapters of any layout: `load_lora_list` for a torch file, else `load_lora_file`.

    `model` is asked for the names that a list lacks, and may be on the meta device; None stands for
    the published model of the list's length. Raises LoadError.
    """
    if Path(path).suffix in SUFFIXES:
        return load_lora_list(path, model)
    return load_lora_file(path)


def load_lora_list(path: str | Path, model: Transformer | None = None) -> dict[str, LoraTensors]:
    """Name the tensors of a published checkpoint: module name -> (A [r, in], B [out, r], 2.0).

    They are taken in order, A then B, by the linears of `TARGETS` in registration order. Tensors
    keep the file's dtype. Raises LoadError for a file that is not such a list, a length that is
    not two per linear, and, naming module and place, the first tensor of another shape.
    """
    values = _read_list(Path(path))
    if model is None:
        if len(values) not in PUBLISHED:
            known = " or ".join(map(str, PUBLISHED))
            raise LoadError(
                f"{path} holds {len(values)} tensors; the published checkpoints hold {known}: "
                "name the model it belongs to"
            )
        with torch.device("meta"):
            model = PUBLISHED[len(values)]()
    linears = find_targets(model, TARGETS[model.family])
    if len(values) != 2 * len(linears):
        raise LoadError(
            f"{path} holds {len(values)} tensors; this {model.family} model needs "
            f"{2 * len(linears)}, two for each of {len(linears)} linears"
        )
    rank = values[0].shape[0]
    tensors = {}
    for index, (name, module) in enumerate(linears.items()):
        linear = module.base_layer if isinstance(module, LoRALinear) else module
        a, b = values[2 * index : 2 * index + 2]
        _check_shape(path, 2 * index, f"{name}.lora_A", a, [rank, linear.in_features])
        _check_shape(path, 2 * index + 1, f"{name}.lora_B", b, [linear.out_features, rank])
        tensors[name] = LoraTensors(a, b, SCALE)
    return tensors


def _read_list(path: Path) -> Sequence[Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(f"cannot read LoRA checkpoint {path}: {reason[0]}") from error
    values = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(values, (list, tuple)):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content)
        raise LoadError(f"{path} has no list {KEY!r}; it holds {found or 'nothing'}")
    odd = [i for i, v in enumerate(values) if not isinstance(v, Tensor) or v.ndim != 2]
    if odd or not values:
        what = f"entry {odd[0]} is no matrix" if odd else "the list is empty"
        raise LoadError(f"{path} is no list of LoRA tensors: {what}")
    return values


def _check_shape(path: str | Path, place: int, name: str, value: Tensor, shape: list[int]) -> None:
    if list(value.shape) != shape:
        raise LoadError(f"{path}: tensor {place} is {list(value.shape)}; {name} is {shape}")
