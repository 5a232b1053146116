"""A `tensorrt.plugin` that builds nothing, as strict as NVIDIA documents the real one to be.

It takes what `tdm_r1.export.plugins` registers, under the names and rules of TensorRT 10.11 to 11:
annotated signatures without attributes, one kernel, expressions of int32 only. `Plugin.launch` then
evaluates a launch for shapes that were unknown to the function which described it.
"""

from __future__ import annotations

import inspect
import operator
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64", "BOOL"])
Shapes = Sequence[tuple[int, ...]]
RESERVED = {"", "trt", "tensorrt", "std"}
LAUNCH = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")


class SymInt32:
    """An int32 that is known when the shapes of the inputs are; it cannot be read before."""

    def __init__(self, value: Any) -> None:
        if isinstance(value, SymInt32):
            self.at: Callable[[Shapes], int] = value.at
        elif type(value) is int and -(2**31) <= value < 2**31:
            self.at = lambda shapes: value
        else:
            raise ValueError(f"no int32 expression: {value!r}")

    def _join(self, other: Any, combine: Callable) -> SymInt32:
        other = SymInt32(other)
        joined = ShapeExpr(0)
        joined.at = lambda shapes: combine(self.at(shapes), other.at(shapes))
        return joined

    # The real one has no reflected forms of these: a number comes second.
    def __add__(self, other: Any) -> SymInt32:
        return self._join(other, operator.add)

    def __sub__(self, other: Any) -> SymInt32:
        return self._join(other, operator.sub)

    def __mul__(self, other: Any) -> SymInt32:
        return self._join(other, operator.mul)

    def __floordiv__(self, other: Any) -> SymInt32:
        return self._join(other, operator.floordiv)

    def __bool__(self) -> bool:
        raise TypeError("read before the shapes are known")

    __int__ = __index__ = __bool__


class ShapeExpr(SymInt32):
    """One axis of a tensor."""


def axis_of(number: int, axis: int) -> ShapeExpr:
    """The size of an input's axis."""
    size = ShapeExpr(0)
    size.at = lambda shapes: shapes[number][axis]
    return size


class SymIntExprs:
    def __init__(self, length: int) -> None:
        self.values: list[Any] = [None] * length

    @classmethod
    def from_tuple(cls, values: Sequence[Any]) -> SymIntExprs:
        made = cls(len(values))
        made.values = [
            value if isinstance(value, SymInt32) else SymInt32(value) for value in values
        ]
        return made


