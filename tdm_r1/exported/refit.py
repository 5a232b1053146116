"""Another LoRA in an export: the weights that a fresh export with it would hold, put in place.

An export made for it carries `refit.safetensors`: the unmerged weights of all linears that its two
graphs of the transformer hold by name, in the dtype that a LoRA is folded into.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tdm_r1.errors import ConfigError
from tdm_r1.exported.manifest import DTYPES, REFIT, Manifest, check_files
from tdm_r1.exported.transformer import ExportedTransformer
from tdm_r1.models.layers import name_some
from tdm_r1.models.loading import CLASSES
from tdm_r1.models.lora import merge_lora
from tdm_r1.models.lora_list import load_lora
from tdm_r1.pipeline import Pipeline

PARTS = ("context", "transformer")


def refit(pipeline: Pipeline, lora: str | Path | None) -> None:
    """Give an opened export the weights of its model with `lora`; None: those it was made with.

    Exactly what `tdm-r1-export --lora` would store, merged in fp32 and rounded once. Raises
    ConfigError for a pipeline that is no export, one without `--refit`, engines that cannot be
    refitted, or a LoRA that changes what the graphs hold as constants; LoadError for one that does
    not fit the model, or for files that are not those of the export any more. With these nothing
    has changed; anything else on the way leaves engines as they were made, graphs as they were.
    """
    transformer = pipeline.transformer
    if not isinstance(transformer, ExportedTransformer):
        raise ConfigError(
            f"{pipeline.name} is no export, and only those are refitted; load it again with lora="
        )
    if not transformer.manifest.refittable:
        raise ConfigError(f"{pipeline.path} cannot be refitted: make it by tdm-r1-export --refit")
    manifest = transformer.manifest
    own = [name for name in manifest.files if name == REFIT or name.split(".")[0] in PARTS]
    check_files(pipeline.path, manifest, own)
    parts: dict[str, Any] = dict(zip(PARTS, (transformer.encode, transformer.step), strict=True))
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in PARTS}
    if lora is not None:
        weights = merged_weights(pipeline.path, manifest, lora)
    try:
        made = [part.refit(weights[name]) for name, part in parts.items()]
    except ConfigError:
        raise
    except BaseException:
        changed = [part for part in parts.values() if part.in_place]
        for part in changed:
            part.refit({})
        pipeline.lora = None if changed else pipeline.lora
        raise
    transformer.encode, transformer.step = made
    pipeline.lora = None if lora is None else Path(lora)


def merged_weights(
    root: Path, manifest: Manifest, lora: str | Path
) -> dict[str, dict[str, Tensor]]:
    """Return, by graph and initializer, all weights of the export in `root` with `lora` merged.

    In the dtype and the order of axes that the graph has; also those that the LoRA leaves alone,
    since another may have changed them. Raises as `refit` does.
    """
    config_class, kind = CLASSES[manifest.transformer["_class_name"]]
    with torch.device("meta"):
        model = kind(config_class.from_dict(manifest.transformer))
    update = load_lora(lora, model)
    stored = safetensors.torch.load_file(root / REFIT)
    linears = dict(model.named_modules())
    constant = [n for n in update if n in linears and f"{n}.weight" not in stored]
    if constant:
        raise ConfigError(
            f"{lora} changes what this export holds as constants: {name_some(constant)}; merge it"
            " with tdm-r1-export --lora"
        )
    for name, weight in stored.items():
        linears[name.removesuffix(".weight")].weight = nn.Parameter(weight, requires_grad=False)
    merge_lora(model, update)
    dtype = DTYPES[manifest.precision]
    found: dict[str, dict[str, Tensor]] = {}
    for part in PARTS:
        found[part] = {}
        for name, entry in manifest.graphs[part]["weights"].items():
            weight = model.get_parameter(entry["weight"]).data.to(dtype)
            found[part][name] = (weight.T if entry["transposed"] else weight).contiguous()
    return found
