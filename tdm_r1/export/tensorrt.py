"""ONNX graphs as engines of TensorRT-RTX, built without a GPU, or of TensorRT, on the one at hand.

An engine holds one graph for the shapes of one optimisation profile. The network is strongly typed:
every layer has the dtype of the graph, and TF32 is off. TensorRT-RTX builds for the compute
capabilities it is told, and compiles kernels when a GPU loads the engine; without one it can be
written, not read. TensorRT chooses among its kernels, and ours, by running them on the GPU that is
there, for which alone the engine then is. No GPU has built one yet.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.export.inspection import fused_layers
from tdm_r1.export.plugin_ops import PluginOp
from tdm_r1.export.plugins import check_kernels, register
from tdm_r1.exported.manifest import TENSORRT_RTX
from tdm_r1.exported.refit import PARTS
from tdm_r1.exported.tensorrt import (
    LIBRARIES,
    RUNTIMES,
    TENSORRT,
    fits_precision,
    import_plugins,
    import_tensorrt,
    known_capabilities,
    make_logger,
)

REPORT_EVERY = 30.0  # seconds
CAPABILITIES = ("8.9", "12.0")
Say = Callable[[str], None]
Profile = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Target:
    """What engines are built for: compute capabilities such as "8.9", and the runtime.

    None are CAPABILITIES, or with TensorRT that of the GPU at hand. `refit`: the transformer's
    engines take other weights later. `plugins`: they have our kernels, which only TensorRT takes.
    """

    compute_capabilities: tuple[str, ...] | None = None
    runtime: str = TENSORRT_RTX
    refit: bool = False
    plugins: bool = False

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities, whether named or not."""
        if self.compute_capabilities is not None:
            return self.compute_capabilities
        if self.runtime == TENSORRT_RTX:
            return CAPABILITIES
        return tuple(known_capabilities(self.runtime))

    @property
    def library(self) -> str:
        """The runtime's name and version, to tell a user."""
        return f"{LIBRARIES[self.runtime]} {self.load().__version__}"

    def load(self) -> Any:
        """Return the runtime's module; ConfigError when it, or a library of its, is missing."""
        return import_tensorrt(self.runtime)

    def check(self, precision: str = "fp32") -> None:
        """Raise ConfigError for what cannot be built for, or when a package is not installed.

        With graphs in `precision` fp8 that is a compute capability below 8.9, and plugins. With
        `refit`, a network of one product is built to see: TensorRT-RTX 1.7 needs a GPU for it.
        """
        if self.runtime not in RUNTIMES:
            allowed = ", ".join(map(repr, RUNTIMES))
            raise ConfigError(f"--runtime is {self.runtime!r}; allowed: {allowed}")
        if self.plugins and self.runtime != TENSORRT:
            raise ConfigError(
                f"--plugins goes with --runtime {TENSORRT}: {LIBRARIES[self.runtime]} takes no"
                " kernels of ours"
            )
        if self.plugins and precision == "fp8":
            raise ConfigError(
                "--plugins does not go with --precision fp8: our kernels give bf16, which others"
                " would then have to read again and round; leave out one of the two"
            )
        self.load()
        if self.runtime == TENSORRT and not torch.cuda.is_available():
            raise ConfigError(
                f"--runtime {TENSORRT} builds engines on the GPU that will run them, and this"
                f" machine has none; --runtime {TENSORRT_RTX} needs none"
            )
        if self.plugins:
            import_plugins()
            check_kernels()
        self._check_capabilities()
        if precision == "fp8":
            self._check_fp8()
        if self.refit and (reason := _refuses_refit(self)):
            raise ConfigError(
                f"--refit: {self.library} builds no engine here whose weights can be replaced"
                f" ({reason}); build where there is a GPU, or leave out --trt"
            )

    def _check_capabilities(self) -> None:
        known, chosen = known_capabilities(self.runtime), self.capabilities
        if not chosen:
            raise ConfigError(f"--compute-capability is empty; allowed: {', '.join(known)}")
        for name in chosen:
            if name not in known:
                where = " on this GPU" if self.runtime == TENSORRT else ""
                raise ConfigError(
                    f"--compute-capability is {name!r}; {self.library} builds{where} for"
                    f" {', '.join(known)}"
                )
        if len(set(chosen)) < len(chosen):
            raise ConfigError(f"--compute-capability is {' '.join(chosen)}; allowed: each once")

    def _check_fp8(self) -> None:
        able = [name for name in known_capabilities(self.runtime) if fits_precision(name, "fp8")]
        for name in self.capabilities:
            if name not in able:
                allowed = ", ".join(able) or "none here"
                raise ConfigError(
                    f"--compute-capability is {name!r}, whose GPUs multiply no fp8; allowed with"
                    f" --precision fp8: {allowed}"
                )


