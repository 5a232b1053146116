"""One TDM-R1 iteration against the method written out plainly, query by query."""

import numpy as np
import pytest
import torch

from tdm_r1 import flow
from tdm_r1.errors import RewardError
from tdm_r1.rewards import load_reward
from tdm_r1.training import tdm as module
from tdm_r1.training.clock import Clock
from tdm_r1.training.queries import Source
from tdm_r1.training.rollout import (
    Batch,
    coins,
    keyed_generator,
    renoised,
    roll_out,
    score_batches,
)
from tdm_r1.training.trainer import Trainer
from tests.training.common import recipe


class Probe:
    """Stands for a DeepSpeed engine: accumulates mean gradients, takes no step."""

    def __init__(self, role, accumulation):
        self.role, self.accumulation = role, accumulation

    def __call__(self, *args):
        return self.role(*args)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def is_gradient_accumulation_boundary(self):
        return False

    def step(self):
        pass


def make(tmp_path, model, method="tdm_r1", kind="full", experiment=None, **values):
    roles = {"kind": kind, "rank": 4, "alpha": 4.0}
    recipe_ = recipe(tmp_path, model, method=method, roles=roles, **values)
    trainer = Trainer(recipe_, method=experiment)
    generator = torch.Generator().manual_seed(5)
    for name in ("generator", "fake", "surrogate", "lag", "reference"):
        if name in trainer.roles:  # roles that differ, so that a swapped query shows
            for tensor in trainer.roles[name].tensors().values():
                tensor.data.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    for name in trainer.engines:
        trainer.engines[name] = Probe(trainer.roles[name], trainer.method.accumulation[name])
    return trainer


