"""Seeded evaluation: the same prompts and noise every time, scored, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tdm_r1 import geneval, rewards, shapes, signs
from tdm_r1.config import Recipe
from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError
from tdm_r1.pipeline import Pipeline
from tdm_r1.prompts import evaluation_prompts, load_prompts
from tdm_r1.rewards import WeightedSum
from tdm_r1.training import panel
from tdm_r1.training.roles import Role
from tdm_r1.trajectory import to_output

BATCH = 64
NUM_SHOWN = 24


@dataclass
class Sample:
    """The first prompts of an evaluation, their pictures and what the reward says of each."""

    prompts: list[str]
    pictures: list[Image.Image]
    values: list[float]


def reward_of(recipe: Recipe) -> str:
    """What an evaluation scores by: `evaluation.reward`, or the run's own, strict for `shapes`."""
    own = "shapes:strict" if recipe.reward == "shapes" else recipe.reward
    return recipe.evaluation.reward or own


class Evaluator:
    """The recipe's `evaluation` section, bound to a pipeline."""

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline,
        load_reward: Callable[[str], WeightedSum] = rewards.load_reward,
    ) -> None:
        config = recipe.evaluation
        self.config = config
        source = config.prompts_file or recipe.prompts.source
        key = "evaluation.prompts_file" if config.prompts_file else "prompts.source"
        pools = load_prompts(source, config.families, config.split, key=key)
        self.prompts = evaluation_prompts(pools, config.num_prompts)
        self.held_out: list[str] = []
        if config.held_out_families:
            pools = load_prompts("shapes", config.held_out_families, "all")
            self.held_out = evaluation_prompts(pools, config.num_prompts)
        self.reward = load_reward(reward_of(recipe))
        other = config.held_out_reward
        self.held_out_reward = load_reward(other) if other else None
        self.pipeline = pipeline
        self.steps = config.steps or recipe.rollout.steps
        self.engine = Engine(pipeline, steps=self.steps, solver=recipe.rollout.solver)

    @property
    def all_prompts(self) -> list[str]:
        """What `run` draws."""
        return [*self.prompts, *self.held_out]

    def run(self, role: Role) -> tuple[dict[str, Any], Sample]:
        """Score a role on the recipe's prompts, and on the families it is not trained on.

        Returns {"reward", "interval", "families", "family_intervals", "family_mean", "num_prompts",
        "num_distinct_prompts", "panel", "seed", "steps", "guidance"} and, with `held_out_families`,
        "held_out" with the first eight of these; and the sample that pages show. The reward is the
        mean over pictures; "family_mean", over families, is the score that GenEval reports for its
        six tasks; "panel" has "held_out_reward", if the recipe names one, and `panel.statistics`.
        """
        facts = {
            "seed": self.config.seed,
            "steps": self.steps,
            "guidance": self.config.guidance,
        }
        result, sample = self._score(role, self.prompts, self.config.seed)
        result |= facts
        if self.held_out:
            seed = self.config.seed + len(self.prompts)
            result["held_out"], _ = self._score(role, self.held_out, seed)
        return result, sample

    def _score(self, role: Role, prompts: list[str], seed: int) -> tuple[dict[str, Any], Sample]:
        pictures = self.pictures(role, prompts, seed)
        values = _values(self.reward, pictures, prompts)
        families = by_family(values, prompts)
        members = panel.statistics(pictures, prompts)
        if self.held_out_reward is not None:
            other = _values(self.held_out_reward, pictures, prompts)
            members = {"held_out_reward": float(other.mean()), **members}
        result = {
            "reward": float(values.mean()),
            "interval": bootstrap_interval(values, prompts, seed),
            "families": families,
            "family_intervals": family_intervals(values, prompts, seed),
            "family_mean": float(np.mean(list(families.values()))),
            "num_prompts": len(prompts),
            "num_distinct_prompts": len(set(prompts)),
            "panel": members,
        }
        shown = slice(NUM_SHOWN)
        return result, Sample(prompts[shown], pictures[shown], values[shown].tolist())

    def pictures(self, role: Role, prompts: Sequence[str], seed: int) -> list[Image.Image]:
        """One picture per prompt from noise seed + i."""
        side, guidance = self.pipeline.default_size, self.config.guidance
        images: list[Image.Image] = []
        for start in range(0, len(prompts), BATCH):
            part = list(prompts[start : start + BATCH])
            noise = self.engine.noise([seed + start + i for i in range(len(part))], side, side)
            cond = self.pipeline.text.encode(part)
            uncond = None if guidance == 1.0 else self.pipeline.text.encode([""]).repeat(len(part))
            with role.active() as transformer:
                path = self.engine.rollout(
                    cond, noise, transformer=transformer, guidance=guidance, uncond=uncond
                )
                images += to_output(self.engine.decode(path.x[-1]), "pil")
        return images


def _values(
    reward: rewards.Reward, pictures: Sequence[Image.Image], prompts: Sequence[str]
) -> np.ndarray:
    """A reward's values, of as many pictures at a time as are drawn at a time."""
    parts = [slice(start, start + BATCH) for start in range(0, len(pictures), BATCH)]
    return np.concatenate([rewards.score(reward, pictures[i], prompts[i]) for i in parts])


def bootstrap_interval(
    values: np.ndarray, prompts: Sequence[str], seed: int, draws: int = 2000
) -> list[float]:
    """95 % percentile interval of the mean when the DIFFERENT prompts are drawn again.

    Pictures of one prompt fail together, so a prompt is resampled with all of them.
    """
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    pick = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[pick].sum(axis=1) / counts[pick].sum(axis=1)
    return [float(v) for v in np.quantile(means, (0.025, 0.975))]


def by_family(values: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Mean per family of the embedded world, task of GenEval or length of text; else "all"."""
    return {family: float(values[rows].mean()) for family, rows in _families(prompts).items()}


def family_intervals(
    values: np.ndarray, prompts: Sequence[str], seed: int
) -> dict[str, list[float]]:
    """`bootstrap_interval` of every family."""
    return {
        family: bootstrap_interval(values[rows], [prompts[i] for i in rows], seed)
        for family, rows in _families(prompts).items()
    }


def _families(prompts: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(_family(prompt), []).append(i)
    return rows


def _family(prompt: str) -> str:
    for language in (
        lambda: shapes.parse(prompt).family,
        lambda: geneval.parse(prompt).task,
        lambda: signs.family_of(prompt),
    ):
        try:
            return language()
        except ConfigError:
            pass
    return "all"
