"""What queries share is their draws, and nothing that changes an answer."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from tdm_r1 import flow
from tdm_r1.config import Reinforcement, Roles
from tdm_r1.engine import Engine
from tdm_r1.models.loading import load_transformer
from tdm_r1.models.sd3 import SD3Transformer
from tdm_r1.pipeline import load_pipeline
from tdm_r1.training import queries
from tdm_r1.training.queries import (
    Query,
    Source,
    ask,
    deal_steps,
    draw_boundaries,
    mean_forwards,
    num_forwards,
    pull_law,
)
from tdm_r1.training.roles import build_roles
from tdm_r1.training.rollout import Batch, roll_out
from tests.training.common import condition, recipe
from tests.training.test_roles import TARGETS
from tests.training.test_tdm import make


@pytest.mark.parametrize("judged", ["trajectory", "final"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_coupled_boundaries_keep_their_laws(num_steps, judged):
    law = list(queries._law(num_steps, judged))
    assert sum(p for *_, p in law) == pytest.approx(1)
    for n in range(num_steps):
        assert sum(p for k, _, p in law if k == n) == pytest.approx(1 / num_steps)
        wanted = (n + 1) / (num_steps * (num_steps + 1) / 2)
        if judged == "final":
            wanted = float(n == num_steps - 1)
        assert sum(p for _, j, p in law if j == n) == pytest.approx(wanted)
    rng, count = np.random.default_rng(0), min(2, num_steps)
    drawn = [
        draw_boundaries(rng, deal_steps(rng, num_steps, count, number), num_steps, judged)
        for number in range(4000)
    ]
    assert all(len({k for k, _ in pairs}) == count for pairs in drawn)
    found = Counter(pair for pairs in drawn for pair in pairs)
    for k, j, p in law:
        n = 4000 * count
        assert abs(found[k, j] - n * p) <= 5 * max(n * p * (1 - p), 1) ** 0.5, (k, j)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 4, 6])
def test_an_iteration_sees_every_step_as_often(micro_batches, count):
    orders = set()
    for iteration in range(50):
        dealt = [
            deal_steps(np.random.default_rng(iteration), 4, count, number)
            for number in range(micro_batches)
        ]
        assert all(len(set(steps)) == count for steps in dealt)
        times = Counter(k for steps in dealt for k in steps)
        assert max(times.values()) - min(times[k] for k in range(4)) <= 1
        orders.add(tuple(dealt[0]))
    assert len(orders) > 2


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ({}, 8.2),  # t_min = t_min_reward = 0.3: the published recipe for OCR
        ({"t_min": 0.25, "t_min_reward": 0.55}, 8.2728),  # for GenEval
        ({"t_min": 0.4, "t_min_reward": 0.55, "trunc_steps": 2}, 7.7),  # for preferences
        ({"judged": "final"}, 8.75),
    ],
)
def test_published_recipes_need_at_most_nine_forwards(values, mean, tmp_path):
    plain = recipe(tmp_path, "tiny-sd3", reinforcement=values)
    schedule = flow.schedule("euler", 4, 3.0)
    assert mean_forwards(plain, schedule, 3.0) == pytest.approx(mean, abs=1e-4)
    for k, j, p in queries._law(4, plain.reinforcement.judged):
        law = pull_law(plain, schedule, 3.0, k, j)
        if p and law is not None:
            own = (1 - law.distil) * law.own
            assert num_forwards(plain, schedule, 3.0, k, j) == 8 + law.distil + 2 * own
            # Of a micro-batch of one group of 24 rows, for all of its rows together.
            extra = np.ones(1)
            for _ in range(24):
                extra = np.convolve(extra, [1 - law.distil - own, law.distil, own])
            assert extra[25:].sum() < 1e-9
    moving = recipe(tmp_path, "tiny-sd3", reinforcement={**values, "reference": "ema"})
    assert mean_forwards(moving, schedule, 3.0) == pytest.approx(mean + 1, abs=1e-4)
    assert mean_forwards(recipe(tmp_path, "tiny-sd3", method="tdm"), schedule, 3.0) == 4


def distance(found, low, high):
    """Kolmogorov and Smirnov's: the largest gap to the distribution uniform in [low, high]."""
    steps = np.arange(len(found) + 1) / len(found)
    ends = (np.sort(found) - low) / (high - low)
    return max(abs(ends - steps[1:]).max(), abs(ends - steps[:-1]).max())


