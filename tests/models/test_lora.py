"""Adapters: injection, roles and merging."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, ZImageTransformer2DModel
from torch import nn

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.models import lora
from tests.models import test_sd3, test_zimage
from tests.models.common import relative_error
from tests.models.lora_pairs import build, inject_trained


@pytest.mark.parametrize("family", ["sd3", "zimage"])
@torch.no_grad()
def test_merging_equals_the_active_adapter(family):
    ours, _, velocity, _ = build(family)
    before = velocity(ours)
    inject_trained(ours, family)
    torch.testing.assert_close(velocity(ours), before)
    lora.set_adapter(ours, "policy")
    expected = velocity(ours)
    assert relative_error(expected, before) > 1e-2
    merged, *_ = build(family)
    merged.freeze()
    lora.merge_lora(merged, lora.adapter_tensors(ours, "policy"))
    assert relative_error(velocity(merged), expected) <= 1e-5
    lora.merge_lora(merged, lora.adapter_tensors(ours, "policy"), scale=-1.0)
    assert relative_error(velocity(merged), before) <= 1e-5


def test_merging_is_all_or_nothing():
    ours, *_ = build()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    good, d = "transformer_blocks.0.attn.to_q", 64
    tensors = {
        good: (torch.ones(2, d), torch.ones(d, 2), 1.0),
        "transformer_blocks.9.attn.to_q": (torch.ones(2, d), torch.ones(d, 2), 1.0),
        "transformer_blocks.0.attn.to_k": (torch.ones(2, 3), torch.ones(d, 2), 1.0),
    }
    with pytest.raises(LoadError, match=r"blocks\.9\.attn\.to_q \(no such.*0\.attn\.to_k \(B"):
        lora.merge_lora(ours, tensors)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_adapters_do_not_interfere():
    ours, _, velocity, _ = build()
    base = velocity(ours).detach()
    inject_trained(ours, names=("generator", "fake"))
    flags = {name: p.requires_grad for name, p in ours.named_parameters()}
    lora.set_adapter(ours, "generator")
    velocity(ours).sum().backward()
    grads = {n: p.grad for n, p in lora.adapter_parameters(ours, "generator").items()}
    # The last block's text queries are never asked, so their adapter is the only one left alone.
    idle = {name for name, grad in grads.items() if grad is None or not grad.any()}
    assert {name.split(".lora_")[0] for name in idle} == {"transformer_blocks.2.attn.add_q_proj"}
    assert all(p.grad is None for p in lora.adapter_parameters(ours, "fake").values())
    lora.set_adapter(ours, None)
    torch.testing.assert_close(velocity(ours), base)
    assert flags == {name: p.requires_grad for name, p in ours.named_parameters()}
    first, second = (lora.adapter_parameters(ours, name) for name in ("generator", "fake"))
    assert list(first) == list(second)


def test_a_second_injection_adds_to_the_same_linears():
    ours, *_ = build()
    lora.inject(ours, ["a"], rank=2, alpha=2, targets=["attn.to_q"])
    lora.inject(ours, ["b"], rank=3, alpha=2, targets=["attn.to_q", "ff.net.2"], init="kaiming")
    assert len(lora.adapter_parameters(ours, "a")) == 6
    assert len(lora.adapter_parameters(ours, "b")) == 12
    lora.set_adapter(ours, "a")
    assert {m.active for _, m in lora.lora_modules(ours)} == {"a", None}


def test_adapters_stay_in_step_with_a_model_that_was_frozen():
    ours, _, velocity, _ = build()
    ours.freeze()
    inject_trained(ours)
    with torch.no_grad():
        base = velocity(ours)
        lora.set_adapter(ours, "policy")
        active = velocity(ours)
        assert relative_error(active, base) > 1e-2
        torch.testing.assert_close(velocity(ours.freeze()), active)


def test_adapters_on_a_half_precision_base_are_fp32():
    ours, _, velocity, _ = build()
    ours.to(torch.bfloat16)
    inject_trained(ours)
    lora.set_adapter(ours, "policy")
    assert {p.dtype for p in lora.adapter_parameters(ours, "policy").values()} == {torch.float32}
    assert velocity(ours).isfinite().all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": ["attn.to_w"]}, "attn.to_w"),
        ({"targets": []}, "match no linear"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"init": "ones"}, "init='ones'"),
        ({"adapter_names": ["a.b"]}, "'a.b'"),
    ],
)
def test_bad_injections_are_refused(changes, message):
    ours, *_ = build()
    arguments = {"adapter_names": ["a"], "rank": 2, "alpha": 2.0, "targets": ["attn.to_q"]}
    with pytest.raises(ConfigError, match=message):
        lora.inject(ours, **{**arguments, **changes})


def test_unknown_and_repeated_adapter_names_are_refused():
    ours, *_ = build()
    lora.inject(ours, ["policy"], rank=2, alpha=2, targets=["attn.to_q"])
    with pytest.raises(ConfigError, match="Did you mean 'policy'"):
        lora.set_adapter(ours, "polcy")
    with pytest.raises(ConfigError, match="'polcy'"):
        lora.adapter_parameters(ours, "polcy")
    with pytest.raises(ConfigError, match="already in use"):
        lora.inject(ours, ["policy"], rank=2, alpha=2, targets=["attn.to_q"])


@pytest.mark.parametrize(
    "family, kind, values",
    [
        ("sd3", SD3Transformer2DModel, test_sd3.TINY),
        ("zimage", ZImageTransformer2DModel, test_zimage.TINY),
    ],
)
def test_default_targets_are_what_peft_finds(family, kind, values):
    from peft import LoraConfig

    theirs = kind(**values)
    theirs.add_adapter(LoraConfig(r=2, target_modules=list(lora.TARGETS[family])))
    expected = [
        n.removesuffix(".base_layer") for n, _ in theirs.named_modules() if "base_layer" in n
    ]
    ours, *_ = build(family)
    lora.inject(ours, ["a"], rank=2, alpha=2, targets=lora.TARGETS[family])
    assert [name for name, _ in lora.lora_modules(ours)] == expected
    assert all(isinstance(m.base_layer, nn.Linear) for _, m in lora.lora_modules(ours))
