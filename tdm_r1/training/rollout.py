"""Rollouts: prompts -> trajectories -> pictures -> rewards -> advantages, through the Engine.

A `Batch` holds whole groups: its rows are [num_groups * G], a group's samples side by side. Noise
comes from generators keyed by (seed, group id, purpose), so a group's draws do not depend on which
rank or which batch it lands in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tdm_r1 import flow, rewards
from tdm_r1.engine import Engine
from tdm_r1.errors import RewardError, TdmError
from tdm_r1.models.conditioning import Condition
from tdm_r1.training import distributed
from tdm_r1.training.clock import Clock
from tdm_r1.training.losses import advantages
from tdm_r1.training.roles import Role
from tdm_r1.trajectory import to_output


@dataclass
class Batch:
    """Whole groups and their trajectories. x: K+1 latents [B, C, h, w]; advantage_B once scored."""

    group_ids: tuple[int, ...]
    prompts: tuple[str, ...]
    group_size: int
    cond: Condition
    uncond: Condition
    x: tuple[Tensor, ...]
    advantage_B: Tensor | None = None

    @property
    def num_groups(self) -> int:
        """How many groups the rows hold."""
        return len(self.group_ids)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a pure function of the key (integers >= 0)."""
    # A key and the same with zeros behind it would be one to SeedSequence, but for their lengths.
    state = np.random.SeedSequence((*key, len(key))).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def roll_out(
    engine: Engine, role: Role, groups: Sequence[tuple[int, str]], group_size: int, seed: int
) -> Batch:
    """Run the current generator on G noises per group, no guidance; keeps every latent."""
    batch = start(engine, groups, group_size, seed)
    with role.active() as transformer:
        path = engine.rollout(batch.cond, batch.x[0], transformer=transformer)
    return replace(batch, x=path.x)


def start(engine: Engine, groups: Sequence[tuple[int, str]], group_size: int, seed: int) -> Batch:
    """G noises per group and what they are to become: a batch whose path is its first state."""
    side = engine.pipeline.default_size // engine.pipeline.vae.scale_factor
    shape = (group_size, engine.pipeline.vae.latent_channels, side, side)
    noise = torch.cat(
        [torch.randn(shape, generator=keyed_generator(seed, group, 0)) for group, _ in groups]
    )
    prompts = tuple(prompt for _, prompt in groups)
    cond = engine.pipeline.text.encode(list(prompts)).repeat(group_size)
    x = (noise.to(engine.device),)
    uncond = engine.pipeline.text.encode([""]).repeat(len(cond))
    return Batch(tuple(group for group, _ in groups), prompts, group_size, cond, uncond, x)


def renoised(
    batch: Batch,
    boundary: int,
    schedule: flow.Schedule,
    *,
    lower: float,
    shift: float,
    key: Sequence[int],
    shared: bool,
    num_prompts: int,
    upper: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_s [B,C,h,w], s_B, eps [B,C,h,w]) from the latents at `boundary` (0..K), s above `lower`.

    shared: one s and one eps per group, so that its samples differ only by themselves. Every level
    has the law of `flow.sigma_above` (`upper` too), and they are stratified: of the G of a group,
    or of the shared ones of the P = num_prompts groups of an iteration, one lies in every G-th
    (P-th) of its interval, so that no iteration dwells on high levels or on low ones. `key`: of the
    iteration and the purpose, the same for all its micro-batches.
    """
    x_b = batch.x[boundary]
    num, shape = (1 if shared else batch.group_size), x_b.shape[1:]
    # Whatever their boundaries: an iteration's micro-batches fill the P places together.
    place_P = torch.randperm(num_prompts, generator=keyed_generator(*key)) if shared else None
    levels, noises = [], []
    for group in batch.group_ids:
        generator = keyed_generator(*key, boundary, group)
        uniform = torch.rand(num, generator=generator)
        if place_P is None:
            uniform = (torch.randperm(num, generator=generator) + uniform) / num
        else:  # the groups of an iteration have consecutive ids
            uniform = (place_P[group % num_prompts] + uniform) / num_prompts
        levels.append(flow.sigma_above(lower, shift, uniform, upper=upper))
        noises.append(torch.randn((num, *shape), generator=generator))
    times = batch.group_size if shared else 1
    s_B = torch.cat(levels).repeat_interleave(times).to(x_b.device)
    eps = torch.cat(noises).repeat_interleave(times, dim=0).to(x_b.device)
    return flow.renoise(x_b, schedule.sigmas[boundary], s_B, eps), s_B, eps


def coins(batch: Batch, key: Sequence[int]) -> Tensor:
    """A number uniform in [0, 1) for every sample, [B]; a group's are its own, as its noise is."""
    draws = [torch.rand(batch.group_size, generator=keyed_generator(*key, group))
             for group in batch.group_ids]  # fmt: skip
    return torch.cat(draws).to(batch.x[0].device)


def describe(error: Exception) -> str:
    """An error in one line: its own text for the package's errors, the class too for others."""
    return str(error) if isinstance(error, TdmError) else f"{type(error).__name__}: {error}"


def score_batches(
    engine: Engine,
    role: Role,
    batches: Sequence[Batch],
    reward: rewards.WeightedSum,
    clock: Clock,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Decode, score, and give every batch its advantages (statistics over ALL ranks).

    Whatever fails on one rank raises RewardError on every rank, before any role changed. Once
    `asked_to_stop`, which all ranks ask after every batch, the rest is left and {} returned.
    """
    values: list[np.ndarray] = []
    failure: Exception | None = None
    for batch in batches:
        try:
            if failure is None:
                values.append(_score(engine, role, batch, reward, clock))
        except Exception as error:  # every rank must hear of it before the next collective
            failure = error
        if asked_to_stop():
            return {}
    messages = distributed.gather(None if failure is None else describe(failure))
    if isinstance(failure, RewardError):
        raise failure
    if failure is not None:
        raise RewardError(describe(failure)) from failure
    for number, message in enumerate(messages):
        if message is not None:
            raise RewardError(f"on rank {number}: {message}")
    mine_PG = np.concatenate(values).reshape(-1, batches[0].group_size)
    all_PG = torch.from_numpy(np.concatenate(distributed.gather(mine_PG)))
    advantage_PG, flat = advantages(all_PG)
    first = distributed.rank() * len(mine_PG)
    for batch in batches:
        rows = advantage_PG[first : first + batch.num_groups]
        batch.advantage_B = rows.reshape(-1).to(engine.device)
        first += batch.num_groups
    return {
        "reward": float(all_PG.mean()),
        "reward_std": float(all_PG.std()),
        "flat_groups": flat / len(all_PG),
    }


def _score(
    engine: Engine, role: Role, batch: Batch, reward: rewards.WeightedSum, clock: Clock
) -> np.ndarray:
    """The rewards of a batch's pictures, [B]."""
    with clock.phase("decode"), role.precision():
        pictures = to_output(engine.decode(batch.x[-1]), "pil")
    prompts = [prompt for prompt in batch.prompts for _ in range(batch.group_size)]
    with clock.phase("reward"):
        return rewards.score(reward, pictures, prompts)