@pytest.mark.parametrize(
    ("k", "j", "t_min", "t_min_reward"),
    [
        (3, 3, 0.25, 0.55),  # GenEval's last two boundaries: x_s above a < b < c, or a = b < c
        (2, 2, 0.25, 0.55),
        (2, 1, 0.7, 0.3),  # nothing of the surrogate's
        (3, 3, 0.7, 0.85),
        (3, 3, 0.6, 0.3),  # the surrogate's reaches below
        (1, 1, 0.3, 0.3),
    ],
)
def test_every_loss_keeps_the_law_of_its_levels_and_noise(
    k, j, t_min, t_min_reward, tmp_path, sd3_dir
):
    values = {"t_min": t_min, "t_min_reward": t_min_reward}
    trainer = make(tmp_path, sd3_dir, kind="lora", reinforcement=values)
    groups, size, sigmas = 800, 12, trainer.engine.schedule.sigmas
    nothing = (torch.zeros(groups * size, 1, 1, 1),) * 5
    batch = Batch(tuple(range(groups)), (), size, None, None, nothing)
    distil, pull, judged = trainer.method._draw_inputs(5, batch, k, j, 0)
    law = pull_law(trainer.recipe, trainer.engine.schedule, 3.0, k, j)
    shares = {
        Source.DISTIL: law.distil,
        Source.OWN: (1 - law.distil) * law.own,
        Source.JUDGED: (1 - law.distil) * (1 - law.own),
    }
    for source, share in shares.items():
        found = (pull.source_B == source).double().mean().item()
        assert abs(found - share) <= 5 * (share * (1 - share) / (groups * size)) ** 0.5 + 1e-9
    floors = max(sigmas[k + 1], t_min), sigmas[k + 1], max(sigmas[j + 1], t_min_reward)
    for at, floor, boundary in zip((pull, distil, judged), floors, (k, k, j), strict=True):
        s, sigma = at.s_B.double(), sigmas[boundary + 1]
        u, low = flow.unshift_sigma(s, 3.0).numpy(), flow.unshift_sigma(floor, 3.0) + 0.02
        assert u.min() >= low - 1e-6
        # Samples of one group may share a level: 800 are independent for certain.
        for sample in range(size):
            assert distance(u[sample::size], low, 1.0) < 2.2 / groups**0.5
        # x_s is b eps here, whatever its source.
        b = (s**2 - (sigma * (1 - s) / (1 - sigma)) ** 2).sqrt()
        eps = (at.x_BChw.flatten().double() / b).view(groups, size)[:, 0]
        assert abs(eps.mean()) < 4.5 / groups**0.5 and abs(eps.std() - 1) < 4 / groups**0.5
        corner = np.corrcoef(eps.abs(), u.reshape(groups, size)[:, 0])[0, 1]
        assert abs(corner) < 4.5 / groups**0.5
    again = Batch((3,), (), size, None, None, tuple(x[:size] for x in nothing))
    alone = trainer.method._draw_inputs(5, again, k, j, 0)[1]
    assert torch.equal(alone.x_BChw, pull.x_BChw[3 * size : 4 * size])


