"""Roles share what they can and nothing else."""

import pytest
import torch

from tdm_r1.config import Roles
from tdm_r1.errors import ConfigError
from tdm_r1.models import lora
from tdm_r1.models.loading import load_transformer
from tdm_r1.models.lora_files import load_lora_file
from tdm_r1.pipeline import find_model
from tdm_r1.training.roles import _targets, build_roles, follow, transferred
from tests.training.common import condition

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def few_step_lora(model_dir):
    """A LoRA with a B that matters, as `build_roles` takes it."""
    model = load_transformer(model_dir, dtype=torch.float32)
    lora.inject(model, ["tdm"], rank=4, alpha=8.0, targets=TARGETS)
    for name, tensor in lora.adapter_parameters(model, "tdm").items():
        torch.nn.init.normal_(tensor, std=0.1 if "lora_B" in name else 0.3)
    return {
        name: type(t)(*(x.clone() if torch.is_tensor(x) else x for x in t))
        for name, t in lora.adapter_tensors(model, "tdm").items()
    }


def build(model_dir, kind, few_step=None):
    base = load_transformer(model_dir, dtype=torch.float32)
    full = ("fake",) if kind == "mixed" else ()
    kind = "lora" if full else kind
    config = Roles(kind=kind, full=full, rank=4, alpha=4.0, targets=TARGETS)
    return build_roles(base, "tdm_r1", config, few_step=few_step, bf16=False, ema_reference=True)


@pytest.fixture(params=["lora", "full", "mixed"])
def kind(request):
    return request.param


def velocities(roles):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([300.0, 800.0])
    with torch.no_grad():
        return {name: role(x, t, condition("sd3", 2)) for name, role in roles.items()}


def test_generator_starts_from_the_few_step_model_and_the_others_from_the_base(kind, sd3_dir):
    few_step = few_step_lora(sd3_dir)
    found = velocities(build(sd3_dir, kind, few_step))
    merged = load_transformer(sd3_dir, dtype=torch.float32)
    lora.merge_lora(merged, few_step)
    expected = velocities({"few": build_single(merged)})["few"]
    assert torch.allclose(found["generator"], expected, atol=1e-5)
    assert torch.equal(found["ema"], found["generator"])
    assert not torch.allclose(found["generator"], found["base"], atol=1e-3)
    for name in ("fake", "surrogate", "lag", "reference"):
        assert torch.allclose(found[name], found["base"], atol=1e-6)


def build_single(transformer):
    from tdm_r1.training.roles import Role

    return Role("few", transformer, None, bf16=False)


def test_training_one_role_changes_no_other(kind, sd3_dir):
    roles = build(sd3_dir, kind)
    before = velocities(roles)
    hashes = {name: role.sha256() for name, role in roles.items()}
    for tensor in roles["fake"].parameters():
        tensor.data.add_(0.05)
    after = velocities(roles)
    for name in roles:
        assert torch.equal(before[name], after[name]) == (name != "fake"), name
        assert (hashes[name] == roles[name].sha256()) == (name != "fake"), name


def test_only_the_trained_roles_want_gradients_and_each_registers_its_own(kind, sd3_dir):
    roles = build(sd3_dir, kind)
    for name, role in roles.items():
        wants = {p.requires_grad for p in role.tensors().values()}
        assert wants <= {name in ("generator", "fake", "surrogate")}
        assert {id(p) for p in role.parameters()} == {id(p) for p in role.tensors().values()}
    ids = [id(p) for role in roles.values() if role.name != "base" for p in role.parameters()]
    assert len(ids) == len(set(ids))


def test_follow_is_a_lerp(kind, sd3_dir):
    roles = build(sd3_dir, kind)
    old = {name: tensor.clone() for name, tensor in roles["lag"].tensors().items()}
    for tensor in roles["surrogate"].parameters():
        tensor.data.normal_()
    follow(roles["lag"], roles["surrogate"], 0.25)
    new = roles["surrogate"].tensors()
    for name, tensor in roles["lag"].tensors().items():
        assert torch.allclose(tensor, 0.75 * old[name] + 0.25 * new[name], atol=1e-6)
    follow(roles["lag"], roles["surrogate"], 1.0)
    assert roles["lag"].sha256() == roles["surrogate"].sha256()


def test_a_few_step_lora_for_other_modules_is_refused(sd3_dir):
    few_step = few_step_lora(sd3_dir)
    whole, lost = dict(few_step), next(iter(few_step))
    few_step.pop(lost)
    with pytest.raises(ConfigError, match=f"targets add 1, such as {lost}; set roles.targets="):
        build(sd3_dir, "lora", few_step)
    few_step = {**whole, "time_text_embed.timestep_embedder.linear_1": whole[lost]}
    with pytest.raises(ConfigError, match="targets lack 1, such as time_text.* or roles.kind=full"):
        build(sd3_dir, "lora", few_step)


def test_the_targets_that_are_named_are_those_of_the_lora():
    root, file = find_model("tiny-sd3")
    base = load_transformer(root)
    few_step = load_lora_file(file)
    assert lora.find_targets(base, _targets(few_step)).keys() == few_step.keys()


def test_a_share_of_a_change_is_transferred_unless_what_made_it_fails(sd3_dir):
    roles = build(sd3_dir, "full")
    origin, target = roles["surrogate"], roles["generator"]
    starts = {name: tensor.detach().clone() for name, tensor in target.tensors().items()}

    def move():
        with torch.no_grad():
            for index, tensor in enumerate(origin.tensors().values()):
                tensor.add_(0.5 + index)

    with transferred(origin, target, 0.25):
        move()
        assert all(torch.equal(tensor, starts[name]) for name, tensor in target.tensors().items())
    for index, (name, tensor) in enumerate(target.tensors().items()):
        torch.testing.assert_close(tensor, starts[name] + 0.25 * (0.5 + index))

    moved = {name: tensor.detach().clone() for name, tensor in target.tensors().items()}
    with pytest.raises(RuntimeError, match="no step"), transferred(origin, target, 0.25):
        raise RuntimeError("no step")
    with transferred(origin, target, 0.0):
        move()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in target.tensors().items())


def test_a_few_step_lora_keeps_its_scale_beside_another_alpha(sd3_dir):
    few_step = few_step_lora(sd3_dir)
    base, merged = (load_transformer(sd3_dir, dtype=torch.float32) for _ in range(2))
    config = Roles(kind="lora", rank=4, alpha=2.0, targets=TARGETS)
    roles = build_roles(base, "tdm_r1", config, few_step=few_step, bf16=False)
    lora.merge_lora(merged, few_step)
    expected = velocities({"few": build_single(merged)})["few"]
    torch.testing.assert_close(velocities(roles)["generator"], expected, atol=1e-5, rtol=0)
