"""`method: tdm` (distillation to a few steps) and `method: tdm_r1` (reinforcement of that model).

One iteration rolls out the current generator, and makes one optimizer step per role, from
`distillation.boundaries` of the K steps in every micro-batch. The three losses of a step see the
same roles: no role is updated before the losses have what they need of it. Formulas: `losses.py`;
which forwards they share: `queries.py`. In the first `distillation.critic_warmup` iterations the
generator waits.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tdm_r1 import flow
from tdm_r1.config import prompts_per_rank
from tdm_r1.errors import NotFinite, NumericsError
from tdm_r1.models.conditioning import Condition
from tdm_r1.prompts import PromptSampler, load_prompts
from tdm_r1.training import distributed
from tdm_r1.training.clock import Clock
from tdm_r1.training.losses import Metrics, fake_loss, generator_loss, surrogate_loss, tdm_loss
from tdm_r1.training.queries import (
    Noised,
    Pull,
    Query,
    Source,
    ask,
    deal_steps,
    draw_boundaries,
    pull_law,
)
from tdm_r1.training.roles import TRAINED, follow, transferred
from tdm_r1.training.rollout import Batch, coins, renoised, roll_out, score_batches

if TYPE_CHECKING:
    from tdm_r1.training.trainer import Trainer

# Purposes of random draws within an iteration.
STEPS, DISTIL, PULL, SURROGATE, JUDGED = 1, 2, 3, 4, 5


class Tdm:
    """Rollout, reward, and the losses of the trained roles, for both methods.

    `judge` is the role that the preference loss trains, and that the lag copy follows.
    """

    judge = "surrogate"

    def __init__(self, trainer: Trainer) -> None:
        recipe = self.recipe = trainer.recipe
        self.trainer, self.engine = trainer, trainer.engine
        self.schedule = trainer.engine.schedule
        self.shift = recipe.sigma_shift or trainer.pipeline.shift
        self.reinforced = recipe.method == "tdm_r1"
        self.reward = trainer.load_reward(recipe.reward) if self.reinforced else None
        prompts = recipe.prompts
        self.sampler = PromptSampler(
            load_prompts(prompts.source, prompts.families, prompts.split), recipe.seed
        )
        # What else a run has met, or a resumed one not yet, must not change a prompt's features.
        trainer.pipeline.text.batch_size = 1
        self._before = self.sampler.position  # where the iteration under way began to draw
        self.share = prompts_per_rank(recipe, distributed.world_size())
        self.clock = Clock()
        passes = self.share // recipe.rollout.micro_groups * recipe.distillation.boundaries
        self.accumulation = dict.fromkeys(TRAINED[recipe.method], passes)

    def state(self) -> dict[str, Any]:
        """What resuming needs besides the roles."""
        return {"position": self.sampler.position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        self.sampler.position = state["position"]

    def step(self, iteration: int) -> dict[str, float]:
        """One iteration.

        Raises RewardError before any role changed; the prompts are drawn again then. Raises
        NotFinite, for a rollout, a loss or a gradient, with no role changed, but by the extra
        updates of the fake score that came first.
        """
        self.clock.read()  # what a skipped step has left
        self._before = self.sampler.position
        draw = self.sampler.draw(self.recipe.rollout.num_prompts)
        try:
            with self.clock.phase("rollout"):
                batches = self._roll_out(draw[distributed.rank() * self.share :][: self.share])
            self._stop_here()
            metrics: dict[str, float] = {}
            if self.reward is not None:
                role = self.trainer.roles["generator"]
                with self.trainer.scoring():
                    metrics = score_batches(
                        self.engine, role, batches, self.reward, self.clock,
                        self.trainer.asked_to_stop,
                    )  # fmt: skip
            self._stop_here()
        except NotFinite:  # these prompts and their noise would only fail again
            raise
        except Exception:
            self.sampler.position = self._before
            raise
        return metrics | self._update(iteration, batches) | self.clock.read()

    def _roll_out(self, groups: list[tuple[int, str]]) -> list[Batch]:
        """A batch per micro-batch; fewer once a stop was asked for."""
        count = self.recipe.rollout.micro_groups
        parts = [groups[i : i + count] for i in range(0, len(groups), count)]
        batches, fault = [], None
        with self.trainer.roles["generator"].gathered():  # once for the phase, by every rank
            for part in parts:
                try:
                    if fault is None:
                        batches.append(self._trajectories(part))
                except NumericsError as error:  # the other ranks go on to the next collective
                    fault = f"a rollout: {error}"
                if self.trainer.asked_to_stop():
                    break
        if found := [fault for fault in distributed.gather(fault) if fault is not None]:
            raise NotFinite(f"not finite: {found[0]}")
        return batches

    def _trajectories(self, groups: list[tuple[int, str]]) -> Batch:
        """A micro-batch, by the generator as it is now."""
        role, size = self.trainer.roles["generator"], self.recipe.rollout.group_size
        return roll_out(self.engine, role, groups, size, self.recipe.seed)

    def _clean(self, batch: Batch, k: int) -> Tensor:
        """The clean latents [B, C, h, w] that step k of the stored trajectory went towards."""
        return self.schedule.towards(k, batch.x[k], batch.x[k + 1])

    def _stop_here(self) -> None:
        """No role has changed yet: a stop now drops the step, and its prompts come again."""
        after, self.sampler.position = self.sampler.position, self._before
        self.trainer.stop_if_asked()
        self.sampler.position = after

    def _update(self, iteration: int, batches: list[Batch]) -> dict[str, float]:
        extras = self.recipe.distillation.fake_updates - 1
        first = distributed.rank() * len(batches)
        steps = [self._draw_steps(iteration, first + i) for i in range(len(batches))]
        for extra in range(1, extras + 1):
            for batch, pairs in zip(batches, steps, strict=True):
                for k, _ in pairs:
                    self._fake_only(batch, k, (self.recipe.seed, iteration, DISTIL, extra))
            self._step()
        sums: dict[str, list[Tensor]] = {}
        for batch, pairs in zip(batches, steps, strict=True):
            for slot, (k, j) in enumerate(pairs):
                for name, value in self._backward(iteration, batch, k, j, slot).items():
                    sums.setdefault(name, []).append(value)
            if not extras:  # only gradients are there yet
                self._stop_here()
        if self.reinforced:
            judge, generator = (self.trainer.roles[name] for name in (self.judge, "generator"))
            with transferred(judge, generator, self.recipe.reinforcement.transfer):
                self._step()
            self._follow_judge(iteration)
        else:
            self._step()
        return _means(sums)

    def _generator_waits(self, iteration: int) -> bool:
        return iteration < self.recipe.distillation.critic_warmup

    def _draw_steps(self, iteration: int, micro_batch: int) -> list[tuple[int, int]]:
        """The boundaries (k, j) of a micro-batch, by its number over all ranks.

        The same micro-batch meets the same steps however many ranks share the work.
        """
        key, num_steps = (self.recipe.seed, iteration), self.schedule.num_steps
        count, judged = self.recipe.distillation.boundaries, self.recipe.reinforcement.judged
        rng = np.random.default_rng((*key, STEPS))
        steps = deal_steps(rng, num_steps, count, micro_batch)
        rng = np.random.default_rng((*key, JUDGED, micro_batch))
        return draw_boundaries(rng, steps, num_steps, judged)

    def _draw_inputs(
        self, iteration: int, batch: Batch, k: int, j: int, slot: int
    ) -> tuple[Noised, Pull | None, Noised | None]:
        """x_s of distillation, x_r of the reward term, and the surrogate's input: `queries.py`."""
        key, sigmas = (self.recipe.seed, iteration), self.schedule.sigmas
        distil = self._renoised(batch, k + 1, sigmas[k + 1], (*key, DISTIL, 0), shared=False)
        if not self.reinforced:
            return distil, None, None
        rl = self.recipe.reinforcement
        floor = max(sigmas[j + 1], rl.t_min_reward)
        judged = self._renoised(batch, j + 1, floor, (*key, SURROGATE, slot), shared=True)
        if self._generator_waits(iteration):
            return distil, None, judged
        return distil, self._pull(iteration, batch, k, j, distil, judged), judged

    def _pull(
        self, iteration: int, batch: Batch, k: int, j: int, distil: Noised, judged: Noised
    ) -> Pull | None:
        """x_r, every row of it from where `pull_law` lets it come from."""
        law = pull_law(self.recipe, self.schedule, self.shift, k, j)
        if law is None:
            return None
        key = (self.recipe.seed, iteration, PULL)
        coin_B = coins(batch, (*key, 0)) if law.own else torch.ones_like(distil.s_B)
        source_B = law.sources(flow.unshift_sigma(distil.s_B, self.shift), coin_B)
        x_r, r_B = judged.x_BChw, judged.s_B
        others = {Source.DISTIL: distil}
        if (source_B == Source.OWN).any():
            others[Source.OWN] = self._renoised(
                batch, k + 1, law.lower, (*key, 1), shared=False, upper=law.upper
            )
        for source, at in others.items():
            chosen_B = source_B == source
            x_r = torch.where(chosen_B.view(-1, 1, 1, 1), at.x_BChw, x_r)
            r_B = torch.where(chosen_B, at.s_B, r_B)
        return Pull(x_r, r_B, source_B)

    def _backward(self, iteration: int, batch: Batch, k: int, j: int, slot: int) -> Metrics:
        """All losses of boundary k (surrogate: j), each through its role's engine."""
        distil, pull, judged = self._draw_inputs(iteration, batch, k, j, slot)
        waits = self._generator_waits(iteration)
        v = self._ask(batch, distil, pull, judged, guided=not waits)
        metrics: Metrics = {}
        known: dict[Source, Tensor] = {}
        if judged is not None:
            known[Source.JUDGED], found = self._surrogate(batch, judged, j, v)
            metrics |= found
        if pull is not None:
            v["surrogate_c"] = pull.merge(known, v.get("surrogate_c"))
        v["fake"], found = self._fake(batch, distil, k, v["base_c"])
        metrics |= found
        return metrics if waits else metrics | self._generator(batch, distil, pull, k, v)

    def _generator(
        self, batch: Batch, distil: Noised, pull: Pull | None, k: int, v: dict[str, Tensor]
    ) -> Metrics:
        x_s, s_B, _ = distil
        t_k = torch.full_like(s_B, self.schedule.timesteps[k])
        with self.clock.phase("backward"):
            v_theta = self.trainer.engines["generator"](batch.x[k], t_k, batch.cond)
        x0_k = flow.x0_from_v(batch.x[k], v_theta, self.schedule.sigmas[k])
        # The value that its rollout went towards, with the gradient of this forward.
        x0_hat = self._clean(batch, k) + self.schedule.gain(k) * (x0_k - x0_k.detach())
        x0 = [flow.x0_from_v(x_s, v[name], s_B) for name in ("base_c", "base_u", "fake")]
        cfg, weight_cfg = self.recipe.distillation.cfg, self.recipe.distillation.weight_cfg
        if not self.reinforced:
            loss, metrics = tdm_loss(x0_hat, *x0, cfg=cfg, weight_cfg=weight_cfg)
        else:
            rl = self.recipe.reinforcement
            towards: list[Tensor | None] = [None, None, None]
            if pull is not None:
                names = ("surrogate_c", "surrogate_u", "base_r")
                towards = [flow.x0_from_v(pull.x_BChw, v[name], pull.s_B) for name in names]
            loss, metrics = generator_loss(
                x0_hat, *x0, *towards, k=k, trunc_steps=rl.trunc_steps, rl_cfg=rl.rl_cfg,
                tdm_weight=rl.tdm_weight, rl_weight=rl.rl_weight, cfg=cfg, weight_cfg=weight_cfg,
            )  # fmt: skip
        self._descend("generator", loss)
        return metrics

    def _ask(
        self,
        batch: Batch,
        distil: Noised,
        pull: Pull | None,
        judged: Noised | None,
        *,
        guided: bool,
    ) -> dict[str, Tensor]:
        """Every velocity that nobody trains, once: at x_s, at x_r (`_r`), where j judges (`_j`).

        `guided`: the generator's loss will read the teacher's guidance at x_s.
        """
        roles, asked = self.trainer.roles, {}

        def put(name: str, role: str, at: Noised, cond: Condition = batch.cond) -> None:
            asked[name] = Query(roles[role], at.x_BChw, at.s_B, cond)

        put("base_c", "base", distil)
        if guided:
            put("base_u", "base", distil, batch.uncond)
        judges = () if judged is None else (Source.JUDGED,)
        if judged is not None:
            put("base_j", "base", judged)
            put("lag", "lag", judged)
            if "reference" in roles:
                put("reference", "reference", judged)
        if pull is not None:
            x_r, r_B, _ = pull
            asked["surrogate_u"] = Query(roles["surrogate"], x_r, r_B, batch.uncond)
            terms = (
                ("surrogate", "surrogate_c", judges),
                ("base", "base_r", (Source.DISTIL, *judges)),
            )
            for role, name, known in terms:
                if len(rows := pull.rest(*known)):
                    asked[name] = Query(roles[role], x_r[rows], r_B[rows], batch.cond.rows(rows))
        # Every rank has to gather a role, also one whose own boundary does not ask it.
        surrogate = roles["surrogate"].gathered() if self.reinforced else nullcontext()
        with self.clock.phase("queries"), surrogate:
            v = dict(zip(asked, ask(self.engine, list(asked.values())), strict=True))
        if pull is not None:
            served = {Source.DISTIL: v["base_c"]}
            if judged is not None:
                served[Source.JUDGED] = v["base_j"]
            v["base_r"] = pull.merge(served, v.get("base_r"))
        return v

    def _surrogate(
        self, batch: Batch, judged: Noised, j: int, v: dict[str, Tensor]
    ) -> tuple[Tensor, Metrics]:
        """The judge's velocity, detached, after its backward pass."""
        rl, (x_s, s_B, eps) = self.recipe.reinforcement, judged
        assert batch.advantage_B is not None
        v_star = flow.renoise_velocity(batch.x[j + 1], self.schedule.sigmas[j + 1], s_B, eps)
        with self.clock.phase("backward"):
            v_sur = self.trainer.engines[self.judge](x_s, s_B * 1000, batch.cond)
        loss, metrics = surrogate_loss(
            v_sur, v_star, v["base_j"], v.get("reference", v["base_j"]), v["lag"],
            batch.advantage_B, num_groups=batch.num_groups, j=j, beta=rl.beta,
            num_steps=self.schedule.num_steps, lag_clip=rl.lag_clip, drift_weight=rl.drift_weight,
            drift_limit=rl.drift_gate,
        )  # fmt: skip
        self._descend(self.judge, loss)
        return v_sur.detach(), metrics

    def _fake(self, batch: Batch, distil: Noised, k: int, v_base: Tensor) -> tuple[Tensor, Metrics]:
        """The fake score's velocity, detached, after its backward pass."""
        x_s, s_B, _ = distil
        # The generator has not moved since its rollout: asking it again would cost a forward, and
        # asking it now for the gradient would keep two graphs alive.
        x0_hat = self._clean(batch, k)
        with self.clock.phase("backward"):
            v_fake = self.trainer.engines["fake"](x_s, s_B * 1000, batch.cond)
        drift = self.recipe.distillation.base_drift
        loss, metrics = fake_loss(v_fake, x_s, x0_hat, s_B, v_base, drift_weight=drift)
        self._descend("fake", loss)
        return v_fake.detach(), metrics

    def _fake_only(self, batch: Batch, k: int, key: tuple[int, ...]) -> None:
        """An extra update of the fake score on fresh noise levels, from the stored trajectory."""
        distil = self._renoised(batch, k + 1, self.schedule.sigmas[k + 1], key, shared=False)
        query = Query(self.trainer.roles["base"], distil.x_BChw, distil.s_B, batch.cond)
        with self.clock.phase("queries"):
            (v_base,) = ask(self.engine, [query])
        self._fake(batch, distil, k, v_base)

    def _renoised(
        self, batch: Batch, boundary: int, lower: float, key: tuple[int, ...], *, shared: bool,
        upper: float | None = None,
    ) -> Noised:  # fmt: skip
        return Noised(*renoised(
            batch, boundary, self.schedule, lower=lower, shift=self.shift,
            key=key, shared=shared, upper=upper, num_prompts=self.recipe.rollout.num_prompts,
        ))  # fmt: skip

    def _descend(self, name: str, loss: Tensor) -> None:
        with self.clock.phase("backward"):
            self.trainer.descent.backward(name, loss)

    def _step(self) -> None:
        with self.clock.phase("optimizer"):
            self.trainer.descent.step()

    def _follow_judge(self, iteration: int) -> None:
        """The lag copy trails by about one step; the reference by an ordinary EMA."""
        rl, roles = self.recipe.reinforcement, self.trainer.roles
        follow(roles["lag"], roles[self.judge], 1 - min(0.3, 0.001 + 0.001 * iteration))
        if rl.reference == "ema":
            follow(roles["reference"], roles[self.judge], 1 - rl.reference_decay)


def _means(values: dict[str, list[Tensor]]) -> dict[str, float]:
    """The mean of every metric over the micro-batches of all ranks, in their order."""
    everyone = distributed.gather({name: torch.stack(v).tolist() for name, v in values.items()})
    names = dict.fromkeys(name for mine in everyone for name in mine)
    return {
        name: float(np.mean([value for mine in everyone for value in mine.get(name, [])]))
        for name in names
    }
