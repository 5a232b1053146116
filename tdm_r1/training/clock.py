"""Where an iteration's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds per phase, summed since they were last read."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase; what a CUDA device was given is waited for first."""
        start = _now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + _now() - start

    def read(self) -> dict[str, float]:
        """{"seconds_<phase>": seconds}, and begin again."""
        seconds, self.seconds = self.seconds, {}
        return {f"seconds_{name}": value for name, value in seconds.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
