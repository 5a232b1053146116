"""What the types of `config.py` cannot say: allowed values, and keys that need each other."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, closest

if TYPE_CHECKING:
    from .config import Recipe

ROLES = ("generator", "fake", "surrogate")
METHODS = ("sft", "tdm", "tdm_r1")
TRACKERS = ("tensorboard", "wandb", "mlflow")
# (key, lowest, highest, ends); an end with a round bracket is refused itself. "*" is every role.
_NUMBERS: tuple[tuple[str, float, float, str], ...] = (
    ("iterations", 1, math.inf, "[]"),
    ("seed", 0, math.inf, "[]"),
    ("resolution", 0, math.inf, "[]"),
    ("t5_length", 0, math.inf, "[]"),
    ("ema_decay", 0, 1, "[]"),
    ("checkpoint_every", 0, math.inf, "[]"),
    ("keep_checkpoints", 1, math.inf, "[]"),
    ("skip_limit", 1, math.inf, "[]"),
    ("sigma_shift", 0, math.inf, "[]"),
    ("data.num_pictures", 1, math.inf, "[]"),
    ("data.batch_size", 1, math.inf, "[]"),
    ("data.caption_dropout", 0, 1, "[]"),
    ("rollout.num_prompts", 1, math.inf, "[]"),
    ("rollout.group_size", 1, math.inf, "[]"),
    ("rollout.micro_groups", 1, math.inf, "[]"),
    ("rollout.steps", 1, math.inf, "[]"),
    ("roles.rank", 1, math.inf, "[]"),
    ("roles.alpha", 0, math.inf, "(]"),
    ("optimizers.*.lr", 0, math.inf, "[]"),
    ("optimizers.*.betas", 0, 1, "[)"),
    ("optimizers.*.weight_decay", 0, math.inf, "[]"),
    ("optimizers.*.eps", 0, math.inf, "(]"),
    ("optimizers.*.clip", 0, math.inf, "[]"),
    ("optimizers.*.warmup", 0, math.inf, "[]"),
    ("distillation.cfg", 0, math.inf, "[]"),
    ("distillation.weight_cfg", 0, math.inf, "[]"),
    ("distillation.base_drift", 0, math.inf, "[]"),
    ("distillation.fake_updates", 1, math.inf, "[]"),
    ("reinforcement.tdm_weight", 0, math.inf, "[]"),
    ("reinforcement.rl_weight", 0, math.inf, "[]"),
    ("reinforcement.beta", 0, math.inf, "[]"),
    ("reinforcement.rl_cfg", 0, math.inf, "[]"),
    ("reinforcement.lag_clip", 0, math.inf, "[]"),
    ("reinforcement.drift_gate", 0, math.inf, "[]"),
    ("reinforcement.drift_weight", 0, math.inf, "[]"),
    ("reinforcement.trunc_steps", 0, math.inf, "[]"),
    ("reinforcement.reference_decay", 0, 1, "[]"),
    ("reinforcement.transfer", 0, 1, "[]"),
    ("evaluation.every", 0, math.inf, "[]"),
    ("evaluation.num_prompts", 0, math.inf, "[]"),
    ("evaluation.seed", 0, math.inf, "[]"),
    ("evaluation.steps", 0, math.inf, "[]"),
    ("evaluation.guidance", 0, math.inf, "[]"),
    ("evaluation.guard", 0, math.inf, "[]"),
    ("memory.decode_batch", 0, math.inf, "[]"),
    ("memory.gpus", 0, math.inf, "[]"),
    ("memory.gpu_gib", 0, math.inf, "[]"),
)
_HIGHEST_U = 0.98  # before the shift; above it the margin of `flow.sigma_above` leaves no level


def validate(recipe: Recipe) -> Recipe:
    """Checks that need more than one field, or a list of allowed values. Raises ConfigError."""
    for row in _NUMBERS:
        _in_range(recipe, *row)
    shift = recipe.sigma_shift or 1.0  # those of the models are larger, and leave more
    highest = _HIGHEST_U * shift / (1 + _HIGHEST_U * (shift - 1))
    for name in ("t_min", "t_min_reward"):
        level = getattr(recipe.reinforcement, name)
        if not 0 <= level <= highest:
            raise ConfigError(
                f"reinforcement.{name} must be from 0 to {highest}, for noise levels to be left "
                f"above it; got {level}"
            )
    _choice("method", recipe.method, METHODS)
    _choice("roles.kind", recipe.roles.kind, ("full", "lora"))
    for name in recipe.roles.full:
        _choice("roles.full", name, ROLES)
    _choice("precision", recipe.precision, ("bf16", "fp32"))
    _choice("memory.base", recipe.memory.base, ("fp32", "bf16"))
    _choice("reinforcement.reference", recipe.reinforcement.reference, ("frozen", "ema"))
    _choice("reinforcement.judged", recipe.reinforcement.judged, ("trajectory", "final"))
    _choice("zero_stage", recipe.zero_stage, (0, 1, 2, 3))
    if recipe.zero_stage == 3 and (recipe.roles.kind == "lora" or recipe.compile):
        found = "compile true" if recipe.compile else "roles.kind 'lora'"
        raise ConfigError(
            "zero_stage 3 needs roles.kind 'full' and compile false, for it cuts weights, and "
            f"adapters are small; got {found}: set zero_stage to 0, 1 or 2"
        )
    whole = recipe.roles.kind == "full" and recipe.zero_stage == 0
    if recipe.reinforcement.transfer and not whole:
        raise ConfigError(
            "reinforcement.transfer adds weights of the surrogate to the generator's, which needs "
            f"roles.kind 'full' and zero_stage 0; got {recipe.roles.kind!r} and {recipe.zero_stage}"
        )
    splits = [split.partition("/") for split in (recipe.prompts.split, recipe.evaluation.split)]
    parts, quarters = [part for part, _, _ in splits], {quarter or "0" for _, _, quarter in splits}
    if recipe.method != "sft" and parts == ["train", "test"] and len(quarters) == 2:
        raise ConfigError(
            f"evaluation.split {recipe.evaluation.split!r} is not the quarter that prompts.split "
            f"{recipe.prompts.split!r} holds out: end both alike"
        )
    for name in recipe.report_to:
        _choice("report_to", name, TRACKERS)
    if recipe.evaluation.guard and (recipe.method != "tdm_r1" or not recipe.evaluation.every):
        raise ConfigError(
            "evaluation.guard needs a training reward and evaluations to compare: method tdm_r1 "
            f"and evaluation.every of at least 1; got {recipe.method} and {recipe.evaluation.every}"
        )
    for name in ROLES:
        optimizer = getattr(recipe.optimizers, name)
        _choice(f"optimizers.{name}.name", optimizer.name, ("adamw", "muon"))
        if optimizer.name == "muon" and recipe.zero_stage:
            raise ConfigError(
                f"optimizers.{name}.name 'muon' needs zero_stage 0: ZeRO cuts matrices into flat "
                f"pieces; got zero_stage {recipe.zero_stage}"
            )
        _choice(f"optimizers.{name}.decay", optimizer.decay, ("none", "cosine"))
        if len(optimizer.betas) != 2:
            raise ConfigError(f"optimizers.{name}.betas must be two numbers; got {optimizer.betas}")
    most = 0 if recipe.method == "sft" else recipe.iterations - 1
    if not 0 <= (wait := recipe.distillation.critic_warmup) <= most:
        raise ConfigError(
            f"distillation.critic_warmup must be from 0 to {most}, for the generator of method "
            f"{recipe.method} to be trained in {recipe.iterations} iterations; got {wait}"
        )
    if recipe.method == "tdm_r1" and recipe.rollout.group_size < 2:
        raise ConfigError(f"rollout.group_size must be at least 2; got {recipe.rollout.group_size}")
    if not 1 <= recipe.distillation.boundaries <= recipe.rollout.steps:
        raise ConfigError(
            f"distillation.boundaries must be from 1 to rollout.steps = {recipe.rollout.steps}; "
            f"got {recipe.distillation.boundaries}"
        )
    return recipe


def _choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        hint = closest(str(value), [str(a) for a in allowed])
        raise ConfigError(
            f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}.{hint}"
        )


def _in_range(recipe: Recipe, key: str, low: float, high: float, ends: str) -> None:
    """Raises ConfigError unless the key's numbers, those of every role for a "*", are in range."""
    for name in [key.replace("*", role) for role in ROLES] if "*" in key else [key]:
        found = attrgetter(name)(recipe)
        for value in found if isinstance(found, tuple) else (found,):
            above = value > low if ends[0] == "(" else value >= low
            below = value < high if ends[1] == ")" else value <= high
            if math.isfinite(value) and above and below:
                continue
            if high == math.inf:
                allowed = f"above {low}" if ends[0] == "(" else f"at least {low}"
            else:
                allowed = f"in {ends[0]}{low}, {high}{ends[1]}"
            finite = "" if math.isfinite(value) else "finite and "
            raise ConfigError(f"{name} must be {finite}{allowed}; got {value}")
