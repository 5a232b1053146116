"""One engine of TensorRT, tensors of a GPU in and out, without a wait.

Inputs and outputs are PyTorch's memory, and so is what the engine computes in: it is taken anew for
every call, from the pool of a graph while one is recorded, and the library owns none of it. Every
call goes to the stream that is being recorded, or else to one stream for all engines of an export,
so that they follow each other whoever calls. No GPU has run this: the tests check what is asked of
the library against a stand-in that computes the same graph on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from tdm_r1.errors import ConfigError, DeviceError, GraphError, LoadError
from tdm_r1.exported.manifest import OPTIONS, Manifest
from tdm_r1.exported.tensorrt import import_tensorrt, make_logger

ALIGNMENT = 256  # bytes: what the library asks of memory, and PyTorch's allocations have
RECORDED = ("transformer", "vae_decoder")  # what a trajectory's graph holds
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The axes of a graph by the sizes of the export that they follow from, to name an option.
_AXES = {
    "rows": ("height",),
    "cols": ("width",),
    "captions": ("text",),
    "image": ("height", "width"),
}
Shapes = tuple[tuple[int, ...], ...]


class Queue(Protocol):
    """Where work is enqueued."""

    def at(self) -> AbstractContextManager:
        """Inside, the library finds the device of this queue."""

    def is_recording(self) -> bool:
        """Whether the caller's stream is being recorded rather than run."""

    def turn(self) -> AbstractContextManager[int]:
        """Inside, work on the stream of this handle follows the caller's, and precedes its next."""

    def finish(self) -> None:
        """Wait until all that was enqueued on the device is done."""


