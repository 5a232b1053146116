"""Calls on a device recorded once, with fixed buffers, and replayed at the cost of one launch.

A `GraphPool` keeps one graph per name and set of shapes. Its inputs are copied into buffers of the
graph's own, and its outputs are copied out before any other graph runs: graphs share one pool of
memory, so a replay may write over whatever another one left. Nothing here knows what is recorded.

`CudaGraphs` records on a GPU. `FakeGraphs` stands in for it elsewhere and is as unforgiving: what
would be silently wrong on a device is NaN or an error there. (`Ops.record` is the same idea one
level down, for the kernels inside one forward on a CPU; on a GPU it records nothing.)
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdm_r1.errors import ConfigError, DeviceError, GraphError

logger = logging.getLogger(__name__)
CAPACITY = 32  # Z-Image has 16 text lengths; inputs and outputs of one graph take about 15 MB


class Graph(Protocol):
    """One recording: `outputs` are rewritten by every `replay`."""

    outputs: Any

    def replay(self) -> None:
        """Run what was recorded, on the buffers it was recorded with."""


class Backend(Protocol):
    """What records graphs on one kind of device."""

    def capture(self, call: Callable[[], Any]) -> Graph:
        """Record `call`, which was run before: its results mean nothing until a replay."""

    def exclusive(self) -> AbstractContextManager:
        """Inside, the device runs nothing else on the buffers of this backend's graphs."""

    def release(self) -> None:
        """Give back the memory of graphs that are gone, and of attempts that failed."""


class GraphPool:
    """At most `capacity` graphs, the ones used last; `strict`: all of `warming`, and no other."""

    def __init__(self, backend: Backend, *, capacity: int = CAPACITY, strict: bool = False) -> None:
        self.backend, self.capacity, self.strict = backend, capacity, strict
        self.graphs: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self.lock = threading.RLock()  # a graph has one set of buffers
        self.is_warming = False
        self.said: set[type] = set()  # kinds of failure that were told

    def run(self, name: Hashable, call: Callable[..., Any], *inputs: Any) -> Any:
        """Return call(*inputs), replayed if it was recorded under this name and these shapes.

        `inputs` and the result are tensors, values, and tuples and dataclasses of them; everything
        else that `call` reads must keep its address. The result is the caller's own. Where a
        recording runs out of memory, or cannot be made, that is said once and the call made as it
        is. Raises GraphError when strict, for what was not warmed up or cannot be recorded.
        """
        key = (name, signature(inputs))
        with self.lock:
            if key not in self.graphs:
                if self.strict and not self.is_warming:
                    raise GraphError(
                        f"no graph was warmed up for {describe(name, inputs)}, and strict_graphs"
                        " records none on the way: call warmup for this shape first"
                    )
                self.graphs[key] = self._record(name, call, inputs)
            self.graphs.move_to_end(key)
            recording = self.graphs[key]
            if recording is not None:
                with self.backend.exclusive():
                    return recording(inputs)
        return call(*inputs)

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Inside, a strict pool records what it is asked to run."""
        with self.lock:
            before, self.is_warming = self.is_warming, True
            try:
                yield
            finally:
                self.is_warming = before

    @property
    def num_graphs(self) -> int:
        """How many graphs there are."""
        return sum(graph is not None for graph in self.graphs.values())

    def clear(self) -> None:
        """Drop every graph: needed when something they read has moved."""
        with self.lock:
            self.graphs.clear()

    def _record(self, name: Hashable, call: Callable[..., Any], inputs: tuple) -> _Recording | None:
        """None, which is remembered, where a recording cannot be had."""
        while len(self.graphs) >= self.capacity and not self.strict:
            self.graphs.popitem(last=False)
        kind, failure = self._try(call, inputs)
        if kind is torch.OutOfMemoryError and self.num_graphs and not self.strict:
            self.graphs.clear()  # this call comes before what they were for
            self.backend.release()
            kind, failure = self._try(call, inputs)
        if not isinstance(failure, str):
            return failure
        if kind is torch.OutOfMemoryError:
            self.backend.release()
        elif self.strict:
            raise GraphError(failure)
        if kind not in self.said:
            logger.warning(
                "no graph of %s: %s. It runs without one, and so will others that fail alike",
                describe(name, inputs), failure,
            )  # fmt: skip
        self.said.add(kind)
        return None

    def _try(self, call: Callable[..., Any], inputs: tuple) -> tuple[type, _Recording | str]:
        """A recording, or why there is none: the error itself would hold on to its memory."""
        try:
            return _Recording, _Recording(self.backend, call, inputs)
        except torch.OutOfMemoryError as error:
            return torch.OutOfMemoryError, str(error).splitlines()[0]
        except GraphError as error:
            return GraphError, str(error).splitlines()[0]


class _Recording:
    """A graph and the buffers it reads."""

    def __init__(self, backend: Backend, call: Callable[..., Any], inputs: tuple) -> None:
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = map_tensors(inputs, torch.clone)
            self.buffers = tensors_in(self.inputs)
            self.graph = backend.capture(lambda: call(*self.inputs))

    def __call__(self, inputs: tuple) -> Any:
        for buffer, x in zip(self.buffers, tensors_in(inputs), strict=True):
            buffer.copy_(x, non_blocking=True)
        self.graph.replay()
        return map_tensors(self.graph.outputs, torch.clone)


def graph_pool(device: torch.device, graphs: str | Backend, strict: bool) -> GraphPool | None:
    """Return a pool for "auto" on a CUDA device or for a backend, None for "off" or elsewhere.

    Raises ConfigError for any other word, and for strictness without a pool.
    """
    if isinstance(graphs, str) and graphs not in ("auto", "off"):
        raise ConfigError(f"graphs is {graphs!r}; allowed: 'auto', 'off', or a backend")
    if graphs == "auto" and device.type == "cuda":
        graphs = CudaGraphs(device)
        logger.info(
            "CUDA graphs hold the sampling steps and the decoding of pictures; the encoding of new"
            " prompts, and what a callback does between steps, run without"
        )
    if not isinstance(graphs, str):
        return GraphPool(graphs, strict=strict)
    if strict:
        raise ConfigError(f"strict_graphs needs graphs: they are {graphs!r} on {device}")
    return None


@contextmanager
def device_errors(task: str) -> Iterator[None]:
    """Raise DeviceError, naming `task`, where the device has no memory for it or is gone."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"out of memory for {task}: {str(error).splitlines()[0]}") from error
    except torch.AcceleratorError as error:
        raise DeviceError(
            f"the device failed during {task} ({str(error).splitlines()[0]}); this process cannot"
            " use it any more: start another"
        ) from error


