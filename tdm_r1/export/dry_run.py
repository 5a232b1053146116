"""`tdm-r1-export --dry-run`: the graphs of a published transformer at full size, without weights.

The model is built of tensors that have shapes and no memory, traced and translated to ONNX ops;
nothing is fetched and no file kept. With `--trt` its engines are built too, of random weights, in a
folder that is removed then. Text encoders and VAE are left out.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tdm_r1 import flow
from tdm_r1.arguments import check_solver
from tdm_r1.errors import ConfigError, closest
from tdm_r1.export.build import check_axes, default_axes
from tdm_r1.export.graphs import Axes, Graph, make_graphs
from tdm_r1.export.onnx_graph import LOW_OPSET, check_installed, count_nodes, write_graph
from tdm_r1.export.precision import DTYPES, check_precision
from tdm_r1.export.tensorrt import Target, build_engine
from tdm_r1.models.layers import Transformer
from tdm_r1.models.published import CONFIGS
from tdm_r1.models.sd3 import SD3Config, SD3Transformer
from tdm_r1.models.zimage import ZImageTransformer
from tdm_r1.pipeline import Pipeline

SHIFT, SIZE = 3.0, 1024  # of both stored schedulers, and of both models' pictures
CLIP_TOKENS, T5_TOKENS = 77, 256
LATENT_CHANNELS, SCALE = 16, 8


@dataclass(frozen=True)
class Counted:
    """One graph. nodes: before the exporter folds constants; bytes: of parameters and tables."""

    name: str
    nodes: int
    parameters: int
    bytes: int
    inputs: dict[str, list[int | str]]
    seconds: float


@dataclass(frozen=True)
class Built:
    """One engine. bytes: of its file; products: how many matrix products give which dtype."""

    name: str
    bytes: int
    seconds: float
    products: dict[str, int]


def dry_run(
    model: str,
    *,
    axes: Axes | None = None,
    steps: int = 4,
    solver: str = "auto",
    precision: str = "fp32",
    layers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Counted]:
    """Trace the graphs of `model`, one of `published.CONFIGS`, and count what is in them.

    `axes`, `steps`, `solver` and `precision` as in `export_model`; `layers` keeps so many of the
    blocks over image and text. `say` hears of the ranges and of every graph. Raises ConfigError for
    an unknown model or sizes it does not take, ExportError for a graph that cannot be made or whose
    axes come out fixed.
    """
    _check(model, precision)
    times = _times(solver, steps)
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        transformer = _build(CONFIGS[model], layers, DTYPES[precision])
        chosen, graphs = _make_graphs(transformer, axes, times)
        say(", ".join(f"{name} {low} to {high}" for name, (low, high) in chosen.items()))
        for graph in graphs:
            started = time.perf_counter()
            nodes, inputs = count_nodes(graph, _opset(precision))
            tensors = [*graph.module.parameters(), *graph.module.buffers()]
            counted = Counted(
                graph.name,
                nodes,
                sum(parameter.numel() for parameter in graph.module.parameters()),
                sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                inputs,
                time.perf_counter() - started,
            )
            found.append(counted)
            say(_line(counted))
    return found


def dry_build(
    model: str,
    target: Target,
    *,
    axes: Axes | None = None,
    steps: int = 4,
    solver: str = "auto",
    precision: str = "fp32",
    layers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Built]:
    """Build the engines of what `dry_run` traces, of random weights, and keep none of them.

    Takes memory for the weights about three times, and room for them twice where temporary files
    go. What a build does depends on shapes and dtypes, not on the weights' values. Arguments as of
    `dry_run`. Raises as it does, and as `Target.check`, `write_graph` and `build_engine` do;
    ConfigError for a target with plugins or to refit.
    """
    _check(model, precision)
    if target.plugins or target.refit:
        raise ConfigError("--plugins and --refit do not go with --dry-run")
    target.check(precision)
    times = _times(solver, steps)
    with tempfile.TemporaryDirectory(prefix="tdm-r1-export-") as folder:
        root, entries = Path(folder), {}
        _, graphs = _make_graphs(
            _build_random(CONFIGS[model], layers, DTYPES[precision]), axes, times
        )
        with torch.no_grad():
            for graph in graphs:
                say(f"{graph.name}: writing the graph with random weights")
                entries[graph.name] = write_graph(graph, root, _opset(precision))
        del graphs, graph
        gc.collect()  # traced modules are in cycles, and their memory is wanted
        return [_build_engine(root, name, entry, target, say) for name, entry in entries.items()]


def _build_engine(
    root: Path, name: str, entry: dict[str, Any], target: Target, say: Callable[[str], None]
) -> Built:
    started, path = time.perf_counter(), root / f"{name}.engine"
    found = build_engine(root / entry["file"], path, entry["profile"], target, say)
    products = found["kinds"].get("MATRIX_MULTIPLY", {})
    built = Built(name, path.stat().st_size, time.perf_counter() - started, products)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in products.items())
    say(f"{path.name}: {built.bytes / 1e9:.2f} GB, {built.seconds:.0f} s; products: {dtypes}")
    return built


def _check(model: str, precision: str) -> None:
    check_precision(precision)
    if precision == "fp8":
        raise ConfigError(
            "--precision fp8 does not go with --dry-run: which products are in fp8 is measured on"
            " weights, and there are none; --precision bf16 traces the same graphs"
        )
    check_installed()
    if model not in CONFIGS:
        raise ConfigError(
            f"--model is {model!r}; allowed with --dry-run: {', '.join(CONFIGS)}."
            f"{closest(model, CONFIGS)}"
        )


def _times(solver: str, steps: int) -> tuple[float, ...]:
    check_solver(solver)
    return flow.schedule("euler" if solver == "auto" else solver, steps, SHIFT).timesteps


def _make_graphs(
    transformer: Transformer, axes: Axes | None, times: tuple[float, ...]
) -> tuple[Axes, Iterator[Graph]]:
    """The ranges that the graphs have, and those of the transformer, one at a time."""
    pipeline = _pipeline(transformer)
    chosen = {**default_axes(pipeline), **(axes or {})}
    check_axes(pipeline, chosen)
    # The first two are the transformer's: no text encoder is asked for.
    return chosen, islice(make_graphs(pipeline, times, chosen), 2)


def _opset(precision: str) -> int | None:
    return None if precision == "fp32" else LOW_OPSET


def _line(counted: Counted) -> str:
    shapes = ", ".join(f"{name} {axes}" for name, axes in counted.inputs.items())
    return (
        f"{counted.name}: {counted.nodes} nodes over a model of {counted.parameters / 1e6:.0f} M"
        f" parameters, {counted.bytes / 1e9:.2f} GB; {shapes}; {counted.seconds:.0f} s"
    ).replace("'", "")


def _build(config: Any, layers: int | None, dtype: torch.dtype) -> Transformer:
    sd3 = isinstance(config, SD3Config)
    if layers is not None and sd3:
        dual = tuple(i for i in config.dual_attention_layers if i < layers - 1)
        config = replace(config, num_layers=layers, dual_attention_layers=dual)
    elif layers is not None:
        config = replace(config, n_layers=layers)
    kind: Any = SD3Transformer if sd3 else ZImageTransformer
    model = kind(config, backend="reference").eval().requires_grad_(False)
    for module in model.modules():  # `Module.to` cannot convert tensors without memory
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(dtype))
    model.bind_ops()
    return model


def _build_random(config: Any, layers: int | None, dtype: torch.dtype) -> Transformer:
    """`_build`, its parameters and tables filled with small random numbers."""
    with torch.device("meta"):
        model = _build(config, layers, dtype)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.uniform_(-0.03, 0.03, generator=generator)
    model.bind_ops()
    return model


def _pipeline(transformer: Transformer) -> Pipeline:
    """What `make_graphs` reads of a pipeline before it comes to text encoders and VAE."""
    text: Any = SimpleNamespace(clip_length=CLIP_TOKENS, t5_length=T5_TOKENS)
    vae: Any = SimpleNamespace(latent_channels=LATENT_CHANNELS, scale_factor=SCALE)
    return Pipeline(
        family=transformer.family,
        transformer=transformer,
        text=text,
        vae=vae,
        shift=SHIFT,
        default_solver="euler",
        default_size=SIZE,
        name="",
        path=Path(),
    )
