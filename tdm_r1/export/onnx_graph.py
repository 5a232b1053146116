"""Traced modules as ONNX files. The owner of `onnx`."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.export.functions import define
from tdm_r1.export.graphs import Graph
from tdm_r1.export.naming import name_weights, scopes
from tdm_r1.export.plugin_ops import NAMESPACE, PluginOp
from tdm_r1.export.quantize import quantize_products

LOW_OPSET = 23  # in half precision: attention is one op there, whose scores are never rounded
# Products that stay fp32 in half precision: a rotary table's angles, which no other dtype resolves.
FULL_PRODUCTS = ("rotary_emb",)
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")
_NODE = re.compile(r"translating node %(\w+)")
_OP = re.compile(r"No ONNX function found for (.+?)\. Failure")


def check_installed() -> None:
    """Raise ConfigError unless the packages that the exporter needs are installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError("the export needs ONNX: pip install onnx onnxscript") from error


def write_graph(
    graph: Graph,
    root: Path,
    opset: int | None = None,
    *,
    refit: bool = False,
    seen: dict[str, PluginOp] | None = None,
    scales: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Trace `graph` and write `root/<name>.onnx`, above 2 GB with its weights in a file beside it.

    `opset` LOW_OPSET is for graphs in half precision. `refit` puts the weights beside it in any
    case, where ONNX Runtime replaces them. `seen` is where the ops that are bound as nodes of their
    own are known by name, once they are traced. `scales`: of what linears read whose products are
    e4m3, by their path in the model. Returns its entry in the manifest. Raises ExportError for a
    module that cannot be traced, an op that ONNX lacks (node and module are named), an op outside
    ONNX's own domain, an axis that came out fixed though it was to vary, in half precision a
    product in fp32 that is not one of FULL_PRODUCTS, and as `quantize_products` does.
    """
    import onnx

    path = root / f"{graph.name}.onnx"
    with _quiet(), torch.no_grad():
        program = _translate(graph, _trace(graph), opset)
        weights = name_weights(graph.module, program.model)
        quantize_products(graph.module, program.model, weights, scales or {})
        plugins = define(program.model, seen or {}, _translate_body)
        program.save(path, external_data=refit or None)
    onnx.checker.check_model(str(path), full_check=opset == LOW_OPSET)
    if opset == LOW_OPSET:
        _check_products(graph.name, program.model)
    nodes = program.model.graph.all_nodes()
    own = ("", NAMESPACE)
    if foreign := sorted({f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in own}):
        raise ExportError(f"{graph.name} holds ops that are not ONNX's own: {', '.join(foreign)}")
    inputs, outputs = _axes(program.model.graph.inputs), _axes(program.model.graph.outputs)
    _check_dynamic(graph, inputs)
    return {
        "file": path.name,
        "inputs": inputs,
        "outputs": outputs,
        "profile": graph.profile(),
        "weights": weights,
        "opset": program.model.opset_imports[""],
        "plugins": plugins,
    }


def describe(node: Any) -> str:
    """ "Op (node 'name' in module 'path')" of a node of the exporter's."""
    found = scopes(node)
    module = found[-2] if len(found) > 1 else ""
    return f"{node.op_type} (node {node.name!r} in module {module or '(root)'!r})"


def count_nodes(graph: Graph, opset: int | None) -> tuple[int, dict[str, list[int | str]]]:
    """Trace and translate `graph`, of tensors without memory; returns its nodes and its inputs.

    Constants are not folded, there being none. Raises ExportError as `write_graph` does.
    """
    with _quiet():
        model = _translate(graph, _trace(graph), opset, optimize=False).model
    inputs = _axes(model.graph.inputs)
    _check_dynamic(graph, inputs)
    return sum(1 for _ in model.graph.all_nodes()), inputs


def _trace(graph: Graph) -> torch.export.ExportedProgram:
    module = graph.module.eval()
    try:
        return torch.export.export(
            module, graph.examples(), dynamic_shapes=graph.dynamic_shapes(), strict=False
        )
    except Exception as error:  # torch.export raises whatever the traced code and its guards do
        reason = " ".join(str(error).split())[:600]
        raise ExportError(f"{graph.name} cannot be traced: {reason}") from error


def _translate(
    graph: Graph, traced: torch.export.ExportedProgram, opset: int | None, *, optimize: bool = True
) -> Any:
    try:
        return torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=opset,
            optimize=optimize,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic_shapes(),
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"{graph.name}: {_explain(error, traced)}") from error


def _translate_body(module: nn.Module, inputs: Any, dynamic_shapes: Any, opset: int) -> Any:
    traced = torch.export.export(module, inputs, dynamic_shapes=(dynamic_shapes,), strict=False)
    program: Any = torch.onnx.export(traced, dynamo=True, opset_version=opset, verbose=False)
    return program.model


def _explain(error: BaseException, traced: torch.export.ExportedProgram) -> str:
    """The op that ONNX lacks, its node and the module it is in; else the innermost message."""
    text, cause = "", error
    while True:
        text += f"\n{cause}"
        if cause.__cause__ is None:
            break
        cause = cause.__cause__
    op, node = _OP.search(text), _NODE.search(text)
    if op is None or node is None:
        return " ".join(str(cause).split())[:600]
    where = "an unknown module"
    for candidate in traced.graph.nodes:
        if candidate.name == node[1]:
            stack = list(candidate.meta.get("nn_module_stack", {}).values())
            where = f"module {stack[-1][0] or '(root)'!r}" if stack else where
    return f"ONNX has no {op[1]} (node {node[1]!r} in {where})"


def _axes(values: Any) -> dict[str, list[int | str]]:
    """Name -> axes, a number or the name of what varies."""
    return {
        value.name: [size if isinstance(size, int) else str(size) for size in value.shape]
        for value in values
    }


def _check_dynamic(graph: Graph, inputs: dict[str, list[int | str]]) -> None:
    for (name, found), wanted in zip(inputs.items(), graph.dynamic_shapes(), strict=True):
        for axis, dim in wanted.items():
            if isinstance(found[axis], int):
                raise ExportError(f"{graph.name}: axis {axis} of {name}, {dim}, came out fixed")


def _check_products(name: str, model: Any) -> None:
    for node in model.graph.all_nodes():
        if node.op_type in PRODUCTS and "FLOAT" in {value.dtype.name for value in node.inputs}:
            where = describe(node)
            if not any(module in where for module in FULL_PRODUCTS):
                raise ExportError(f"{name} multiplies in fp32: {where}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings about its own workings off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
