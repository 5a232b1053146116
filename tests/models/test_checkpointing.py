"""Recomputed blocks: the same values and gradients, in less memory, whoever's turn it is."""

import pytest
import torch

from tdm_r1.models import lora
from tdm_r1.models.loading import load_transformer
from tests.training.common import condition

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
T = torch.tensor([300.0, 800.0])


@pytest.fixture(params=["sd3", "zimage"])
def model(request, sd3_dir, zimage_dir):
    return load_transformer(sd3_dir if request.param == "sd3" else zimage_dir)


def gradients(model, *, checkpointed, between=lambda: None, bf16=False):
    """(v, gradient by name) of the sum of squares; `between` runs before the backward pass."""
    model.checkpoint_blocks = checkpointed
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        v = model.velocity(X, T, condition(model.family, 2))
    between()
    v.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return v.detach(), grads


def assert_same(left, right):
    assert torch.equal(left[0], right[0])
    assert left[1].keys() == right[1].keys()
    for name, grad in left[1].items():
        assert torch.equal(grad, right[1][name]), name


@pytest.mark.parametrize("bf16", [False, True])
def test_every_gradient_is_the_same(model, bf16):
    plain = gradients(model, checkpointed=False, bf16=bf16)
    assert len(plain[1]) > 0.9 * len(list(model.parameters()))  # but for the last text queries
    assert_same(plain, gradients(model, checkpointed=True, bf16=bf16))


def test_an_adapter_is_recomputed_as_itself_after_another_was_switched_on(model):
    model.requires_grad_(False)
    targets = lora.TARGETS[model.family]
    lora.inject(model, ["one", "two"], rank=4, alpha=8.0, targets=targets)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in ("one", "two"):
            for parameter in lora.adapter_parameters(model, name).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def run(checkpointed):
        lora.set_adapter(model, "one")
        return gradients(
            model, checkpointed=checkpointed, between=lambda: lora.set_adapter(model, "two")
        )

    plain, found = run(False), run(True)
    assert len(found[1]) >= 40 and all(name.endswith(".one") for name in found[1])
    assert_same(plain, found)
    active = {module.active for _, module in lora.lora_modules(model)}
    assert active == {"two"}  # recomputing left the other role's turn alone


def test_less_is_kept_for_the_backward_pass(model):
    def kept(checkpointed):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.checkpoint_blocks = checkpointed
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.velocity(X, T, condition(model.family, 2)).sum()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    assert kept(True) < 0.5 * kept(False)


def test_without_gradients_nothing_is_wrapped(model, monkeypatch):
    from tdm_r1.models import checkpointing

    monkeypatch.setattr(checkpointing, "checkpoint", None)  # calling it would raise
    plain = model.velocity(X, T, condition(model.family, 2)).detach()
    model.checkpoint_blocks = True
    with torch.no_grad():
        assert torch.allclose(model.velocity(X, T, condition(model.family, 2)), plain, atol=1e-5)
    with pytest.raises(TypeError):
        model.velocity(X, T, condition(model.family, 2))
