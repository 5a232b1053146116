"""Graphs in bf16 or fp16, rewritten for a runtime that multiplies neither.

Two rewritings, both in fp32 arithmetic on the weights as they are stored. Wide: nothing is rounded,
so that what remains is the wiring, to be held to an fp32 tolerance. Rounded: every value of the low
dtype is rounded to it as soon as it is computed, which is what a GPU does that adds up products in
fp32 and stores the low dtype. Attention is one op: as in a fused kernel, its output is rounded.

What is quantised to e4m3 on its way into a product is rounded so too, wide not at all; weights in
e4m3 are what they are in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdm_r1.errors import ExportError
from tdm_r1.export.onnx_graph import describe
from tdm_r1.exported.session import Session

LOW = {"bf16": "BFLOAT16", "fp16": "FLOAT16", "fp8": "BFLOAT16"}


class Watched:
    """A wide graph, and the largest magnitude so far of every value that would be low.

    Called as `Session`; `largest` is that of each of `places`, "Op (node 'x' in module 'y')".
    """

    def __init__(self, path: Path, places: Sequence[str]) -> None:
        self.session, self.places = Session(path), tuple(places)
        self.device = torch.device("cpu")
        self.largest = [0.0] * len(self.places)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs that the graph had before it was watched."""
        outputs = self.session(*inputs)
        num_own = len(outputs) - len(self.places)
        found = [output.item() for output in outputs[num_own:]]
        self.largest = [max(pair) for pair in zip(self.largest, found, strict=True)]
        return outputs[:num_own]


def write_rounded(graph: Path, path: Path, precision: str) -> None:
    """Write the rounded form of the ONNX file `graph` to `path`, in the same folder.

    Weights in a file of their own are shared, not copied. Raises ExportError for a value whose
    dtype the exporter does not know.
    """
    _save(_rewrite(_load(graph), LOW[precision], rounded=True)[0], path)


def write_wide(graph: Path, path: Path, precision: str) -> Watched:
    """Write the wide form of `graph` to `path` and open it; otherwise as `write_rounded`."""
    import onnx_ir as ir

    model, values = _rewrite(_load(graph), LOW[precision], rounded=False)
    for value in values:
        size = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        output = largest.outputs[0]
        output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape(())
        model.graph.extend([size, largest])
        model.graph.outputs.append(output)
    _save(model, path)
    return Watched(path, [describe(value.producer()) for value in values])


def _load(path: Path) -> Any:
    """The graph, every node that is a function replaced by its body."""
    import onnx_ir
    from onnx_ir.passes.common import InlinePass

    return InlinePass()(onnx_ir.load(path)).model


def _save(model: Any, path: Path) -> None:
    import onnx_ir

    onnx_ir.save(model, path)


def _rewrite(model: Any, name: str, *, rounded: bool) -> tuple[Any, list[Any]]:
    """`model`, changed, and the values that nodes computed in the dtype `name`."""
    import onnx_ir as ir

    graph, low, full = model.graph, ir.DataType[name], ir.DataType.FLOAT
    if not rounded:
        _skip_pairs(graph)
    nodes, computed = list(graph), []
    for value in list(graph.initializers.values()):
        if value.dtype == low:
            cast = _redirect(value, [full])
            graph.insert_before(nodes[0], cast)
    for node in nodes:
        if unknown := [value for value in node.outputs if value.dtype is None]:
            raise ExportError(f"{describe(node)} has no dtype: {unknown[0].name}")
        for value in [value for value in node.outputs if value.dtype == low]:
            if node.op_type == "Constant":
                graph.insert_after(node, _redirect(value, [full]))
                continue
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", full)
            value.dtype = full
            computed.append(value)
            if rounded:
                graph.insert_after(node, _redirect(value, [low, full]))
    return model, computed


def _skip_pairs(graph: Any) -> None:
    """Hand what would be quantised and dequantised again to its readers as it is."""
    for node in list(graph):
        first = node.inputs[0].producer() if node.op_type == "DequantizeLinear" else None
        if first is None:  # a weight
            continue
        for use in list(node.outputs[0].uses()):
            use.node.replace_input_with(use.idx, first.inputs[0])
        graph.remove([node, first], safe=True)


def _redirect(value: Any, dtypes: Sequence[Any]) -> list[Any]:
    """Casts of `value` through `dtypes`, the last of which all its readers read instead."""
    import onnx_ir as ir

    uses, casts, last = list(value.uses()), [], value
    for dtype in dtypes:
        casts.append(ir.node("Cast", [last], {"to": int(dtype)}))
        last = casts[-1].outputs[0]
        last.dtype, last.shape = dtype, value.shape
    for use in uses:
        use.node.replace_input_with(use.idx, last)
    return casts