class CudaGraphs:
    """CUDA graphs of one device, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.memory = torch.cuda.graph_pool_handle()
        self.done: torch.cuda.Event | None = None

    def capture(self, call: Callable[[], Any]) -> Graph:
        """Run `call` twice, so that kernels are compiled and libraries have chosen, and record it.

        Raises torch.OutOfMemoryError, what the attempt took still taken until `release`; GraphError
        for a call that cannot be recorded.
        """
        graph = _CudaGraph()
        try:
            with torch.cuda.device(self.device):
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    for _ in range(2):
                        call()
                torch.cuda.current_stream().wait_stream(self.stream)
                torch.cuda.synchronize()
                # Other threads may go on with work of their own meanwhile.
                with torch.cuda.graph(
                    graph.graph,
                    pool=self.memory,
                    stream=self.stream,
                    capture_error_mode="thread_local",
                ):
                    graph.outputs = call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            raise GraphError(f"it cannot be recorded: {str(error).splitlines()[0]}") from error
        return graph

    def release(self) -> None:
        """Leave the pool, whose blocks a failed attempt may hold for good, to the graphs in it."""
        self.memory = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait, on the caller's stream, for the last use on any other."""
        stream = torch.cuda.current_stream(self.device)
        if self.done is not None:
            stream.wait_event(self.done)
        yield
        self.done = stream.record_event()


class _CudaGraph:
    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.outputs: Any = None

    def replay(self) -> None:
        self.graph.replay()


class FakeGraphs:
    """Graphs without a GPU, which punish what a GPU would not forgive.

    Recording computes nothing anyone may read; replaying one graph spoils the outputs of all the
    others; memory that was not there when a call was recorded is refused when it is replayed.
    """

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[_FakeGraph] = weakref.WeakSet()
        self.num_captures = self.num_replays = 0

    def capture(self, call: Callable[[], Any]) -> Graph:
        """Run `call` once to warm up and once more to learn what it reads."""
        call()
        graph = _FakeGraph(self, call)
        self.alive.add(graph)
        self.num_captures += 1
        return graph

    def exclusive(self) -> AbstractContextManager:
        """Nothing runs beside the caller here."""
        return nullcontext()

    def release(self) -> None:
        """Memory of graphs that are gone is gone already."""

    def spoil(self) -> None:
        """Overwrite the outputs of every graph."""
        for graph in self.alive:
            _spoil(graph.outputs)


class _FakeGraph:
    def __init__(self, owner: FakeGraphs, call: Callable[[], Any]) -> None:
        self.owner, self.call = owner, call
        with _Reads() as reads:
            self.outputs = call()
        self.reads = reads.outside
        _spoil(self.outputs)

    def replay(self) -> None:
        self.owner.num_replays += 1
        self.owner.spoil()
        with torch.inference_mode(False), torch.no_grad(), _Reads() as reads:
            found = self.call()
        if moved := reads.outside - self.reads:
            raise GraphError(f"a graph reads {len(moved)} tensors from memory it has never seen")
        for mine, x in zip(tensors_in(self.outputs), tensors_in(found), strict=True):
            mine.copy_(x)


def _spoil(tree: Any) -> None:
    for tensor in tensors_in(tree):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


class _Reads(TorchDispatchMode):
    """Collects the addresses that ops read and that no op inside has made."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: set[int] = set()
        self.made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.outside |= _addresses((args, kwargs)) - self.made
        self.made |= _addresses(out) - self.outside
        return out


def _addresses(tree: Any) -> set[int]:
    # A weight in oneDNN's order has no address to tell; a CUDA graph reads none.
    leaves = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
    tensors = (x for x in leaves if x.layout is torch.strided)
    return {x.untyped_storage().data_ptr() for x in tensors if x.untyped_storage().nbytes()}


def map_tensors(tree: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return `tree` (tensors, values, tuples and dataclasses of them) with its tensors replaced."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, tuple):
        return tuple(map_tensors(x, fn) for x in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(
            tree, **{name: map_tensors(value, fn) for name, value in _named(tree).items()}
        )
    return tree


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in the order of its parts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple):
        return [x for part in tree for x in tensors_in(part)]
    if is_dataclass(tree) and not isinstance(tree, type):
        return tensors_in(tuple(_named(tree).values()))
    return []


def signature(tree: Any) -> Hashable:
    """Return what two trees must share to be inputs of one graph: shapes, dtypes, values."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, tuple):
        return tuple(signature(x) for x in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), signature(tuple(_named(tree).values()))
    return tree


def _named(tree: Any) -> dict[str, Any]:
    return {field.name: getattr(tree, field.name) for field in fields(tree)}


def describe(name: Hashable, inputs: tuple) -> str:
    """Say what a call is: its name, and the shapes of its first two inputs."""
    words = " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
    return f"{words} of {', '.join(str(list(x.shape)) for x in tensors_in(inputs)[:2])}"