def plain_losses(trainer, batch, iteration, k, j, slot):
    """The plain method: every loss of `_backward`, one forward per term; returns {role: loss}."""
    roles, schedule, recipe_ = trainer.roles, trainer.engine.schedule, trainer.recipe
    rl, distil, shift = recipe_.reinforcement, recipe_.distillation, trainer.pipeline.shift
    sigma = schedule.sigmas
    rows = len(batch.cond)
    col = (rows, 1, 1, 1)

    def draw(boundary, lower, purpose, **values):
        values["key"] = (recipe_.seed, iteration, *purpose)
        values["num_prompts"] = recipe_.rollout.num_prompts
        return renoised(batch, boundary, schedule, lower=lower, shift=shift, **values)

    def x0(name, x, s, cond):
        with torch.no_grad():
            return x - s.view(col) * roles[name](x, s * 1000, cond)

    def mean(x):
        return x.flatten(1).mean(1)

    x_s, s, _ = draw(k + 1, sigma[k + 1], (module.DISTIL, 0), shared=False)
    t_k = torch.full((rows,), float(schedule.timesteps[k]))
    x0_hat = batch.x[k] - sigma[k] * roles["generator"](batch.x[k], t_k, batch.cond)
    if schedule.solver == "dpm2m" and 0 < k < 3:  # second order: m is corrected by the last one
        t_prev = torch.full((rows,), float(schedule.timesteps[k - 1]))
        with torch.no_grad():
            v_prev = roles["generator"](batch.x[k - 1], t_prev, batch.cond)
        lam = [np.log((1 - s) / s) for s in sigma[:-1]]
        q = (lam[k + 1] - lam[k]) / (2 * (lam[k] - lam[k - 1]))
        x0_hat = (1 + q) * x0_hat - q * (batch.x[k - 1] - sigma[k - 1] * v_prev)
    v_fake = roles["fake"](x_s, s * 1000, batch.cond)
    with torch.no_grad():
        v_base = roles["base"](x_s, s * 1000, batch.cond)
    target = (x_s - x0_hat.detach()) / s.view(col)
    fake = (v_fake - target).square().mean() + 0.02 * (v_fake - v_base).square().mean()

    base_c, base_u = x0("base", x_s, s, batch.cond), x0("base", x_s, s, batch.uncond)
    kl = base_c - x0("fake", x_s, s, batch.cond)
    cfg = distil.cfg * (base_c - base_u)
    w = mean((x0_hat.detach() - base_u - distil.weight_cfg * (base_c - base_u)).abs())

    def square(direction):
        return mean((x0_hat.detach() + direction - x0_hat).square())

    if trainer.recipe.method == "tdm":
        return {"fake": fake, "generator": ((square(cfg) + square(kl)) / w).mean()}
    floor = max(sigma[j + 1], rl.t_min_reward)
    x_j, q, eps = draw(j + 1, floor, (module.SURROGATE, slot), shared=True)
    if k < rl.trunc_steps:
        x_r, r = pulled(trainer, batch, iteration, k, j, slot, draw)
        sur_c, sur_u = x0("surrogate", x_r, r, batch.cond), x0("surrogate", x_r, r, batch.uncond)
        guided = sur_u + rl.rl_cfg * (sur_c - sur_u)
        pull = square(guided - x0("base", x_r, r, batch.cond)) / mean(
            (x0_hat.detach() - guided).abs()
        )
        generator = ((0.3 * square(cfg) + square(kl)) / w + 0.7 * pull).mean()
    else:
        generator = 0.3 * ((square(cfg) + square(kl)) / w).mean()

    v_star = flow.renoise_velocity(batch.x[j + 1], sigma[j + 1], q, eps)
    v_sur = roles["surrogate"](x_j, q * 1000, batch.cond)
    with torch.no_grad():
        v_ref, v_lag = (roles[n](x_j, q * 1000, batch.cond) for n in ("base", "lag"))
        v_logit = roles["reference" if rl.reference == "ema" else "base"](x_j, q * 1000, batch.cond)
    d, d_ref, d_lag, d_logit = (mean((v - v_star).square()) for v in (v_sur, v_ref, v_lag, v_logit))
    a = batch.advantage_B
    logit = rl.beta * (a * (d - d_logit)).detach().view(batch.num_groups, -1).mean(1)
    weight = logit.sigmoid().repeat_interleave(batch.group_size)
    ratio = (d_lag - d).exp().detach()
    stop = ((a > 0) & (ratio > 1 + rl.lag_clip)) | ((a < 0) & (ratio < 1 - rl.lag_clip))
    drift = (v_sur - v_ref).square().mean()
    if drift > rl.drift_gate:
        stop = stop | ((a > 0) & (d < d_ref)) | ((a < 0) & (d > d_ref))
    kept = torch.where(stop, d.detach(), d)
    surrogate = (j + 1) / 4 * ((weight * a * kept).mean() + 0.001 * drift)
    return {"fake": fake, "generator": generator, "surrogate": surrogate}


def pulled(trainer, batch, iteration, k, j, slot, draw):
    """x_r and its levels, a row at a time."""
    rl, sigma = trainer.recipe.reinforcement, trainer.engine.schedule.sigmas
    floors = [max(sigma[n + 1], t) for n, t in ((k, 0.0), (k, rl.t_min), (j, rl.t_min_reward))]
    a, b, c = (floor / (3 - 2 * floor) + 0.02 for floor in floors)  # u of the shift 3
    judging = j == k and c >= b
    end = c if judging else 1.0
    from_s, wanted = (end - b) / (1 - a), (end - b) / (1 - b)
    x_s, s, _ = draw(k + 1, sigma[k + 1], (module.DISTIL, 0), shared=False)
    x_j, q, _ = draw(j + 1, floors[2], (module.SURROGATE, slot), shared=True)
    upper = floors[2] if judging else None
    own, o, _ = draw(k + 1, floors[1], (module.PULL, 1), shared=False, upper=upper)
    coin = coins(batch, (trainer.recipe.seed, iteration, module.PULL, 0))
    rows = []
    for i, level in enumerate(s.tolist()):
        u = level / (3 - 2 * level)
        if b - 1e-6 < u < c or (not judging and u > b - 1e-6):
            rows.append((x_s[i], s[i]))
        elif not judging or (from_s < 1 and coin[i] < (wanted - from_s) / (1 - from_s)):
            rows.append((own[i], o[i]))
        else:
            rows.append((x_j[i], q[i]))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def gradients(trainer):
    return {
        f"{name}.{key}": tensor.grad.clone()
        for name in trainer.engines
        for key, tensor in trainer.roles[name].tensors().items()
        if tensor.grad is not None
    }


