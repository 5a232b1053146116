"""The evaluations of a run so far: which was best, and whether the reward is being gamed."""

from __future__ import annotations

from typing import Any

from tdm_r1.training.panel import fell


class History:
    """Results of `Evaluator.run` in the order of their iterations, and the training reward between.

    Every rank keeps one, so that all decide alike; a checkpoint stores it.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._rewards = [0.0, 0]  # sum and number since the last evaluation

    def reward(self, value: float) -> None:
        """The training reward of one iteration."""
        self._rewards = [self._rewards[0] + value, self._rewards[1] + 1]

    def add(self, iteration: int, result: dict[str, Any]) -> None:
        """An evaluation after `iteration` iterations."""
        total, number = self._rewards
        self._rewards = [0.0, 0]
        mean = total / number if number else None
        self.entries.append({"iteration": iteration, "training_reward": mean, "result": result})

    def seen(self, iteration: int) -> bool:
        """Whether that iteration was evaluated."""
        return any(entry["iteration"] == iteration for entry in self.entries)

    def result(self, iteration: int | None = None) -> dict[str, Any]:
        """The evaluation of an iteration, by default the last one; {} where there is none."""
        for entry in reversed(self.entries):
            if iteration in (None, entry["iteration"]):
                return entry["result"]
        return {}

    @property
    def best(self) -> int | None:
        """The trained iteration of the highest `score`, the earliest of equals; None before one.

        Of the entries that can be compared with the latest one.
        """
        trained = [entry for entry in self._comparable() if entry["iteration"]]
        if not trained:
            return None
        return max(trained, key=lambda entry: score(entry["result"]))["iteration"]

    def alarm(self, times: int) -> str | None:
        """Why the run should end, or None.

        It should when at each of the last `times` > 0 evaluations the mean training reward since
        the one before had risen and the panel had fallen (`panel.fell`). One evaluation that says
        otherwise starts the count anew. Panels of other members than the latest do not count.
        """
        entries = self._comparable()
        rewarded = [entry for entry in entries if entry["training_reward"] is not None]
        if not times or len(rewarded) <= times:
            return None
        start = entries[0]["result"]["panel"]
        tail = rewarded[-times - 1 :]
        for before, now in zip(tail, tail[1:], strict=False):
            rose = now["training_reward"] > before["training_reward"]
            if not (rose and fell(before["result"]["panel"], now["result"]["panel"], start)):
                return None
        first, last = tail[0], tail[-1]
        changes = ", ".join(
            f"{name} {first['result']['panel'][name]:.3f} -> {value:.3f}"
            for name, value in last["result"]["panel"].items()
        )
        return (
            f"the training reward rose ({first['training_reward']:.3f} -> "
            f"{last['training_reward']:.3f}) while the held-out panel fell at {times} evaluations "
            f"in a row ({changes})"
        )

    def _comparable(self) -> list[dict[str, Any]]:
        """The entries whose panel has the latest one's members: a resumed run may have others."""
        members = self.result().get("panel", {}).keys()
        return [entry for entry in self.entries if entry["result"]["panel"].keys() == members]

    def state(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return {"entries": self.entries, "rewards": self._rewards}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        self.entries, self._rewards = list(state["entries"]), list(state["rewards"])


def score(result: dict[str, Any]) -> float:
    """What a checkpoint is ranked by: the held-out reward, or the evaluation's own without one."""
    return result["panel"].get("held_out_reward", result["reward"])
