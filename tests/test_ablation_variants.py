"""What each variant of the ablation does differently, by value, and a run of it in miniature."""

import json

import pytest
import torch

from bench import ablation_variants as module
from bench.ablation_variants import (
    DirectDgpo,
    FrozenSurrogate,
    PreferenceAlone,
    StochasticRollout,
    WithoutKl,
)
from tdm_r1 import flow
from tdm_r1.errors import ConfigError
from tdm_r1.models.loading import load_transformer
from tdm_r1.training.rollout import keyed_generator
from tdm_r1.training.tdm import Tdm
from tdm_r1.training.trainer import Trainer
from tests.training.common import recipe
from tests.training.test_tdm import clear, gradients, make

ROLLOUT = {"num_prompts": 2, "group_size": 3, "micro_groups": 2}


def prepared(tmp_path, model, experiment, **values):
    """A trainer whose roles differ, one pass an iteration, and a scored batch."""
    trainer = make(
        tmp_path, model, experiment=experiment, rollout=ROLLOUT,
        distillation={"boundaries": 1}, **values,
    )  # fmt: skip
    batch = trainer.method._trajectories(trainer.method.sampler.draw(2))
    batch.advantage_B = torch.tensor([1.5, -1.0, -0.5, 0.5, -2.0, 1.5])
    return trainer, batch


def mean(x):
    return x.flatten(1).mean(1)


def rows(s):
    return s.view(-1, 1, 1, 1)


def query(role, at, cond):
    """x0 of a role at a re-noised state."""
    with torch.no_grad():
        return at.x_BChw - rows(at.s_B) * role(at.x_BChw, at.s_B * 1000, cond)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6, rtol=2e-3), name


@pytest.mark.parametrize(("k", "j"), [(1, 1), (2, 3)])  # x_r is the surrogate's input, or x_s
def test_without_kl_the_generator_has_the_gradient_of_guidance_and_reward(k, j, tmp_path, sd3_dir):
    trainer, batch = prepared(tmp_path, sd3_dir, WithoutKl)
    roles, sigma = trainer.roles, trainer.engine.schedule.sigmas[k]
    distil, pull, _ = trainer.method._draw_inputs(7, batch, k, j, 0)
    base_c, base_u = (query(roles["base"], distil, c) for c in (batch.cond, batch.uncond))
    sur_c, sur_u = (query(roles["surrogate"], pull, c) for c in (batch.cond, batch.uncond))
    guidance = 3.5 * (base_c - base_u)
    surrogate = sur_u + 4.5 * (sur_c - sur_u)
    reward = surrogate - query(roles["base"], pull, batch.cond)
    x0_hat = batch.x[k] - sigma * roles["generator"](
        batch.x[k], torch.full((6,), 1000 * sigma), batch.cond
    )
    w = mean((x0_hat.detach() - base_u - 4.5 * (base_c - base_u)).abs())
    w_reward = mean((x0_hat.detach() - surrogate).abs())
    direction = 0.3 * guidance / rows(w) + 0.7 * reward / rows(w_reward)
    x0_hat.backward(-2 * direction / x0_hat.numel())
    expected = gradients(trainer)
    clear(trainer)
    metrics = trainer.method._backward(7, batch, k, j, 0)
    assert metrics["generator_kl"] == 0 and "fake_loss" not in metrics
    found = {name: value for name, value in gradients(trainer).items() if "generator." in name}
    assert_same(found, expected)
    assert "fake" not in trainer.engines