def clear(trainer):
    for name in trainer.engines:
        for tensor in trainer.roles[name].tensors().values():
            tensor.grad = None


# t_min_reward = t_min shares x_r with the surrogate wherever j = k; 0.85 makes a mixture of it.
@pytest.mark.parametrize(
    ("family", "method", "kind", "solver", "rl", "inputs"),
    [
        ("sd3", "tdm_r1", "full", "euler", {}, {Source.DISTIL, Source.JUDGED}),
        ("sd3", "tdm_r1", "lora", "euler", {"t_min": 0.7, "t_min_reward": 0.85}, set(Source)),
        ("sd3", "tdm_r1", "lora", "dpm2m", {"trunc_steps": 1}, {Source.DISTIL, None}),
        ("sd3", "tdm", "full", "dpm2m", {}, {None}),
        ("zimage", "tdm_r1", "lora", "euler", {"reference": "ema"}, {Source.DISTIL, Source.JUDGED}),
    ],
)
def test_iteration_has_the_gradients_of_the_plain_method(
    family, method, kind, solver, rl, inputs, tmp_path, request
):
    model = request.getfixturevalue(f"{family}_dir")
    rollout = {"num_prompts": 4, "group_size": 3, "micro_groups": 2, "solver": solver}
    trainer = make(tmp_path, model, method, kind, rollout=rollout, reinforcement=rl)
    method_ = trainer.method
    draw = method_.sampler.draw(4)
    batches = [
        roll_out(trainer.engine, trainer.roles["generator"], part, 3, 0)
        for part in (draw[:2], draw[2:])
    ]
    for batch in batches:
        batch.advantage_B = torch.randn(6, generator=torch.Generator().manual_seed(1))
    sources, sums = set(), {}
    for number, batch in enumerate(batches):
        for slot, (k, j) in enumerate(method_._draw_steps(11, number)):
            pull = method_._draw_inputs(11, batch, k, j, slot)[1]
            sources.update([None] if pull is None else pull.source_B.tolist())
            losses = plain_losses(trainer, batch, 11, k, j, slot)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.item()
                loss.div(4).backward()
    assert sources == inputs
    expected = gradients(trainer)
    clear(trainer)
    metrics = method_._update(11, batches)  # last: it moves the lag copy
    for name, total in sums.items():
        assert metrics[f"{name}_loss"] == pytest.approx(total / 4, rel=1e-4, abs=1e-6)
    found = gradients(trainer)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6, rtol=2e-3), name


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
def test_rollouts_follow_the_solver_and_replay_bitwise(solver, kind, tmp_path, sd3_dir):
    trainer = make(tmp_path, sd3_dir, kind=kind, rollout={"solver": solver, "micro_groups": 2})
    role, schedule = trainer.roles["generator"], trainer.engine.schedule
    groups = [(0, "two circles"), (1, "a circle and a square")]
    batch = roll_out(trainer.engine, role, groups, 3, 0)
    assert len(batch.x) == schedule.num_steps + 1
    with role.active() as transformer:
        again = trainer.engine.rollout(batch.cond, batch.x[0], transformer=transformer)
    assert all(torch.equal(a, b) for a, b in zip(again.x, batch.x, strict=True))
    m = None
    for k in range(schedule.num_steps):
        t = torch.full((6,), float(schedule.timesteps[k]))
        with torch.no_grad():
            v = role(batch.x[k], t, batch.cond)
        expected, m = schedule.step(k, batch.x[k], v, m)
        assert torch.allclose(batch.x[k + 1], expected, atol=1e-4)
        # What training takes for x0 of this step, from the stored states alone.
        r = schedule.sigmas[k + 1] / schedule.sigmas[k]
        towards = schedule.towards(k, batch.x[k], batch.x[k + 1])
        assert torch.allclose(r * batch.x[k] + (1 - r) * towards, batch.x[k + 1], atol=1e-6)
        if schedule.gain(k) == 1.0:
            assert torch.allclose(towards, m, atol=1e-3)
    assert (schedule.gain(1) == 1.0) == (solver == "euler")


