"""Every error this package raises on purpose, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TdmError(Exception):
    """Root of the package's own errors; a command line turns it into one line and exit status 1."""


class ConfigError(TdmError, ValueError):
    """The user asked for what cannot be: names field, value and what is allowed. Exit status 2."""


class LoadError(ConfigError):
    """Weights, a model directory or a checkpoint are not what they claim to be: names the file."""


class RewardError(TdmError):
    """A reward raised, or returned something other than one finite number per image. Status 1."""


class ExportError(TdmError):
    """A graph could not be made, or does not compute what the Engine does: names it. Status 1."""


def closest(name: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"`, x the allowed name nearest to `name`; `""` if none is near."""
    matches = difflib.get_close_matches(str(name), [str(option) for option in allowed], n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
