"""A run's log as curves: output/metrics.jsonl -> output/curves.png."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

Records = list[dict[str, Any]]


def read_metrics(output: Path) -> tuple[Records, Records]:
    """(iterations, evaluations) of the run that metrics.jsonl tells of last.

    A line replaces what an earlier attempt wrote of that moment and of later ones: a resumed run
    repeats the iterations after its checkpoint, and a new run in an old folder starts anew.
    """
    steps: Records = []
    evaluations: Records = []
    for line in (output / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        now, evaluated = record["iteration"], "evaluation" in record
        for records, end in ((steps, now + evaluated), (evaluations, now)):
            while records and records[-1]["iteration"] >= end:
                records.pop()
        (evaluations if evaluated else steps).append(record)
    return steps, evaluations


def write_curves(output: Path) -> None:
    """Write curves.png from metrics.jsonl; where matplotlib is missing, say so and write nothing.

    Up to five plots, as far as the log has them: training reward with the evaluations and their
    95 % intervals, the surrogate's margin, the losses, the panel's statistics relative to their
    first value, where the time went.
    """
    try:
        import matplotlib
    except ImportError:
        log.warning("no curves.png without matplotlib: pip install 'tdm-r1[train]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, evaluations = read_metrics(output)
    names = {name for record in steps for name in record}
    plots = [lambda axis: _rewards(axis, steps, evaluations)]
    if "surrogate_margin" in names:
        plots.append(lambda axis: _margin(axis, steps))
    if losses := sorted(name for name in names if name.endswith("_loss")):
        plots.append(lambda axis: _losses(axis, steps, losses))
    if len(evaluations) > 1:
        plots.append(lambda axis: _panel(axis, evaluations))
    if steps:
        plots.append(lambda axis: _seconds(axis, steps, names))
    columns = min(3, len(plots))
    rows = -(-len(plots) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    for axis, plot in zip(axes.flat, plots, strict=False):
        plot(axis)
        axis.set_xlabel("iteration")
    for empty in axes.flat[len(plots) :]:
        empty.set_visible(False)
    figure.savefig(output / "curves.png", dpi=110)
    plt.close(figure)


def _rewards(axis: Any, steps: Records, evaluations: Records) -> None:
    at, values = _series(steps, "reward")
    if len(at):
        axis.plot(at, values, color="0.8", label="training reward")
        axis.plot(at, _smooth(values), color="C0", label="smoothed")
    results = [record["evaluation"] for record in evaluations]
    at = np.array([record["iteration"] for record in evaluations])
    if results:
        means = np.array([result["reward"] for result in results])
        low, high = np.array([result["interval"] for result in results]).T
        axis.errorbar(at, means, [means - low, high - means], fmt="o-", color="C3", capsize=3,
                      label="evaluation, 95 %")  # fmt: skip
        axis.legend(fontsize=8)
        other = [result["panel"].get("held_out_reward", np.nan) for result in results]
        if np.isfinite(other).any():
            right = axis.twinx()  # another reward has another scale
            right.plot(at, other, "s--", color="C2")
            right.set_ylabel("held-out reward", color="C2")
            low, high = right.get_ylim()  # but no finer one: a small change shall look small
            spare = max(0.0, np.ptp(axis.get_ylim()) - (high - low)) / 2
            right.set_ylim(low - spare, high + spare)
    axis.set_ylabel("reward")


def _margin(axis: Any, steps: Records) -> None:
    at, values = _series(steps, "surrogate_margin")
    axis.plot(at, _smooth(values))
    axis.set_ylabel("surrogate margin R(G+) - R(G-)")


def _losses(axis: Any, steps: Records, names: list[str]) -> None:
    for name in names:
        at, values = _series(steps, name)
        axis.plot(at, _smooth(values), label=name.removesuffix("_loss"))
    axis.set_ylabel("loss, smoothed")
    axis.legend(fontsize=8)


def _panel(axis: Any, evaluations: Records) -> None:
    first = evaluations[0]["evaluation"]["panel"]
    for name, start in first.items():
        values = [record["evaluation"]["panel"].get(name, np.nan) for record in evaluations]
        at = [record["iteration"] for record in evaluations]
        if start and name != "held_out_reward":  # that may be negative, and is plotted by itself
            axis.plot(at, np.array(values) / start, "o-", label=name.replace("_", " "))
    axis.axhline(1, color="0.8", zorder=0)
    axis.set_ylabel("picture statistics / their first value")
    axis.legend(fontsize=8)


def _seconds(axis: Any, steps: Records, names: set[str]) -> None:
    at, total = _series(steps, "seconds")
    phases = sorted(name for name in names if name.startswith("seconds_"))
    rows = [np.array([record.get(name, 0.0) for record in steps]) for name in phases]
    rest = np.clip(total - sum(rows, np.zeros(len(total))), 0, None)
    labels = [*(name.removeprefix("seconds_") for name in phases), "rest"]
    axis.stackplot(at, *rows, rest, labels=labels)
    axis.set_ylabel("seconds per iteration")
    axis.legend(fontsize=8)


def _series(steps: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Where a number was logged, and what it was: a skipped step has none."""
    found = [(record["iteration"], record[name]) for record in steps if name in record]
    return np.array([at for at, _ in found]), np.array([value for _, value in found])


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving average, narrower at the ends and where there is little to average."""
    half = min(width // 2, len(values) // 8)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
