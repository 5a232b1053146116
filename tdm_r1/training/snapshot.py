"""What a checkpoint of a run holds, and a trainer made to go on from one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tdm_r1.errors import LoadError
from tdm_r1.training import checkpoint, distributed, identity
from tdm_r1.training.roles import Role

if TYPE_CHECKING:
    from tdm_r1.training.trainer import Trainer

log = logging.getLogger(__name__)


def take(trainer: Trainer) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """(tensors, state) for `save_checkpoint`: roles, copies, optimizers, position, evaluations.

    Every rank calls it, to gather what ZeRO has cut; only rank 0 gets the tensors.
    Noise and steps are pure functions of seed, iteration and group, so that no generator is stored.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {
        name: distributed.whole(role.tensors())
        for name, role in trainer.roles.items()
        if name != "base"
    }
    state: dict[str, Any] = {
        "iteration": trainer.iteration,
        "recipe": identity.values(trainer.recipe),
        "skipped": trainer.skipped,
        "history": trainer.history.state(),
        "method": trainer.method.state() if hasattr(trainer.method, "state") else {},
    }
    for name, engine in trainer.engines.items():
        key = f"optimizer-{name}"
        tensors[key], state[key] = distributed.optimizer_state(engine)
    return tensors, state


def restore(trainer: Trainer, path: Path) -> None:
    """Bring a new trainer to where the checkpoint was written; every rank calls it.

    Raises LoadError for a damaged checkpoint and for one of another run.
    """
    tensors, state = checkpoint.load_checkpoint(path)
    identity.check_checkpoint(trainer.recipe, state.get("recipe"), path)
    for name, role in trainer.roles.items():
        if name != "base":
            load_role(role, tensors.get(name, {}), path)
    for name, engine in trainer.engines.items():
        key = f"optimizer-{name}"
        if key not in tensors:
            raise LoadError(f"{path} holds no optimizer of {name}")
        try:
            distributed.load_optimizer_state(engine, tensors[key], state[key])
        except ValueError as error:
            raise LoadError(f"{path}: {name}: {error}") from error
    trainer.iteration, trainer.skipped = state["iteration"], state["skipped"]
    trainer.history.load_state(state["history"])
    if state["method"]:
        trainer.method.load_state(state["method"])
    log.info("resumed %s at iteration %d", path, trainer.iteration)


@torch.no_grad()
def load_role(role: Role, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy a checkpoint's tensors into a role. Raises LoadError if they are not the role's."""
    own = role.tensors()
    if set(own) != set(tensors):
        raise LoadError(f"{path}: role {role.name} does not match this recipe's roles")
    for name, tensor in own.items():
        shape, wanted = list(tensors[name].shape), list(getattr(tensor, "ds_shape", tensor.shape))
        if shape != wanted:
            raise LoadError(f"{path}: {role.name}.{name} is {shape}, not {wanted}")
        distributed.held(tensor).copy_(distributed.share(tensor, tensors[name]))
