"""Traced modules as ONNX files. The owner of `onnx`."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.export.graphs import Graph

_NODE = re.compile(r"translating node %(\w+)")
_OP = re.compile(r"No ONNX function found for (.+?)\. Failure")


def check_installed() -> None:
    """Raise ConfigError unless the packages that the exporter needs are installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError("the export needs ONNX: pip install onnx onnxscript") from error


def write_graph(graph: Graph, root: Path) -> dict[str, Any]:
    """Trace `graph` and write `root/<name>.onnx`, above 2 GB with its weights in a file beside it.

    Returns its entry in the manifest. Raises ExportError for a module that cannot be traced, an op
    that ONNX lacks (node and module are named), an op outside ONNX's own domain, and an axis that
    came out fixed though it was to vary.
    """
    import onnx

    path = root / f"{graph.name}.onnx"
    with _quiet(), torch.no_grad():
        program = _translate(graph, _trace(graph))
        program.save(path)
    onnx.checker.check_model(str(path))
    nodes = program.model.graph.all_nodes()
    if foreign := sorted({f"{node.domain}::{node.op_type}" for node in nodes if node.domain}):
        raise ExportError(f"{graph.name} holds ops that are not ONNX's own: {', '.join(foreign)}")
    inputs, outputs = _axes(program.model.graph.inputs), _axes(program.model.graph.outputs)
    _check_dynamic(graph, inputs)
    return {
        "file": path.name,
        "inputs": inputs,
        "outputs": outputs,
        "profile": graph.profile(),
        "opset": program.model.opset_imports[""],
    }


def _trace(graph: Graph) -> torch.export.ExportedProgram:
    module = graph.module.eval()
    try:
        return torch.export.export(
            module, graph.examples(), dynamic_shapes=graph.dynamic_shapes(), strict=False
        )
    except Exception as error:  # torch.export raises whatever the traced code and its guards do
        reason = " ".join(str(error).split())[:600]
        raise ExportError(f"{graph.name} cannot be traced: {reason}") from error


def _translate(graph: Graph, traced: torch.export.ExportedProgram) -> Any:
    try:
        return torch.onnx.export(
            traced,
            dynamo=True,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic_shapes(),
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"{graph.name}: {_explain(error, traced)}") from error


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
