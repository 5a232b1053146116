"""Whether two recipes are one run: on the ranks of a launch, and in a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

from tdm_r1.config import Recipe
from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.training import distributed

log = logging.getLogger(__name__)

# With another value here, a checkpoint is of another run.
FIXED = (
    "model",
    "method",
    "seed",
    "reward",
    "lora",
    "resolution",
    "t5_length",
    "roles",
    "prompts",
    "data",
    "rollout.num_prompts",
    "rollout.group_size",
    "rollout.steps",
    "rollout.solver",
    "sigma_shift",
    "optimizers.generator.name",
    "optimizers.fake.name",
    "optimizers.surrogate.name",
    "reinforcement.reference",
)
# These may change on resuming without a word: where a run is written, how long, how it is spread.
FREE = (
    "iterations",
    "output",
    "compile",
    "zero_stage",
    "checkpoint_every",
    "keep_checkpoints",
    "skip_limit",
    "report_to",
    "evaluation",
)
_REMOTE = re.compile(r"\bremote\s*\([^()]*\)")


def values(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted key, as JSON would give it back: tuples become lists."""
    return _flat(dataclasses.asdict(recipe), "")


def check_ranks(recipe: Recipe) -> None:
    """Raises ConfigError on every rank, naming the key, unless all ranks have one recipe."""
    first, *others = distributed.gather(values(recipe))
    for number, other in enumerate(others, start=1):
        for key, value in first.items():
            if other[key] != value:
                raise ConfigError(
                    f"{key} must be the same on every rank; it is {value!r} on rank 0 and "
                    f"{other[key]!r} on rank {number}"
                )


def check_checkpoint(recipe: Recipe, saved: Any, path: Path) -> None:
    """Compare a recipe with the `values` that the checkpoint `path` was written with.

    What is neither FIXED nor FREE (learning rates, weights of losses) may change, and is logged;
    so may the options of a remote reward, which say where and how it is asked.

    Raises:
        LoadError: the checkpoint is of another run, or does not say; names the key and both values.
    """
    if not isinstance(saved, dict):
        raise LoadError(f"{path} does not say which recipe it was written with")
    for key, value in values(recipe).items():
        before = saved.get(key, value)  # a key that is younger than the checkpoint says nothing
        if before == value or _under(key, FREE):
            continue
        if _under(key, FIXED) and not _same_reward(key, before, value):
            raise LoadError(f"{path} was written with {key} {before!r}, this is {value!r}")
        log.warning("%s was written with %s %r; from here on it is %r", path, key, before, value)


def _under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _same_reward(key: str, before: Any, value: Any) -> bool:
    """Whether two specs of the reward differ in options of `remote(...)` alone."""
    specs = [_REMOTE.sub("remote", str(spec)) for spec in (before, value)]
    return key == "reward" and specs[0] == specs[1]


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found
