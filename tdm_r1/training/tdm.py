"""`method: tdm` (distillation to a few steps) and `method: tdm_r1` (reinforcement of that model).

One iteration rolls out the current generator, and makes one optimizer step per role from
`distillation.boundaries` of the K steps. The three losses of a step see the same roles: nothing is
updated before the last backward pass. Formulas: `losses.py`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tdm_r1 import flow, rewards
from tdm_r1.errors import ConfigError
from tdm_r1.models.conditioning import Condition
from tdm_r1.prompts import PromptSampler, load_prompts
from tdm_r1.training import distributed
from tdm_r1.training.losses import Metrics, fake_loss, generator_loss, surrogate_loss, tdm_loss
from tdm_r1.training.roles import follow
from tdm_r1.training.rollout import Batch, renoised, roll_out, score_batches

if TYPE_CHECKING:
    from tdm_r1.training.trainer import Trainer

# Purposes of random draws within an iteration.
STEPS, DISTIL, PULL, SURROGATE = 1, 2, 3, 4


class Tdm:
    """Rollout, reward, and the losses of the trained roles, for both methods."""

    def __init__(self, trainer: Trainer) -> None:
        recipe = self.recipe = trainer.recipe
        self.trainer, self.engine = trainer, trainer.engine
        self.schedule = trainer.engine.schedule
        if self.schedule.solver != "euler":
            # The fake score's target is the first-order x0 prediction of the transition.
            raise ConfigError(
                f"rollout.solver must be euler for method {recipe.method}; "
                f"'{recipe.rollout.solver}' means {self.schedule.solver} for this model"
            )
        self.shift = recipe.sigma_shift or trainer.pipeline.shift
        self.reinforced = recipe.method == "tdm_r1"
        self.reward = rewards.load_reward(recipe.reward) if self.reinforced else None
        prompts = recipe.prompts
        self.sampler = PromptSampler(
            load_prompts(prompts.source, prompts.families, prompts.split), recipe.seed
        )
        share, rest = divmod(recipe.rollout.num_prompts, distributed.world_size())
        if rest or share % recipe.rollout.micro_groups:
            raise ConfigError(
                f"rollout.num_prompts = {recipe.rollout.num_prompts} must be a multiple of "
                f"ranks x micro_groups = {distributed.world_size()} x {recipe.rollout.micro_groups}"
            )
        self.share = share
        passes = share // recipe.rollout.micro_groups * recipe.distillation.boundaries
        self.accumulation = {"generator": passes, "fake": passes, "surrogate": passes}

    def state(self) -> dict[str, Any]:
        """What resuming needs besides the roles."""
        return {"position": self.sampler.position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        self.sampler.position = state["position"]

    def step(self, iteration: int) -> dict[str, float]:
        """One iteration.

        Raises RewardError before any role changed; the prompts are drawn again then.
        """
        start, position = time.perf_counter(), self.sampler.position
        draw = self.sampler.draw(self.recipe.rollout.num_prompts)
        try:
            batches = self._roll_out(draw[distributed.rank() * self.share :][: self.share])
            metrics = {"seconds_rollout": time.perf_counter() - start}
            if self.reward is not None:
                role = self.trainer.roles["generator"]
                with self.trainer.scoring():
                    metrics |= score_batches(self.engine, role, batches, self.reward)
            self._stop_here(position)
        except Exception:
            self.sampler.position = position
            raise
        return metrics | self._update(iteration, batches)

    def _roll_out(self, groups: list[tuple[int, str]]) -> list[Batch]:
        rollout, role = self.recipe.rollout, self.trainer.roles["generator"]
        parts = [
            groups[i : i + rollout.micro_groups]
            for i in range(0, len(groups), rollout.micro_groups)
        ]
        seed = self.recipe.seed
        return [roll_out(self.engine, role, part, rollout.group_size, seed) for part in parts]

    def _stop_here(self, position: int) -> None:
        """No role has changed yet: a stop now drops the step, and its prompts come again."""
        after, self.sampler.position = self.sampler.position, position
        self.trainer.stop_if_asked()
        self.sampler.position = after

    def _update(self, iteration: int, batches: list[Batch]) -> dict[str, float]:
        first = distributed.rank() * len(batches)
        steps = [self._draw_steps(iteration, first + i) for i in range(len(batches))]
        for extra in range(1, self.recipe.distillation.fake_updates):
            for batch, pairs in zip(batches, steps, strict=True):
                for k, _ in pairs:
                    self._fake_only(batch, k, (self.recipe.seed, iteration, DISTIL, extra))
        sums: dict[str, list[Tensor]] = {}
        for batch, pairs in zip(batches, steps, strict=True):
            for slot, (k, j) in enumerate(pairs):
                for name, value in self._backward(iteration, batch, k, j, slot).items():
                    sums.setdefault(name, []).append(value)
        if self.reinforced:
            self._follow_surrogate(iteration)
        return {name: float(torch.stack(values).mean()) for name, values in sums.items()}

    def _draw_steps(self, iteration: int, micro_batch: int) -> list[tuple[int, int]]:
        """The boundaries (k, j) of a micro-batch, by its number over all ranks.

        k, for distillation and pull, without replacement; j, for the surrogate, in proportion to
        j + 1. The same micro-batch meets the same steps however many ranks share the work.
        """
        rng = np.random.default_rng((self.recipe.seed, iteration, STEPS, micro_batch))
        num_steps, boundaries = self.schedule.num_steps, self.recipe.distillation.boundaries
        weights = np.arange(1, num_steps + 1) / (num_steps * (num_steps + 1) / 2)
        k = rng.choice(num_steps, boundaries, replace=False)
        j = rng.choice(num_steps, boundaries, p=weights)
        return list(zip(k.tolist(), j.tolist(), strict=True))

    def _backward(self, iteration: int, batch: Batch, k: int, j: int, slot: int) -> Metrics:
        """All losses of boundary k (surrogate: j), each through its role's engine."""
        distil, engines = self.recipe.distillation, self.trainer.engines
        key = (self.recipe.seed, iteration)
        sigma_k, lower = self.schedule.sigmas[k], self.schedule.sigmas[k + 1]
        x_s, s_B, _ = self._renoised(batch, k + 1, lower, (*key, DISTIL, 0), shared=False)
        queries = [(x_s, s_B, batch.cond), (x_s, s_B, batch.uncond)]
        pulled = self.reinforced and k < self.recipe.reinforcement.trunc_steps
        if pulled:
            t_min = max(lower, self.recipe.reinforcement.t_min)
            x_r, r_B, _ = self._renoised(batch, k + 1, t_min, (*key, PULL), shared=True)
            queries.append((x_r, r_B, batch.cond))
        if self.reinforced:
            floor = max(self.schedule.sigmas[j + 1], self.recipe.reinforcement.t_min_reward)
            sur = (*self._renoised(batch, j + 1, floor, (*key, SURROGATE, slot), shared=True), j)
            queries.append((sur[0], sur[1], batch.cond))
        v_base_c, v_base_u, *v_base = self._ask("base", queries)

        t_k = torch.full_like(s_B, self.schedule.timesteps[k])
        v_theta = engines["generator"](batch.x[k], t_k, batch.cond)
        x0_hat = flow.x0_from_v(batch.x[k], v_theta, sigma_k)
        v_fake = engines["fake"](x_s, s_B * 1000, batch.cond)
        loss, metrics = fake_loss(
            v_fake, x_s, x0_hat, s_B, v_base_c, drift_weight=distil.base_drift
        )
        self._descend("fake", loss)

        x0 = [flow.x0_from_v(x_s, v, s_B) for v in (v_base_c, v_base_u, v_fake.detach())]
        cfg, weight_cfg = distil.cfg, distil.weight_cfg
        if not self.reinforced:
            loss, found = tdm_loss(x0_hat, *x0, cfg=cfg, weight_cfg=weight_cfg)
        else:
            rl = self.recipe.reinforcement
            pull: list[Tensor | None] = [None, None, None]
            if pulled:
                v_sur = self._ask("surrogate", [(x_r, r_B, batch.cond), (x_r, r_B, batch.uncond)])
                pull = [flow.x0_from_v(x_r, v, r_B) for v in (*v_sur, v_base[0])]
            loss, found = generator_loss(
                x0_hat, *x0, *pull, k=k, trunc_steps=rl.trunc_steps, rl_cfg=rl.rl_cfg,
                tdm_weight=rl.tdm_weight, cfg=cfg, weight_cfg=weight_cfg,
            )  # fmt: skip
        self._descend("generator", loss)
        metrics |= found
        if self.reinforced:
            metrics |= self._surrogate(batch, *sur, v_base[-1])
        return metrics

    def _surrogate(
        self, batch: Batch, x_s: Tensor, s_B: Tensor, eps: Tensor, j: int, v_base: Tensor
    ) -> Metrics:
        rl = self.recipe.reinforcement
        assert batch.advantage_B is not None
        query = [(x_s, s_B, batch.cond)]
        v_ref = v_base if rl.reference == "frozen" else self._ask("reference", query)[0]
        v_lag = self._ask("lag", query)[0]
        v_star = flow.renoise_velocity(batch.x[j + 1], self.schedule.sigmas[j + 1], s_B, eps)
        v_sur = self.trainer.engines["surrogate"](x_s, s_B * 1000, batch.cond)
        loss, metrics = surrogate_loss(
            v_sur, v_star, v_base, v_ref, v_lag, batch.advantage_B,
            num_groups=batch.num_groups, j=j, num_steps=self.schedule.num_steps, beta=rl.beta,
            lag_clip=rl.lag_clip, drift_weight=rl.drift_weight, drift_limit=rl.drift_gate,
        )  # fmt: skip
        self._descend("surrogate", loss)
        return metrics

    def _fake_only(self, batch: Batch, k: int, key: tuple[int, ...]) -> None:
        """An extra update of the fake score on fresh noise levels, from the stored trajectory."""
        sigma_k, lower = self.schedule.sigmas[k], self.schedule.sigmas[k + 1]
        x_s, s_B, _ = self._renoised(batch, k + 1, lower, key, shared=False)
        with torch.no_grad():
            v_theta = self.trainer.roles["generator"](
                batch.x[k], torch.full_like(s_B, self.schedule.timesteps[k]), batch.cond
            )
        (v_base,) = self._ask("base", [(x_s, s_B, batch.cond)])
        v_fake = self.trainer.engines["fake"](x_s, s_B * 1000, batch.cond)
        x0_hat = flow.x0_from_v(batch.x[k], v_theta, sigma_k)
        drift = self.recipe.distillation.base_drift
        loss, _ = fake_loss(v_fake, x_s, x0_hat, s_B, v_base, drift_weight=drift)
        self._descend("fake", loss)

    def _renoised(
        self, batch: Batch, boundary: int, lower: float, key: tuple[int, ...], *, shared: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return renoised(
            batch,
            boundary,
            self.schedule,
            lower=lower,
            shift=self.shift,
            key=(*key, boundary),
            shared=shared,
        )

    @torch.no_grad()
    def _ask(self, role: str, queries: list[tuple[Tensor, Tensor, Condition]]) -> list[Tensor]:
        """Velocities for several (x, s_B, cond), as one batch: same frozen weights read once."""
        x = torch.cat([x for x, _, _ in queries])
        t = torch.cat([s for _, s, _ in queries]) * 1000
        cond = Condition.cat([c for _, _, c in queries]) if len(queries) > 1 else queries[0][2]
        return list(self.trainer.roles[role](x, t, cond).split(len(queries[0][0])))

    def _descend(self, name: str, loss: Tensor) -> None:
        engine = self.trainer.engines[name]
        engine.backward(loss)
        engine.step()

    def _follow_surrogate(self, iteration: int) -> None:
        """The lag copy trails by about one step; the reference by an ordinary EMA."""
        rl, roles = self.recipe.reinforcement, self.trainer.roles
        follow(roles["lag"], roles["surrogate"], 1 - min(0.3, 0.001 + 0.001 * iteration))
        if rl.reference == "ema":
            follow(roles["reference"], roles["surrogate"], 1 - rl.reference_decay)
