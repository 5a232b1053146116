"""Fair timing: variants interleaved, so that a busy machine hurts them alike; quantiles."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Times:
    """Wall-clock milliseconds of one variant."""

    p20: float
    p50: float
    p80: float
    repeats: int


def interleaved(
    variants: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 3
) -> dict[str, Times]:
    """Run every variant once per round, in turn; returns quantiles over `repeats` rounds.

    CUDA work is waited for on both sides of the clock. Raises ValueError below 5 repeats: the
    quantiles would be made of single runs.
    """
    if repeats < 5:
        raise ValueError(f"repeats is {repeats}; allowed: 5 or more")
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warmup + repeats):
        for name, call in variants.items():
            elapsed = _milliseconds(call)
            if round_ >= warmup:
                samples[name].append(elapsed)
    return {name: _quantiles(values) for name, values in samples.items()}


def environment() -> dict[str, object]:
    """What a number depends on: processor, threads, load, versions."""
    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(result: dict, path: Path | None) -> None:
    """Print `result` as the last line of stdout, one JSON object, and store it at `path`."""
    line = json.dumps(result, default=asdict)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
    print(line)


def _milliseconds(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return (time.perf_counter() - start) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quantiles(values: list[float]) -> Times:
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    p50 = statistics.median(values)
    return Times(round(p20, 3), round(p50, 3), round(p80, 3), len(values))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
