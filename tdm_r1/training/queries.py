"""Which forwards a boundary needs, which of them are one and the same, and how they are asked.

Written out term by term, the losses of one boundary k (for the surrogate: j) take 13 forwards of B
rows: fake score 3 (generator, fake, base), surrogate 3 (surrogate, base, lag copy), generator 7
(generator; at x_s: base with and without caption, fake; at x_r: base, surrogate with and without).
Here a row takes 7 to 10, and what is not trained of them runs in one or two batches:

1. The fake score's loss and the generator's distillation terms read one x_s. Their draws have one
   law, and the answers of generator, fake and base serve both: 10 forwards are left.
2. The generator's reward term reads an x_r = renoise(x_{k+1}, s_r) that is drawn already, where
   there is one. All levels are uniform in u (`flow.sigma_above`), x_s's above a, x_r's above
   b >= a (from max(sigma_{k+1}, t_min)), the surrogate's above c (from t_min_reward). A law cut to
   an interval is uniform again, so that x_r may be put together, row by row, from
   - x_s where its u lies in [b, c). The base's answer serves twice: 9 forwards for this row;
   - with a probability that makes up what [b, c) lacks, a draw of its own there: 10;
   - the surrogate's input for all other rows, above c. The base's answer and the surrogate's own
     training forward serve twice: 8.
   For j != k, or c < b, there is none above c: c = 1. `pull_law` has the shares. From trunc_steps
   on there is no reward term: 7. A moving reference adds one to each.
3. j comes in proportion to j + 1, k uniformly, and no loss reads both: they are drawn to be equal
   as often as these two laws allow, which makes c of 2 the surrogate's most of the time. Over the
   micro-batches of an iteration the steps k come equally often (`deal_steps`).

What is shared is a draw, never an expectation: every loss is a mean over samples (the surrogate's,
over groups) of a function of its own (boundary, level, noise), whose law is unchanged: which source
a row of x_r has depends on x_s and a coin alone, and there its level and noise have the law that
was asked for. Only draws within an iteration become dependent. A sample's level and noise may be
shared by its group or be its own in every loss but the surrogate's: there a group's logit compares
samples, and (s, eps) must be the group's. No role is updated between a draw's first use and its
last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tdm_r1 import flow
from tdm_r1.config import Recipe
from tdm_r1.engine import Engine
from tdm_r1.models.conditioning import Condition
from tdm_r1.training.roles import Role, stacked

STACKED = 4  # queries in one batch: bounds what its activations take


class Noised(NamedTuple):
    """A re-noised boundary state: x_s [B, C, h, w], its levels [B], the noise [B, C, h, w]."""

    x_BChw: Tensor
    s_B: Tensor
    eps_BChw: Tensor


class Source(IntEnum):
    """Where a row of x_r comes from: the surrogate's input, x_s, or a draw of its own."""

    JUDGED = 0
    DISTIL = 1
    OWN = 2


class Pull(NamedTuple):
    """The reward term's x_r [B, C, h, w], its levels [B], and where each row comes from [B]."""

    x_BChw: Tensor
    s_B: Tensor
    source_B: Tensor

    def rest(self, *sources: Source) -> Tensor:
        """Indices of the rows that come from none of these."""
        known = self.source_B.new_tensor([int(source) for source in sources])
        return (~torch.isin(self.source_B, known)).nonzero()[:, 0]

    def merge(self, answers: Mapping[Source, Tensor], asked_RChw: Tensor | None) -> Tensor:
        """v_BChw: a source's rows from its answer [B, C, h, w], the `rest` from what was asked."""
        v_BChw = torch.empty_like(self.x_BChw)
        if asked_RChw is not None:
            v_BChw[self.rest(*answers)] = asked_RChw
        for source, answer_BChw in answers.items():
            chosen_B = self.source_B == source
            v_BChw[chosen_B] = answer_BChw[chosen_B]
        return v_BChw


class PullLaw(NamedTuple):
    """Of x_r: from x_s where low <= u < high, else its own with probability `own`, else judged.

    lower, upper: of the levels that are its own, as `flow.sigma_above` takes them. distil: the
    probability that x_s is in the interval.
    """

    low: float
    high: float
    own: float
    lower: float
    upper: float | None
    distil: float

    def sources(self, u_B: Tensor, coin_B: Tensor) -> Tensor:
        """A `Source` for every row: u of x_s, and a coin uniform in [0, 1)."""
        other_B = torch.where(coin_B < self.own, Source.OWN, Source.JUDGED)
        return torch.where((u_B >= self.low) & (u_B < self.high), Source.DISTIL, other_B)


class Query(NamedTuple):
    """One role's velocity, asked at x_s [B, C, h, w] with levels s [B], for a condition."""

    role: Role
    x_BChw: Tensor
    s_B: Tensor
    cond: Condition