class KernelLaunchParams:
    """Expressions, whatever they are set to; no other attribute."""

    def __init__(self) -> None:
        for name in LAUNCH:
            setattr(self, name, int(name != "shared_mem"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in LAUNCH:
            raise AttributeError(name)
        self.__dict__[name] = SymInt32(value)


class TensorDesc:
    """Dtype and symbolic shape; only a copy may be changed."""

    def __init__(self, dtype: DataType, shape_expr: Sequence[SymInt32], fixed: bool = True) -> None:
        self.__dict__.update(dtype=dtype, shape_expr=list(shape_expr), fixed=fixed)

    def like(self) -> TensorDesc:
        return TensorDesc(self.dtype, self.shape_expr, fixed=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.fixed:
            raise ValueError("Cannot modify immutable TensorDesc properties")
        self.__dict__[name] = value


@dataclass(frozen=True)
class Launched:
    """What an engine would launch at some shapes."""

    name: str
    ptx: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    extra: tuple[int, ...]


class Plugin:
    """A registered plugin: `describe` and, once given, `compile`."""

    def __init__(self, describe: Callable, inputs: list[str], num_outputs: int) -> None:
        self.describe, self.inputs, self.num_outputs = describe, inputs, num_outputs
        self.compile: Callable | None = None

    def outputs(self, given: Sequence[TensorDesc]) -> tuple[TensorDesc, ...]:
        assert len(given) == len(self.inputs)
        made = self.describe(*given)
        made = made if isinstance(made, tuple) else (made,)
        assert len(made) == self.num_outputs
        assert all(isinstance(described, TensorDesc) for described in made)
        return made

    def launch(self, dtypes: Sequence[DataType], shapes: Shapes) -> Launched:
        given = [
            TensorDesc(dtype, [axis_of(number, axis) for axis in range(len(shape))])
            for number, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
        ]
        assert self.compile is not None
        name, ptx, launch, extra = self.compile(*given, self.outputs(given), 0)
        assert isinstance(name, (str, bytes)) and isinstance(ptx, (str, bytes))
        assert isinstance(launch, KernelLaunchParams) and isinstance(extra, SymIntExprs)
        assert all(isinstance(value, SymInt32) for value in extra.values)
        values = [getattr(launch, each).at(shapes) for each in LAUNCH]
        assert all(type(value) is int and value > 0 for value in values[:6])
        # What CUDA allows of a grid and a block, and of shared memory that nobody asked for.
        assert values[0] < 2**31 and max(values[1:3]) < 2**16 and 0 <= values[6] <= 48 * 1024
        assert values[3] * values[4] * values[5] <= 1024
        numbers = tuple(value.at(shapes) for value in extra.values)
        return Launched(name, ptx, tuple(values[:3]), tuple(values[3:6]), values[6], numbers)


class Namespace(SimpleNamespace):
    """`tensorrt.plugin.op` and what is in it."""


class PluginModule:
    """The module: `plugins` by id, as "namespace::name"."""

    TensorDesc = TensorDesc
    SymInt32 = SymInt32
    SymIntExprs = SymIntExprs
    KernelLaunchParams = KernelLaunchParams

    def __init__(self) -> None:
        self.plugins: dict[str, Plugin] = {}
        self.op = Namespace()

    def register(self, plugin_id: str) -> Callable:
        def decorate(describe: Callable) -> Callable:
            namespace, name = plugin_id.split("::")
            if "." in plugin_id or namespace in RESERVED:
                raise ValueError(f"no such id: {plugin_id}")
            known = self.op.__dict__.setdefault(namespace, Namespace())
            if hasattr(known, name):
                raise ValueError(f"{name!r} is registered already")
            signature = inspect.signature(describe)
            for parameter in signature.parameters.values():
                # Attributes would be allowed behind the tensors; ours have none.
                _check_parameter(parameter, TensorDesc)
            made = typing.get_args(signature.return_annotation)
            if typing.get_origin(signature.return_annotation) is not tuple or not made:
                raise ValueError(f"returns {signature.return_annotation}")
            if set(made) != {TensorDesc}:
                raise ValueError(f"returns {made}")
            plugin = Plugin(describe, list(signature.parameters), len(made))
            self.plugins[plugin_id] = plugin
            setattr(known, name, plugin)
            return describe

        return decorate

    def aot_impl(self, plugin_id: str) -> Callable:
        def decorate(compile_for: Callable) -> Callable:
            if plugin_id not in self.plugins:
                raise ValueError(f"{plugin_id} is not registered")
            plugin, signature = self.plugins[plugin_id], inspect.signature(compile_for)
            if [*signature.parameters] != [*plugin.inputs, "outputs", "tactic"]:
                raise ValueError(f"takes {[*signature.parameters]}")
            *tensors, outputs, tactic = signature.parameters.values()
            for parameter in tensors:
                _check_parameter(parameter, TensorDesc)
            _check_parameter(tactic, int)
            if typing.get_args(outputs.annotation) != (TensorDesc,) * plugin.num_outputs:
                raise ValueError(f"outputs are {outputs.annotation}")
            name, ptx, launch, extra = typing.get_args(signature.return_annotation)
            if not {name, ptx} <= {str, bytes} or (launch, extra) != (
                KernelLaunchParams,
                SymIntExprs,
            ):
                raise ValueError(f"returns {signature.return_annotation}")
            plugin.compile = compile_for
            return compile_for

        return decorate


def _check_parameter(parameter: inspect.Parameter, kind: type) -> None:
    if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise ValueError(f"{parameter.name} is {parameter.kind}")
    if parameter.annotation is not kind or parameter.default is not inspect.Parameter.empty:
        raise ValueError(f"{parameter.name} is {parameter.annotation}")
