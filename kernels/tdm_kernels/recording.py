"""Native calls on fixed buffers, recorded once and replayed by one call.

For a small model, calling an op costs what computing it does. A recording walks the kernels of a
whole forward in C++, its threads meeting at barriers: what a CUDA graph is to a GPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdm_kernels.native import native_op
from tdm_kernels.quantized import version_of

_MAX_NUMBERS = 2**15  # in the first input: above, computing takes longer than calling
_MAX_PROGRAMS = 8  # different shapes kept
_ALLOCATE = ("empty", "new_empty", "empty_like")
_PASS = ("detach", "alias", "_unsafe_view")
_unused: deque[int] = deque()  # numbers of programs nobody holds, forgotten at the next recording


def record(call: Callable[..., Tensor], sources: Iterable[Tensor]) -> Callable[..., Tensor]:
    """`reference.record`: small fp32 calls without gradients are replayed, the others made."""
    return Recorded(call, sources)


class Recorded:
    """`call`, by programs, one for each set of shapes; made anew when a source has changed."""

    def __init__(self, call: Callable[..., Tensor], sources: Iterable[Tensor]) -> None:
        self.call, self.sources = call, tuple(sources)
        self.programs: OrderedDict[tuple, Program | None] = OrderedDict()
        self.version = -1
        self.lock = threading.Lock()  # a program has one set of buffers

    def __call__(self, *inputs: Any) -> Tensor:
        """Return call(*inputs); the first is a tensor, the others tensors or values."""
        first = inputs[0]
        small = first.numel() <= _MAX_NUMBERS and first.dtype == torch.float32
        busy = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if busy or not small or torch.compiler.is_compiling():
            return self.call(*inputs)
        with self.lock:
            program = self._program(inputs)
            return self.call(*inputs) if program is None else program(inputs)

    def _program(self, inputs: tuple) -> Program | None:
        version = version_of(self.sources)
        if version != self.version:
            self.programs.clear()
            self.version = version
        key = tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs)
        if key not in self.programs:
            try:
                self.programs[key] = Program(self.call, inputs)
            except NotRecordable:
                self.programs[key] = None
            if len(self.programs) > _MAX_PROGRAMS:
                self.programs.popitem(last=False)
        self.programs.move_to_end(key)
        return self.programs[key]


class NotRecordable(Exception):
    """The call runs something that is neither a native op nor a view."""


class Program:
    """One recording, and the buffers it reads and writes."""

    def __init__(self, call: Callable[..., Tensor], inputs: tuple) -> None:
        """Raises NotRecordable."""
        _forget_unused()
        buffers = _Buffers()
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
            call(*self.inputs)  # warm-up: layers pack their weights now, outside of the recording
            native_op("record")()
            try:
                with buffers:
                    self.output = call(*self.inputs)
            finally:
                self.number = native_op("recorded")()
        self.buffers = buffers.kept

    def __call__(self, inputs: tuple) -> Tensor:
        """Copy the inputs in, replay, copy the output out."""
        for mine, x in zip(self.inputs, inputs, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(x)
        native_op("replay")(self.number, torch.get_num_threads())
        return self.output.clone()

    def __del__(self) -> None:
        # An op called here would become part of whatever is being traced when this is collected.
        if hasattr(self, "number"):
            _unused.append(self.number)


def _forget_unused() -> None:
    while True:
        try:
            number = _unused.pop()
        except IndexError:
            return
        native_op("forget")(number)


class _Buffers(TorchDispatchMode):
    """Keeps what is allocated, and refuses what a replay would leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _ALLOCATE:
            self.kept.append(out)
        elif not (func.is_view or name in _PASS or func.namespace == "tdm_kernels"):
            raise NotRecordable(str(func))
        return out
