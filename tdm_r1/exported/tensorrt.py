"""TensorRT, in both its forms: the owner of `tensorrt` and `tensorrt_rtx`, and who may load what.

An engine belongs to one version of one runtime and to the compute capabilities that it was built
for, of TensorRT proper to one model of GPU. Anything else is refused before the library sees a
file, with the command that rebuilds it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from tdm_kernels.quantized import E4M3_CAPABILITY

from tdm_r1.errors import ConfigError
from tdm_r1.exported.manifest import ENGINES_ONLY, OPTIONS, TENSORRT_RTX, Manifest
from tdm_r1.pipeline import resolve_device

TENSORRT = "tensorrt"
LIBRARIES = {TENSORRT_RTX: "TensorRT-RTX", TENSORRT: "TensorRT"}  # by package
RUNTIMES = tuple(LIBRARIES)
NEWER = "'tensorrt>=10.11'"  # plugins ahead of time came with 10.9


def import_tensorrt(runtime: str) -> Any:
    """Return the module of a runtime.

    Raises ConfigError when it, or a library of its, is missing, and for a TensorRT that cannot run
    engines in memory that is PyTorch's.
    """
    try:
        if runtime == TENSORRT_RTX:
            import tensorrt_rtx as module
        else:
            import tensorrt as module
    except (ImportError, OSError) as error:
        raise ConfigError(f"{runtime!r} is not installed: pip install {runtime}") from error
    if not hasattr(module.ICudaEngine, "create_runtime_config"):
        raise ConfigError(f"TensorRT {module.__version__} is too old: pip install {NEWER}")
    return module


def import_plugins() -> Any:
    """Return `tensorrt.plugin`, of a TensorRT that `import_tensorrt` has let pass."""
    import tensorrt.plugin

    return tensorrt.plugin


def make_logger(module: Any) -> Any:
    """Return a logger that keeps what the library reports in no other way.

    errors: messages. layers: the message that lists the layers of an engine just built, if any.
    """
    base: Any = module.ILogger

    class Logger(base):
        """Says nothing on the terminal."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                self.layers = message
            if severity <= base.ERROR:
                self.errors.append(" ".join(message.split()))

    return Logger()


def device_of_engines(
    root: Path, manifest: Manifest, runtime: str, device: str | torch.device
) -> torch.device:
    """Return the GPU that runs the engines of an export.

    Raises ConfigError where there are none, or none for this runtime; without a GPU or the
    package; and for engines of another version or compute capability.
    """
    engines = manifest.engines
    if engines is None:
        capability = None
        if torch.cuda.is_available() and (gpu := resolve_device(device)).type == "cuda":
            capability = _capability(gpu)
        raise ConfigError(
            f"{root} holds no engines; {_rebuild(root, manifest, runtime, capability, 'make some')}"
        )
    if engines["runtime"] != runtime:
        raise ConfigError(
            f"backend is {runtime!r}; the engines of {root} are for {engines['runtime']!r}"
        )
    if not torch.cuda.is_available():
        instead = (
            "" if manifest.precision in ENGINES_ONLY else "; backend='onnx' runs it on the CPU"
        )
        raise ConfigError(f"{runtime} needs a CUDA GPU, and this machine has none{instead}")
    found = resolve_device(device)
    if found.type != "cuda":
        raise ConfigError(
            f"device is {str(device)!r}; allowed with backend={runtime!r}: 'auto', 'cuda', 'cuda:N'"
        )
    version = import_tensorrt(runtime).__version__
    if version != engines["version"]:
        raise ConfigError(
            f"the engines of {root} were built by {runtime} {engines['version']}, and {version} is"
            f" installed: pip install {runtime}=={engines['version']}, or"
            f" {_rebuild(root, manifest, runtime)}"
        )
    capability = _capability(found)
    if capability not in engines["compute_capabilities"]:
        raise ConfigError(
            f"the engines of {root} are for compute capability"
            f" {' or '.join(engines['compute_capabilities'])}, and {found} has {capability};"
            f" {_rebuild(root, manifest, runtime, capability)}"
        )
    name = torch.cuda.get_device_name(found) if "device" in engines else None
    if name != engines.get("device"):
        raise ConfigError(
            f"the engines of {root} are for {engines['device']}, which built them, and {found} is"
            f" {name}; {_rebuild(root, manifest, runtime)}"
        )
    return found


def known_capabilities(runtime: str) -> dict[str, Any]:
    """Return compute capability, such as "8.9" -> the library's name for it, if it has one.

    TensorRT builds for the current GPU alone. Raises ConfigError as `import_tensorrt` does.
    """
    if runtime == TENSORRT:
        return {_capability(): None}
    members = import_tensorrt(runtime).ComputeCapability.__members__.items()
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in members if name[:2] == "SM"}


def fits_precision(capability: str, precision: str) -> bool:
    """Whether GPUs of this compute capability multiply in `precision`."""
    return precision != "fp8" or tuple(map(int, capability.split("."))) >= E4M3_CAPABILITY


def _capability(device: torch.device | None = None) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _rebuild(
    root: Path,
    manifest: Manifest,
    runtime: str,
    capability: str | None = None,
    task: str = "rebuild them",
) -> str:
    """What to do: the command, or another way where no engine can be for that capability."""
    if capability is not None and runtime == TENSORRT_RTX:
        if not fits_precision(capability, manifest.precision):
            return f"{capability} has no {manifest.precision}: export with --precision bf16"
        known = known_capabilities(runtime)
        if capability not in known:
            return (
                f"{LIBRARIES[runtime]} builds for {', '.join(known)} only, TensorRT here:"
                f" {rebuild_command(root, manifest, TENSORRT)}"
            )
    return f"{task}: {rebuild_command(root, manifest, runtime, capability)}"


def rebuild_command(
    root: Path, manifest: Manifest, runtime: str, capability: str | None = None
) -> str:
    """Return the `tdm-r1-export` command of this export, with engines, into a new directory.

    `capability` replaces those that its engines are for.
    """
    engines, axes, schedule = manifest.engines or {}, manifest.axes, manifest.schedule
    words: list[Any] = ["tdm-r1-export", "--model", manifest.model, "--output", f"{root}-rebuilt"]
    if manifest.lora is not None:
        words += ["--lora", manifest.lora]
    words += ["--steps", schedule.num_steps, "--solver", schedule.solver]
    words += [OPTIONS["batch"], axes["batch"][1]]
    for name in ("height", "width", "text"):
        words += [OPTIONS[name], *axes[name]]
    words += ["--trt", "--runtime", runtime, "--precision", manifest.precision]
    if manifest.fp8 is not None and manifest.fp8["report"] is not None:
        words += ["--calibration", manifest.fp8["report"]]
    words += ["--refit"] if manifest.refittable else []
    has_plugins = any(graph.get("plugins") for graph in manifest.graphs.values())
    words += ["--plugins"] if has_plugins and runtime == TENSORRT else []
    wanted = engines.get("compute_capabilities", []) if capability is None else [capability]
    if wanted and runtime != TENSORRT:  # that builds for the GPU where the command runs
        words += ["--compute-capability", *wanted]
    return shlex.join(map(str, words))
