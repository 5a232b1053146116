"""What each part of TDM-R1 is worth on `tiny-sd3`: variants, seeds, one plot, one table.

    python -m bench.ablation [--iterations 48] [--prompts 16] [--seeds 0 1 2] [--variants ...]
                             [--jobs 1] [--output runs/ablation] [--resume | --aggregate] [--write]

Every variant of `bench/ablation_variants.py` starts from the same weights, draws as many pictures
in as many iterations of the demo's recipe, whose cosines end at 0 with the last, and is scored
once, on the recipe's held-out captions and noise: the strict reward of the families that it
trains on and of those that it does not. Each (variant, seed) is a process of its own and leaves one
JSON file in --output when it ends: --resume makes only the runs that have none, --aggregate makes
none. The plot goes to --output; --write puts it and the result into a folder, by default
bench/results.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/ablation.py`, too

from bench.ablation_variants import RECIPE, VARIANTS
from bench.runs import logged, run_all
from bench.timing import report as print_result
from tdm_r1.config import load_recipe
from tdm_r1.errors import ConfigError, TdmError, report

RESULTS = Path(__file__).parent / "results"
SCORES = {"trained": "families trained on", "held_out": "families not trained on"}


class Run(NamedTuple):
    """One process: a variant with a seed, or "before", the evaluation that all start from."""

    variant: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.variant if self.variant == "before" else f"{self.variant}-{self.seed}"

    @property
    def file(self) -> Path:
        """Its result, which exists once it has ended well."""
        return self.folder / f"{self.name}.json"

    @property
    def work(self) -> Path:
        """Its own files while it runs."""
        return self.folder / "work" / self.name

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def progress(self) -> int:
        """How many iterations it has logged so far, those of a surrogate trained first included."""
        return sum(map(logged, self.work.glob("*/metrics.jsonl")))

    def tidy(self) -> None:
        """Keep the result alone."""
        shutil.rmtree(self.work, ignore_errors=True)


def length(run: Run, iterations: int) -> int:
    """How many iterations a run makes, of a bench whose variants train for so many."""
    if run.variant == "before":
        return 0
    return iterations * (1 + VARIANTS[run.variant].pretrained)


def command(run: Run, settings: Sequence[str]) -> list[str]:
    """What makes a run."""
    before = Run("before", 0, run.folder).file
    own = ["--seed", str(run.seed), "--before", str(before)] if run.variant != "before" else []
    keys = [part for setting in settings for part in ("--set", setting)]
    places = ["--output", str(run.file), "--work", str(run.work)]
    file = str(Path(__file__).with_name("ablation_variants.py"))
    return [sys.executable, file, run.variant, *own, *places, *keys]


def load(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The results of those runs that have ended. Raises ConfigError if their settings differ."""
    found = [json.loads(run.file.read_text()) for run in runs if run.file.is_file()]
    for result in found[1:]:
        check_settings(result, found[0]["settings"], runs[0].folder)
    return found


def check_settings(result: dict[str, Any], settings: list[str], folder: Path) -> None:
    """Raise ConfigError unless a result was made with these settings."""
    if result["settings"] != settings:
        raise ConfigError(
            f"{folder} holds runs of other settings, {' '.join(result['settings'])}, than "
            f"{' '.join(settings)}: choose another --output"
        )


def interval95(values: Sequence[float]) -> list[float] | None:
    """mean -+ t s / sqrt(n): s the sample's deviation, t Student's with n - 1 degrees of freedom.

    None for a single value.
    """
    if len(values) < 2:
        return None
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return [round(mean - half, 4), round(mean + half, 4)]


