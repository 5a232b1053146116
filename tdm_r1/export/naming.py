"""Names for what a graph multiplies by: the exporter folds a linear's weight into "val_75".

An initializer that a linear multiplies by is named after its weight, so that it can be found in the
file, and in an engine made from it, to be replaced.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor, nn

from tdm_r1.errors import ExportError

_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter keeps the modules around a node
_OWNER = "model."  # what the traced modules of a transformer's graphs call it


def scopes(node: Any) -> list[str]:
    """Return the paths of the modules around a node of the exporter's, and last its own name."""
    return ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))


def name_weights(module: nn.Module, model: Any) -> dict[str, dict[str, Any]]:
    """Name every initializer of the ONNX IR `model` that a linear of `module` multiplies by.

    Returns, by the initializer's new name, "weight", the weight's path within the module, or within
    its attribute `model`, and whether it lies "transposed", [in, out]. Two linears whose equal
    weights the exporter has made one get one each. What a linear's weight was folded into, such as
    a table, has no such name. Raises ExportError where an initializer is not its linear's weight.
    """
    linears = {path: part for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    graph, found = model.graph, {}
    for node in list(graph):
        path = scopes(node)[-2] if len(scopes(node)) > 1 else None
        if path not in linears or node.op_type not in ("MatMul", "Gemm"):
            continue
        value = node.inputs[1]
        if value is None or not value.is_initializer():
            continue
        transposed = not (node.op_type == "Gemm" and _attribute(node, "transB"))
        name = f"{path}.weight"
        if value.name in found and value.name != name:
            value = _copied(graph, node, value)
        _check_bits(name, value, linears[path].weight, transposed)
        value.name = name
        found[name] = {"weight": name.removeprefix(_OWNER), "transposed": transposed}
    return found


def _attribute(node: Any, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _copied(graph: Any, node: Any, value: Any) -> Any:
    """An initializer of its own for the second input of `node`."""
    twin = type(value)(name=f"{value.name}.{node.name}", shape=value.shape, type=value.type)
    twin.const_value = value.const_value
    graph.register_initializer(twin)
    node.replace_input_with(1, twin)
    return twin


def _check_bits(name: str, value: Any, weight: Tensor, transposed: bool) -> None:
    laid_out = (weight.detach().T if transposed else weight.detach()).contiguous()
    if value.const_value.tobytes() != laid_out.view(torch.uint8).numpy().tobytes():
        raise ExportError(f"{value.name} is not the weight that {name} multiplies by")