def test_draws_belong_to_the_group_not_to_the_batch(tmp_path, sd3_dir):
    trainer = make(tmp_path, sd3_dir)
    groups = [(5, "two circles"), (6, "a circle and a square")]
    role, schedule = trainer.roles["generator"], trainer.engine.schedule
    both = roll_out(trainer.engine, role, groups, 3, 0)
    alone = roll_out(trainer.engine, role, groups[1:], 3, 0)
    assert torch.equal(both.x[0][3:], alone.x[0])
    for shared in (True, False):
        args = {"lower": 0.5, "shift": 3.0, "key": (1, 2), "shared": shared, "num_prompts": 4}
        _, s_both, eps_both = renoised(both, 2, schedule, **args)
        _, s_alone, eps_alone = renoised(alone, 2, schedule, **args)
        assert torch.equal(s_both[3:], s_alone) and torch.equal(eps_both[3:], eps_alone)
        assert (s_both >= 0.5).all()
        assert (len(s_both[:3].unique()) == 1) == shared
        assert torch.equal(eps_both[0], eps_both[1]) == shared
    keys = (1, 2), (2, 1), (1, 2, 0), (1, 2, 0, 0), (1, 2, 2), (0, 1, 2)
    assert len({keyed_generator(*key).initial_seed() for key in keys}) == len(keys)


@pytest.mark.parametrize("upper", [None, 0.9])
def test_levels_are_stratified(upper):
    """Of n that are drawn together, one lies in every n-th of the interval, in a new order."""
    groups, size = 8, 6
    batch = Batch(
        tuple(range(16, 16 + groups)), (), size, None, None, (torch.zeros(48, 1, 1, 1),) * 2
    )
    grid = flow.schedule("euler", 2, 3.0)
    low, high = (1.0 if s is None else flow.lowest_u(s, 3.0) for s in (grid.sigmas[1], upper))

    def places(shared, key):
        _, s_B, _ = renoised(
            batch, 1, grid, lower=grid.sigmas[1], shift=3.0, key=key, shared=shared, upper=upper,
            num_prompts=groups,
        )  # fmt: skip
        u = (flow.unshift_sigma(s_B.double(), 3.0) - low) / (high - low)
        return u.view(groups, size)

    orders = set()
    for key in range(20):
        for row in (u := places(False, (0, key)) * size):
            assert sorted(row.floor().tolist()) == list(range(size))
        assert u.flatten().unique().numel() == groups * size
        u = places(True, (0, key)) * groups
        assert (u == u[:, :1]).all()
        assert sorted(u[:, 0].floor().tolist()) == list(range(groups))
        orders.add(tuple(u[:, 0].floor().tolist()))
    assert len(orders) > 15


