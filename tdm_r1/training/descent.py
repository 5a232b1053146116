"""Backward passes and optimizer steps of an iteration: all of its roles step, or none does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdm_r1.errors import NotFinite
from tdm_r1.training import distributed


class Descent:
    """Gradients of several roles, and the steps that they earn if every number is finite.

    `backward` hands a loss to its role's engine; at the end of the accumulation the engine does not
    step yet. `step` then lets every role that is due step, unless a loss or a gradient of any of
    them is NaN or infinite on any rank: then all their gradients are dropped and parameters,
    moments and step counts stay bit for bit as they were.
    """

    def __init__(self, engines: dict[str, Any]) -> None:
        self.engines = engines
        self.stepped: list[str] = []  # by the last `step`
        self._due: list[str] = []
        self._losses: dict[str, list[Tensor]] = {}

    def backward(self, name: str, loss: Tensor) -> None:
        """One micro-step of the role `name`; its losses are averaged over the accumulation."""
        engine = self.engines[name]
        self._losses.setdefault(name, []).append(loss.detach())
        engine.backward(loss)
        if engine.is_gradient_accumulation_boundary():
            self._due.append(name)
        else:
            engine.step()

    def step(self) -> None:
        """Step every role that is due.

        Raises NotFinite on every rank, naming the roles, when one rank met a number that is not
        finite; every due role's gradients are gone then.
        """
        due, losses = self._due, self._losses
        self._due, self._losses = [], {}
        faults = [fault for name in due for fault in self._faults(name, losses[name])]
        found = sorted({fault for rank in distributed.gather(faults) for fault in rank})
        for name in due:
            if found:
                distributed.drop_gradients(self.engines[name])
            else:
                self.engines[name].step()
        self.stepped = [] if found else due
        if found:
            raise NotFinite(f"not finite: {', '.join(found)}")

    def _faults(self, name: str, losses: list[Tensor]) -> list[str]:
        faults = []
        if not torch.stack(losses).isfinite().all():
            faults.append(f"loss of {name}")
        if not distributed.finite_gradients(self.engines[name]):
            faults.append(f"gradient of {name}")
        return faults
