"""A model -> an export directory: graphs, tokenizers, the gate, engines, and last the manifest."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tdm_r1 import __version__
from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.export.graphs import Axes, make_graphs, traceable
from tdm_r1.export.onnx_graph import LOW_OPSET, check_installed, write_graph
from tdm_r1.export.parity import check
from tdm_r1.export.plugin_ops import PluginOp, bind
from tdm_r1.export.precision import check_low, check_precision, copy_weights, load_low
from tdm_r1.export.quantize import check_pairs
from tdm_r1.export.static_fp8 import Static, calibrate_static, emulated
from tdm_r1.export.tensorrt import Target, build_engines
from tdm_r1.exported.loading import open_parts
from tdm_r1.exported.manifest import REFIT, Manifest, write_manifest
from tdm_r1.exported.refit import PARTS
from tdm_r1.exported.session import import_runtime
from tdm_r1.files import save_tensors, sha256
from tdm_r1.models.loading import load_transformer, read_json
from tdm_r1.pipeline import Pipeline, load_pipeline
from tdm_r1.trajectory import DECODE_LIMIT

PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
DEFAULT_BATCH = 4
# Z-Image's chat template alone takes a dozen tokens, and the gate draws a prompt of a sentence.
FEWEST_CAPTION_TOKENS = 64
Say = Callable[[str], None]


def export_model(
    model: str | Path,
    output: str | Path,
    *,
    axes: Axes | None = None,
    lora: str | Path | None = None,
    steps: int = 4,
    solver: str = "auto",
    precision: str = "fp32",
    calibration: str | Path | None = None,
    refit: bool = False,
    target: Target | None = None,
    say: Say = lambda line: None,
) -> Manifest:
    """Write the directory `output` for `Engine.from_pretrained(output, backend="onnx")`.

    `model`, `lora`, `steps` and `solver` as in `Engine.from_pretrained`. `precision` is that of
    weights, products and what lies between: fp32, bf16, fp16, or fp8, which is bf16 with products
    of e4m3 in the layers that `calibrate_static` chooses, among those of the report `calibration`.
    The graphs take and return fp32. `axes` replaces some of `default_axes`. `refit` adds what
    `Engine.refit` needs to change the LoRA: the unmerged weights, and the transformer's in files
    beside its graphs. With a `target`, TensorRT engines are built from the graphs once these have
    passed the gate. `say` hears of the progress. Everything is written beside `output` under
    another name, which is given to it at the very end: what is not whole is never there, and is
    removed on the way out.

    Raises ConfigError for sizes the model does not take, an `output` that exists, options that
    exclude each other, or missing packages; LoadError as `load_pipeline` does; ExportError for a
    graph that cannot be made, that differs from the Engine, or of which no engine can be built, and
    as `calibrate_static` does.
    """
    output = Path(output).expanduser()
    if os.path.lexists(output):  # also a link to nowhere
        raise ConfigError(f"--output is {str(output)!r}, which exists; choose another or remove it")
    check_precision(precision, calibration, refit)
    check_installed()
    import_runtime()  # the gate needs it: better said before the work than after
    if target is not None:
        target.check(precision)
    with written_whole(output) as root:
        pipeline = load_pipeline(model, lora=lora, device="cpu", dtype="float32")
        chosen = {**default_axes(pipeline), **(axes or {})}
        check_axes(pipeline, chosen)
        # A graph decodes pictures whole, however large, and is held to whole ones.
        pixels = max(DECODE_LIMIT, chosen["height"][1] * chosen["width"][1])
        options: dict[str, Any] = {"steps": steps, "solver": solver, "decode_limit": pixels}
        engine = Engine(pipeline, **options)
        low = static = None
        if precision != "fp32":
            low = Engine(load_low(model, lora, precision), **options)
            if precision == "fp8":
                static = calibrate_static(low.pipeline, low.schedule, calibration)
                say(static.line)
            copy_weights(low.pipeline, pipeline)
        plugins = target is not None and target.plugins
        graphs = _write_graphs(low or engine, chosen, root, say, refit, plugins, static)
        if refit:
            _write_unmerged(low or engine, precision, graphs, root)
        for folder in filter(Path.is_dir, pipeline.path.glob("tokenizer*")):
            shutil.copytree(folder, root / folder.name)
        manifest = _manifest(engine, chosen, graphs, root, lora, precision, static)
        started = time.perf_counter()
        if low is None:
            parity = check(engine, Engine(open_parts(root, manifest), **options), chosen)
        else:
            with nullcontext() if static is None else _in_fp8(low, static, root, graphs):
                parity = check_low(engine, low, root, manifest, chosen)
        manifest = replace(manifest, parity=parity)
        took = time.perf_counter() - started
        say(f"parity with the Engine: {_worst(parity)}, {took:.0f} s")
        if target is not None:
            engines = build_engines(root, manifest.graphs, target, say)
            engines["precision"] = precision
            names = [part["file"] for part in engines["parts"].values()]
            files = {**manifest.files, **{name: sha256(root / name) for name in names}}
            manifest = replace(manifest, engines=engines, files=files)
        write_manifest(root, manifest)
    return manifest


def default_axes(pipeline: Pipeline) -> Axes:
    """Sizes from half to one and a half times the default, four images, every prompt there is."""
    unit, limits, longest = _limits(pipeline)
    default = pipeline.default_size
    ends = max(unit, default // 2 // unit * unit), default * 3 // 2 // unit * unit
    axes = {
        name: (min(ends[0], limit), min(ends[1], limit))
        for name, limit in zip(("height", "width"), limits, strict=True)
    }
    shortest = 2 if pipeline.family == "zimage" else max(2, longest // 2)
    return {"batch": (1, DEFAULT_BATCH), **axes, "text": (shortest, longest)}


def check_axes(pipeline: Pipeline, axes: Axes) -> None:
    """Raise ConfigError, naming the option, for an axis that the model cannot have."""
    unit, limits, longest = _limits(pipeline)
    if not 1 == axes["batch"][0] <= axes["batch"][1]:
        raise ConfigError(f"--batch is {axes['batch'][1]}; allowed: a whole number from 1")
    for option, name, limit in zip(
        ("--heights", "--widths"), ("height", "width"), limits, strict=True
    ):
        low, high = axes[name]
        if not 0 < low <= high <= limit or low % unit or high % unit:
            raise ConfigError(
                f"{option} is {low} {high}; allowed: multiples of {unit}, rising, up to {limit}"
            )
    low, high = axes["text"]
    if pipeline.family == "zimage":  # a prompt is padded to 32 tokens, however short
        lows, fewest = "2", FEWEST_CAPTION_TOKENS
        fits = low == 2
    else:
        lows, fewest = "from 2, rising", longest
        fits = 2 <= low <= high
    if not (fits and fewest <= high <= longest):
        raise ConfigError(
            f"--text is {low} {high}; allowed: {lows}, and at the end {fewest} to {longest}"
        )


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Give a folder beside `output` to write in; it becomes `output` only if all goes well.

    Raises ConfigError where none can be made, ExportError, and keeps it, if its name is taken then.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise ConfigError(f"--output is {str(output)!r}, which cannot be made: {error}") from error
    try:
        yield root
        root.chmod(0o755)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    try:
        os.rename(root, output)
    except OSError as error:  # hours of work are not thrown away for a name
        raise ExportError(
            f"{output} has come into being meanwhile; the finished export is in {root}"
        ) from error


def _limits(pipeline: Pipeline) -> tuple[int, tuple[int, int], int]:
    """(multiple of height and width, their largest values, the most text tokens)."""
    config: Any = pipeline.transformer.config
    unit = pipeline.size_unit
    text: Any = pipeline.text
    if pipeline.family == "sd3":
        side = config.pos_embed_max_size * unit
        return unit, (side, side), text.t5_length
    frames, rows, cols = config.axes_lens
    return unit, (rows * unit, cols * unit), min(512, (frames - 2) // 32 * 32)


def _write_graphs(
    engine: Engine,
    axes: Axes,
    root: Path,
    say: Say,
    refit: bool = False,
    plugins: bool = False,
    static: Static | None = None,
) -> dict[str, dict]:
    written = {}
    transformer = engine.pipeline.transformer
    seen: dict[str, PluginOp] = {}
    with torch.no_grad(), traceable(transformer):
        if plugins:
            transformer.ops = bind(transformer.ops, seen)
        low = transformer.dtype != torch.float32
        for graph in make_graphs(engine.pipeline, engine.schedule.timesteps, axes):
            started = time.perf_counter()
            beside = refit and graph.name in PARTS
            opset = LOW_OPSET if low else None
            scales = static.scales if static and graph.name == "transformer" else None
            entry = write_graph(graph, root, opset, refit=beside, seen=seen, scales=scales)
            written[graph.name] = entry
            size = sum(path.stat().st_size for path in root.glob(f"{graph.name}.onnx*"))
            took = time.perf_counter() - started
            say(f"{graph.name}: {size / 1e6:.1f} MB, {took:.0f} s")
    return written


@contextmanager
def _in_fp8(low: Engine, static: Static, root: Path, graphs: dict[str, dict]) -> Iterator[None]:
    """Hold the pairs of the file to the scales with which `low` computes meanwhile."""
    transformer, graph = low.pipeline.transformer, graphs["transformer"]
    check_pairs(root / graph["file"], transformer, graph["weights"], static.scales)
    with emulated(transformer, static.scales):
        yield


def _write_unmerged(engine: Engine, precision: str, graphs: dict[str, dict], root: Path) -> None:
    """Write `REFIT`: the model's weights that the graphs hold, in the dtype that LoRAs go into."""
    model = load_transformer(engine.pipeline.path, backend="reference", device="cpu")
    # As `load_pipeline` merges: no coarser than the file, nor than what is asked of it.
    asked = torch.bfloat16 if precision == "bf16" else torch.float32
    model.to(dtype=torch.promote_types(model.dtype, asked))
    entries = (entry for name in PARTS for entry in graphs[name]["weights"].values())
    names = sorted({entry["weight"] for entry in entries})
    tensors = {name: model.get_parameter(name).detach().contiguous() for name in names}
    save_tensors(tensors, root / REFIT)


