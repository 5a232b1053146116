"""`tdm-r1-export --dry-run`: the graphs of a published model at full size, without weights.

The model is built of tensors that have shapes and no memory, traced and translated to ONNX ops;
nothing is fetched and no file kept. With `--trt` the transformer's engines are built too, of random
weights, in a folder that is removed then.
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
from tdm_r1.models.published import CONFIGS, TEXT_ENCODERS, VAE
from tdm_r1.models.sd3 import SD3Config, SD3Transformer
from tdm_r1.models.zimage import ZImageTransformer
from tdm_r1.pipeline import Pipeline
from tdm_r1.text import ClipFeatures, QwenFeatures, T5Features, quiet_transformers

SHIFT, SIZE = 3.0, 1024  # of both stored schedulers, and of both models' pictures
CLIP_TOKENS, T5_TOKENS = 77, 256
_VAE_SIZES = {"latent_channels": VAE["latent_channels"], "scale_factor": 8}


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
    blocks over image and text, and of the layers of every text encoder. `say` hears of the ranges
    and of every graph. Raises ConfigError for an unknown model or sizes it does not take,
    ExportError for a graph that cannot be made or whose axes come out fixed.
    """
    _check(model, precision)
    times = _times(solver, steps)
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        dtype = DTYPES[precision]
        transformer = _build(CONFIGS[model], layers, dtype)
        parts = _text(model, layers, dtype), _vae(dtype)
        chosen, graphs = _make_graphs(transformer, axes, times, *parts)
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
    """Build the engines of the transformer's graphs, of random weights, and keep none of them.

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
            for graph in islice(graphs, 2):  # those of the transformer
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
    transformer: Transformer,
    axes: Axes | None,
    times: tuple[float, ...],
    text: Any = None,
    vae: Any = None,
) -> tuple[Axes, Iterator[Graph]]:
    """The ranges that the graphs have, and these; without text and VAE for the first two only."""
    if text is None:
        text = SimpleNamespace(clip_length=CLIP_TOKENS, t5_length=T5_TOKENS)
    if vae is None:
        vae = SimpleNamespace(**_VAE_SIZES)
    pipeline = Pipeline(
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
    chosen = {**default_axes(pipeline), **(axes or {})}
    check_axes(pipeline, chosen)
    return chosen, make_graphs(pipeline, times, chosen)


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
    model = _cast(kind(config, backend="reference"), dtype)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(dtype))
    model.bind_ops()
    return model


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """`model` in `dtype`, to infer: `Module.to` cannot convert tensors without memory.

    In half precision transformers keeps fp32 what a class of its says: the last of T5's products.
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    made: dict[int, nn.Parameter] = {}  # one for those that two modules share
    for path, module in model.eval().named_modules():
        if dtype == torch.float16 and not set(path.split(".")).isdisjoint(kept):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            low = nn.Parameter(parameter.to(dtype), requires_grad=False)
            setattr(module, name, made.setdefault(id(parameter), low))
    return model.requires_grad_(False)


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


def _text(model: str, layers: int | None, dtype: torch.dtype) -> Any:
    """The text encoders of a published model, as `make_graphs` reads them."""
    import transformers

    built = []
    for name, config in TEXT_ENCODERS[model]:
        depth = "num_layers" if "num_layers" in config else "num_hidden_layers"
        changes = {} if layers is None else {depth: layers}
        kind = getattr(transformers, name)
        with quiet_transformers():
            made = kind(kind.config_class(**{**config, **changes, "attn_implementation": "sdpa"}))
        built.append(_cast(made, dtype))
    if len(built) == 1:
        return SimpleNamespace(features=QwenFeatures(built[0]))
    *clips, t5 = built
    return SimpleNamespace(
        clip_length=CLIP_TOKENS,
        t5_length=T5_TOKENS,
        clips=[(None, ClipFeatures(clip)) for clip in clips],
        t5=(None, T5Features(t5)),
    )


def _vae(dtype: torch.dtype) -> Any:
    """The VAE of both, likewise."""
    from diffusers import AutoencoderKL

    model = _cast(AutoencoderKL(**VAE), dtype)
    return SimpleNamespace(model=model, dtype=dtype, scaling=1.5305, shift=0.0609, **_VAE_SIZES)
