"""An export directory -> a Pipeline whose parts are graphs, for the Engine to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdm_r1.errors import ConfigError
from tdm_r1.exported.manifest import ENGINES_ONLY, NAME, Manifest, check_files, read_manifest
from tdm_r1.exported.plan import open_plans
from tdm_r1.exported.session import Session
from tdm_r1.exported.tensorrt import RUNTIMES, device_of_engines
from tdm_r1.exported.transformer import ExportedSD3, ExportedTransformer, ExportedZImage
from tdm_r1.models.loading import CLASSES
from tdm_r1.pipeline import Pipeline
from tdm_r1.text import SD3TextEncoder, TextEncoder, ZImageTextEncoder, load_tokenizer
from tdm_r1.vae import VAE

BACKENDS = ("onnx", *RUNTIMES)
CPU = torch.device("cpu")


def is_export(name_or_dir: str | Path) -> bool:
    """Whether this is the directory of a finished export."""
    return (Path(name_or_dir).expanduser() / NAME).is_file()


def load_exported(
    root: str | Path,
    *,
    lora: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str = "onnx",
) -> Pipeline:
    """Open an export of this `backend`: it runs in the steps it was made for, taking fp32.

    "onnx" runs its graphs on the CPU, "tensorrt-rtx" and "tensorrt" its engines on a GPU. Raises
    LoadError for a directory that is no finished, unchanged export, ConfigError for what an export
    cannot do any more (take a LoRA, move, change its dtype), and as `device_of_engines` does.
    """
    root = Path(root).expanduser().resolve()  # a refit reads it again
    if lora is not None:
        raise ConfigError(
            f"lora is {str(lora)!r}: merge it with `tdm-r1-export --lora`, or `Engine.refit` an"
            " export that was made with --refit"
        )
    if dtype not in ("auto", "float32", torch.float32):
        raise ConfigError(
            f"dtype is {str(dtype)!r}; allowed with backend={backend!r}: 'auto', 'float32'"
        )
    manifest = read_manifest(root)
    if backend in RUNTIMES:
        gpu = device_of_engines(root, manifest, backend, device)
        check_files(root, manifest)
        return assemble(root, manifest, open_plans(root, manifest, backend, gpu), gpu)
    if device not in ("auto", "cpu", CPU):
        raise ConfigError(f"device is {str(device)!r}; allowed with backend='onnx': 'auto', 'cpu'")
    if manifest.precision in ENGINES_ONLY:
        engines, instead = manifest.engines, ""
        if engines is not None:
            instead = f"backend={engines['runtime']!r} runs its engines, and "
        raise ConfigError(
            f"{root} is in {manifest.precision}, whose matrices ONNX Runtime does not multiply on a"
            f" CPU; {instead}`tdm-r1-export --precision fp32` makes graphs that it runs"
        )
    check_files(root, manifest)
    return open_parts(root, manifest)


def open_parts(root: Path, manifest: Manifest) -> Pipeline:
    """Open the graphs of `manifest` in `root` on ONNX Runtime, without checking the files."""
    graphs = {name: Session(root / graph["file"]) for name, graph in manifest.graphs.items()}
    return assemble(root, manifest, graphs)


def assemble(
    root: Path, manifest: Manifest, graphs: Mapping[str, Any], device: torch.device = CPU
) -> Pipeline:
    """Make a Pipeline of the opened graphs of `manifest`, called as `Session` is, on `device`."""
    config = CLASSES[manifest.transformer["_class_name"]][0].from_dict(manifest.transformer)
    transformer: ExportedTransformer
    if manifest.family == "sd3":
        transformer = ExportedSD3(config, config.attention_head_dim, manifest, graphs, device)
    else:
        head_dim = config.dim // config.n_heads
        transformer = ExportedZImage(config, head_dim, manifest, graphs, device)
    return Pipeline(
        family=manifest.family,
        transformer=transformer,
        text=_text_encoder(root, manifest, graphs, device),
        vae=ExportedVAE(manifest, graphs["vae_decoder"]),
        shift=manifest.shift,
        default_solver=manifest.schedule.solver,
        default_size=manifest.default_size,
        name=manifest.model,
        path=root,
        schedule=manifest.schedule,
        text_axis=manifest.axes["text"],
    )


class ExportedVAE(VAE):
    """The decoder of a VAE as a graph."""

    def __init__(self, manifest: Manifest, graph: Any) -> None:
        self.manifest, self.graph = manifest, graph
        self.latent_channels = manifest.vae["latent_channels"]
        self.scale_factor = manifest.vae["scale_factor"]
        self.sample_size = manifest.vae["sample_size"]

    def parameters(self) -> list[Tensor]:
        """None: the graph has them."""
        return []

    def unclamped(self, latents_BChw: Tensor) -> Tensor:
        """As in `VAE`, but in [0, 1]; ConfigError for sizes outside the export's axes."""
        b, _, height, width = latents_BChw.shape
        scale = self.scale_factor
        self.manifest.check(batch=b, height=height * scale, width=width * scale)
        return self.graph(latents_BChw)[0]

    def decode_tiled(self, latents_BChw: Tensor, side: int) -> Tensor:
        """Decode whole: tiles at the edges could be smaller than what the graph takes."""
        return self.decode(latents_BChw)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Raise ConfigError: an export only draws."""
        raise ConfigError("an export holds the VAE's decoder only, and cannot encode images")


def _text_encoder(
    root: Path, manifest: Manifest, graphs: Mapping[str, Any], device: torch.device
) -> TextEncoder:
    def pair(suffix: str, axis: str | None = None) -> tuple:
        graph = graphs[f"text_encoder{suffix}"]
        return load_tokenizer(root / f"tokenizer{suffix}"), _features(graph, manifest, axis)

    if manifest.family == "zimage":
        return ZImageTextEncoder(*pair("", "text"), device=device)
    t5 = pair("_3", "text") if "text_encoder_3" in graphs else None
    return SD3TextEncoder(
        [pair(""), pair("_2")],
        t5,
        width=manifest.text["width"],
        t5_length=manifest.text["t5_length"],
        device=device,
    )


def _features(graph: Any, manifest: Manifest, axis: str | None) -> Callable:
    """A text encoder's graph as `text` calls it: any number of prompts, in parts that fit."""

    def run(ids_BT: Tensor) -> Tensor | tuple[Tensor, ...]:
        if axis is not None:
            manifest.check(**{axis: ids_BT.shape[1]})
        parts = [graph(part) for part in ids_BT.split(manifest.axes["batch"][1])]
        outputs = tuple(torch.cat(output) for output in zip(*parts, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    return run
