"""An export directory -> a Pipeline whose parts are graphs, for the Engine to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdm_r1.errors import ConfigError
from tdm_r1.exported.manifest import NAME, TENSORRT_RTX, Manifest, read_manifest
from tdm_r1.exported.session import Session
from tdm_r1.exported.transformer import ExportedSD3, ExportedTransformer, ExportedZImage
from tdm_r1.models.loading import CLASSES
from tdm_r1.pipeline import Pipeline
from tdm_r1.text import SD3TextEncoder, TextEncoder, ZImageTextEncoder, load_tokenizer
from tdm_r1.vae import VAE

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
    """Open an export on ONNX Runtime. It runs on the CPU, in fp32, in the steps it was made for.

    Raises LoadError for a directory that is no finished, unchanged export, ConfigError for what an
    export cannot do any more: take a LoRA, move, change its dtype; and for `backend=TENSORRT_RTX`,
    whose engines are built but not run.
    """
    root = Path(root).expanduser()
    if backend == TENSORRT_RTX:
        raise ConfigError(f"backend is {backend!r}: {_why_no_engine(root)}")
    if lora is not None:
        raise ConfigError(f"lora is {str(lora)!r}: merge it with `tdm-r1-export --lora`")
    if device not in ("auto", "cpu", CPU):
        raise ConfigError(f"device is {str(device)!r}; allowed with backend='onnx': 'auto', 'cpu'")
    if dtype not in ("auto", "float32", torch.float32):
        raise ConfigError(
            f"dtype is {str(dtype)!r}; allowed with backend='onnx': 'auto', 'float32'"
        )
    manifest = read_manifest(root)
    if manifest.precision == "bf16":
        raise ConfigError(
            f"{root} is in bf16, whose matrices ONNX Runtime does not multiply on a CPU;"
            " `tdm-r1-export --precision fp32` makes graphs that it runs"
        )
    return open_parts(root, manifest)


def _why_no_engine(root: Path) -> str:
    """What keeps the engines of an export from running; LoadError where there is no export."""
    if read_manifest(root).engines is None:
        return f"{root} holds no engines; `tdm-r1-export --trt` builds them"
    instead = "backend='onnx' runs this export on the CPU"
    if not torch.cuda.is_available():
        return f"it needs a CUDA GPU, and this machine has none; {instead}"
    return f"this version builds engines and does not run them yet; {instead}"


def open_parts(root: Path, manifest: Manifest) -> Pipeline:
    """Open the graphs of `manifest` in `root` on ONNX Runtime, without checking the files."""
    graphs = {name: Session(root / graph["file"]) for name, graph in manifest.graphs.items()}
    return assemble(root, manifest, graphs)


def assemble(root: Path, manifest: Manifest, graphs: Mapping[str, Any]) -> Pipeline:
    """Make a Pipeline of the opened graphs of `manifest`, called as `Session` is."""
    config = CLASSES[manifest.transformer["_class_name"]][0].from_dict(manifest.transformer)
    transformer: ExportedTransformer
    if manifest.family == "sd3":
        transformer = ExportedSD3(config, config.attention_head_dim, manifest, graphs)
    else:
        transformer = ExportedZImage(config, config.dim // config.n_heads, manifest, graphs)
    return Pipeline(
        family=manifest.family,
        transformer=transformer,
        text=_text_encoder(root, manifest, graphs),
        vae=ExportedVAE(manifest, graphs["vae_decoder"]),
        shift=manifest.shift,
        default_solver=manifest.schedule.solver,
        default_size=manifest.default_size,
        name=manifest.model,
        path=root,
        schedule=manifest.schedule,
    )


class ExportedVAE(VAE):
    """The decoder of a VAE as a graph."""

    def __init__(self, manifest: Manifest, graph: Any) -> None:
        self.manifest, self.graph = manifest, graph
        self.latent_channels = manifest.vae["latent_channels"]
        self.scale_factor = manifest.vae["scale_factor"]
        self.sample_size = manifest.vae["sample_size"]

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """As in `VAE`; ConfigError for sizes outside the export's axes."""
        b, _, height, width = latents_BChw.shape
        scale = self.scale_factor
        self.manifest.check(batch=b, height=height * scale, width=width * scale)
        return self.graph(latents_BChw)[0]

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Raise ConfigError: an export only draws."""
        raise ConfigError("an export holds the VAE's decoder only, and cannot encode images")


def _text_encoder(root: Path, manifest: Manifest, graphs: Mapping[str, Any]) -> TextEncoder:
    def pair(suffix: str, axis: str | None = None) -> tuple:
        graph = graphs[f"text_encoder{suffix}"]
        return load_tokenizer(root / f"tokenizer{suffix}"), _features(graph, manifest, axis)

    if manifest.family == "zimage":
        return ZImageTextEncoder(*pair("", "text"), device=CPU)
    t5 = pair("_3", "text") if "text_encoder_3" in graphs else None
    return SD3TextEncoder(
        [pair(""), pair("_2")],
        t5,
        width=manifest.text["width"],
        t5_length=manifest.text["t5_length"],
        device=CPU,
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
