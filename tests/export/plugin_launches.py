"""The kernels of registered plugins against the bodies of their nodes.

Each is launched as an engine would: over the grid and with the int32 values that the plugin's
expressions come to, on contiguous tensors. Run by test_registration.py in a process of its own, in
Triton's interpreter, where nothing can be compiled: of the code only the launch is asked.
"""

from __future__ import annotations

import pytest
import torch
from tdm_kernels.plugins import Code, Plugin
from tdm_kernels.testing import in_double

from tdm_r1.export import plugins
from tdm_r1.export.plugin_ops import PluginOp, compute
from tests.export.plugin_stand_in import DataType, PluginModule
from tests.export.test_registration import TORCH, describe
from tests.kernels.compare import assert_as_good, randn

EPS = 1e-3  # not the default
OPS = [
    PluginOp("norm_modulate", 40, "fp32", ("x", "scale", "weight"), eps=EPS),
    PluginOp("norm_modulate", 24, "fp16", ("x", "scale", "shift"), per_sample=True, eps=EPS),
    PluginOp("norm_modulate", 40, "fp16", ("x", "weight"), eps=EPS),
    PluginOp(
        "gate_residual_norm", 40, "fp16", ("x", "branch", "gate", "scale", "shift"), 2,
        per_sample=True, eps=EPS,
    ),
    PluginOp(
        "gate_residual_norm", 24, "fp32",
        ("x", "branch", "gate", "scale", "branch_weight", "weight"), 2, eps=EPS,
    ),
    PluginOp(
        "qk_norm_rope", 16, "fp32", ("q", "k", "weight_q", "weight_k", "rope"), 2,
        num_heads=11, eps=EPS,
    ),
    PluginOp("qk_norm_rope", 24, "fp16", ("q", "k", "weight_q", "weight_k"), 2, 3, eps=EPS),
    PluginOp("swiglu", 2100, "fp16", ("gate", "up")),
    PluginOp("gelu_tanh", 40, "fp32", ("x",)),
]  # fmt: skip


def inputs_of(op: PluginOp, b: int, t: int) -> tuple[list[torch.Tensor], list[DataType]]:
    """Random inputs of an op, in its order, and TensorRT's dtypes of them."""
    shapes, dtypes = describe(op, b, t)
    described = enumerate(zip(shapes, dtypes, strict=True))
    return [randn(*shape, seed=i, dtype=TORCH[dtype]) for i, (shape, dtype) in described], dtypes


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 5)])
def test_kernels_compute_the_bodies(op, b, t, monkeypatch):
    monkeypatch.setattr(plugins, "capability_at_hand", lambda: 89)
    monkeypatch.setattr(
        Plugin,
        "compile",
        lambda self, arch: Code("name", "ptx", 32 * self.launch.options["num_warps"], 0),
    )
    module = PluginModule()
    plugins.register(module, [op])
    tensors, dtypes = inputs_of(op, b, t)
    launched = module.plugins[f"tdm_r1::{op.name}"].launch(dtypes, [x.shape for x in tensors])
    launch = plugins.kernel_of(op).launch
    given = iter(tensors)
    first = len(launch.args) - op.num_outputs - len(launched.extra)
    arguments = [None if a is None else next(given) for a in launch.args[:first]]
    outputs = [torch.full_like(tensors[0], float("nan")) for _ in range(op.num_outputs)]
    launch.kernel[launched.grid](*arguments, *launched.extra, *outputs, **launch.options)
    like = compute(op, *tensors)
    with in_double():
        exact = compute(op, *(x.double() for x in tensors))
    for triple in zip(outputs, like, exact, strict=True):
        assert_as_good(*triple)
