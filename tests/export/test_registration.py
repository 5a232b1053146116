"""What is registered with `tensorrt.plugin`: names, launches, and what these compute.

TensorRT is not here: a stand-in checks what the real one would, and evaluates the launches.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from tdm_kernels import registry
from torch import nn

from tdm_r1.export import plugins
from tdm_r1.export.plugin_ops import PluginOp, compute
from tdm_r1.exported.manifest import DTYPES
from tests.export.plugin_stand_in import DataType, PluginModule, ShapeExpr, SymInt32
from tests.kernels.test_triton import run_checks

OWN = {"fp32": DataType.FLOAT, "fp16": DataType.HALF, "bf16": DataType.BF16}
TORCH = {OWN[precision]: dtype for precision, dtype in DTYPES.items()}
GRN = ("x", "branch", "gate", "scale", "shift")
OPS = [
    PluginOp("gate_residual_norm", 1536, "bf16", GRN, 2, per_sample=True, eps=1e-6),
    PluginOp("norm_modulate", 3840, "fp32", ("x", "scale", "weight"), eps=1e-5),
    PluginOp("qk_norm_rope", 128, "fp16", ("q", "k", "rope"), 2, num_heads=30, eps=1e-5),
    PluginOp("swiglu", 10240, "bf16", ("gate", "up")),
    PluginOp("gelu_tanh", 6144, "bf16", ("x",)),
]


class TestRegistration:
    @pytest.fixture
    def module(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(plugins, "capability_at_hand", lambda: 89)
        return PluginModule()

    @pytest.mark.parametrize("op", OPS, ids=lambda op: op.op)
    @pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 77), (4, 4224)])
    def test_launches(self, module, op, b, t):
        from tests.kernels import test_plugins as kernels

        plugins.register(module, [op])
        plugins.register(module, [op])  # once is enough
        ((plugin_id, plugin),) = module.plugins.items()
        assert plugin_id == f"tdm_r1::{op.name}"
        assert (plugin.inputs, plugin.num_outputs) == (list(op.inputs), op.num_outputs)
        shapes, dtypes = describe(op, b, t)
        launched = plugin.launch(dtypes, shapes)
        tokens = ["u32"] * (op.eps is not None)
        parameters = ["u64"] * len(shapes) + tokens + ["u64"] * op.num_outputs
        assert kernels.entry(launched.ptx, launched.name) == parameters
        assert launched.extra == (t,) * len(tokens)
        assert f".reqntid {launched.block[0]}" in launched.ptx
        grid, num_warps = kernels.launched(lambda: call_triton(op, shapes, dtypes))
        assert (launched.grid, launched.block) == (grid, (32 * num_warps, 1, 1))

    def test_a_dtype_that_it_is_not_for(self, module):
        plugins.register(module, OPS[-1:])
        (plugin,) = module.plugins.values()
        with pytest.raises(ValueError, match="is given HALF, HALF; allowed: BF16"):
            plugin.launch([DataType.HALF], [(1, 2, 6144)])

    def test_expressions_are_of_int32_and_not_read(self):
        size = ShapeExpr(0)
        with pytest.raises(ValueError, match="no int32 expression: 0.5"):
            SymInt32(0.5)
        with pytest.raises(ValueError, match="no int32 expression: 0.5"):
            size * 0.5
        for read in (bool, int):
            with pytest.raises(TypeError):
                read(size)


def describe(op: PluginOp, b: int, t: int):
    """Shapes and dtypes of an op's inputs, in their order."""
    own = OWN[op.precision]
    heads = () if op.num_heads is None else (op.num_heads,)
    shapes, dtypes = [], []
    for name in op.inputs:
        vector = op.eps is not None and name in ("gate", "scale", "shift")
        if vector or name == "rope":
            first = b if op.per_sample else 1
            shapes.append((first, 1, op.width) if vector else (first, t, 1, op.width))
        else:
            shapes.append((op.width,) if "weight" in name else (b, t, *heads, op.width))
        dtypes.append(DataType.FLOAT if vector or name == "rope" else own)
    return shapes, dtypes


def call_triton(op: PluginOp, shapes, dtypes) -> None:
    """What PyTorch calls: the op of the Triton backend, on tensors without memory."""
    names = {"weight": "weight_D", "weight_q": "weight_q_H", "rope": "rope_BTNH"}
    rows = "BTNH" if op.num_heads else "BTF" if op.eps is None else "BTD"
    given = {
        names.get(name, f"{name}_{rows}"): torch.empty(shape, dtype=TORCH[dtype], device="meta")
        for name, shape, dtype in zip(op.inputs, shapes, dtypes, strict=True)
    }
    module, _, name = registry.TRITON_OPS[op.op].partition(":")
    options = {} if op.eps is None else {"eps": op.eps}
    getattr(importlib.import_module(module), name)(**given, **options)


def test_names_tell_ops_apart():
    changes = [{"eps": 1e-5}, {"per_sample": False}, {"width": 16}, {"precision": "fp16"}]
    changes += [{"inputs": GRN[:-1]}, {"op": "norm_modulate"}, {"num_heads": 2}]
    names = {OPS[0].name, *(replace(OPS[0], **change).name for change in changes)}
    assert len(names) == 8 and all(name.isidentifier() for name in names)
    for op in OPS:
        assert PluginOp.from_dict({**op.to_dict(), "nodes": 3}) == op


@pytest.mark.slow
def test_what_the_plugins_compute():
    run_checks(interpret=True, checks="tests/export/plugin_launches.py")


def test_the_reference_of_an_op():
    inputs = [torch.randn(2, 3, 16) for _ in range(2)]
    op = PluginOp("swiglu", 16, "fp32", ("gate", "up"))
    (found,) = compute(op, *inputs)
    torch.testing.assert_close(found, nn.functional.silu(inputs[0]) * inputs[1])
