"""What is the demo's gain on captions it did not see, whichever those are? Four-fold validation.

    python -m bench.folds [--seeds 0] [--jobs 1] [--output runs/folds] [--resume | --aggregate]
                          [--write]

The demo holds a quarter of its captions out; here each quarter is held out once, for every seed.
A run is `python -m tdm_r1 demo` with `prompts.split=train/K` and `evaluation.split=test/K` and its
pictures, with `threads / jobs` threads; it leaves its folder in --output. --resume makes only the
runs that have not ended, --aggregate makes none. --write puts the result into a folder, by default
bench/results. The interval is Student's over the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.ablation import RESULTS, interval95
from bench.timing import environment
from bench.timing import report as print_result
from tdm_r1.config import load_recipe
from tdm_r1.demo import RECIPE
from tdm_r1.errors import ConfigError, TdmError, report
from tdm_r1.shapes import NUM_FOLDS


class Run(NamedTuple):
    """The demo with one quarter held out."""

    fold: int
    seed: int
    folder: Path
    settings: tuple[str, ...]

    @property
    def output(self) -> Path:
        return self.folder / f"fold{self.fold}-seed{self.seed}"

    @property
    def summary(self) -> Path:
        """What the demo writes when it has ended well."""
        return self.output / "summary.json"

    @property
    def overrides(self) -> list[str]:
        """What differs from the recipe."""
        splits = [f"prompts.split=train/{self.fold}", f"evaluation.split=test/{self.fold}"]
        return [*self.settings, *splits, f"seed={self.seed}", f"output={self.output}"]

    def make(self, threads: int) -> None:
        """Run the demo, anew where one was broken off.

        Raises TdmError if it fails; what it said is in a log beside its folder.
        """
        shutil.rmtree(self.output, ignore_errors=True)
        keys = [part for override in self.overrides for part in ("--set", override)]
        log = self.output.with_suffix(".log")
        with log.open("wb") as file:
            code = subprocess.run(
                [sys.executable, "-m", "tdm_r1", "demo", *keys],
                stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            ).returncode  # fmt: skip
        if code:
            raise TdmError(f"fold {self.fold}, seed {self.seed} ended with status {code}: {log}")
        print(f"fold {self.fold}, seed {self.seed}: {self.row()['gain']:+.3f}", file=sys.stderr)

    def row(self) -> dict[str, Any]:
        """What it says. Raises ConfigError for a run of other settings."""
        if load_recipe(self.output / "recipe.yaml") != load_recipe(RECIPE, self.overrides):
            raise ConfigError(f"{self.output} holds a run of another recipe: choose --output anew")
        found = json.loads(self.summary.read_text())
        before, after = found["reward_before"], found["reward_after"]
        return {
            "fold": self.fold,
            "seed": self.seed,
            "before": before,
            "after": after,
            "gain": round(after - before, 4),
            "held_out_before": found["held_out_before"]["reward"],
            "held_out_after": found["held_out_after"]["reward"],
            "seconds": round(found["seconds"]),
        }


def result_of(runs: Sequence[Run]) -> dict[str, Any]:
    """A row per finished run, their means, and the interval of the gain.

    Raises ConfigError if none has ended.
    """
    rows = [run.row() for run in runs if run.summary.is_file()]
    if not rows:
        raise ConfigError(f"{runs[0].folder} holds no finished runs to aggregate")
    recipe = load_recipe(RECIPE, runs[0].overrides)
    scores = ("before", "after", "gain", "held_out_before", "held_out_after")
    return {
        "bench": "folds",
        "recipe": RECIPE,
        "settings": list(runs[0].settings),
        "pictures": recipe.evaluation.num_prompts,
        **environment(),
        "rows": rows,
        "mean": {key: round(statistics.fmean(row[key] for row in rows), 4) for key in scores},
        "gain_interval95": interval95([row["gain"] for row in rows]),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the threads")
    parser.add_argument("--output", type=Path, default=Path("runs/folds"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
                        help="keys of the demo's recipe, for all runs")  # fmt: skip
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="make only the runs that are missing")
    how.add_argument("--aggregate", action="store_true", help="make none, report those there are")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, metavar="FOLDER",
                        help="store folds.json there")  # fmt: skip
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; allowed: 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run and report; the last line of stdout is one JSON object."""
    args = parse(argv)
    pairs = product(dict.fromkeys(args.seeds), range(NUM_FOLDS))
    runs = [Run(fold, seed, args.output, tuple(args.settings)) for seed, fold in pairs]
    try:
        for run in runs:
            load_recipe(RECIPE, run.overrides)
        done = [run for run in runs if run.output.exists()]
        if done and not (args.resume or args.aggregate):
            raise ConfigError(
                f"{args.output} holds runs of an earlier bench: pass --resume to go on from them, "
                "or choose another --output"
            )
        if not args.aggregate:
            args.output.mkdir(parents=True, exist_ok=True)
            threads = max(1, torch.get_num_threads() // args.jobs)
            pool = ThreadPoolExecutor(args.jobs)
            try:
                missing = [run for run in runs if not run.summary.is_file()]
                list(pool.map(lambda run: run.make(threads), missing))
            finally:
                pool.shutdown(cancel_futures=True)
        result = result_of(runs)
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from {args.output}", file=sys.stderr)
        return 130
    except TdmError as error:
        return report(error, "folds", details=False)
    for row in result["rows"]:
        print(f"fold {row['fold']} seed {row['seed']}  {row['before']:.3f} -> {row['after']:.3f}")
    print_result(result, None if args.write is None else args.write / "folds.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