@torch.no_grad()
def ask(engine: Engine, queries: Sequence[Query]) -> list[Tensor]:
    """v_BChw (fp32) of every query, in batches of one transformer: they read its weights once.

    Roles that are adapters of one base share a batch, each on its own rows.
    """
    answers: dict[int, Tensor] = {}
    shared: dict[int, list[int]] = {}
    for index, query in enumerate(queries):
        shared.setdefault(id(query.role.transformer), []).append(index)
    for indices in (
        group[i : i + STACKED] for group in shared.values() for i in range(0, len(group), STACKED)
    ):
        batch = [queries[index] for index in indices]
        sizes = [len(query.x_BChw) for query in batch]
        x_BChw = torch.cat([query.x_BChw for query in batch])
        t_B = torch.cat([query.s_B for query in batch]) * 1000
        cond = Condition.cat([query.cond for query in batch])
        roles = [query.role for query in batch]
        with stacked(list(zip(roles, sizes, strict=True))) as transformer:
            v_BChw = engine.score(x_BChw, t_B, cond, transformer).float()
        answers |= zip(indices, v_BChw.split(sizes), strict=True)
    return [answers[index] for index in range(len(queries))]


def deal_steps(rng: np.random.Generator, num_steps: int, count: int, micro_batch: int) -> list[int]:
    """The `count` steps k of a micro-batch, by its number in the iteration: none twice.

    rng: the same for every micro-batch of an iteration. They are dealt one random order of the K
    steps, over and over: P(k) = 1/K for each, and over the iteration no step comes more than once
    more often than another. Drawn independently, some iterations would never see the last step, and
    an iteration's work would vary.
    """
    order_K = rng.permutation(num_steps)
    return [int(order_K[(micro_batch * count + i) % num_steps]) for i in range(count)]


def draw_boundaries(
    rng: np.random.Generator, steps: Sequence[int], num_steps: int, judged: str = "trajectory"
) -> list[tuple[int, int]]:
    """A pair (k, j) for every step k: P(j) = (j + 1) / (1 + ... + K) where P(k) = 1/K.

    Where only "final" states are judged, j = K - 1. Within a pair P(j = k) is the largest that
    these laws allow: j = k with probability min(1, K P(j)), else j from what is left of its law.
    """
    p_K, rest_K = _laws(num_steps, judged)
    pairs = []
    for k in steps:
        same = rng.random() < num_steps * p_K[k] or not rest_K.any()
        pairs.append((k, k if same else int(rng.choice(num_steps, p=rest_K / rest_K.sum()))))
    return pairs


def pull_law(
    recipe: Recipe, schedule: flow.Schedule, shift: float, k: int, j: int
) -> PullLaw | None:
    """How x_r is put together, or None where nothing reads one. `shift`: of the levels drawn."""
    rl, sigma = recipe.reinforcement, schedule.sigmas[k + 1]
    if recipe.method != "tdm_r1" or k >= rl.trunc_steps:
        return None
    lower, judged = max(sigma, rl.t_min), max(sigma, rl.t_min_reward)
    lowest, low, high = (flow.lowest_u(s, shift) for s in (sigma, lower, judged))
    upper = judged if j == k and high >= low else None

    def below_high(start: float) -> float:
        """The part of what is uniform in [start, 1] that lies in [low, high)."""
        if upper is None and low == start:
            return 1.0
        return ((1.0 if upper is None else high) - low) / (1 - start) if start < 1 else 0.0

    distil, wanted = below_high(lowest), below_high(low)
    own = (wanted - distil) / (1 - distil) if wanted > distil else 0.0
    # No rounding of a level may carry it over an end of its own law.
    low, high = (0.0 if low == lowest else low), (math.inf if upper is None else high)
    return PullLaw(low, high, own, lower, upper, distil)


def num_forwards(recipe: Recipe, schedule: flow.Schedule, shift: float, k: int, j: int) -> float:
    """Forwards that a row takes in the losses of boundary (k, j), on average, training's included.

    A fraction only where x_r comes from several sources.
    """
    if recipe.method != "tdm_r1":
        return 4
    found: float = 7 + (recipe.reinforcement.reference == "ema")
    if (law := pull_law(recipe, schedule, shift, k, j)) is not None:
        found += 1 + law.distil + 2 * (1 - law.distil) * law.own
    return found


def mean_forwards(recipe: Recipe, schedule: flow.Schedule, shift: float) -> float:
    """`num_forwards`, averaged over the law of (k, j)."""
    return sum(
        probability * num_forwards(recipe, schedule, shift, k, j)
        for k, j, probability in _law(schedule.num_steps, recipe.reinforcement.judged)
    )


def _laws(num_steps: int, judged: str) -> tuple[np.ndarray, np.ndarray]:
    """P(j), and what is left of it, not normalised, where j = k has taken all it can."""
    p_K = np.arange(1, num_steps + 1) / (num_steps * (num_steps + 1) / 2)
    if judged == "final":
        p_K = np.eye(num_steps)[-1]
    return p_K, np.maximum(p_K - 1 / num_steps, 0)


def _law(num_steps: int, judged: str) -> Iterator[tuple[int, int, float]]:
    """(k, j, probability) of a boundary that is drawn."""
    p_K, rest_K = _laws(num_steps, judged)
    for k in range(num_steps):
        same = min(1.0, num_steps * p_K[k])
        for j in range(num_steps):
            moved = (1 - same) * rest_K[j] / rest_K.sum() if same < 1 else 0.0
            yield k, j, (same * (j == k) + moved) / num_steps
