"""Fair timing: variants interleaved, so that a busy machine hurts them alike; quantiles."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_BLOCK = 0.2  # milliseconds


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
    """Run every variant in turn, round after round; returns quantiles over `repeats` rounds.

    A call below 0.2 ms is repeated for as long within its turn and the mean taken, as
    torch.utils.benchmark does: of one such call the clock and cold caches are half. CUDA work is
    waited for on both sides of the clock. Raises ValueError below 5 repeats: the
    quantiles would be made of single runs.
    """
    if repeats < 5:
        raise ValueError(f"repeats is {repeats}; allowed: 5 or more")
    samples: dict[str, list[float]] = {name: [] for name in variants}
    calls: dict[str, int] = dict.fromkeys(variants, 1)
    for round_ in range(warmup + repeats):
        for name, call in variants.items():
            elapsed = _milliseconds(call, calls[name])
            if round_ >= warmup:
                samples[name].append(elapsed)
            elif not torch.cuda.is_available():
                calls[name] = max(1, math.ceil(_BLOCK / max(elapsed, 1e-4)))
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
    store(result, path)
    print(json.dumps(result, default=asdict))


def store(result: dict, path: Path | None) -> None:
    """Replace the file at `path`, if any, as a whole: whoever is ended next leaves this one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(result, default=asdict) + "\n")
        part.replace(path)


def _milliseconds(call: Callable[[], object], times: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait()
    return (time.perf_counter() - start) * 1e3 / times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quantiles(values: list[float]) -> Times:
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    p50 = statistics.median(values)
    return Times(round(p20, 4), round(p50, 4), round(p80, 4), len(values))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
