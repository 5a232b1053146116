"""Recipes: one frozen dataclass tree, read from YAML and changed by `--set a.b=v`.

Unknown keys are refused.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, closest
from .recipe_checks import validate
from .schema import build, override_key, plain

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Optimizer:
    """One role's optimizer: `name` "adamw", or "muon" (matrices of the blocks; AdamW for the rest).

    `warmup` in iterations; `decay` "none", or "cosine" to 0 at the last.
    """

    name: str = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    eps: float = 1e-8
    clip: float = 1.0
    warmup: int = 0
    decay: str = "none"


@dataclass(frozen=True)
class Optimizers:
    """One optimizer per trained role; `sft` uses the generator's alone."""

    generator: Optimizer = Optimizer(lr=7.5e-5, betas=(0.0, 0.999))
    fake: Optimizer = Optimizer(lr=3e-4, betas=(0.0, 0.999))
    surrogate: Optimizer = Optimizer(lr=3e-4, betas=(0.9, 0.999))


@dataclass(frozen=True)
class Roles:
    """`full`: every role copies the transformer. `lora`: named adapters over one frozen base.

    `full`, under `lora`: the trained roles that copy the transformer nevertheless. A fake score
    must keep up with its generator; it is not shipped, so it need not be small.
    """

    kind: str = "lora"
    full: tuple[str, ...] = ()
    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """Where prompts come from: "shapes", "geneval" or "ocr", and families of it; or a text file."""

    source: str = "shapes"
    families: tuple[str, ...] = ("counting", "colours", "position", "attribution")
    split: str = "train"


@dataclass(frozen=True)
class Data:
    """Pictures for `sft`: "shapes" or an image folder with metadata.jsonl."""

    source: str = "shapes"
    families: tuple[str, ...] = (
        "single",
        "two",
        "counting",
        "colours",
        "position",
        "attribution",
        "words",
    )
    num_pictures: int = 30000
    batch_size: int = 128
    caption_dropout: float = 0.1


@dataclass(frozen=True)
class Rollout:
    """P prompts by G samples per iteration over all ranks; `micro_groups` whole groups per pass."""

    num_prompts: int = 48
    group_size: int = 24
    micro_groups: int = 4
    steps: int = 4
    solver: str = "auto"


@dataclass(frozen=True)
class Distillation:
    """Few-step distribution matching. `boundaries` of the K steps are trained per micro-batch.

    `critic_warmup`: iterations at the start in which only the generator's critics learn, the fake
    score and the surrogate, from what the generator draws.
    """

    boundaries: int = 2
    cfg: float = 3.5
    weight_cfg: float = 4.5
    base_drift: float = 0.02
    fake_updates: int = 1
    critic_warmup: int = 0


