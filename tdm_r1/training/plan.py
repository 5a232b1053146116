"""A run's plan before it starts: what it holds, what it computes, whether it fits its GPUs.

Nothing is loaded, fetched or measured, and no process group is made. A phase is refused where it
exceeds the GPU less 1 GiB for the runtime and 5 % for fragments. The arithmetic: budget.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tdm_r1.config import Recipe, prompts_per_rank
from tdm_r1.errors import ConfigError
from tdm_r1.prompts import load_prompts
from tdm_r1.recipe_checks import validate
from tdm_r1.training.budget import (
    Phase,
    forwards_per_picture,
    phases,
    role_parameters,
    rows_per_step,
)
from tdm_r1.training.roles import ORIGIN, TRAINED
from tdm_r1.training.sizes import Size, describe

GIB = 2**30
RUNTIME, FRAGMENTS = 1 * GIB, 0.05


@dataclass(frozen=True)
class Plan:
    """A recipe on `gpus` GPUs of `gpu_bytes` (0: unknown)."""

    recipe: Recipe
    size: Size
    gpus: int
    gpu_bytes: float
    roles: dict[str, int]  # name -> parameters of its own
    phases: tuple[Phase, ...]
    forwards: dict[str, float]  # rows per picture

    @property
    def usable(self) -> float:
        """Bytes that a phase may take."""
        return self.gpu_bytes * (1 - FRAGMENTS) - RUNTIME

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase does; true where the GPU is not known."""
        return not self.gpu_bytes or self.peak.total <= self.usable


def make_plan(recipe: Recipe, size: Size | None = None) -> Plan:
    """Work a recipe out. Raises ConfigError for what the run itself would refuse."""
    size = size or describe(recipe.model, recipe.t5_length)
    side = recipe.resolution or size.default_side
    if side % size.side_unit:
        raise ConfigError(
            f"resolution is {recipe.resolution}; allowed: a multiple of {size.side_unit}"
        )
    gpus = recipe.memory.gpus or int(os.environ.get("WORLD_SIZE", "1"))
    _check_shares(recipe, gpus)
    gpu_bytes = recipe.memory.gpu_gib * GIB
    if not gpu_bytes and torch.cuda.is_available():
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    roles = role_parameters(recipe, size)
    found = phases(recipe, size, roles, gpus, side)
    forwards = forwards_per_picture(recipe, size)
    return Plan(recipe, size, gpus, gpu_bytes, roles, found, forwards)


def _check_shares(recipe: Recipe, gpus: int) -> None:
    if recipe.method != "sft":
        prompts_per_rank(recipe, gpus, of="GPUs")
    elif recipe.data.batch_size % gpus:
        size = recipe.data.batch_size
        raise ConfigError(f"data.batch_size = {size} must be a multiple of the {gpus} GPUs")


KNOBS: tuple[tuple[str, Any], ...] = (
    ("memory.precompute_text", True),
    ("memory.checkpoint_blocks", True),
    ("rollout.micro_groups", 1),
    ("memory.base", "bf16"),
    ("memory.offload", True),
    ("memory.decode_batch", 4),
    ("memory.decode_batch", 1),
    ("zero_stage", 2),
    ("zero_stage", 3),
)
LAST_KNOBS = (("roles.kind", "lora"),)  # another run, not the same in less memory


