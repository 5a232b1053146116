"""What a run says: a bar on stderr, one JSON object a line in metrics.jsonl, pages and curves.

Every line goes to the trackers of `report_to` too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tdm_r1.config import Recipe
from tdm_r1.training import identity, pages
from tdm_r1.training.curves import write_curves
from tdm_r1.training.evaluate import Sample
from tdm_r1.training.report import Report

_SHOWN = ("reward", "sft_loss", "fake_loss", "surrogate_margin")


class Progress:
    """Rank 0's bar and log; does nothing where `enabled` is false."""

    def __init__(self, recipe: Recipe, start: int, *, resumed: bool, enabled: bool) -> None:
        """`start`: how many iterations are done already."""
        self.enabled, self.output = enabled, Path(recipe.output)
        self.bar = tqdm(
            total=recipe.iterations, initial=start, disable=not enabled, dynamic_ncols=True
        )
        if not enabled:
            return
        if not resumed:
            pages.forget(self.output)
        self.file = _open_log(self.output / "metrics.jsonl")
        settings = identity.values(recipe)
        self.report = Report(recipe.report_to, self.output, settings, start, resumed=resumed)

    def update(self, iteration: int, metrics: dict[str, Any]) -> None:
        """One finished iteration."""
        self.bar.set_postfix_str(postfix(metrics), refresh=False)
        self.bar.update(1)
        if self.enabled:
            self._write({"iteration": iteration, **metrics})
            self.report.log(iteration, metrics, "train")

    def evaluation(self, iteration: int, result: dict[str, Any], sample: Sample) -> None:
        """A finished evaluation."""
        if not self.enabled:
            return
        self._write({"iteration": iteration, "evaluation": result})
        tqdm.write(table(iteration, result), file=sys.stderr)
        self.report.log(iteration, result, "evaluation")
        self.report.picture(iteration, pages.write_sample(self.output, iteration, sample))
        if iteration:
            write_curves(self.output)

    def close(self) -> None:
        """End the bar and the files."""
        self.bar.close()
        if self.enabled:
            self.file.close()
            self.report.close()

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def postfix(metrics: dict[str, Any]) -> str:
    """What the bar shows of an iteration: its main numbers, and each phase's share of its time."""
    if "skipped" in metrics:
        return f"skipped: {metrics['skipped']}"
    parts = [f"{name}={metrics[name]:.3f}" for name in _SHOWN if name in metrics]
    phases = {name: value for name, value in metrics.items() if name.startswith("seconds_")}
    whole = max(metrics["seconds"], 1e-9)
    parts += [
        f"{name.removeprefix('seconds_')} {value / whole:.0%}" for name, value in phases.items()
    ]
    if phases:
        parts.append(f"rest {1 - sum(phases.values()) / whole:.0%}")
    return ", ".join(parts)


def table(iteration: int, result: dict[str, Any]) -> str:
    """An evaluation as lines of text: the reward, every family, the panel."""

    def line(name: str, value: float, interval: list[float] | None = None) -> str:
        ends = f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        return f"  {name:<20}{value:8.3f}{ends}"

    lines = [f"evaluation after {iteration} iterations, {result['num_prompts']} pictures"]
    lines.append(line("reward", result["reward"], result["interval"]))
    for family, value in result["families"].items():
        lines.append(line(f"  {family}", value, result["family_intervals"][family]))
    if "held_out" in result:
        lines.append(line("other families", result["held_out"]["reward"],
                          result["held_out"]["interval"]))  # fmt: skip
    lines += [line(name.replace("_", " "), value) for name, value in result["panel"].items()]
    return "\n".join(lines)


def _open_log(file: Path):
    """Open for appending, without the half line that a killed run may have left."""
    if file.is_file():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return file.open("a")
