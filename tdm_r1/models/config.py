"""Published config.json files -> frozen dataclasses, refusing what cannot be honoured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from tdm_r1.errors import ConfigError, closest

Config = TypeVar("Config")


def parse_config(cls: Callable[..., Config], values: dict[str, Any]) -> Config:
    """Build the dataclass `cls` from a config.json dict.

    Keys starting with an underscore are the writer's notes and are skipped; lists become tuples.
    Any other unknown key raises ConfigError: it may change the model.
    """
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_"):
            continue
        if key not in names:
            raise ConfigError(f"unknown model config key {key!r}.{closest(key, names)}")
        known[key] = tuple(value) if isinstance(value, list) else value
    return cls(**known)