def turned(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with one key, of at most two levels, set."""
    section, _, leaf = key.rpartition(".")
    if not section:
        return replace(recipe, **{leaf: value})
    changes: dict[str, Any] = {leaf: value}
    if key == "roles.kind":
        changes["full"] = ()
        recipe = replace(recipe, zero_stage=min(recipe.zero_stage, 2))
    return replace(recipe, **{section: replace(getattr(recipe, section), **changes)})


def require_fit(plan: Plan) -> None:
    """Raises ConfigError for a plan that does not fit, naming the keys to change."""
    if plan.fits:
        return
    peak, steps = plan.peak, []
    best = plan
    while not best.fits:
        found = _best_turn(best, KNOBS) or _best_turn(best, LAST_KNOBS)
        if found is None:
            break
        stage = best.recipe.zero_stage
        key, value, best = found
        change = f"{key}={str(value).lower()}"
        if key != "zero_stage" and best.recipe.zero_stage != stage:
            change += f" with zero_stage={best.recipe.zero_stage}"
        steps.append(f"{change} ({best.peak.total / GIB:.1f} GiB)")
    advice = f"set {', then '.join(steps)}" if steps else "no key of the recipe makes it smaller"
    if not best.fits:
        advice += f"; that is not enough: take GPUs of {_needed(best):.0f} GiB (memory.gpu_gib)"
    raise ConfigError(
        f"the phase '{peak.name}' needs {peak.total / GIB:.1f} GiB on each GPU, and "
        f"{plan.usable / GIB:.1f} of memory.gpu_gib = {plan.gpu_bytes / GIB:g} are usable: {advice}"
    )


def _best_turn(plan: Plan, knobs: Sequence[tuple[str, Any]]) -> tuple[str, Any, Plan] | None:
    """The key whose other value makes the largest phase smallest, if any makes it smaller."""
    options = [
        (key, value, make_plan(turned(plan.recipe, key, value), plan.size))
        for key, value in knobs
        if _current(plan.recipe, key) != value and _applies(plan, key, value)
    ]
    best = min(options, key=lambda option: option[2].peak.total, default=None)
    return best if best is not None and best[2].peak.total < plan.peak.total else None


def _needed(plan: Plan) -> float:
    return (plan.peak.total + RUNTIME) / (1 - FRAGMENTS) / GIB + 0.5


def _current(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _applies(plan: Plan, key: str, value: Any) -> bool:
    try:
        validate(turned(plan.recipe, key, value))
    except ConfigError:
        return False
    if key == "zero_stage":
        return plan.gpus > 1 and plan.recipe.zero_stage < value
    if key == "rollout.micro_groups":
        return plan.recipe.method != "sft"
    batch = plan.recipe.memory.decode_batch
    return key != "memory.decode_batch" or batch == 0 or batch > 1


def report(plan: Plan) -> str:
    """The plan as text."""
    recipe, size = plan.recipe, plan.size
    rollout, side = recipe.rollout, recipe.resolution or size.default_side
    of = f" of {plan.gpu_bytes / GIB:g} GiB" if plan.gpu_bytes else ", size unknown"
    text = ", ".join(f"{name} {_count(count)}" for name, count in size.text.items())
    lines = [
        f"{recipe.model}: {recipe.method} on {plan.gpus} GPU(s){of}, ZeRO {recipe.zero_stage}",
        f"  from {size.source}",
        f"  transformer {_count(size.parameters)} ({size.blocks} blocks, width {size.dim}); "
        f"{text}; VAE {_count(size.vae)}",
        f"  {side} pixels: {size.image_tokens(side)} image and {size.text_tokens} text tokens",
        "roles (parameters of their own)",
    ]
    for name, count in plan.roles.items():
        state = "trained" if name in TRAINED[recipe.method] else f"copy of {ORIGIN[name]}"
        lines.append(f"  {name:<10} {_count(count):>9}  {state}")
    lines += ["GiB on each GPU, by phase"]
    for phase in plan.phases:
        parts = ", ".join(f"{name} {b / GIB:.2f}" for name, b in phase.parts.items() if b)
        lines.append(f"  {phase.name:<16} {phase.total / GIB:6.1f}  ({parts})")
    if recipe.method != "sft":
        pictures = rollout.num_prompts * rollout.group_size
        micro = rollout.num_prompts // (plan.gpus * rollout.micro_groups)
        lines.append(
            f"{pictures} pictures per iteration ({rollout.num_prompts} prompts x "
            f"{rollout.group_size}), {pictures // plan.gpus} per GPU in {micro} micro-step(s) of "
            f"{rows_per_step(recipe, plan.gpus)} rows x {recipe.distillation.boundaries} boundaries"
        )
    lines.append(
        "transformer rows per picture: "
        + ", ".join(f"{name} {count:.3g}" for name, count in plan.forwards.items())
    )
    if recipe.memory.precompute_text and recipe.method != "sft":
        prompts = load_prompts(recipe.prompts.source, recipe.prompts.families, recipe.prompts.split)
        count = min(sum(map(len, prompts)), recipe.iterations * rollout.num_prompts)
        width = 2 if recipe.memory.base == "bf16" else 4
        disk = count * size.text_tokens * size.text_width * width
        lines.append(
            f"about {disk / GIB:.1f} GiB of embeddings on disk, of {count} prompts at most"
        )
    return "\n".join(lines)


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
