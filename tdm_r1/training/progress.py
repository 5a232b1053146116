"""What a run says: a progress bar on stderr, one JSON object per line in metrics.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

_SHOWN = ("reward", "sft_loss", "fake_loss", "surrogate_margin")


class Progress:
    """Rank 0's bar and log; does nothing where `enabled` is false."""

    def __init__(self, output: Path, total: int, start: int, *, enabled: bool) -> None:
        self.enabled = enabled
        self.bar = tqdm(total=total, initial=start, disable=not enabled, dynamic_ncols=True)
        self.file = (output / "metrics.jsonl").open("a") if enabled else None

    def update(self, iteration: int, metrics: dict[str, float]) -> None:
        """One finished iteration."""
        self._write({"iteration": iteration, **metrics})
        shown = {name: f"{metrics[name]:.3f}" for name in _SHOWN if name in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    def evaluation(self, iteration: int, result: dict[str, Any]) -> None:
        """A finished evaluation."""
        self._write({"iteration": iteration, "evaluation": result})
        if self.enabled:
            low, high = result["interval"]
            families = " ".join(f"{name} {value:.2f}" for name, value in result["families"].items())
            tqdm.write(
                f"[{iteration}] reward {result['reward']:.3f} [{low:.3f}, {high:.3f}]  {families}",
                file=sys.stderr,
            )

    def close(self) -> None:
        """End the bar and the file."""
        self.bar.close()
        if self.file:
            self.file.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
