"""ONNX graphs as TensorRT-RTX engines, built without a GPU.

An engine holds one graph for some compute capabilities and the shapes of one optimisation profile.
The network is strongly typed: every layer has the dtype of the graph, and TF32 is off. The kernels
are compiled when a GPU loads the engine; without one it can be written, not read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.exported.manifest import TENSORRT_RTX
from tdm_r1.exported.refit import PARTS
from tdm_r1.exported.tensorrt import import_tensorrt, make_logger

REPORT_EVERY = 30.0  # seconds
Say = Callable[[str], None]
Profile = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Target:
    """What engines are built for: compute capabilities such as "8.9", and the runtime.

    `refit`: the transformer's engines take other weights later.
    """

    compute_capabilities: tuple[str, ...] = ("8.9", "12.0")
    runtime: str = TENSORRT_RTX
    refit: bool = False

    def check(self) -> None:
        """Raise ConfigError for what cannot be built for, or when TensorRT-RTX is not installed.

        With `refit`, a network of one product is built to see: TensorRT-RTX 1.7 needs a GPU for it.
        """
        if self.runtime != TENSORRT_RTX:
            raise ConfigError(f"--runtime is {self.runtime!r}; allowed: {TENSORRT_RTX!r}")
        known = _known_capabilities()
        if not self.compute_capabilities:
            raise ConfigError(f"--compute-capability is empty; allowed: {', '.join(known)}")
        for name in self.compute_capabilities:
            if name not in known:
                raise ConfigError(
                    f"--compute-capability is {name!r}; TensorRT-RTX {_import().__version__} builds"
                    f" for {', '.join(known)}"
                )
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ConfigError(
                f"--compute-capability is {' '.join(self.compute_capabilities)}; allowed: each once"
            )
        if self.refit and (reason := _refuses_refit(self)):
            raise ConfigError(
                f"--refit: TensorRT-RTX {_import().__version__} builds no engine here whose weights"
                f" can be replaced ({reason}); build where there is a GPU, or leave out --trt"
            )


def build_engines(
    root: Path, graphs: dict[str, dict[str, Any]], target: Target, say: Say
) -> dict[str, Any]:
    """Write `root/<name>.engine` for every graph of a manifest; returns its `engines`.

    `say` hears of every part, and of a long one every REPORT_EVERY seconds. Raises as
    `Target.check` and `build_engine` do.
    """
    target.check()
    parts = {}
    for name, graph in graphs.items():
        started = time.perf_counter()
        path = root / f"{name}.engine"
        its = target if name in PARTS else replace(target, refit=False)
        kinds = build_engine(root / graph["file"], path, graph["profile"], its, say)
        layers = sum(map(Counter, kinds.values()), Counter())
        parts[name] = {"file": path.name, "layers": dict(layers), "kinds": kinds}
        took = time.perf_counter() - started
        say(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {took:.0f} s")
    return {
        "runtime": target.runtime,
        "version": _import().__version__,
        "compute_capabilities": list(target.compute_capabilities),
        "parts": parts,
    }


def build_engine(
    graph: Path, engine: Path, profile: Profile, target: Target, say: Say
) -> dict[str, dict[str, int]]:
    """Write the file `engine` for the ONNX file `graph`; returns how many layers give each dtype.

    They are counted by kind, such as "MATRIX_MULTIPLY".

    `profile`: per input, its lowest, typical and highest shape; the layers are those of the network
    before the builder fuses them. Raises ExportError for a node that TensorRT-RTX does not take,
    naming it, and where the build fails.

    The work is done on a thread of its own: the library calls back into Python between its steps,
    and no interrupt may be raised through its frames. An interrupted build stops at the next step.
    """
    monitor = _make_monitor()
    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(_build, graph, profile, target, monitor)
        try:
            while not wait([future], timeout=REPORT_EVERY).done:
                seconds = time.perf_counter() - started
                say(f"{engine.name}: {monitor.phase}, {seconds:.0f} s so far")
        except BaseException:
            monitor.stopped = True
            raise
        plan, layers = future.result()
    with engine.open("wb") as file:
        file.write(plan)
    return layers


def _build(graph: Path, profile: Profile, target: Target, monitor: Any) -> tuple[Any, dict]:
    """(the engine as a buffer, layers by kind and dtype)."""
    trt = _import()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise ExportError(f"{graph.stem}: TensorRT-RTX cannot take {_explain(parser.get_error(0))}")
    config = _configure(builder, target)
    config.progress_monitor = monitor
    shapes = builder.create_optimization_profile()
    for name, bounds in profile.items():
        shapes.set_shape(name, *bounds)
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = (logger.errors or ["no reason given"])[0]
        raise ExportError(f"{graph.stem}: TensorRT-RTX cannot build the engine: {reason}")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds: dict[str, Counter[str]] = {}
    for layer in layers:
        if layer.num_outputs:  # an assertion gives nothing
            kinds.setdefault(layer.type.name, Counter())[layer.get_output_type(0).name] += 1
    return plan, {kind: dict(counts) for kind, counts in kinds.items()}


def _configure(builder: Any, target: Target) -> Any:
    """The builder's settings, all but the shapes."""
    trt, known = _import(), _known_capabilities()
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and ten bits are not fp32
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or no graph could record it
    if target.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(target.compute_capabilities)
    for i, name in enumerate(target.compute_capabilities):
        config.set_compute_capability(known[name], i)
    return config


def _refuses_refit(target: Target) -> str | None:
    """Why the library builds no engine with weights to replace, if so."""
    trt = _import()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    weight = np.eye(4, dtype=np.float32)
    given = network.add_input("x", trt.float32, (4, 4))
    constant = network.add_constant((4, 4), trt.Weights(weight))
    plain = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(given, plain, constant.get_output(0), plain)
    network.mark_output(product.get_output(0))
    if builder.build_serialized_network(network, _configure(builder, target)) is not None:
        return None
    return (logger.errors or ["no reason given"])[0]


def _explain(error: Any) -> str:
    """What the parser stumbled over, where it has a node: with its op and name."""
    reason = f"{error.code().name}, {' '.join(error.desc().split())}"
    if not error.node_name():
        return f"the graph: {reason}"
    return f"{error.node_operator()} (node {error.node_name()!r}): {reason}"


def _import() -> Any:
    """Return the `tensorrt_rtx` module; ConfigError when it, or a library of its, is missing."""
    return import_tensorrt(TENSORRT_RTX)


def _known_capabilities() -> dict[str, Any]:
    """Compute capability, such as "8.9", -> the library's name for it."""
    members = _import().ComputeCapability.__members__.items()
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in members if name.startswith("SM")}


def _make_monitor() -> Any:
    base: Any = _import().IProgressMonitor

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
