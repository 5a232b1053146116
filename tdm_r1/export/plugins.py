"""The nodes of `plugin_ops` as TensorRT's ahead-of-time plugins: our Triton kernels in an engine.

A plugin is two functions that TensorRT calls while it builds. One tells what leaves a node, the
other returns a kernel's name, its PTX, its launch and its int32 arguments, the last two as
expressions of the input's shape. Both go into the engine, which then needs no Python and no Triton.
Source: NVIDIA's documentation of `tensorrt.plugin`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tdm_r1.errors import ConfigError
from tdm_r1.export.plugin_ops import NAMESPACE, PluginOp
from tdm_r1.exported.manifest import DTYPES

_NAMES = {"fp32": "FLOAT", "bf16": "BF16", "fp16": "HALF"}  # TensorRT's


def check_kernels() -> None:
    """Raise ConfigError unless Triton is installed, which compiles the kernels."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plugins compiles kernels by Triton: pip install triton") from error


def capability_at_hand() -> int:
    """Return the compute capability of the current GPU, as 89."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def kernel_of(op: PluginOp) -> Any:
    """Return the `tdm_kernels.plugins.Plugin` that computes an op; needs Triton."""
    from tdm_kernels.plugins import OPS, make_plugin

    plugin = make_plugin(
        op.op,
        op.width,
        dtype=DTYPES[op.precision],
        optional=[name for name in op.inputs if name not in OPS[op.op].required],
        num_heads=op.num_heads,
        per_sample=op.per_sample,
        **({} if op.eps is None else {"eps": op.eps}),
    )
    assert plugin.inputs == op.inputs and plugin.num_outputs == op.num_outputs, op.name
    return plugin


def register(module: Any, ops: Iterable[PluginOp]) -> None:
    """Register a plugin for each of `ops` with `module`, which is `tensorrt.plugin`.

    Those that this process has registered before are left as they are. PTX is compiled for the GPU
    that is at hand when an engine is built, and once here, since who builds is told little of what
    goes wrong in between: raises ValueError for a kernel that an engine could not launch.
    """
    known = getattr(module.op, NAMESPACE, None)
    for op in ops:
        kernel_of(op).compile(capability_at_hand())
        if hasattr(known, op.name):
            continue
        plugin_id = f"{NAMESPACE}::{op.name}"
        module.register(plugin_id)(_describe(module, op))
        module.aot_impl(plugin_id)(_compile(module, op))


def _describe(module: Any, op: PluginOp) -> Callable:
    """All outputs are like the first input."""

    def describe(*inputs: Any) -> Any:
        return tuple(inputs[0].like() for _ in range(op.num_outputs))

    made: Any = tuple[(module.TensorDesc,) * op.num_outputs]  # type: ignore[misc]
    # The library reads names and types of arguments off the function.
    describe.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        _parameters(op, module.TensorDesc), return_annotation=made
    )
    return describe


def _compile(module: Any, op: PluginOp) -> Callable:
    """The kernel, its launch, and its arguments between inputs and outputs."""

    def compile_for(*arguments: Any) -> Any:
        *inputs, outputs, _ = arguments
        first = inputs[0]
        wanted = (_NAMES[op.precision],) * (1 + op.num_outputs)
        found = tuple(described.dtype.name for described in (first, *outputs))
        if found != wanted:
            raise ValueError(f"{op.name} is given {', '.join(found)}; allowed: {wanted[0]}")
        plugin = kernel_of(op)
        code = plugin.compile(capability_at_hand())
        launch = module.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = plugin.grid(first.shape_expr)
        launch.block_x, launch.shared_mem = code.threads, code.shared
        extra = [module.SymInt32(value) for value in plugin.extra(first.shape_expr)]
        return code.name, code.ptx, launch, module.SymIntExprs.from_tuple(extra)

    given: Any = tuple[(module.TensorDesc,) * op.num_outputs]  # type: ignore[misc]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        *_parameters(op, module.TensorDesc),
        inspect.Parameter("outputs", kind, annotation=given),
        inspect.Parameter("tactic", kind, annotation=int),
    ]
    made = tuple[str, str, module.KernelLaunchParams, module.SymIntExprs]
    compile_for.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        parameters, return_annotation=made
    )
    return compile_for


def _parameters(op: PluginOp, described: Any) -> list[inspect.Parameter]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [inspect.Parameter(name, kind, annotation=described) for name in op.inputs]