def build_engines(
    root: Path, graphs: dict[str, dict[str, Any]], target: Target, say: Say
) -> dict[str, Any]:
    """Write `root/<name>.engine` for every graph of a manifest; returns its `engines`.

    `say` hears of every part, and of a long one every REPORT_EVERY seconds. `target.check` has let
    it pass. Raises as `build_engine` does.
    """
    parts = {}
    for name, graph in graphs.items():
        started = time.perf_counter()
        path = root / f"{name}.engine"
        its = target if name in PARTS else replace(target, refit=False)
        plugins = graph.get("plugins", {}) if target.plugins else {}
        found = build_engine(root / graph["file"], path, graph["profile"], its, say, plugins)
        layers = sum(map(Counter, found["kinds"].values()), Counter())
        parts[name] = {"file": path.name, "layers": dict(layers), **found}
        took = time.perf_counter() - started
        say(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {took:.0f} s")
    device = {"device": torch.cuda.get_device_name()} if target.runtime == TENSORRT else {}
    return {
        "runtime": target.runtime,
        "version": target.load().__version__,
        "compute_capabilities": list(target.capabilities),
        **device,
        "parts": parts,
    }


def build_engine(
    graph: Path,
    engine: Path,
    profile: Profile,
    target: Target,
    say: Say,
    plugins: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, dict[str, dict[str, int]]]:
    """Write the file `engine` for the ONNX file `graph`; returns how many layers have which dtype.

    "kinds" are the layers of the network, by kind, such as "MATRIX_MULTIPLY", and by what they
    give; "fused" those of the engine, as `fused_layers` counts them, where the library tells.

    `profile`: per input, its lowest, typical and highest shape. `plugins` are those of the graph's
    entry in a manifest. Raises ExportError for a node that the library does not take, naming it,
    where it takes the body of a node in place of its plugin, for a plugin that cannot be one, and
    where the build fails.

    The work is done on a thread of its own: the library calls back into Python between its steps,
    and no interrupt may be raised through its frames. An interrupted build stops at the next step.
    """
    monitor = _make_monitor(target.load())
    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(_build, graph, profile, target, monitor, plugins or {})
        try:
            while not wait([future], timeout=REPORT_EVERY).done:
                seconds = time.perf_counter() - started
                say(f"{engine.name}: {monitor.phase}, {seconds:.0f} s so far")
        except BaseException:
            monitor.stopped = True
            raise
        plan, kinds, layers = future.result()
    with engine.open("wb") as file:
        file.write(plan)
    return {"kinds": kinds, "fused": fused_layers(layers)}


def _build(
    graph: Path,
    profile: Profile,
    target: Target,
    monitor: Any,
    plugins: Mapping[str, dict[str, Any]],
) -> tuple[Any, dict, str]:
    """(the engine as a buffer, layers by kind and dtype, what the library says of the engine's)."""
    trt, library = target.load(), LIBRARIES[target.runtime]
    logger = make_logger(trt)
    if plugins:
        try:
            register(import_plugins(), map(PluginOp.from_dict, plugins.values()))
        except ValueError as error:
            raise ExportError(f"{graph.stem}: {error}") from error
    builder = trt.Builder(logger)
    network = builder.create_network(_flags(trt, plugins=bool(plugins)))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise ExportError(f"{graph.stem}: {library} cannot take {_explain(parser.get_error(0))}")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds: dict[str, Counter[str]] = {}
    for layer in layers:
        if layer.num_outputs:  # an assertion gives nothing
            kinds.setdefault(layer.type.name, Counter())[layer.get_output_type(0).name] += 1
    if plugins:
        _check_plugins(graph, kinds, plugins)
    config = _configure(trt, builder, target)
    config.progress_monitor = monitor
    shapes = builder.create_optimization_profile()
    for name, bounds in profile.items():
        shapes.set_shape(name, *bounds)
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = (logger.errors or ["no reason given"])[0]
        raise ExportError(f"{graph.stem}: {library} cannot build the engine: {reason}")
    return plan, {kind: dict(counts) for kind, counts in kinds.items()}, logger.layers


def _flags(trt: Any, *, plugins: bool) -> int:
    """How a network is made: strongly typed, and of plugins their kernels, not their Python."""
    flags = trt.NetworkDefinitionCreationFlag
    chosen = [flags.STRONGLY_TYPED, *([flags.PREFER_AOT_PYTHON_PLUGINS] if plugins else [])]
    return sum(1 << int(flag) for flag in chosen)


def _check_plugins(graph: Path, kinds: Mapping[str, Counter[str]], plugins: Mapping) -> None:
    # The parser takes a node's body, and says so to nobody, where it finds no plugin of that name.
    found = kinds["PLUGIN_V3"].total() if "PLUGIN_V3" in kinds else 0
    wanted = sum(entry["nodes"] for entry in plugins.values())
    if found != wanted:
        raise ExportError(
            f"{graph.stem}: {found} of {wanted} nodes became plugins: {', '.join(plugins)}"
        )


def _configure(trt: Any, builder: Any, target: Target) -> Any:
    """The builder's settings, all but the shapes."""
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and ten bits are not fp32
    if target.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target.runtime == TENSORRT_RTX:
        # Or no graph could record it; of TensorRT it is asked when the engine is loaded.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        known = known_capabilities(target.runtime)
        config.num_compute_capabilities = len(target.capabilities)
        for i, name in enumerate(target.capabilities):
            config.set_compute_capability(known[name], i)
    return config


def _refuses_refit(target: Target) -> str | None:
    """Why the library builds no engine with weights to replace, if so."""
    trt = target.load()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_flags(trt, plugins=False))
    weight = np.eye(4, dtype=np.float32)
    given = network.add_input("x", trt.float32, (4, 4))
    constant = network.add_constant((4, 4), trt.Weights(weight))
    plain = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(given, plain, constant.get_output(0), plain)
    network.mark_output(product.get_output(0))
    if builder.build_serialized_network(network, _configure(trt, builder, target)) is not None:
        return None
    return (logger.errors or ["no reason given"])[0]


def _explain(error: Any) -> str:
    """What the parser stumbled over, where it has a node: with its op and name."""
    reason = f"{error.code().name}, {' '.join(error.desc().split())}"
    if not error.node_name():
        return f"the graph: {reason}"
    return f"{error.node_operator()} (node {error.node_name()!r}): {reason}"


def _make_monitor(trt: Any) -> Any:
    base: Any = trt.IProgressMonitor

    class Monitor(base):
        """Knows what the builder is at, and stops it when told to."""

        def __init__(self) -> None:
            super().__init__()
            self.phase, self.stopped = "Parsing", False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phase = name

        def step_complete(self, name: str, step: int) -> bool:
            return not self.stopped

        def phase_finish(self, name: str) -> None:
            """Nothing: the phase that follows says more."""

    return Monitor()
