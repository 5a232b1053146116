"""Nodes of `plugin_ops` as functions of their graph: their bodies are the same ops in ONNX's own.

A runtime that knows no such node runs its body, and so does the gate; NVIDIA's parser asks for a
plugin of the node's namespace and name first. One file thus serves both, and what the gate has
checked is the very graph that an engine is built from, but for the kernels inside the nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tdm_r1.export.plugin_ops import ATTRIBUTES, NAMESPACE, PluginOp, compute
from tdm_r1.exported.manifest import DTYPES

_VECTORS = ("gate", "scale", "shift")
_WEIGHTS = ("weight", "branch_weight", "weight_q", "weight_k")


class Body(nn.Module):
    """What a node computes, in plain PyTorch."""

    def __init__(self, op: PluginOp) -> None:
        super().__init__()
        self.op = op

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return compute(self.op, *tensors)


def define(
    model: Any, seen: Mapping[str, PluginOp], translate: Callable[..., Any]
) -> dict[str, dict[str, Any]]:
    """Give the ONNX IR `model` a function for each kind of node that it has of `seen`.

    `translate` (module, inputs, dynamic shapes, opset) returns the ONNX IR of a module. Returns by
    name the op of each, as `PluginOp.to_dict` has it, and the number of its "nodes".
    """
    opset = model.opset_imports[""]
    counts = Counter(node.op_type for node in model.graph.all_nodes() if node.domain == NAMESPACE)
    for name in sorted(counts):
        function = _function(seen[name], translate(Body(seen[name]), *_example(seen[name]), opset))
        model.functions[function.identifier()] = function
    if counts:
        model.opset_imports[NAMESPACE] = 1
    return {name: {**seen[name].to_dict(), "nodes": counts[name]} for name in sorted(counts)}


def _example(op: PluginOp) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace a body with, and their axes that vary: batch and tokens."""
    batch, tokens = Dim("batch", min=1), Dim("tokens", min=1)
    inputs, dynamic = [], []
    shape: tuple[int, ...]
    axes: dict[int, Any]
    heads = () if op.num_heads is None else (op.num_heads,)
    activation = op.eps is None
    for name in op.inputs:
        vector = name in _VECTORS and not activation
        dtype = torch.float32 if vector or name == "rope" else DTYPES[op.precision]
        first = 2 if op.per_sample else 1
        if name in _WEIGHTS:
            shape, axes = (op.width,), {}
        elif vector:
            shape, axes = (first, 1, op.width), {0: batch} if op.per_sample else {}
        elif name == "rope":
            shape = (first, 3, 1, op.width)
            axes = {0: batch, 1: tokens} if op.per_sample else {1: tokens}
        else:
            shape, axes = (2, 3, *heads, op.width), {0: batch, 1: tokens}
        inputs.append(torch.zeros(shape, dtype=dtype))
        dynamic.append(axes)
    return tuple(inputs), tuple(dynamic)


def _function(op: PluginOp, body: Any) -> Any:
    """The graph of the ONNX IR `body` as a function, which holds its constants as nodes."""
    import onnx_ir as ir

    graph = body.graph
    for value in list(graph.initializers.values()):
        constant = ir.node("Constant", [], {"value": value.const_value})
        made = constant.outputs[0]
        made.dtype, made.shape = value.dtype, value.shape
        graph.insert_before(graph[0], constant)
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, made)
        del graph.initializers[value.name]
    # An axis of a body is not the axis of that name in another: a runtime would share its buffers.
    for value in (*graph.inputs, *(made for node in graph for made in node.outputs)):
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else None for size in value.shape]
            value.shape = ir.Shape(sizes)
    # Declared, or a runtime would refuse them on the node; the body reads neither.
    kinds = {str: ir.AttributeType.STRING, bool: ir.AttributeType.INT}
    attributes = [ir.Attr(name, kinds[type(value)], None) for name, value in ATTRIBUTES.items()]
    return ir.Function(NAMESPACE, op.name, graph=graph, attributes=attributes)
