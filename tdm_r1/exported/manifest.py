"""`export.json`: what an exported model holds, for which shapes, and how it was checked.

It is written last and carries a digest of itself and of every other file: an interrupted export has
none, and one that was edited by hand is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tdm_r1 import flow
from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.files import sha256
from tdm_r1.models.loading import read_json

NAME = "export.json"
FORMAT = 4
REFIT = "refit.safetensors"  # the unmerged weights, in an export whose LoRA can be changed
TENSORRT_RTX = "tensorrt-rtx"  # the runtime of the engines
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by precision
PRECISIONS = (*DTYPES, "fp8")  # the last is bf16 with products of e4m3
ENGINES_ONLY = ("bf16", "fp8")  # what ONNX Runtime does not multiply on a CPU
OPTIONS = {"batch": "--batch", "height": "--heights", "width": "--widths", "text": "--text"}


@dataclass(frozen=True)
class Manifest:
    """The content of `export.json`.

    model: name or directory as asked for; lora: likewise what was merged in place of the model's
        own, or None. source tells the files of both.
    transformer: config.json of the transformer, with its class name.
    vae: latent_channels, scale_factor and sample_size of the VAE.
    text: what the text encoder is built from: its width, and of SD3 the padded lengths.
    axes: (lowest, highest) of batch (images), height and width (pixels), text (tokens: of SD3 those
        of T5, of Z-Image those of the prompt in its chat template).
    graphs: by name, file, inputs and outputs with their axes, the profile: of each input the
        lowest, the typical and the highest shape, the weights: initializer -> the weight of the
        model that it holds, and whether transposed; and the ops that are plugins, by name, with
        their constants and the number of their nodes. files: path -> sha256.
    precision: "fp32", "bf16" or "fp16", of weights and products, or "fp8", e4m3 in some products of
        the transformer and otherwise bf16; inputs and outputs are fp32.
    fp8: None, or the layers in e4m3 and what was measured of all, as `Static.to_dict` has it.
    source: file of the model -> sha256. parity: what the gate measured, in half precision without
        rounding, with it under "rounded" beside the drift of a whole loop and the Engine's, and of
        each graph the largest value that is not fp32.
    engines: None, or runtime, version, precision and compute_capabilities of the TensorRT engines,
        of TensorRT proper the GPU's name ("device"), and by graph the file of each and how many of
        its layers, and of each kind, give each dtype, and of those that were fused have it.
    """

    family: str
    model: str
    lora: str | None
    precision: str
    transformer: dict[str, Any]
    vae: dict[str, int]
    text: dict[str, int]
    default_size: int
    shift: float
    schedule: flow.Schedule
    axes: dict[str, tuple[int, int]]
    graphs: dict[str, dict[str, Any]]
    files: dict[str, str]
    source: dict[str, str]
    versions: dict[str, str]
    parity: dict[str, Any]
    fp8: dict[str, Any] | None
    engines: dict[str, Any] | None

    @property
    def refittable(self) -> bool:
        """Whether the export holds what another LoRA is merged into."""
        return REFIT in self.files

    def check(self, **sizes: int) -> None:
        """Raise ConfigError for a size outside its axis, naming the option that widens it."""
        for name, size in sizes.items():
            low, high = self.axes[name]
            if not low <= size <= high:
                raise ConfigError(
                    f"{name} is {size}; allowed in this export: {low} to {high}"
                    f" (tdm-r1-export {OPTIONS[name]} makes another)"
                )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `root/export.json`, its own digest included."""
    values = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**values, "sha256": _digest(values)}, indent=1)
    (root / NAME).write_text(text + "\n")


def read_manifest(root: Path) -> Manifest:
    """Read `root/export.json`; `check_files` is for the rest.

    Raises LoadError when it is missing, of another format or changed.
    """
    path = root / NAME
    if not path.is_file():
        raise LoadError(
            f"{root} is no export: it has no {NAME}, which an interrupted export does not leave"
            " and tdm-r1-export writes last"
        )
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise LoadError(f"{path} has format {values.get('format')!r}; this version reads {FORMAT}")
    if values.pop("sha256", None) != _digest(values):
        raise LoadError(f"{path} was changed after the export: its digest differs; export again")
    del values["format"]
    values["schedule"] = _schedule(values["schedule"])
    values["axes"] = {name: tuple(ends) for name, ends in values["axes"].items()}
    return Manifest(**{field.name: values[field.name] for field in fields(Manifest)})


def check_files(root: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Raise LoadError unless the files of these names, or all, are those that were exported.

    Of all, those of the folders have to be listed, too: a tokenizer reads whatever lies in its own.
    Reads every file once: about a second per gigabyte.
    """
    for name in manifest.files if names is None else names:
        if not (root / name).is_file():
            raise LoadError(f"{root} lacks {name}, which its {NAME} lists")
        if sha256(root / name) != manifest.files[name]:
            raise LoadError(f"{root / name} is not the file that was exported: its sha256 differs")
    found = root.glob("*/**/*") if names is None else ()
    for path in sorted(path for path in found if path.is_file()):
        hidden = path.name.startswith(".")  # a desktop's, which no tokenizer reads
        if not hidden and path.relative_to(root).as_posix() not in manifest.files:
            raise LoadError(f"{path} was added after the export: {NAME} does not list it")


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of the values, independent of how they are laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _schedule(values: dict[str, Any]) -> flow.Schedule:
    return flow.Schedule(
        values["solver"],
        tuple(values["sigmas"]),
        tuple(values["timesteps"]),
        tuple((a, b, c) for a, b, c in values["coefficients"]),
    )
