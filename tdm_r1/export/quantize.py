"""Products of a graph in e4m3, as pairs of QuantizeLinear and DequantizeLinear.

x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- W in e4m3: the form that a
strongly typed TensorRT fuses into one product of e4m3. Scales have the dtype of x, which is that of
what is dequantised: one number for x, one for each output feature of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdm_r1.errors import ExportError
from tdm_r1.export.static_fp8 import to_e4m3, weight_scale


def quantize_products(
    module: nn.Module,
    model: Any,
    weights: Mapping[str, Mapping[str, Any]],
    scales: Mapping[str, float],
) -> None:
    """Put pairs around the products of the ONNX IR `model` whose linears have a scale for inputs.

    `module` is what was traced, `weights` what `name_weights` returned for it, `scales` are by the
    path of a linear. Raises ExportError for a scale without a product, and for a weight that e4m3
    does not hold exactly.
    """
    import onnx_ir as ir

    paths = {name: entry["weight"].removesuffix(".weight") for name, entry in weights.items()}
    graph = model.graph
    seconds = [(node, node.inputs[1]) for node in graph if len(node.inputs) > 1]
    read = [(node, v, paths[v.name]) for node, v in seconds if v is not None and v.name in paths]
    products = [(node, value, path) for node, value, path in read if path in scales]
    rounded: dict[tuple[str, float], Any] = {}
    done = set()
    for node, value, path in products:
        given, scale = node.inputs[0], scales[path]
        if (given.name, scale) not in rounded:  # q, k and v read the same rows
            pair = _rows(ir, graph, given, torch.tensor(scale), path)
            _insert(graph, node, pair)
            rounded[given.name, scale] = pair[-1].outputs[0]
        node.replace_input_with(0, rounded[given.name, scale])
        if path not in done:
            weight = module.get_parameter(value.name).detach()
            transposed = weights[value.name]["transposed"]
            _insert(graph, node, [_weight(ir, graph, value, weight, transposed)])
        done.add(path)
    if missing := sorted(scales.keys() - done):
        raise ExportError(f"the graph has no product of {missing[0]}, which was to be in fp8")


def _rows(ir: Any, graph: Any, given: Any, scale: Tensor, path: str) -> list[Any]:
    """The pair that rounds `given`, which the linear at `path` reads."""
    kind = ir.DataType.FLOAT8E4M3FN
    scale = _hold(ir, graph, f"{path}.input_scale", scale.bfloat16())
    first = ir.node(
        "QuantizeLinear", [given, scale], {"output_dtype": int(kind)}, name=f"{path}.quantize"
    )
    last = ir.node("DequantizeLinear", [first.outputs[0], scale], name=f"{path}.dequantize")
    for node, dtype in ((first, kind), (last, given.dtype)):
        node.outputs[0].dtype, node.outputs[0].shape = dtype, given.shape
        node.outputs[0].name = f"{node.name}d"
    return [first, last]


def _weight(ir: Any, graph: Any, value: Any, weight_FD: Tensor, transposed: bool) -> Any:
    """The node that dequantises an initializer, whose content becomes e4m3; all readers follow."""
    scale_F1 = weight_scale(weight_FD)
    e4m3_FD = to_e4m3(weight_FD, scale_F1)
    if not torch.equal((e4m3_FD.float() * scale_F1).to(weight_FD.dtype), weight_FD):
        raise ExportError(f"{value.name} is not rounded to e4m3")
    uses, dtype = list(value.uses()), value.dtype
    scale = _hold(ir, graph, f"{value.name}_scale", scale_F1[:, 0].to(weight_FD.dtype))
    stored = e4m3_FD.T if transposed else e4m3_FD
    value.const_value = ir.tensor(stored.contiguous(), name=value.name)
    value.dtype = ir.DataType.FLOAT8E4M3FN
    axis = {"axis": 1 if transposed else 0}
    node = ir.node("DequantizeLinear", [value, scale], axis, name=f"{value.name}.dequantize")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = f"{node.name}d", dtype, value.shape
    for use in uses:
        use.node.replace_input_with(use.idx, output)
    return node


def _hold(ir: Any, graph: Any, name: str, content: Tensor) -> Any:
    """A new initializer."""
    tensor = ir.tensor(content.contiguous(), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def _insert(graph: Any, before: Any, nodes: list[Any]) -> None:
    for node in nodes:
        node.metadata_props.update(before.metadata_props)  # the modules around it
    graph.insert_before(before, nodes)


def check_pairs(
    graph: Path,
    model: nn.Module,
    weights: Mapping[str, Mapping[str, Any]],
    scales: Mapping[str, float],
) -> None:
    """Hold the ONNX file `graph` to what `model` computes whose linears' inputs have these scales.

    Whole pictures cannot: two e4m3 roundings of values that differ in their last bit differ by 6 %,
    so that any two runs differ as much as quantisation errs. `weights` are those of the graph's
    entry in the manifest. Raises ExportError, naming the linear, for a product whose input has
    another scale or none, for a weight that is not the model's bit for bit, and for more quantised
    values than `scales` ask for.
    """
    import onnx_ir as ir

    read: Any = ir.load(graph).graph
    found, used = set(), set()
    for node in read:
        first, second = map(_pair, (*node.inputs, None, None)[:2])
        if first is None or second is None:
            continue
        (rows, scale), (stored, by_output) = first, second
        entry = weights[stored.name]
        path = entry["weight"].removesuffix(".weight")
        if scale.tolist() != scales.get(path):
            raise ExportError(
                f"{path} reads rows scaled by {scale.tolist()}, not by {scales.get(path)}"
            )
        values = _tensor(stored).float()
        weight_FD = (values.T if entry["transposed"] else values) * by_output[:, None]
        if not torch.equal(weight_FD, model.get_parameter(entry["weight"]).float()):
            raise ExportError(f"{path} multiplies by another weight than the Engine")
        found.add(path)
        used.add(rows.name)
    quantized = [n.inputs[0].name for n in read if n.op_type == "QuantizeLinear"]
    if found != scales.keys() or set(quantized) != used:
        raise ExportError(f"{graph.stem} has {len(found)} products in fp8 of {len(scales)}")


def _pair(value: Any) -> tuple[Any, Tensor] | None:
    """What is quantised before it is dequantised to `value`, or is stored so, and its scale."""
    last = None if value is None else value.producer()
    if last is None or last.op_type != "DequantizeLinear":
        return None
    first, scale = last.inputs[0].producer(), _tensor(last.inputs[1]).float()
    if first is None:
        return last.inputs[0], scale
    same = first.op_type == "QuantizeLinear" and first.inputs[1] is last.inputs[1]
    return (first.inputs[0], scale) if same else None


def _tensor(value: Any) -> Tensor:
    """An initializer's content."""
    import onnx_ir as ir

    dtypes = {
        ir.DataType.FLOAT8E4M3FN: (torch.uint8, torch.float8_e4m3fn),
        ir.DataType.BFLOAT16: (torch.int16, torch.bfloat16),
    }
    stored, dtype = dtypes[value.const_value.dtype]
    content = torch.frombuffer(bytearray(value.const_value.tobytes()), dtype=stored)
    return content.view(dtype).reshape(tuple(value.const_value.shape))