def test_direct_dgpo_is_the_group_likelihood_of_the_generator_against_its_start(tmp_path, sd3_dir):
    rl = {"lag_clip": 1e3, "drift_gate": 1e3, "drift_weight": 0.0}  # every gate open
    trainer, batch = prepared(tmp_path, sd3_dir, DirectDgpo, reinforcement=rl)
    j, generator = 2, trainer.roles["generator"]
    judged = trainer.method._draw_inputs(7, batch, 0, j, 0)[2]
    sigma = trainer.engine.schedule.sigmas[j + 1]
    target = flow.renoise_velocity(batch.x[j + 1], sigma, judged.s_B, judged.eps_BChw)
    start = load_transformer(sd3_dir, dtype=torch.float32)  # what the generator was made from
    with torch.no_grad():
        v_start = start.velocity(judged.x_BChw, judged.s_B * 1000, batch.cond)
    v = generator(judged.x_BChw, judged.s_B * 1000, batch.cond)
    d, d_start = (mean((x - target) ** 2).view(2, 3) for x in (v, v_start))
    loss, a = 0.0, batch.advantage_B.view(2, 3)
    for p in range(2):
        r = -10.0 / 3 * (d[p] - d_start[p])
        good, bad = a[p] > 0, a[p] < 0
        margin = (a[p][good] * r[good]).sum() - (-a[p][bad] * r[bad]).sum()
        loss = loss - torch.nn.functional.logsigmoid(margin) / 2
    (loss * (j + 1) / 4 / 10.0).backward()
    expected = gradients(trainer)
    clear(trainer)
    trainer.method._backward(7, batch, 0, j, 0)
    assert_same(gradients(trainer), expected)
    assert list(trainer.engines) == ["generator"]
    trainer.method._follow_judge(0)  # 0.999 of the way to the generator
    for name, tensor in trainer.roles["lag"].tensors().items():
        assert torch.allclose(tensor, generator.tensors()[name], atol=1e-3)


def test_a_frozen_surrogate_pulls_as_the_dynamic_one_does(tmp_path, sd3_dir):
    found = []
    for experiment in (Tdm, FrozenSurrogate):
        trainer, batch = prepared(tmp_path / experiment.__name__, sd3_dir, experiment)
        for k, j in ((0, 0), (3, 3), (1, 2)):
            trainer.method._backward(7, batch, k, j, 0)
        found.append(gradients(trainer))
    wanted = {name: value for name, value in found[0].items() if "surrogate." not in name}
    assert len(wanted) < len(found[0])
    assert_same(found[1], wanted)


@pytest.mark.parametrize(
    ("experiment", "moving"),
    [
        (PreferenceAlone, {"surrogate", "lag"}),
        (DirectDgpo, {"generator", "ema", "lag"}),
        (FrozenSurrogate, {"generator", "ema", "fake"}),
        (WithoutKl, {"generator", "ema", "surrogate", "lag"}),
        (StochasticRollout, {"generator", "ema", "surrogate", "lag", "fake"}),
    ],
)
def test_a_run_moves_only_the_roles_of_its_variant(experiment, moving, tmp_path, sd3_dir, bright):
    values = {"reward": bright, "iterations": 1, "roles": {"kind": "full"}, "checkpoint_every": 0}
    trainer = Trainer(recipe(tmp_path, sd3_dir, **values), method=experiment)
    before = {name: role.sha256() for name, role in trainer.roles.items()}
    trainer.run()
    changed = {name for name, role in trainer.roles.items() if role.sha256() != before[name]}
    assert changed == moving


def test_stochastic_rollouts_noise_every_clean_estimate_anew(tmp_path, sd3_dir):
    trainer, batch = prepared(tmp_path, sd3_dir, StochasticRollout)
    method, role, schedule = trainer.method, trainer.roles["generator"], trainer.engine.schedule
    fresh = []
    for k, s in enumerate(schedule.sigmas[:-1]):
        with torch.no_grad():
            v = role(batch.x[k], torch.full((6,), 1000 * s), batch.cond)
        x0 = batch.x[k] - s * v
        draws = [
            torch.randn((3, 16, 8, 8), generator=keyed_generator(0, group, k + 1))
            for group in batch.group_ids
        ]
        fresh.append(torch.cat(draws))
        s_next = schedule.sigmas[k + 1]
        expected = (1 - s_next) * x0 + s_next * fresh[-1]
        assert torch.allclose(batch.x[k + 1], expected, atol=1e-4)
        assert torch.allclose(method._clean(batch, k), x0, atol=2e-3)
    different = torch.cat([batch.x[0], *fresh]).flatten(1)  # no two draws have anything in common
    assert len(different) == 30
    assert (torch.corrcoef(different) - torch.eye(30)).abs().max() < 0.2
    groups = list(zip(batch.group_ids, batch.prompts, strict=True))
    again = method._trajectories(groups)
    assert all(torch.equal(a, b) for a, b in zip(again.x, batch.x, strict=True))
    alone = method._trajectories(groups[1:])
    assert torch.allclose(alone.x[-1], batch.x[-1][3:], atol=1e-5)


