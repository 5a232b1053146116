"""What does the demo gain on captions that its run has not trained on, whichever those are?

    python -m bench.folds [--seeds 0] [--jobs 1] [--output runs/folds] [--resume | --aggregate]
                          [--write]

The demo holds a quarter of its captions out, here each quarter is held out in turn: four-fold
cross-validation, for every seed. A run is `python -m tdm_r1 demo` with `prompts.split=train/K` and
`evaluation.split=test/K`, in a folder of its own in --output: --resume makes only the runs that
have not ended, --aggregate makes none. --write puts the result into a folder, by default
bench/results. The model itself was trained on all captions, its reinforcement on those of `train`.

The interval is Student's over the means of the quarters, three degrees of freedom where there are
all: approximate, for two runs share two thirds of what they train on, and all share their noise.
The recipe was chosen on quarter 0; `others` is the mean gain without it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/folds.py`, too

from bench.ablation import RESULTS, interval95
from bench.runs import logged, run_all
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
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"fold{self.fold}-seed{self.seed}"

    @property
    def work(self) -> Path:
        """The demo's output."""
        return self.folder / self.name

    @property
    def file(self) -> Path:
        """What the demo writes when it has ended well."""
        return self.work / "summary.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def overrides(self) -> list[str]:
        """What differs from the recipe."""
        splits = [f"prompts.split=train/{self.fold}", f"evaluation.split=test/{self.fold}"]
        return [*self.settings, *splits, f"seed={self.seed}", f"output={self.work}"]

    def progress(self) -> int:
        """How many iterations it has logged so far."""
        return logged(self.work / "metrics.jsonl")

    def tidy(self) -> None:
        """Keep the result and the pages, no weights."""
        for folder in (*self.work.glob("checkpoint-*"), self.work / "model"):
            shutil.rmtree(folder, ignore_errors=True)

    def row(self) -> dict[str, Any]:
        """What it says. Raises ConfigError for a run of another recipe and a damaged file."""
        made, asked = load_recipe(self.work / "recipe.yaml"), load_recipe(RECIPE, self.overrides)
        if replace(made, output="") != replace(asked, output=""):
            raise ConfigError(f"{self.work} holds a run of another recipe: choose another --output")
        try:
            found = json.loads(self.file.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.file} is damaged ({error}): remove it to run anew") from error
        before, after = found["reward_before"], found["reward_after"]
        others = [found[f"held_out_{when}"] for when in ("before", "after")]
        return {
            "fold": self.fold,
            "seed": self.seed,
            "before": before,
            "after": after,
            "gain": round(after - before, 4),
            **(
                {"held_out_before": others[0]["reward"], "held_out_after": others[1]["reward"]}
                if all(others)
                else {}
            ),
            "seconds": round(found["seconds"]),
        }


def command(run: Run) -> list[str]:
    """What makes a run."""
    keys = [part for override in run.overrides for part in ("--set", override)]
    return [sys.executable, "-m", "tdm_r1", "demo", *keys]


def result_of(runs: Sequence[Run]) -> dict[str, Any]:
    """A row per finished run, the means over quarters, and the interval of the gain.

    Raises ConfigError if none has ended.
    """
    rows = [run.row() for run in runs if run.file.is_file()]
    if not rows:
        raise ConfigError(f"{runs[0].folder} holds no finished runs to aggregate")
    folds = sorted({row["fold"] for row in rows})

    def mean(key: str, fold: int) -> float:
        return statistics.fmean(row[key] for row in rows if row["fold"] == fold)

    scores = [key for key in rows[0] if key not in ("fold", "seed", "seconds")]
    gains = {fold: mean("gain", fold) for fold in folds}
    others = [gain for fold, gain in gains.items() if fold]
    return {
        "bench": "folds",
        "recipe": RECIPE,
        "settings": list(runs[0].settings),
        "pictures": load_recipe(RECIPE, runs[0].overrides).evaluation.num_prompts,
        **environment(),
        "rows": rows,
        "missing": [run.name for run in runs if not run.file.is_file()],
        "mean": {key: round(statistics.fmean(mean(key, k) for k in folds), 4) for key in scores},
        "gain_interval95": interval95(list(gains.values())),
        "others": round(statistics.fmean(others), 4) if others else None,
    }


def prepare(args: argparse.Namespace) -> list[Run]:
    """All runs asked for. Raises ConfigError for settings no recipe takes and an unfit folder."""
    pairs = product(dict.fromkeys(args.seeds), range(NUM_FOLDS))
    runs = [Run(fold, seed, args.output, tuple(args.settings)) for seed, fold in pairs]
    for run in runs:
        load_recipe(RECIPE, run.overrides)
    if any(run.work.exists() for run in runs) and not (args.resume or args.aggregate):
        raise ConfigError(
            f"{args.output} holds runs of an earlier bench: pass --resume to go on from them, "
            "or choose another --output"
        )
    for run in runs:
        if run.file.is_file():
            run.row()
    return runs


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
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
    try:
        runs = prepare(args)
        missing = [] if args.aggregate else [run for run in runs if not run.file.is_file()]
        iterations = load_recipe(RECIPE, runs[0].overrides).iterations
        threads = max(1, torch.get_num_threads() // args.jobs)
        if missing:
            run_all(missing, command, lambda _: iterations, jobs=args.jobs, threads=threads)
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
