"""A TensorRT that computes on the CPU, by ONNX Runtime, to test what is asked of the real one.

It has the calls that `tdm_r1.exported.plan` makes, under the names and rules of `tensorrt_rtx` 1.7
(`test_runtime.py` compares the names with the package where it is installed). An "engine" is a file
that names an ONNX graph. A context reads and writes memory by address, as the real one does, and
refuses what the real one would leave undefined.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager, nullcontext
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tdm_r1.exported.session import Session

STREAM = 7
Strategy = Enum("Strategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
Specialization = Enum("Specialization", ["LAZY", "EAGER", "NONE"])
DataType = Enum("DataType", ["FLOAT", "HALF", "BF16"])
Capability = Enum("Capability", ["NONE", "SM86", "SM89", "SM120"])
Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])


class ILogger:
    ERROR = Severity.ERROR


class StandIn:
    """The module: `loads` counts the files that were given to it."""

    __name__ = "tensorrt_rtx"
    __version__ = "1.7.1.116"
    ILogger = ILogger
    ExecutionContextAllocationStrategy = Strategy
    DynamicShapesKernelSpecializationStrategy = Specialization
    DataType = DataType
    ComputeCapability = Capability

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.loads = 0

    def Runtime(self, logger: ILogger) -> SimpleNamespace:
        def load(plan: bytes) -> Engine | None:
            self.loads += 1
            if not plan.startswith(b"stand-in:"):
                logger.log(Severity.ERROR, "no engine\n  at all")
                return None
            self.engines.append(Engine(Path(plan[9:].decode()), logger))
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=load)

    def Refitter(self, engine: Engine, logger: ILogger) -> Refitter:
        return Refitter(engine, logger)

    def Weights(self, dtype: DataType, address: int, count: int) -> tuple:
        return dtype, address, count


def write_engine(path: Path, graph: Path) -> None:
    """Write an engine of the ONNX file `graph`."""
    path.write_bytes(b"stand-in:" + str(graph).encode())


class Engine:
    def __init__(self, graph: Path, logger: ILogger) -> None:
        self.name, self.logger = graph.stem, logger
        self.graph, self.opened = graph, Session(graph)
        self.session = self.opened._session
        self.refittable, self.weights = True, {}
        self.inputs = {given.name: _dtype(given.type) for given in self.session.get_inputs()}
        self.outputs = {made.name: _dtype(made.type) for made in self.session.get_outputs()}
        self.contexts: list[Context] = []
        self.shapes: dict[tuple, list[tuple]] = {}

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        dtype = {**self.inputs, **self.outputs}[name]
        return SimpleNamespace(name={np.float32: "FLOAT", np.int64: "INT64"}[dtype])

    def create_runtime_config(self) -> SimpleNamespace:
        config = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=Specialization.LAZY)
        config.set_execution_context_allocation_strategy = lambda s: setattr(config, "memory", s)
        return config

    def create_execution_context(self, config: SimpleNamespace) -> Context:
        self.contexts.append(Context(self, config))
        return self.contexts[-1]

    def output_shapes(self, shapes: tuple) -> list[tuple]:
        if shapes not in self.shapes:
            ones = {n: np.ones(s, self.inputs[n]) for n, s in zip(self.inputs, shapes, strict=True)}
            self.shapes[shapes] = [out.shape for out in self.session.run(None, ones)]
        return self.shapes[shapes]


class Refitter:
    """Takes fp32 weights that the graph has, as many as it has, and reads them when it refits."""

    def __init__(self, engine: Engine, logger: ILogger) -> None:
        import onnx

        assert engine.refittable
        self.engine, self.logger = engine, logger
        model = onnx.load(engine.graph, load_external_data=False)
        self.known = {value.name: tuple(value.dims) for value in model.graph.initializer}
        self.given: dict[str, tuple] = {}

    def set_named_weights(self, name: str, weights: tuple) -> bool:
        dtype, _, count = weights
        if dtype is not DataType.FLOAT or np.prod(self.known.get(name, 0)) != count:
            self.logger.log(Severity.ERROR, f"no such weights: {name}")
            return False
        self.given[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        opened = self.engine.opened
        for name, (_, address, _) in self.given.items():
            array = _at(address, self.known[name], np.float32).copy()
            self.engine.weights[name] = torch.from_numpy(array)
        self.engine.opened = opened.refit(self.engine.weights)
        self.engine.session = self.engine.opened._session
        return True


class Context:
    """As unforgiving as memory that is not there: `calls` counts what was enqueued."""

    def __init__(self, engine: Engine, config: SimpleNamespace) -> None:
        assert config.memory is Strategy.USER_MANAGED
        self.engine, self.config = engine, config
        self.shapes: dict[str, tuple] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.calls = self.reshaped = 0
        self.capturable = True
        self.fails = ""

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        assert name in self.engine.inputs
        self.shapes[name] = tuple(shape)
        self.memory, self.addresses = (0, 0), {}
        self.reshaped += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple:
        outputs = self.engine.output_shapes(self._shapes())
        return dict(zip(self.engine.outputs, outputs, strict=True))[name]

    def update_device_memory_size_for_shapes(self) -> int:
        return 64 * sum(map(len, self._shapes()))

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.inputs or name in self.engine.outputs

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        address, size = self.memory
        assert address and size >= self.update_device_memory_size_for_shapes()
        ctypes.memset(address, 0xFF, size)
        if self.fails:
            self.engine.logger.log(Severity.ERROR, self.fails)
            return False
        feed = {
            name: _at(self.addresses[name], self.shapes[name], dtype).copy()
            for name, dtype in self.engine.inputs.items()
        }
        outputs = self.engine.session.run(None, feed)
        for (name, dtype), out in zip(self.engine.outputs.items(), outputs, strict=True):
            _at(self.addresses[name], out.shape, dtype)[...] = out
        self.calls += 1
        return True

    def _shapes(self) -> tuple:
        return tuple(self.shapes[name] for name in self.engine.inputs)


class Queue:
    """A queue without a GPU, whose work is done at once."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.recording, self.waits = False, 0

    def at(self):
        return nullcontext()

    def is_recording(self) -> bool:
        return self.recording

    @contextmanager
    def turn(self):
        yield STREAM

    def finish(self) -> None:
        self.waits += 1


def _at(address: int, shape: tuple, dtype: type) -> np.ndarray:
    """The memory at an address: nothing that PyTorch would know of."""
    count = int(np.prod(shape))
    buffer = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype, count).reshape(shape)


def _dtype(kind: str) -> type:
    return {"tensor(float)": np.float32, "tensor(int64)": np.int64}[kind]
