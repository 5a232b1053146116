"""What is registered and asked of TensorRT, against NVIDIA's own Python bindings, without TensorRT.

The bindings are a package of their own. Their libraries are replaced by empty ones that have the
few symbols the bindings look for: names, types and all of `tensorrt.plugin` are then real, and
nothing can be built. Run by test_frontend.py in a process of its own.
"""

from __future__ import annotations

import ctypes
import operator
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tdm_r1.export import plugins
from tests.export import build_stand_in, stand_in
from tests.export.plugin_stand_in import PluginModule
from tests.export.test_registration import OPS, describe

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


class Expression:
    """IDimensionExpr: a size that depends on the shapes."""

    def __init__(self, at) -> None:
        self.at = at


class ExpressionBuilder:
    """IExprBuilder."""

    operations = {"SUM": operator.add, "PROD": operator.mul, "FLOOR_DIV": operator.floordiv}

    def constant(self, value: int) -> Expression:
        return Expression(lambda shapes: value)

    def operation(self, kind, first: Expression, second: Expression) -> Expression:
        combine = self.operations[kind.name]
        return Expression(lambda shapes: combine(first.at(shapes), second.at(shapes)))


class Registry:
    """IPluginRegistry."""

    def __init__(self) -> None:
        self.creators: dict = {}

    def register_creator(self, creator, namespace: str) -> None:
        self.creators[creator.name, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str):
        return self.creators[name, namespace]


@pytest.fixture(scope="session")
def trt(tmp_path_factory):
    """The bindings, as `tensorrt`."""
    root = tmp_path_factory.mktemp("empty")
    folder = Path(find_spec("tensorrt_bindings").origin).parent
    major = re.search(r'__version__ = "(\d+)\.', (folder / "__init__.py").read_text())[1]
    source = root / "empty.c"
    source.write_text("\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in SYMBOLS))
    for name in LIBRARIES:
        file = f"lib{name}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", root / file, source]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(root / file), mode=ctypes.RTLD_GLOBAL)
    import tensorrt_bindings as module

    sys.modules["tensorrt"] = module
    registry = Registry()
    module.get_plugin_registry = lambda: registry
    module.IDimensionExpr = Expression
    return module


@pytest.fixture(scope="session")
def frontend(trt):
    """`tensorrt.plugin`, while the launch of a plugin is asked for."""
    import tensorrt_bindings.plugin as module

    module._tensor.SymIntExpr._exprBuilder = ExpressionBuilder()
    return module


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.op)
def test_launches_are_those_of_the_stand_in(trt, frontend, op, monkeypatch):
    monkeypatch.setattr(plugins, "capability_at_hand", lambda: 89)
    ours = PluginModule()
    plugins.register(ours, [op])
    plugins.register(frontend, [op])
    plugins.register(frontend, [op])  # once is enough
    known = frontend._lib.QDP_REGISTRY[f"tdm_r1::{op.name}"]
    assert (known.input_tensor_names, known.num_outputs) == (list(op.inputs), op.num_outputs)
    assert not known.input_attrs and (op.name, "tdm_r1") in trt.get_plugin_registry().creators
    shapes, dtypes = describe(op, 3, 77)
    given = [
        frontend.TensorDesc(
            frontend.ShapeExprs.from_tuple(
                [
                    frontend.ShapeExpr(Expression(lambda shapes, i=i, axis=axis: shapes[i][axis]))
                    for axis in range(len(shape))
                ]
            ),
            trt.DataType.__members__[dtype.name],
        )
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    for described in given:
        described._immutable = True
    outputs = known.register_func(*given)
    assert [out.dtype for out in outputs] == [given[0].dtype] * op.num_outputs
    for out in outputs:
        assert tuple(size._expr.at(shapes) for size in out.shape_expr) == shapes[0]
    name, ptx, launch, extra = known.aot_impl_func(*given, outputs, 0)
    assert isinstance(launch, frontend.KernelLaunchParams)
    assert isinstance(extra, frontend.SymExprs)
    assert all(isinstance(value, frontend.SymInt32) for value in extra)
    wanted = ours.plugins[f"tdm_r1::{op.name}"].launch(dtypes, shapes)
    grid = tuple(getattr(launch, f"grid_{axis}")._expr.at(shapes) for axis in "xyz")
    block = tuple(getattr(launch, f"block_{axis}")._expr.at(shapes) for axis in "xyz")
    assert (name, ptx, grid, block) == (wanted.name, wanted.ptx, wanted.grid, wanted.block)
    assert launch.shared_mem._expr.at(shapes) == wanted.shared
    assert tuple(value._expr.at(shapes) for value in extra) == wanted.extra


def test_names_that_a_build_uses(trt):
    module = build_stand_in.TensorRT
    for ours, theirs in (
        (module.NetworkDefinitionCreationFlag, trt.NetworkDefinitionCreationFlag),
        (module.BuilderFlag, trt.BuilderFlag),
    ):
        assert ours.__members__.keys() <= theirs.__members__.keys()
    assert "DETAILED" in trt.ProfilingVerbosity.__members__
    assert "PLUGIN_V3" in trt.LayerType.__members__
    assert not hasattr(trt, "ComputeCapability")  # TensorRT-RTX alone is told what to build for
    assert "REQUIRE_USER_ALLOCATION" not in trt.BuilderFlag.__members__
    config = {"progress_monitor", "profiling_verbosity"} | names(build_stand_in.Config)
    for theirs, wanted in (
        (trt.IBuilderConfig, config),
        (trt.IOptimizationProfile, names(build_stand_in.Profile)),
        (trt.INetworkDefinition, names(build_stand_in.Network)),
        (trt.ILayer, names(build_stand_in.Layer) | {"type"}),
        (trt.OnnxParser, names(build_stand_in.Parser) | {"get_error"}),
        (trt.ParserError, {"code", "desc", "node_name", "node_operator"}),
        (trt.IProgressMonitor, {"phase_start", "step_complete", "phase_finish"}),
        (trt.Builder, vars(module().Builder(None)).keys()),
    ):
        assert wanted <= set(dir(theirs)), theirs


def test_names_that_a_run_uses(trt):
    context = names(stand_in.Context) - {"is_stream_capturable"}  # TensorRT-RTX's own
    engine = {"get_tensor_dtype", "create_runtime_config", "create_execution_context", "refittable"}
    refitter = {"set_named_weights", "refit_cuda_engine"}
    for theirs, wanted in (
        (trt.IExecutionContext, context),
        (trt.ICudaEngine, engine),
        (trt.Refitter, refitter),
        (trt.IRuntimeConfig, {"set_execution_context_allocation_strategy"}),
        (trt.Runtime, {"deserialize_cuda_engine"}),
    ):
        assert wanted <= set(dir(theirs)), theirs
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__


def names(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}