@pytest.mark.parametrize("judged", ["trajectory", "final"])
def test_an_iteration_spreads_its_steps_and_levels(judged, tmp_path, sd3_dir):
    groups, count, size = 8, 2, 3
    trainer = make(
        tmp_path, sd3_dir, reinforcement={"judged": judged}, distillation={"boundaries": 1},
        rollout={"num_prompts": groups, "group_size": size, "micro_groups": count},
    )  # fmt: skip
    sigmas, floor = trainer.engine.schedule.sigmas, trainer.recipe.reinforcement.t_min_reward
    nothing, boundaries = (torch.zeros(count * size, 1, 1, 1),) * 5, set()
    for iteration in range(3):
        steps, places = [], []
        for number in range(groups // count):
            ids = tuple(groups * iteration + count * number + i for i in range(count))
            batch = Batch(ids, (), size, None, None, nothing)
            ((k, j),) = trainer.method._draw_steps(iteration, number)
            s_B = trainer.method._draw_inputs(iteration, batch, k, j, 0)[2].s_B
            low = flow.lowest_u(max(sigmas[j + 1], floor), 3.0)
            u = (flow.unshift_sigma(s_B.double(), 3.0) - low) / (1 - low)
            steps.append(k)
            boundaries.add(j)
            places += (u.view(count, size)[:, 0] * groups).floor().tolist()
        assert sorted(steps) == [0, 1, 2, 3] and sorted(places) == list(range(groups))
    assert len(boundaries) == 1 if judged == "final" else len(boundaries) > 1


def write_counting_reward(file):
    """A reward whose n-th image, counted over all its calls, scores n squared."""
    lines = (
        "count = [0]",
        "def score(images, prompts):",
        "    n = count[0]",
        "    count[0] += len(images)",
        "    return [float(v * v) for v in range(n, n + len(images))]",
    )
    file.write_text("\n".join(lines) + "\n")


def test_advantages_use_the_rewards_of_the_whole_iteration(tmp_path, sd3_dir):
    file = tmp_path / "index.py"
    write_counting_reward(file)
    trainer = make(tmp_path, sd3_dir)
    reward = load_reward(f"{file}:score")
    parts = [
        roll_out(trainer.engine, trainer.roles["generator"], [(i, "two circles")], 3, 0)
        for i in range(2)
    ]
    metrics = score_batches(trainer.engine, trainer.roles["generator"], parts, reward, Clock())
    r = np.arange(6.0) ** 2
    expected = (r.reshape(2, 3) - r.reshape(2, 3).mean(1, keepdims=True)) / (r.std() + 1e-4)
    found = torch.stack([part.advantage_B for part in parts]).numpy()
    assert np.allclose(found, expected, atol=1e-6)
    assert metrics["reward"] == pytest.approx(r.mean())
    file.write_text("def score(images, prompts):\n    raise KeyError('gone')\n")
    with pytest.raises(RewardError, match="gone"):
        score_batches(
            trainer.engine,
            trainer.roles["generator"],
            parts,
            load_reward(f"{file}:score"),
            Clock(),
        )


def test_a_moving_reference_keeps_its_decay_of_itself(tmp_path, sd3_dir):
    rl = {"reference": "ema", "reference_decay": 0.75}
    trainer = make(tmp_path, sd3_dir, reinforcement=rl)
    old = {n: t.clone() for n, t in trainer.roles["reference"].tensors().items()}
    trainer.method._follow_judge(0)
    new = trainer.roles["surrogate"].tensors()
    for name, tensor in trainer.roles["reference"].tensors().items():
        torch.testing.assert_close(tensor, 0.75 * old[name] + 0.25 * new[name])


def test_the_fake_score_is_updated_as_often_as_asked_at_fresh_levels(
    tmp_path, sd3_dir, monkeypatch
):
    trainer = make(tmp_path, sd3_dir, "tdm", distillation={"boundaries": 2, "fake_updates": 3})
    batch = roll_out(trainer.engine, trainer.roles["generator"], [(0, "two circles")], 3, 0)
    calls, plain = [], module.fake_loss
    monkeypatch.setattr(module, "fake_loss", lambda *a, **k: calls.append(a[3]) or plain(*a, **k))
    trainer.method._update(0, [batch])
    assert len(calls) == len({tuple(s_B.tolist()) for s_B in calls}) == 3 * 2


def test_levels_follow_the_recipes_shift(tmp_path, sd3_dir):
    trainer = make(tmp_path, sd3_dir, sigma_shift=1.0)
    groups = [(i, "a circle") for i in range(2)]
    batch = roll_out(trainer.engine, trainer.roles["generator"], groups, 64, 0)
    s_B = trainer.method._draw_inputs(0, batch, 3, 3, 0)[0].s_B  # uniform in [0.02, 1]
    assert s_B.mean().item() == pytest.approx(0.51, abs=0.02)