def aggregate(before: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per variant, in the order of VARIANTS: after - before per seed, mean and interval.

    `before`: `Evaluator.run` on the common start; `runs`: what `ablation_variants` writes.
    """
    start = {"trained": before["reward"], "held_out": before["held_out"]["reward"]}
    rows = []
    for name, variant in VARIANTS.items():
        mine = sorted((r for r in runs if r["variant"] == name), key=lambda r: r["seed"])
        if not mine:
            continue
        row: dict[str, Any] = {"variant": name, "label": variant.label}
        row["seeds"] = [run["seed"] for run in mine]
        ends = {
            "trained": [run["after"]["reward"] for run in mine],
            "held_out": [run["after"]["held_out"]["reward"] for run in mine],
        }
        for key, values in ends.items():
            gains = [value - start[key] for value in values]
            row[key] = {
                "after": round(statistics.fmean(values), 4),
                "gain": round(statistics.fmean(gains), 4),
                "interval": interval95(gains),
                "per_seed": [round(gain, 4) for gain in gains],
            }
        row["rewards"] = [run["rewards"] for run in mine]
        row["skipped"] = sum(run["skipped"] for run in mine)
        for key in ("seconds", "cpu_seconds"):
            row[key] = round(statistics.fmean(run[key] for run in mine), 1)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    heads = [
        "variant",
        *(f"gain, {what} (per seed)" for what in SCORES.values()),
        "seconds a run (of CPU)",
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = []
        for key in SCORES:
            gain, ends = row[key]["gain"], row[key]["interval"]
            interval = f" [{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else ""
            seeds = ", ".join(f"{value:+.3f}" for value in row[key]["per_seed"])
            cells.append(f"{gain:+.3f}{interval} ({seeds})")
        lines.append([row["label"], *cells, f"{row['seconds']:.0f} ({row['cpu_seconds']:.0f})"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Sequence[dict[str, Any]], before: dict[str, Any], file: Path) -> None:
    """PNG: a panel per score, a line per variant with its seeds, their mean and its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    start = {"trained": before["reward"], "held_out": before["held_out"]["reward"]}
    gains = [0.0, *(gain for row in rows for key in SCORES for gain in row[key]["per_seed"])]
    margin = 0.2 * (max(gains) - min(gains)) or 0.1
    figure, axes = plt.subplots(
        1, 2, figsize=(9.5, 1.2 + 0.46 * len(rows)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (key, what) in zip(axes, SCORES.items(), strict=True):
        axis.axvline(0, color="0.8", linewidth=1, zorder=0)
        for y, row in enumerate(rows):
            score, colour = row[key], "C3" if row["variant"] == "tdm-r1" else "0.25"
            axis.plot(score["per_seed"], [y + 0.14] * len(row["seeds"]), "o", color=colour,
                      markersize=4, alpha=0.45, markeredgewidth=0)  # fmt: skip
            axis.plot(score["gain"], y - 0.14, "D", color=colour, markersize=5)
            if score["interval"]:
                axis.plot(score["interval"], [y - 0.14] * 2, color=colour, linewidth=1.2)
        axis.set_title(f"{what}: {start[key]:.2f} before", fontsize=10)
        axis.set_xlabel("change of the strict reward", fontsize=9)
        axis.set_xlim(min(gains) - margin, max(gains) + margin)  # bars of two seeds go beyond
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.supxlabel("dots: seeds; diamond and bar: their mean and its 95 % interval", fontsize=8)
    axes[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def result_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the finished ones among `runs`, the first of them "before", say together.

    Raises ConfigError if "before" or all the others are missing.
    """
    found = load(runs)
    if not found or found[0]["variant"] != "before" or len(found) < 2:
        raise ConfigError(f"{runs[0].folder} holds no finished runs to aggregate")
    first, others = found[0], found[1:]
    recipe = load_recipe(RECIPE, first["settings"])
    return {
        "bench": "ablation",
        "recipe": RECIPE,
        "settings": first["settings"],
        "iterations": recipe.iterations,
        "prompts": recipe.rollout.num_prompts,
        "group_size": recipe.rollout.group_size,
        "pictures": [first["before"]["num_prompts"], first["before"]["held_out"]["num_prompts"]],
        **others[0]["environment"],
        "before": first["before"],
        "rows": aggregate(first["before"], others),
    }


def prepare(args: argparse.Namespace) -> list[Run]:
    """All runs asked for, each once, "before" first, seed by seed.

    Raises ConfigError for keys and seeds that no recipe takes, and for an unfit folder.
    """
    for seed in args.seeds:
        load_recipe(RECIPE, [*args.settings, f"seed={seed}"])
    pairs = [("before", 0), *((name, seed) for seed in args.seeds for name in args.variants)]
    runs = [Run(name, seed, args.output) for name, seed in dict.fromkeys(pairs)]
    if args.aggregate:
        return runs
    done = [run for run in runs if run.file.is_file()]
    if done and not args.resume:
        raise ConfigError(
            f"{args.output} holds {len(done)} runs of an earlier bench: pass --resume to go on "
            "from them, or choose another --output"
        )
    for run in done:
        check_settings(json.loads(run.file.read_text()), args.settings, args.output)
    return runs


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `settings` are the recipe's keys that all runs share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=16, help="per iteration, by 12 samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the threads")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="further keys of the recipe, for all variants")  # fmt: skip
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="make only the runs that are missing")
    how.add_argument("--aggregate", action="store_true", help="make none, report those there are")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, metavar="FOLDER",
                        help="store ablation.json and ablation.png there")  # fmt: skip
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; allowed: 1 or more")
    sizes = [f"iterations={args.iterations}", f"rollout.num_prompts={args.prompts}"]
    args.settings = [*sizes, *args.overrides]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run and report; the last line of stdout is one JSON object."""
    args = parse(argv)
    try:
        runs = prepare(args)
        missing = [] if args.aggregate else [run for run in runs if not run.file.is_file()]
        threads = max(1, torch.get_num_threads() // args.jobs)
        for part in (missing[:1], missing[1:]) if missing[:1] == runs[:1] else (missing,):
            run_all(
                part,
                lambda run: command(run, args.settings),
                lambda run: length(run, args.iterations),
                jobs=args.jobs,
                threads=threads,
            )
        result = result_of(runs)
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from {args.output}", file=sys.stderr)
        return 130
    except TdmError as error:
        return report(error, "ablation", details=False)
    plot = args.output / "ablation.png"
    draw(result["rows"], result["before"], plot)
    if args.write is not None:
        args.write.mkdir(parents=True, exist_ok=True)
        shutil.copy(plot, args.write / plot.name)
    print(table(result["rows"]))
    print_result(result, None if args.write is None else args.write / "ablation.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