class CudaQueue:
    """A stream of its own, or the current one while that is recorded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def at(self) -> AbstractContextManager:
        return torch.cuda.device(self.device)

    def is_recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def turn(self) -> Iterator[int]:
        current = torch.cuda.current_stream(self.device)
        if self.is_recording():
            yield current.cuda_stream
            return
        self.stream.wait_stream(current)
        try:
            yield self.stream.cuda_stream
        finally:
            current.wait_stream(self.stream)

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def open_plans(
    root: Path, manifest: Manifest, runtime: str, device: torch.device
) -> dict[str, Plan]:
    """Load every engine of an export that `device_of_engines` has let pass.

    Raises LoadError for a file that the library does not take.
    """
    assert manifest.engines is not None
    module = import_tensorrt(runtime)
    queue = CudaQueue(device)
    with queue.at():
        return {
            name: Plan(module, root / part["file"], manifest.graphs[name], device, queue)
            for name, part in manifest.engines["parts"].items()
        }


class Plan:
    """An engine and its execution contexts.

    What a graph has recorded belongs to the context that enqueued it, whose shapes must then stay:
    an engine that is recorded keeps a context for every set of shapes, any other has one.
    """

    in_place = True

    def __init__(
        self, module: Any, path: Path, graph: dict[str, Any], device: torch.device, queue: Queue
    ) -> None:
        """`graph` is its entry in the manifest. LoadError if the library refuses the file."""
        self.name, self.graph, self.device, self.queue = path.stem, graph, device, queue
        self.recorded = self.name in RECORDED
        self._module, self._path, self._logger = module, path, make_logger(module)
        self._runtime = module.Runtime(self._logger)  # outlives its engine
        self._lock = Lock()
        self._load()

    def _load(self) -> None:
        self._engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
        if self._engine is None:
            name = self._module.__name__
            raise LoadError(f"{self._path} is refused by {name}: {self._reason()}")
        self._dtypes = {name: self._dtype(name) for part in ("inputs", "outputs")
                        for name in self.graph[part]}  # fmt: skip
        self._config = self._configure(self._module)
        self._contexts: dict[Shapes | None, Any] = {}

    def refit(self, weights: Mapping[str, Tensor]) -> Plan:
        """Replace weights of the engine by name, in its own memory; none: load it anew.

        It waits for the device, whose work nobody may enqueue meanwhile; contexts stay. Raises
        ConfigError for an engine that was not built for it, with nothing changed, DeviceError where
        the library fails, some weights possibly replaced.
        """
        with self._lock, self.queue.at():
            self.queue.finish()
            if not weights:
                self._load()
                return self
            if not self._engine.refittable:
                raise ConfigError(
                    f"the engine {self.name!r} cannot be refitted: build it by tdm-r1-export"
                    " --trt --refit, where there is a GPU"
                )
            refitter = self._module.Refitter(self._engine, self._logger)
            for name, weight in weights.items():
                assert weight.device.type == "cpu" and weight.is_contiguous(), name
                dtype = getattr(self._module.DataType, _NAMES[weight.dtype])
                given = self._module.Weights(dtype, weight.data_ptr(), weight.numel())
                self._succeed(refitter.set_named_weights(name, given), f"take {name}")
            self._succeed(refitter.refit_cuda_engine(), "be refitted")
        return self

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Enqueue the engine, and return its outputs in the graph's order; they are not waited for.

        Raises ConfigError for shapes outside the profile, naming the option that widens it,
        GraphError where what is enqueued cannot be recorded, DeviceError where the library fails.
        """
        names = list(self.graph["inputs"])
        given = {
            name: _bindable(x.detach().to(self.device, self._dtypes[name]))
            for name, x in zip(names, inputs, strict=True)
        }
        shapes = tuple(tuple(x.shape) for x in given.values())
        for name, shape in zip(names, shapes, strict=True):
            self._check(name, shape)
        with self._lock, self.queue.at():
            context = self._context(shapes)
            made = {
                name: torch.empty(
                    tuple(context.get_tensor_shape(name)),
                    dtype=self._dtypes[name],
                    device=self.device,
                )
                for name in self.graph["outputs"]
            }
            self._enqueue(context, {**given, **made})
        return tuple(made.values())

    def _enqueue(self, context: Any, tensors: dict[str, Tensor]) -> None:
        # At least a byte: no memory at all has no address.
        size = max(1, context.update_device_memory_size_for_shapes())
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        with self.queue.turn() as stream:
            if self.queue.is_recording() and not _capturable(context, stream):
                raise GraphError(f"the engine {self.name!r} cannot be recorded")
            context.set_device_memory(memory.data_ptr(), size)
            for name, tensor in tensors.items():
                self._succeed(context.set_tensor_address(name, tensor.data_ptr()), f"bind {name}")
            self._succeed(context.execute_async_v3(stream), "run")

    def _context(self, shapes: Shapes) -> Any:
        """The context for these shapes, which it has."""
        key = shapes if self.recorded else None
        known = key in self._contexts
        if not known:
            assert not self.queue.is_recording(), f"{self.name} of {shapes} was not run before"
            self._contexts[key] = self._engine.create_execution_context(self._config)
        context = self._contexts[key]
        if not (known and self.recorded):
            for name, shape in zip(self.graph["inputs"], shapes, strict=True):
                self._succeed(context.set_input_shape(name, shape), f"take {name} of {shape}")
        return context

    def _configure(self, module: Any) -> Any:
        """How contexts are made: in memory that is given to them, and for the shapes they have."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        strategies = getattr(module, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None and self.recorded:
            # By default kernels for a shape are compiled behind the first calls; a graph that was
            # recorded meanwhile would keep those that stand in for them.
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        low, _, high = self.graph["profile"][name]
        if len(shape) != len(low):
            raise ConfigError(f"{self.name}: {name} is {list(shape)}; allowed: {len(low)} axes")
        for axis, size in enumerate(shape):
            if not low[axis] <= size <= high[axis]:
                raise ConfigError(
                    f"{self.name}: axis {axis} of {name} is {size}; allowed in this engine:"
                    f" {low[axis]} to {high[axis]}{_widened(self.graph['inputs'][name][axis])}"
                )

    def _dtype(self, name: str) -> torch.dtype:
        found = self._engine.get_tensor_dtype(name).name
        if found not in DTYPES:
            raise LoadError(f"{self.name}: {name} is {found}; allowed: {', '.join(DTYPES)}")
        return DTYPES[found]

    def _succeed(self, success: bool, task: str) -> None:
        if not success:
            raise DeviceError(f"the engine {self.name!r} failed to {task}: {self._reason()}")

    def _reason(self) -> str:
        return (self._logger.errors or ["no reason given"])[-1]


def _bindable(x: Tensor) -> Tensor:
    """`x` itself, or a copy where an engine could not read it in place."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _capturable(context: Any, stream: int) -> bool:
    """TensorRT-RTX knows; TensorRT says so by failing."""
    return not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(stream)


def _widened(axis: int | str) -> str:
    """The options that another export needs for more of this axis."""
    if isinstance(axis, int):
        return ""
    name = axis.split("*")[-1]
    options: Sequence[str] = [OPTIONS[size] for size in _AXES.get(name, (name,)) if size in OPTIONS]
    return f" (tdm-r1-export {' or '.join(options)} makes another)" if options else ""