@dataclass(frozen=True)
class Reinforcement:
    """The surrogate reward and its pull on the generator, `rl_weight` times (published: 0.7).

    `tdm_weight` is that of the teacher's guidance, and from step `trunc_steps` on, where nothing
    pulls, of all of distillation; `method: tdm` weighs both by 1.

    `judged`: the surrogate learns from every state of a "trajectory", as published, or from "final"
    pictures alone, whose velocity target has no noise of the earlier states. `transfer`: the share
    of every change of the surrogate's weights that the generator's take over at once, also while it
    waits (task arithmetic, arXiv 2212.04089). Both come from one base, and the pull alone takes
    many iterations to say as much.
    """

    tdm_weight: float = 0.3
    rl_weight: float = 0.7
    beta: float = 10.0
    t_min: float = 0.3
    t_min_reward: float = 0.3
    rl_cfg: float = 4.5
    lag_clip: float = 1e-3
    drift_gate: float = 0.05
    drift_weight: float = 0.001
    trunc_steps: int = 4
    reference: str = "frozen"
    reference_decay: float = 0.95
    judged: str = "trajectory"
    transfer: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Seeded evaluation on EMA weights, every `every` iterations (0: only first and last).

    `num_prompts` 0 takes every prompt of the split once, `steps` 0 as many steps as the rollout;
    `reward` "" is the run's own, with `shapes` made strict, `prompts_file` "" its own source.
    `held_out_reward` scores the same pictures a second time, by a reward that nothing is trained
    on. `guard` N > 0 ends the run when the training reward rose and the held-out panel fell at N
    evaluations in a row.
    """

    every: int = 0
    families: tuple[str, ...] = ("counting", "colours", "position", "attribution")
    split: str = "test"
    num_prompts: int = 256
    seed: int = 10_000
    steps: int = 0
    guidance: float = 1.0
    held_out_families: tuple[str, ...] = ()
    prompts_file: str = ""
    reward: str = ""
    held_out_reward: str = ""
    guard: int = 0


@dataclass(frozen=True)
class Memory:
    """How a run fits into its GPUs.

    base: dtype of what no optimizer steps: the frozen base, the text encoders, the VAE. Adapters
        and roles with parameters of their own stay fp32. "bf16" halves the base and rounds what
        flows through it.
    checkpoint_blocks: keep a block's inputs only and run it again in the backward pass.
    precompute_text: encode the run's prompts once, into the output folder, and drop the encoders.
    offload: VAE and reward on the CPU but while they work.
    decode_batch: pictures per pass of the VAE; 0 is the engine's own bound.
    gpus, gpu_gib: what `--dry-run` plans for; 0 is what is there.
    """

    base: str = "fp32"
    checkpoint_blocks: bool = False
    precompute_text: bool = False
    offload: bool = False
    decode_batch: int = 0
    gpus: int = 0
    gpu_gib: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A whole run. The YAML file's keys are these fields; nested keys, those of the classes above.

    `compile` runs the forward of `sft` through torch.compile: one or two minutes at the start, then
    faster. `lora` makes the model a few-step one: generator and EMA start from it, the other roles
    from the model itself. A shipped name brings its own. `resolution` is the side in pixels of
    rollouts and of evaluation, `t5_length` the number of T5 tokens (SD3); 0 is the model's own.
    `zero_stage` cuts over the GPUs: 1 the optimizers, 2 gradients too, 3 also the weights of roles
    of `kind: full`, copies included. A role is then whole, in fp32, only while it works: a rollout
    phase, its queries, a forward with its backward pass, an evaluation.
    A step whose losses or gradients are not finite is skipped; `skip_limit` of them in a row end
    the run. `report_to` names trackers that get what metrics.jsonl gets: "tensorboard", "wandb",
    "mlflow".
    """

    model: str
    method: str
    iterations: int
    output: str
    seed: int = 0
    reward: str = "shapes"
    lora: str = ""
    resolution: int = 0
    t5_length: int = 0
    precision: str = "bf16"
    compile: bool = False
    zero_stage: int = 0
    ema_decay: float = 0.9
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    skip_limit: int = 5
    report_to: tuple[str, ...] = ()
    sigma_shift: float = 0.0
    prompts: Prompts = field(default_factory=Prompts)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    roles: Roles = field(default_factory=Roles)
    optimizers: Optimizers = field(default_factory=Optimizers)
    distillation: Distillation = field(default_factory=Distillation)
    reinforcement: Reinforcement = field(default_factory=Reinforcement)
    evaluation: Evaluation = field(default_factory=Evaluation)
    memory: Memory = field(default_factory=Memory)


def load_recipe(name_or_file: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a YAML file, and apply `a.b=value` overrides (YAML values).

    A file with `extends: NAME` holds only what differs from that shipped recipe.
    Raises ConfigError for an unknown recipe, key or value, with the closest match.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_file}.yaml"
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        if not path.is_file():
            hint = closest(str(name_or_file), names)
            raise ConfigError(
                f"no recipe named '{name_or_file}'; shipped: {', '.join(names)}.{hint}"
            )
    values = _read(path)
    for override in overrides:
        override_key(values, override)
    return validate(build(Recipe, values))


def _read(path: Path) -> dict[str, Any]:
    """The keys of a file, over those of the recipe that it extends."""
    if not path.is_file():
        raise ConfigError(f"recipe file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} must be a mapping of keys to values")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    source = RECIPES / f"{parent}.yaml"
    if not source.is_file() or source == path:
        raise ConfigError(f"recipe {path} extends {parent!r}, which is no other shipped recipe")
    return _merged(_read(source), values)


def _merged(base: dict, over: dict) -> dict:
    """`over` upon `base`, groups of keys key by key."""
    both = {
        key: _merged(base[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **over, **both}


def save_recipe(recipe: Recipe, file: str | Path) -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back to an equal object."""
    values = yaml.safe_load(yaml.safe_dump(plain(dataclasses.asdict(recipe))))
    Path(file).write_text(yaml.safe_dump(values, sort_keys=False))


def prompts_per_rank(recipe: Recipe, count: int, *, of: str = "ranks") -> int:
    """How many of an iteration's prompts each of `count` ranks takes, in whole micro-batches.

    Raises ConfigError, which calls ranks what `of` says, where they cannot be shared so.
    """
    rollout = recipe.rollout
    if rollout.num_prompts % (count * rollout.micro_groups):
        raise ConfigError(
            f"rollout.num_prompts = {rollout.num_prompts} must be a multiple of "
            f"{of} x micro_groups = {count} x {rollout.micro_groups}"
        )
    return rollout.num_prompts // count
