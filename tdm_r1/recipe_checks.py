"""What the types of `config.py` cannot say: allowed values, and keys that need each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError, closest

if TYPE_CHECKING:
    from .config import Recipe

METHODS = ("sft", "tdm", "tdm_r1")
TRACKERS = ("tensorboard", "wandb", "mlflow")
_FROM_ZERO = (
    "seed",
    "resolution",
    "t5_length",
    "evaluation.every",
    "evaluation.guard",
    "evaluation.num_prompts",
    "evaluation.steps",
    "memory.gpus",
    "memory.decode_batch",
)


def validate(recipe: Recipe) -> Recipe:
    """Checks that need more than one field, or a list of allowed values. Raises ConfigError."""
    _choice("method", recipe.method, METHODS)
    _choice("roles.kind", recipe.roles.kind, ("full", "lora"))
    for name in recipe.roles.full:
        _choice("roles.full", name, ("generator", "fake", "surrogate"))
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
    for name in recipe.report_to:
        _choice("report_to", name, TRACKERS)
    if recipe.evaluation.guard and (recipe.method != "tdm_r1" or not recipe.evaluation.every):
        raise ConfigError(
            "evaluation.guard needs a training reward and evaluations to compare: method tdm_r1 "
            f"and evaluation.every of at least 1; got {recipe.method} and {recipe.evaluation.every}"
        )
    for name, value in (
        ("iterations", recipe.iterations),
        ("rollout.num_prompts", recipe.rollout.num_prompts),
        ("rollout.steps", recipe.rollout.steps),
        ("rollout.micro_groups", recipe.rollout.micro_groups),
        ("data.batch_size", recipe.data.batch_size),
        ("distillation.fake_updates", recipe.distillation.fake_updates),
        ("rollout.group_size", recipe.rollout.group_size),
        ("evaluation.num_prompts", recipe.evaluation.num_prompts + 1),
        ("data.num_pictures", recipe.data.num_pictures),
        ("evaluation.every", recipe.evaluation.every + 1),
        ("evaluation.guard", recipe.evaluation.guard + 1),
        ("keep_checkpoints", recipe.keep_checkpoints),
        ("skip_limit", recipe.skip_limit),
        ("seed", recipe.seed + 1),
        ("resolution", recipe.resolution + 1),
        ("t5_length", recipe.t5_length + 1),
        ("memory.gpus", recipe.memory.gpus + 1),
        ("memory.decode_batch", recipe.memory.decode_batch + 1),
        ("evaluation.steps", recipe.evaluation.steps + 1),
    ):
        if value < 1:
            zero = name in _FROM_ZERO
            raise ConfigError(f"{name} must be at least {0 if zero else 1}; got {value - zero}")
    for name in ("t_min", "t_min_reward"):
        level = getattr(recipe.reinforcement, name)
        if not 0 <= level < 1:
            raise ConfigError(f"reinforcement.{name} must be a noise level in [0, 1); got {level}")
    for name in ("generator", "fake", "surrogate"):
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