def test_stochastic_rollouts_are_first_order(tmp_path, sd3_dir):
    rollout = {**ROLLOUT, "solver": "dpm2m"}
    with pytest.raises(ConfigError, match="rollout.solver is dpm2m; allowed .* euler"):
        make(tmp_path, sd3_dir, experiment=StochasticRollout, rollout=rollout)


@pytest.mark.parametrize("experiment", [PreferenceAlone, DirectDgpo])
def test_a_preference_alone_hands_no_weights_on(experiment, tmp_path, sd3_dir):
    with pytest.raises(ConfigError, match=r"reinforcement.transfer is 0.5; allowed .* 0"):
        make(tmp_path, sd3_dir, experiment=experiment, reinforcement={"transfer": 0.5})


def tiny_settings(model, reward):
    values = {
        "model": model, "reward": reward, "precision": "fp32", "iterations": 1,
        "distillation.critic_warmup": 0, "evaluation.num_prompts": 6,
        "rollout.num_prompts": 2, "rollout.group_size": 3, "rollout.micro_groups": 2,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def test_the_frozen_surrogate_was_trained_on_the_generator_before_its_first_step(
    tmp_path, sd3_dir, bright, monkeypatch
):
    trained, followed = [], []

    class Teacher(PreferenceAlone):
        def step(self, iteration):
            generator = self.trainer.roles["generator"].sha256()
            metrics = super().step(iteration)
            trained.append((generator, self.trainer.roles["surrogate"].sha256()))
            return metrics

    class Pupil(FrozenSurrogate):
        def step(self, iteration):
            roles = self.trainer.roles
            followed.append(tuple(roles[name].sha256() for name in ("generator", "surrogate")))
            return super().step(iteration)

    monkeypatch.setattr(module, "PreferenceAlone", Teacher)
    variant = module.Variant("", Pupil, pretrained=True)
    settings = [*tiny_settings(sd3_dir, bright), "iterations=2"]
    result = module.train(variant, 3, settings, tmp_path / "work", {"reward": 0.0, "panel": {}})
    generator, surrogate = trained[-1]
    assert len(trained) == len(followed) == len(result["rewards"]) == 2
    assert {row[0] for row in trained} == {generator} == {followed[0][0]}
    assert {row[1] for row in followed} == {surrogate} and surrogate != trained[0][1]
    assert result["after"]["held_out"]["num_prompts"] == 6 and result["skipped"] == 0


def test_a_run_leaves_one_json(tmp_path, sd3_dir, bright, capsys):
    settings = tiny_settings(sd3_dir, bright)
    keys = [part for setting in settings for part in ("--set", setting)]
    before, file = tmp_path / "before.json", tmp_path / "ema-reference-1.json"
    places = ["--work", str(tmp_path / "work")]
    assert module.main(["before", "--output", str(before), *places, *keys]) == 0
    start = json.loads(before.read_text())
    assert start["before"]["num_prompts"] == 6 and start["settings"] == settings
    own = ["ema-reference", "--seed", "1", "--before", str(before), "--output", str(file)]
    assert module.main([*own, *places, *keys]) == 0
    result = json.loads(file.read_text())
    assert (result["variant"], result["seed"]) == ("ema-reference", 1)
    assert result["settings"] == settings and result["environment"]["threads"] >= 1
    steps = (tmp_path / "work" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("iteration") for line in steps] == [1, 1]  # no evaluation at 0
    file.unlink()
    assert module.main([*own, *places, *keys, "--set", "reward=nothing"]) == 2
    assert not file.exists() and "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        module.main(["no-kl", "--output", str(file), *places])
