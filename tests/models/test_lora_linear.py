"""Siblings with adapters as a few products: against the same linears, one after the other."""

import contextlib
import copy

import pytest
import torch
from tdm_kernels import select
from tdm_kernels.testing import allowed_error
from torch import nn

from tdm_r1.models.lora_linear import LoRALinear
from tdm_r1.models.packing import Packable

WIDTHS, RANKS, ALPHAS = (24, 16, 40), (3, 5), (6.0, 2.5)


class Siblings(Packable):
    groups = ("all",)

    def __init__(self, dtype):
        super().__init__()
        linears = [nn.Linear(12, width).requires_grad_(False).to(dtype) for width in WIDTHS]
        for index in (0, 2):
            linears[index] = LoRALinear(linears[index])
        self.linears = nn.ModuleList(linears)
        for linear, rank, alpha in zip(self.adapted(), RANKS, ALPHAS, strict=True):
            for name in ("policy", "fake"):
                linear.add_adapter(name, rank, alpha, "gaussian")
                nn.init.normal_(linear.lora_B[name])

    def adapted(self):
        return [self.linears[0], self.linears[2]]

    def siblings(self, group):
        return list(self.linears)

    def forward(self, x):
        joint = self.joint("all")
        if joint is not None:
            return joint(x)
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


@pytest.fixture(params=["float32", "bfloat16 under fp32 adapters", "autocast"])
def case(request):
    """(siblings packed, the same one by one, the same in fp64, what they run under, their x)."""
    torch.manual_seed(0)
    half = request.param != "float32"
    plain = Siblings(torch.bfloat16 if half else torch.float32)
    packed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    dtype = plain.linears[1].weight.dtype
    packed.pack(select("auto", "cpu", dtype, 8), adapters=True)
    x = torch.randn(2, 7, 12).to(dtype)
    auto = request.param == "autocast"
    under = torch.autocast("cpu", torch.bfloat16) if auto else contextlib.nullcontext()
    return packed, plain, exact, under, x


def results(model, x, under):
    """y and the gradients of x and of every tensor of the active adapters."""
    x = x.detach().requires_grad_()
    tensors = [t for m in model.adapted() for t in (m.lora_A["policy"], m.lora_B["policy"])]
    with under:
        y = model(x)
    found = torch.autograd.grad(y.double().square().sum(), [x, *tensors], allow_unused=True)
    return [y.detach(), *found]


@pytest.mark.parametrize("active", [("policy", "policy"), ("policy", None), (None, None)])
def test_values_and_gradients(case, active):
    packed, plain, exact, under, x = case
    for model in (packed, plain, exact):
        for linear, name in zip(model.adapted(), active, strict=True):
            linear.select(name)
    found, like = results(packed, x, under), results(plain, x, under)
    true = results(exact, x.double(), contextlib.nullcontext())
    with torch.no_grad(), under:
        torch.testing.assert_close(packed(x), found[0], rtol=0, atol=0)
    for mine, theirs, value in zip(found, like, true, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and mine.shape == value.shape
            assert (mine.double() - value).abs().max() <= allowed_error(theirs, value)


@torch.no_grad()
def test_runs_of_samples_have_their_own_adapters(case):
    packed, plain, _, under, _ = case
    x = torch.randn(6, 7, 12).to(plain.linears[1].weight.dtype)
    rows = [("policy", 1), (None, 2), ("fake", 3)]
    for linear in packed.adapted():
        linear.select_rows(rows)
    with under:
        found = packed(x)
        out = found.new_zeros(6, 9, sum(WIDTHS))
        assert torch.equal(packed.linear("all", x, out[:, 1:8]), found)
        assert torch.equal(out[:, 1:8], found) and not out[:, 0].any() and not out[:, 8].any()
        for (name, _), mine, part in zip(rows, found.split([1, 2, 3]), x.split([1, 2, 3]),
                                         strict=True):  # fmt: skip
            for linear in packed.adapted():
                linear.select(name)
            torch.testing.assert_close(mine, packed(part), rtol=1e-2, atol=1e-2)


def test_what_carries_adapters_is_packed_only_if_asked(case):
    packed, plain, _, _, _ = case
    ops = select("auto", "cpu", torch.float32, 8)
    plain.pack(ops)
    assert not plain.packed
    plain.activated = ("all",)  # GELU would come before what the adapters add
    plain.pack(ops, adapters=True)
    assert not plain.packed
    weights = [linear.detach().clone() for linear in packed.parameters()]
    packed.unpack()
    assert all(torch.equal(a, b) for a, b in zip(weights, packed.parameters(), strict=True))


def test_rows_of_different_adapters_have_no_graph(case):
    packed, _, _, _, x = case
    for linear in packed.adapted():
        linear.select_rows([("policy", 2)])
    with pytest.raises(AssertionError, match="no graph"):
        packed(x)