def _worst(parity: dict[str, Any]) -> str:
    """The largest errors as a user is told of them."""
    line = f"{max(found['error'] for found in parity['worst'].values()):.1e}"
    if "rounded" in parity:
        found = max(parity["rounded"]["worst"].values(), key=lambda f: f["error"] / f["allowed"])
        line += (
            f" unrounded; rounded at most {found['error']:.1e} where {found['allowed']:.1e} is"
            f" allowed ({found['part']}, {found['tensor']});"
            " a whole loop drifts by {exported:.1e}, the Engine's by {engine:.1e}".format(
                **parity["rounded"]["drift"]
            )
        )
    return line


def _manifest(
    engine: Engine,
    axes: Axes,
    graphs: dict[str, dict],
    root: Path,
    lora: str | Path | None,
    precision: str,
    static: Static | None,
) -> Manifest:
    pipeline, text, vae = engine.pipeline, engine.pipeline.text, engine.pipeline.vae
    lengths = {}
    if pipeline.family == "sd3":
        lengths = {name: getattr(text, name) for name in ("width", "clip_length", "t5_length")}
    source = {
        str(path.relative_to(pipeline.path)): sha256(path)
        for path in sorted(pipeline.path.glob("*/*.safetensors"))
    }
    if pipeline.lora is not None:
        source[pipeline.lora.name] = sha256(pipeline.lora)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return Manifest(
        family=pipeline.family,
        model=pipeline.name,
        lora=None if lora is None else str(lora),
        precision=precision,
        transformer=read_json(pipeline.path / "transformer" / "config.json"),
        vae={
            name: getattr(vae, name) for name in ("latent_channels", "scale_factor", "sample_size")
        },
        text=lengths,
        default_size=pipeline.default_size,
        shift=pipeline.shift,
        schedule=engine.schedule,
        axes=axes,
        graphs=graphs,
        files={path.relative_to(root).as_posix(): sha256(path) for path in files},
        source=source,
        versions={"tdm_r1": __version__, **{name: _version(name) for name in PACKAGES}},
        parity={},
        fp8=None if static is None else static.to_dict(),
        engines=None,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # ONNX Runtime comes under several names
        return "unknown"
