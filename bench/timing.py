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
from functools import partial
from pathlib import Path

import torch

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_BLOCK = 0.2  # milliseconds
# How often the L2 cache is written before a sample, at most: some 10 ms. Calls that are still being
# queued then wait for the device themselves.
_MAX_WRITES = 128


@dataclass(frozen=True)
class Times:
    """Milliseconds of one variant."""

    p20: float
    p50: float
    p80: float
    repeats: int


def interleaved(
    variants: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 3,
    device: torch.device | str | None = None,
) -> dict[str, Times]:
    """Run every variant in turn, round after round; returns quantiles over `repeats` rounds.

    A call below 0.2 ms is repeated for as long within its turn and the mean taken, as
    torch.utils.benchmark does: of one such call the clock and cold caches are half. With a CUDA
    `device` the time is the device's own, as of ops inside a model: the calls of a turn are queued
    behind other work, so that none waits for Python, and find nothing of earlier turns in the L2
    cache. Otherwise it is the wall clock's, Python included; without a `device`, CUDA work, where
    the process has any, is waited for on both sides of it. Raises ValueError below 5 repeats: the
    quantiles would be made of single runs.
    """
    if repeats < 5:
        raise ValueError(f"repeats is {repeats}; allowed: 5 or more")
    device = None if device is None else torch.device(device)
    sample: Callable[[Callable[[], object], int], float] = partial(_milliseconds, device)
    if device is not None and device.type == "cuda":
        sample = _Queue(device).milliseconds
    samples: dict[str, list[float]] = {name: [] for name in variants}
    calls: dict[str, int] = dict.fromkeys(variants, 1)
    for round_ in range(warmup + repeats):
        for name, call in variants.items():
            elapsed = sample(call, calls[name])
            if round_ >= warmup:
                samples[name].append(elapsed)
            else:
                calls[name] = max(1, math.ceil(_BLOCK / max(elapsed, 1e-4)))
    return {name: _quantiles(values) for name, values in samples.items()}


def roofs(
    device: torch.device | str,
    side: int,
    size: int,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 20,
) -> dict[str, float]:
    """Operations and bytes per second of this machine: a product of side^3, a copy of `size` bytes.

    "flops_per_s_bf16", or whatever `dtype` is; where there is e4m3, "flops_per_s_fp8", which sums
    as `scaled_linear` does, and "flops_per_s_fp8_fast", by the shorter accumulators of Hopper.
    """
    a = torch.randn(side, side, device=device, dtype=dtype)
    one = torch.ones(side, 1, device=device)
    a8 = a.to(torch.float8_e4m3fn)
    source = torch.randint(255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def product_fp8(fast: bool) -> torch.Tensor:
        scales = {"scale_a": one, "scale_b": one.t()}
        out = torch.bfloat16
        return torch._scaled_mm(a8, a8.t(), **scales, out_dtype=out, use_fast_accum=fast)

    calls: dict[str, Callable[[], object]] = {NAMES[dtype]: lambda: a @ a}
    for name, fast in (("fp8", False), ("fp8_fast", True)):
        try:
            product_fp8(fast)
        except Exception:  # the others are roofs without it
            continue
        calls[name] = partial(product_fp8, fast)
    every = calls | {"copy": lambda: target.copy_(source)}
    times = interleaved(every, repeats=repeats, device=device)
    found = {f"flops_per_s_{name}": 2 * side**3 / times[name].p50 * 1e3 for name in calls}
    return found | {"bytes_per_s": 2 * size / times["copy"].p50 * 1e3}


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


class _Queue:
    """A CUDA device, which is kept busy with its L2 cache while calls are queued."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.writes = device, 1
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def milliseconds(self, call: Callable[[], object], times: int) -> float:
        """Mean of `times` calls in a row, between two events."""
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self.device)
            for _ in range(self.writes):
                self.buffer.zero_()
            start.record(stream)
            for _ in range(times):
                call()
            late = start.query()  # the device came to the first call before the last was queued
            end.record(stream)
            end.synchronize()
            if not late or self.writes >= _MAX_WRITES:
                return start.elapsed_time(end) / times
            self.writes *= 2


def _milliseconds(device: torch.device | None, call: Callable[[], object], times: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - start) * 1e3 / times


def _wait(device: torch.device | None) -> None:
    if device is None and torch.cuda.is_initialized():
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
