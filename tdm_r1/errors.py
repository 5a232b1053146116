"""Every error this package raises on purpose, and how a program tells its user of one."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Iterable, Sequence


class TdmError(Exception):
    """Root of the package's own errors; a command line turns it into one line and exit status 1."""


class ConfigError(TdmError, ValueError):
    """The user asked for what cannot be: names field, value and what is allowed. Exit status 2."""


class LoadError(ConfigError):
    """Weights, a model directory or a checkpoint are not what they claim to be: names the file."""


class SaveError(TdmError, OSError):
    """A checkpoint could not be written, the disk being full or gone: names the cause. Status 1."""


class RewardError(TdmError):
    """A reward raised, or returned something other than one finite number per image. Status 1."""


class NotFinite(TdmError):
    """A loss or a gradient was NaN or infinite, so no role took its step: names them. Status 1."""


class ExportError(TdmError):
    """A graph could not be made, or does not compute what the Engine does: names it. Status 1."""


class GraphError(TdmError):
    """A graph was asked for that was not recorded, cannot be, or reads what moved. Status 1."""


class DeviceError(TdmError, RuntimeError):
    """The device ran out of memory, or was lost: says what was asked of it. Status 1."""


class NumericsError(TdmError):
    """Pictures hold NaN or infinities: `rows` are their places in the batch. Status 1."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


def closest(name: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"`, x the allowed name nearest to `name`; `""` if none is near."""
    matches = difflib.get_close_matches(str(name), [str(option) for option in allowed], n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def report(
    error: Exception, program: str, *, details: bool, unnamed: type[Exception] = TdmError
) -> int:
    """Say `error` in one line on stderr, after its traceback if `details`; return the exit status.

    The line is "program: class: message", the class left out for errors of `unnamed`. The status
    is 2 for a ConfigError and 1 for any other.
    """
    if details:
        traceback.print_exception(error)
    kind = "" if isinstance(error, unnamed) else f"{type(error).__name__}: "
    print(f"{program}: {kind}{' '.join(str(error).split())}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