@pytest.mark.parametrize(
    ("kind", "rl"), [("lora", {}), ("full", {}), ("lora", {"t_min": 0.7, "t_min_reward": 0.85})]
)
def test_iterations_make_the_forwards_they_are_said_to(kind, rl, tmp_path, sd3_dir, monkeypatch):
    trainer = make(
        tmp_path,
        sd3_dir,
        kind=kind,
        rollout={"num_prompts": 2, "group_size": 3, "micro_groups": 1},
        distillation={"boundaries": 4},
        reinforcement=rl,
    )
    generator = trainer.roles["generator"]
    batches = [roll_out(trainer.engine, generator, [(i, "two circles")], 3, 0) for i in range(2)]
    for batch in batches:
        batch.advantage_B = torch.tensor([1.0, -1.0, 0.0])
    sizes, plain = [], SD3Transformer.velocity

    def velocity(self, x_BChw, t_B, cond):
        sizes.append(len(x_BChw))
        return plain(self, x_BChw, t_B, cond)

    monkeypatch.setattr(SD3Transformer, "velocity", velocity)
    trainer.method._update(3, batches)
    pairs = [pair for number in range(2) for pair in trainer.method._draw_steps(3, number)]
    schedule = trainer.engine.schedule
    if rl:
        rows = [
            trainer.method._draw_inputs(3, batch, k, j, slot)[1].source_B
            for number, batch in enumerate(batches)
            for slot, (k, j) in enumerate(trainer.method._draw_steps(3, number))
        ]
        assert sum(sizes) == sum(8 * 3 + source_B.sum() for source_B in rows)
        return
    counts = [num_forwards(trainer.recipe, schedule, 3.0, *pair) for pair in pairs]
    assert sum(sizes) == 3 * sum(counts) and max(counts) == 9
    # Calls: three that train, and the rest in stacks of 4; copies share their base with nobody.
    stacks = [-(-(count - 3) // 4) if kind == "lora" else 3 for count in counts]
    assert len(sizes) == sum(3 + calls for calls in stacks)


def roles_of(sd3_dir, config, bf16=False):
    base = load_transformer(sd3_dir, dtype=torch.float32)
    roles = build_roles(base, "tdm_r1", config, few_step=None, bf16=bf16, ema_reference=True)
    generator = torch.Generator().manual_seed(3)
    for name in ("fake", "surrogate", "lag", "reference"):
        for tensor in roles[name].tensors().values():
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return roles


# The last targets lie outside of the blocks: their rows are samples, not tokens.
@pytest.mark.parametrize("targets", [TARGETS, ("to_q", "norm1.linear", "linear_2")])
@pytest.mark.parametrize("full", [(), ("surrogate",)])
@torch.no_grad()
def test_stacked_queries_are_the_separate_ones(targets, full, sd3_dir):
    roles = roles_of(sd3_dir, Roles(kind="lora", full=full, rank=4, alpha=8.0, targets=targets))
    engine = Engine(load_pipeline(sd3_dir))
    generator = torch.Generator().manual_seed(0)
    names = ("base", "lag", "base", "surrogate", "reference", "fake")
    asked = [
        Query(roles[name], x, torch.rand(n, generator=generator), condition("sd3", n))
        for name, n in zip(names, (2, 3, 1, 2, 3, 2), strict=True)
        for x in [torch.randn(n, 16, 8, 8, generator=generator)]
    ]
    found = ask(engine, asked)
    alone = [query.role(query.x_BChw, query.s_B * 1000, query.cond) for query in asked]
    base = [roles["base"](query.x_BChw, query.s_B * 1000, query.cond) for query in asked]
    for name, v, expected, plain in zip(names, found, alone, base, strict=True):
        assert v.shape == expected.shape
        torch.testing.assert_close(v, expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(expected, plain) == (name == "base")


@pytest.mark.parametrize("family", ["sd3", "zimage"])
@torch.no_grad()
def test_linears_held_in_bf16_keep_every_bit(family, request):
    folder = request.getfixturevalue(f"{family}_dir")
    plain, held = (load_transformer(folder, dtype=torch.float32) for _ in range(2))
    held.hold_linears(torch.bfloat16)
    assert held.dtype == torch.float32
    linears = [m for m in held.modules() if isinstance(m, torch.nn.Linear)]
    assert {p.dtype for m in linears for p in m.parameters()} == {torch.bfloat16}
    x, t = torch.randn(2, 16, 8, 8), torch.tensor([900.0, 30.0])
    with torch.autocast("cpu", torch.bfloat16):
        args = x, t, condition(family, 2)
        assert torch.equal(held.velocity(*args), plain.velocity(*args))


def test_a_bf16_base_still_trains_fp32_adapters(sd3_dir):
    roles = roles_of(sd3_dir, Roles(kind="lora", rank=4, alpha=8.0, targets=TARGETS), bf16=True)
    fake = roles["fake"]
    fake(
        torch.randn(2, 16, 8, 8), torch.tensor([900.0, 30.0]), condition("sd3", 2)
    ).sum().backward()
    grads = [p.grad for p in fake.parameters() if p.grad is not None]
    assert grads and {g.dtype for g in grads} == {torch.float32}
    assert all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)


def test_a_base_under_adapters_packs_them_too(sd3_dir):
    config = Roles(kind="lora", rank=4, alpha=8.0, targets=TARGETS)
    packed = roles_of(sd3_dir, config)
    plain = copy.deepcopy(packed)  # a copy starts unpacked
    base = packed["base"].transformer
    assert not plain["base"].transformer.packed
    assert {"modulation", "output"} <= set(base.packed) and not base.frozen
    block = base.transformer_blocks[0]
    assert set(block.ff.packed) == {"up", "down"} and set(block.attn.packed) == set(
        block.attn.groups
    )
    args = torch.randn(2, 16, 8, 8), torch.tensor([900.0, 30.0]), condition("sd3", 2)
    for _ in range(2):
        for name in ("base", "fake"):
            with torch.no_grad():
                found, expected = (roles[name](*args) for roles in (packed, plain))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        for roles in (packed, plain):  # moves take along what was packed
            roles["base"].transformer.to(torch.bfloat16).to(torch.float32)
    found, expected = (
        torch.autograd.grad(
            roles["fake"](*args).square().sum(),
            list(roles["fake"].parameters()),
            allow_unused=True,  # one by one, the last block's text queries are left out
        )
        for roles in (packed, plain)
    )
    for mine, theirs in zip(found, expected, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-4)


def test_default_levels_are_equal_so_that_inputs_are_shared():
    assert Reinforcement().t_min == Reinforcement().t_min_reward
