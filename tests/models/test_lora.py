"""Adapters: injection, roles, merging, and files that diffusers reads."""

import json

import pytest
import safetensors.torch
import torch
from diffusers import SD3Transformer2DModel, ZImageTransformer2DModel
from torch import nn

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.models import lora
from tests.models import test_sd3, test_zimage
from tests.models.common import relative_error


def build(family="sd3"):
    """Return both models of one family, and a function of each that runs it on fixed inputs."""
    if family == "sd3":
        ours, theirs = test_sd3.build_pair()
        batch = test_sd3.make_batch(2, 6, 8, 5)
        return ours, theirs, lambda m: m.velocity(*batch), lambda m: test_sd3.run_theirs(m, *batch)
    ours, theirs = test_zimage.build_pair()
    batch = test_zimage.make_batch((6, 8), [5, 40])
    return ours, theirs, lambda m: m.velocity(*batch), lambda m: test_zimage.run_theirs(m, *batch)


def inject_trained(model, family="sd3", names=("policy",), rank=4, alpha=6.0, seed=3):
    """Inject adapters and move B away from zero, as training would."""
    lora.inject(model, names, rank=rank, alpha=alpha, targets=lora.TARGETS[family])
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            for parameter in lora.adapter_parameters(model, name).values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))


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


@pytest.mark.parametrize("family", ["sd3", "zimage"])
@pytest.mark.parametrize("rank, alpha", [(4, 8.0), (2, 3.0), (8, 1.0)])
@torch.no_grad()
def test_saved_adapters_have_the_same_effect_here_and_in_diffusers(family, rank, alpha, tmp_path):
    ours, theirs, velocity, their_velocity = build(family)
    inject_trained(ours, family, rank=rank, alpha=alpha)
    lora.set_adapter(ours, "policy")
    expected = velocity(ours)
    file = lora.save_lora(tmp_path, ours, "policy", {"steps": "4"})
    assert file == tmp_path / lora.WEIGHTS_NAME
    tensors = lora.load_lora_file(tmp_path)
    assert {entry.scale for entry in tensors.values()} == {alpha / rank}
    merged, *_ = build(family)
    lora.merge_lora(merged, tensors)
    assert relative_error(velocity(merged), expected) <= 1e-5
    load_in_diffusers(family, theirs, file)
    assert relative_error(their_velocity(theirs), expected) <= 1e-5


def load_in_diffusers(family, theirs, file):
    from diffusers import StableDiffusion3Pipeline, ZImagePipeline

    kind = StableDiffusion3Pipeline if family == "sd3" else ZImagePipeline
    state, metadata = kind.lora_state_dict(str(file), return_lora_metadata=True)
    kind.load_lora_into_transformer(state, transformer=theirs, metadata=metadata)


def test_reads_an_adapter_that_peft_saved(tmp_path):
    from peft import LoraConfig

    ours, theirs, velocity, their_velocity = build()
    config = LoraConfig(r=4, lora_alpha=10, init_lora_weights=False, target_modules=["attn.to_q"])
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path, adapter_name="default")
    lora.merge_lora(ours, lora.load_lora_file(tmp_path))
    with torch.no_grad():
        assert relative_error(velocity(ours), their_velocity(theirs)) <= 1e-5


@pytest.mark.parametrize(
    "layout, scale",
    [
        ({"a": "transformer.m.to_q.lora_A.weight", "b": "transformer.m.to_q.lora_B.weight"}, 1.0),
        (
            {
                "a": "base_model.model.m.to_q.lora_A.default.weight",
                "b": "base_model.model.m.to_q.lora_B.default.weight",
            },
            1.0,
        ),
        (
            {
                "a": "transformer.m.to_q.lora.down.weight",
                "b": "transformer.m.to_q.lora.up.weight",
                "alpha": "transformer.m.to_q.alpha",
            },
            1.5,
        ),
        (
            {"a": "m.to_q.lora_down.weight", "b": "m.to_q.lora_up.weight", "alpha": "m.to_q.alpha"},
            1.5,
        ),
    ],
)
def test_key_layouts(layout, scale, tmp_path):
    values = {"a": torch.randn(2, 5), "b": torch.randn(3, 2), "alpha": torch.tensor(3.0)}
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: values[kind] for kind, key in layout.items()}, file)
    ((name, (a, b, s)),) = lora.load_lora_file(file).items()
    assert name == "m.to_q" and s == scale
    assert torch.equal(a, values["a"]) and torch.equal(b, values["b"])


def test_alpha_comes_from_the_config_beside_a_peft_file(tmp_path):
    tensors = {
        "base_model.model.m.lora_A.weight": torch.randn(2, 5),
        "base_model.model.m.lora_B.weight": torch.randn(3, 2),
    }
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert lora.load_lora_file(tmp_path)["m"].scale == 4.0


@pytest.mark.parametrize(
    "keys, message",
    [
        (["transformer.m.lora_A.weight"], "half a pair"),
        (["transformer.m.weight"], "transformer.m.weight"),
        (["text_encoder.m.lora_A.weight", "text_encoder.m.lora_B.weight"], "text_encoder.m"),
        ([], "empty"),
    ],
)
def test_foreign_files_are_refused(keys, message, tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2, 2) for key in keys}, file)
    with pytest.raises(LoadError, match=message):
        lora.load_lora_file(file)


def test_missing_and_damaged_files_are_named(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(LoadError, match="x.safetensors"):
        lora.load_lora_file(file)
    file.write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(LoadError, match="x.safetensors"):
        lora.load_lora_file(file)
    with pytest.raises(LoadError, match="no pytorch_lora_weights.safetensors"):
        lora.load_lora_file(tmp_path)


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
