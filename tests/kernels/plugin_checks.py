"""The entries of plugins.py against the reference in fp64, launched with what a plugin says.

Run by test_plugins.py in a process of its own, in Triton's interpreter (see triton_checks.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tdm_kernels import reference
from tdm_kernels.plugins import make_plugin
from tdm_kernels.testing import in_double

from tests.kernels.compare import assert_as_good, randn

DTYPES = [torch.float32, torch.float16]
SHAPES = [(3, 5, 40), (1, 1, 24)]
EPS = 1e-3  # not the default


def launch(op: str, tensors: dict, *, width: int, **settings) -> list[torch.Tensor]:
    """Outputs, as an engine would have them made: contiguous tensors, and no other argument."""
    first = next(iter(tensors.values()))
    required = {"x", "branch", "q", "k", "up"} | ({"gate"} if op == "swiglu" else set())
    optional = tuple(name for name in tensors if name not in required)
    plugin = make_plugin(op, width, dtype=first.dtype, optional=optional, **settings)
    assert plugin.inputs == tuple(tensors)
    outputs = [torch.full_like(first, float("nan")) for _ in range(plugin.num_outputs)]
    # A parameter is absent where the plugin has no such input.
    given = iter(tensors.values())
    num_inputs = len(plugin.launch.args) - plugin.num_outputs - plugin.takes_tokens
    arguments = [None if a is None else next(given) for a in plugin.launch.args[:num_inputs]]
    kernel = plugin.launch.kernel[plugin.grid(first.shape)]
    kernel(*arguments, *plugin.extra(first.shape), *outputs, **plugin.launch.options)
    return outputs


def check(op: str, tensors: dict, call: Callable, **settings) -> None:
    """`call` is the reference, of the same tensors."""

    def expected(inputs: dict) -> tuple:
        found = call(**inputs)
        return found if isinstance(found, tuple) else (found,)

    outputs, like = launch(op, tensors, **settings), expected(tensors)
    with in_double():
        exact = expected({name: x.double() for name, x in tensors.items()})
    for triple in zip(outputs, like, exact, strict=True):
        assert_as_good(*triple)


def norm_modulate(x, scale=None, shift=None, weight=None):
    return reference.norm_modulate(x, scale, shift, weight_D=weight, eps=EPS)


def gate_residual_norm(
    x, branch, gate=None, scale=None, shift=None, branch_weight=None, weight=None
):
    weights = {"branch_weight_D": branch_weight, "weight_D": weight}
    return reference.gate_residual_norm(x, branch, gate, scale, shift, **weights, eps=EPS)


def qk_norm_rope(**tensors):
    return reference.qk_norm_rope(*tensors.values(), eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "d"), SHAPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_norms(dtype, b, t, d, per_sample):
    x, branch = (randn(b, t, d, seed=seed, dtype=dtype) for seed in (1, 2))
    gate, scale, shift = (randn(b if per_sample else 1, 1, d, seed=seed) for seed in (3, 4, 5))
    weight, other = (randn(d, seed=seed, dtype=dtype) for seed in (6, 7))
    settings = {"width": d, "per_sample": per_sample, "eps": EPS}
    for extra in ({"scale": scale, "shift": shift}, {"scale": scale, "weight": weight}, {}):
        check("norm_modulate", {"x": x, **extra}, norm_modulate, **settings)
    for extra in (
        {"gate": gate, "scale": scale, "shift": shift},
        {"gate": gate, "scale": scale, "branch_weight": other, "weight": weight},
        {"scale": scale},
    ):
        tensors = {"x": x, "branch": branch, **extra}
        check("gate_residual_norm", tensors, gate_residual_norm, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "heads", "h"), [(2, 3, 11, 16), (1, 5, 3, 24)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_heads(dtype, b, t, heads, h, per_sample):
    q, k = (randn(b, t, heads, h, seed=seed, dtype=dtype) for seed in (1, 2))
    weights = {f"weight_{n}": randn(h, seed=seed, dtype=dtype) for n, seed in (("q", 3), ("k", 4))}
    rope = {"rope": randn(b if per_sample else 1, t, 1, h, seed=5)}
    settings = {"width": h, "num_heads": heads, "per_sample": per_sample, "eps": EPS}
    for extra in (rope, {}):
        check("qk_norm_rope", {"q": q, "k": k, **weights, **extra}, qk_norm_rope, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "f"), [*SHAPES, (1, 2, 2100)])
def test_activations(dtype, b, t, f):
    gate, up = (randn(b, t, f, seed=seed, dtype=dtype) for seed in (1, 2))
    check("swiglu", {"gate": gate, "up": up}, lambda gate, up: reference.swiglu(gate, up), width=f)
    check("gelu_tanh", {"x": gate}, lambda x: reference.gelu_tanh(x), width=f)
