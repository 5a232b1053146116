"""Models in half precision, or in fp8 beside bf16, and the gate of their graphs.

The gate has two parts. Without rounding, a graph must agree with the Engine in fp32 on the same
(rounded) weights to the fp32 tolerance: the wiring is right. With it, its error against that Engine
may be twice that of the Engine in half precision, plus 2 ulp: the rule of `tdm_kernels.testing`.

In fp8 the Engine in half precision is one whose linears round by the very scales of the graph
(`static_fp8.emulated`), and the weights are the rounded ones. Steps are held to it in the mean of
squares: the largest error is that of a few values that fell to the other side, 6 % away. What two
such roundings differ in is as large as what they err by, so this does not tell one scale from its
double: `check_pairs` reads the scales from the file.

In fp16 the largest number is 65504, and models overflow it: Z-Image's feed-forward reaches 6e4. The
first part of the gate therefore measures every value that would be fp16, and refuses the export
where one comes within a factor of `HEADROOM` of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, ExportError, closest
from tdm_r1.export.emulation import Watched, write_rounded, write_wide
from tdm_r1.export.graphs import Axes
from tdm_r1.export.parity import check, encoders
from tdm_r1.exported.loading import assemble, open_parts
from tdm_r1.exported.manifest import DTYPES, PRECISIONS, Manifest
from tdm_r1.pipeline import Pipeline, load_pipeline
from tdm_r1.vae import VAE

HEADROOM = 2.0  # other prompts reach further than the gate's few


def check_precision(
    precision: str, calibration: str | Path | None = None, refit: bool = False
) -> None:
    """Raise ConfigError unless `precision` is one of PRECISIONS and goes with the options."""
    if precision not in PRECISIONS:
        allowed = ", ".join(PRECISIONS)
        hint = closest(precision, PRECISIONS)
        raise ConfigError(f"--precision is {precision!r}; allowed: {allowed}.{hint}")
    if calibration is not None and precision != "fp8":
        raise ConfigError("--calibration goes with --precision fp8")
    if refit and precision == "fp8":
        raise ConfigError(
            "--refit does not go with --precision fp8: the scales are measured on the weights as"
            " they are exported; export again with another --lora"
        )


def load_low(model: str | Path, lora: str | Path | None, precision: str) -> Pipeline:
    """Load `model` on the CPU in bf16, also for fp8, or fp16; its LoRA is merged before rounding.

    The Engine knows no fp16: there the fp32 model is cast. Buffers outside of the transformer stay
    fp32, since they hold angles.
    """
    if precision in ("bf16", "fp8"):
        return load_pipeline(model, lora=lora, device="cpu", dtype="bfloat16")
    dtype = DTYPES[precision]
    pipeline = load_pipeline(model, lora=lora, device="cpu", dtype="float32")
    pipeline.transformer.to(dtype)
    for module in (pipeline.vae.model, *_text_modules(pipeline)):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
    pipeline.vae = VAE(pipeline.vae.model, backend=pipeline.vae.backend)  # its ops are for a dtype
    return pipeline


@torch.no_grad()
def copy_weights(source: Pipeline, target: Pipeline) -> None:
    """Give `target`, of the same model in fp32, the weights of `source` as they were rounded."""
    for theirs, ours in zip(_tensors(source), _tensors(target), strict=True):
        ours.copy_(theirs)
    target.text.clear_cache()


def check_low(
    exact: Engine, low: Engine, root: Path, manifest: Manifest, axes: Axes
) -> dict[str, Any]:
    """Hold the graphs of `manifest` in `root` to both Engines; returns what was measured.

    `exact` computes in fp32 on the weights of `low`. Raises ExportError, naming the tensor, for an
    error above what is allowed, and naming node and module for a value too large for fp16. ONNX
    Runtime runs the fp16 graph itself, and of any other the rounded form.
    """
    files = {name: root / graph["file"] for name, graph in manifest.graphs.items()}
    spare = {name: path.with_suffix(".rewritten.onnx") for name, path in files.items()}
    options: dict[str, Any] = {
        "steps": exact.schedule.num_steps,
        "solver": exact.schedule.solver,
        "decode_limit": exact.decode_limit,
    }
    try:
        watched = {
            name: write_wide(path, spare[name], manifest.precision) for name, path in files.items()
        }
        exported = Engine(assemble(root, manifest, watched), **options)
        measured = check(exact, exported, axes)
        measured["largest"] = {name: _largest(graph) for name, graph in watched.items()}
        if manifest.precision == "fp16":
            _refuse_overflow(measured["largest"])
            opened = open_parts(root, manifest)
        else:
            graphs = {}
            for name, path in files.items():
                write_rounded(path, spare[name], manifest.precision)
                graphs[name] = {**manifest.graphs[name], "file": spare[name].name}
            opened = open_parts(root, replace(manifest, graphs=graphs))
        exported = Engine(opened, **options)
        in_mean = ("loop", "transformer") if manifest.precision == "fp8" else ("loop",)
        measured["rounded"] = check(exact, exported, axes, low, in_mean)
    finally:
        for path in spare.values():
            path.unlink(missing_ok=True)
    return measured


def _largest(graph: Watched) -> dict[str, Any]:
    """The largest value of a graph, and where it is."""
    if not graph.largest:
        return {"value": 0.0, "where": "nowhere"}
    value = max(graph.largest)
    return {"value": value, "where": graph.places[graph.largest.index(value)]}


def _refuse_overflow(largest: dict[str, dict[str, Any]]) -> None:
    name = max(largest, key=lambda part: largest[part]["value"])
    limit = torch.finfo(torch.float16).max / HEADROOM
    if largest[name]["value"] > limit:
        raise ExportError(
            f"{name} overflows in fp16: {largest[name]['where']} reaches"
            f" {largest[name]['value']:.3g}, and fp16 ends at 65504 (allowed: {limit:.0f}, other"
            " prompts reaching further); use --precision bf16"
        )


def _text_modules(pipeline: Pipeline) -> list[nn.Module]:
    return [features for features, _ in encoders(pipeline.text).values()]


def _tensors(pipeline: Pipeline) -> Iterator[Tensor]:
    """Every parameter, and every buffer of floating point, in an order that follows the model."""
    vae: Any = pipeline.vae
    for module in (pipeline.transformer, vae.model, *_text_modules(pipeline)):
        tensors = chain(module.parameters(), module.buffers())
        yield from (tensor for tensor in tensors if tensor.is_floating_point())
