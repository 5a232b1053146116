"""Processes that train, some at a time: a bar, a log each, and an end to all with their parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm import tqdm

from tdm_r1.errors import TdmError
from tdm_r1.training.distributed import GROUP


class Run(Protocol):
    """One process: `file` exists once it has ended well, `work` is a folder of its own."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> Path: ...

    @property
    def work(self) -> Path: ...

    @property
    def log(self) -> Path: ...

    def progress(self) -> int:
        """How many iterations it has logged so far."""

    def tidy(self) -> None:
        """Drop what nobody needs once it has ended."""


AnyRun = TypeVar("AnyRun", bound=Run)


def logged(metrics: Path) -> int:
    """How many iterations a trainer's metrics.jsonl holds."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return sum('"seconds"' in line for line in lines)


def run_all(
    runs: Sequence[AnyRun],
    command_of: Callable[[AnyRun], list[str]],
    length_of: Callable[[AnyRun], int],
    *,
    jobs: int,
    threads: int,
) -> None:
    """Make the runs, `jobs` at a time with `threads` each, and show how far they are.

    Raises TdmError, after all have ended, if some of them failed; what they said is in their logs.
    Runs under way are stopped when this is interrupted.
    """
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    environment["OMP_NUM_THREADS"] = str(threads)
    waiting, failed = list(runs), []
    running: dict[AnyRun, subprocess.Popen[bytes]] = {}
    ended = 0
    total = sum(length_of(run) for run in runs)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, stops them
    with tqdm(total=total, unit="iteration", mininterval=1.0) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = _launch(command_of(run), run, environment)
                time.sleep(0.2)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    process = running.pop(run)
                    ended += length_of(run)
                    run.tidy()
                    if process.returncode or not run.file.is_file():
                        failed.append(f"{run.name} ({_last_line(run.log)}; {run.log})")
                bar.set_postfix_str(", ".join(run.name for run in running), refresh=False)
                bar.update(ended + sum(run.progress() for run in running) - bar.n)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
            signal.signal(signal.SIGTERM, handler)
    if failed:
        raise TdmError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def _launch(arguments: list[str], run: Run, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    shutil.rmtree(run.work, ignore_errors=True)  # of a run that was broken off
    run.work.mkdir(parents=True)
    with run.log.open("wb") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").split("\n")
    return next((line.split("\r")[-1] for line in reversed(lines) if line.strip()), "no word")
