"""Frozen dataclasses from plain mappings and back: the grammar of recipes, knowing none of them."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import yaml

from .errors import ConfigError, closest


def override_key(values: dict, text: str) -> None:
    """Set one key of nested mappings from "a.b=value" (a YAML value)."""
    key, sep, raw = text.partition("=")
    if not sep:
        raise ConfigError(f"--set wants key=value; got {text!r}")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: '{parent}' is not a group of keys")
    try:
        values[leaf] = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(f"--set {key}: {raw!r} is not YAML: {cause}") from error


def build(cls: type, values: Any, prefix: str = ""):
    """A dataclass from a mapping; `prefix` is where it stands, for messages.

    Raises ConfigError for unknown keys (closest match named), missing ones and wrong types.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')} must be a mapping; got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            hint = closest(str(key), hints)
            raise ConfigError(
                f"unknown recipe key '{prefix}{key}'; allowed: {', '.join(hints)}.{hint}"
            )
    built = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in built and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"recipe lacks the key(s) {', '.join(prefix + m for m in missing)}")
    return cls(**built)


def _convert(kind: Any, value: Any, name: str):
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(typing.get_args(kind)[0], item, name) for item in items)
    if kind is float and isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {kind.__name__}; got {value!r}")
    return value


def plain(value: Any):
    """Tuples as lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
