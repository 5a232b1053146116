"""What queries share is their draws, and nothing that changes an answer."""

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
from tdm_r1.training.queries import Query, ask, draw_boundaries, mean_forwards, num_forwards
from tdm_r1.training.roles import build_roles
from tdm_r1.training.rollout import roll_out
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
    drawn = [draw_boundaries(rng, num_steps, count, judged) for _ in range(4000)]
    assert all(len({k for k, _ in pairs}) == count for pairs in drawn)
    found = Counter(pair for pairs in drawn for pair in pairs)
    for k, j, p in law:
        n = 4000 * count
        assert abs(found[k, j] - n * p) <= 5 * max(n * p * (1 - p), 1) ** 0.5, (k, j)


@pytest.mark.parametrize(
    ("values", "mean", "largest"),
    [
        ({}, 8.2, 9),  # t_min = t_min_reward = 0.3: the published recipe for OCR
        ({"t_min": 0.25, "t_min_reward": 0.55}, 8.95, 10),  # for GenEval
        ({"t_min": 0.4, "t_min_reward": 0.55, "trunc_steps": 2}, 7.7, 9),  # for preferences
        ({"judged": "final"}, 8.75, 9),
    ],
)
def test_published_recipes_need_at_most_nine_forwards(values, mean, largest, tmp_path):
    plain = recipe(tmp_path, "tiny-sd3", reinforcement=values)
    schedule = flow.schedule("euler", 4, 3.0)
    assert mean_forwards(plain, schedule) == pytest.approx(mean)
    counts = [
        num_forwards(plain, schedule, k, j)
        for k, j, p in queries._law(4, plain.reinforcement.judged)
        if p
    ]
    assert max(counts) == largest
    moving = recipe(tmp_path, "tiny-sd3", reinforcement={**values, "reference": "ema"})
    assert mean_forwards(moving, schedule) == pytest.approx(mean + 1)
    assert mean_forwards(recipe(tmp_path, "tiny-sd3", method="tdm"), schedule) == 4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_iterations_make_the_forwards_they_are_said_to(kind, tmp_path, sd3_dir, monkeypatch):
    values = {"num_prompts": 2, "group_size": 3, "micro_groups": 1}
    trainer = make(tmp_path, sd3_dir, kind=kind, rollout=values, distillation={"boundaries": 4})
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
    counts = [num_forwards(trainer.recipe, schedule, *pair) for pair in pairs]
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


def test_default_levels_are_equal_so_that_inputs_are_shared():
    assert Reinforcement().t_min == Reinforcement().t_min_reward
