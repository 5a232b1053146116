"""The one file that knows DeepSpeed: process group, and a role's optimizer behind an engine."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tdm_r1.config import Optimizer
from tdm_r1.training import optimizer as optimizers


def init() -> None:
    """Join the process group of the `deepspeed` launcher; alone, make one of a single rank."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # Rank 0 evaluates alone while the others wait: the default of ten minutes is too short.
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(hours=4))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def rank() -> int:
    """This process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def close() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(
    role: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    config: Optimizer,
    *,
    accumulation: int,
    zero_stage: int,
):
    """A DeepSpeed engine that owns the gradients, the clip and the optimizer of one role.

    Only `parameters` are trained and synchronised; `accumulation` backward passes make one step,
    and their losses are averaged. The forward runs in the role's own precision (autocast inside).
    The clip is that of `parameters` alone, once per step; `grad_norm` tells the norm before it.
    """
    import deepspeed

    optimizer = optimizers.build(parameters, config)
    if not zero_stage:  # DeepSpeed would clip too, and forget the norm
        optimizer.register_step_pre_hook(_Clip(list(parameters.values()), config.clip))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(
        model=role,
        model_parameters=list(parameters.values()),
        optimizer=optimizer,
        config=settings,
    )
    return engine


class _Clip:
    """Scales gradients to a norm of at most `limit` (0: any) before a step, and keeps the norm."""

    def __init__(self, parameters: list[nn.Parameter], limit: float) -> None:
        self.parameters, self.limit = parameters, limit or math.inf

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.limit)
        optimizer.grad_norm = norm  # type: ignore[attr-defined]


def grad_norm(engine) -> float:
    """The norm of a role's whole gradient in its last step, before the clip; on every rank."""
    norm = getattr(engine.optimizer, "grad_norm", None)
    return float(engine.get_global_grad_norm() if norm is None else norm)


def finite_gradients(engine) -> bool:
    """Whether this rank's share of the accumulated gradients is all finite; before `step`."""
    sharded = engine.optimizer
    if hasattr(sharded, "averaged_gradients"):  # any stage of ZeRO but 0
        kept = [share for group in sharded.averaged_gradients.values() for share in group or ()]
    else:
        kept = [parameter.grad for parameter in engine.module.parameters()]
    gradients = [gradient for gradient in kept if gradient is not None]
    flags = [gradient.isfinite().all() for gradient in gradients]
    return not flags or bool(torch.stack(flags).all())


def drop_gradients(engine) -> None:
    """End an accumulation without a step: as if its backward passes had not been made."""
    sharded = engine.optimizer
    if hasattr(sharded, "averaged_gradients"):  # as its own step does after an overflow
        sharded.zero_grad(set_to_none=True)
        sharded.micro_step_id = -1
        sharded.averaged_gradients.clear()
        getattr(sharded, "all_grad_tensors", {}).clear()
    else:
        engine.zero_grad()
    engine.micro_steps += 1


def optimizer_state(engine) -> tuple[dict[str, Tensor], list[int]]:
    """`optimizer.state_tensors` of an engine, the same for every ZeRO stage and number of ranks.

    Every rank has to call it: what ZeRO has cut into shares is put together again.
    """
    sharded = engine.optimizer
    if not _is_sharded(sharded):
        return optimizers.state_tensors(sharded)
    tensors: dict[str, Tensor] = {}
    steps: list[int] = []
    for group, parameters in enumerate(sharded.bit16_groups):
        share = sharded.single_partition_of_fp32_groups[group]
        state = sharded.optimizer.state.get(share, {})
        for parameter in parameters:
            for slot in sorted(set(state) - {"step"}):
                tensors[f"{len(steps):05d}.{slot}"] = parameter.get_full_hp_param(slot)
            steps.append(int(state.get("step", 0)))
    return tensors, steps


@torch.no_grad()
def load_optimizer_state(engine, tensors: Mapping[str, Tensor], steps: list[int]) -> None:
    """Inverse of `optimizer_state`, after the parameters have their values.

    Raises ValueError if the parameters are not as many.
    """
    sharded = engine.optimizer
    if not _is_sharded(sharded):
        return optimizers.load_state(sharded, tensors, steps)
    count = sum(map(len, sharded.bit16_groups))
    if count != len(steps):
        raise ValueError(f"the checkpoint's optimizer has {len(steps)} tensors, this one {count}")
    slots = sorted({name.split(".", 1)[1] for name in tensors})
    first = 0
    for group, parameters in enumerate(sharded.bit16_groups):
        share = sharded.single_partition_of_fp32_groups[group]
        if steps[first]:
            empty = {slot: torch.zeros_like(share) for slot in slots}
            sharded.optimizer.state[share] = {"step": torch.tensor(float(steps[first])), **empty}
        first += len(parameters)
    if any(steps):
        sharded._lazy_init_hp_params_optimizer_state()  # what its first step does: views of shares
    for index, parameter in enumerate(p for group in sharded.bit16_groups for p in group):
        parameter.set_full_hp_param(parameter)  # the fp32 copy that its step starts from
        for slot in slots if steps[index] else ():
            parameter.set_full_hp_param(tensors[f"{index:05d}.{slot}"], slot)


def _is_sharded(optimizer) -> bool:
    return hasattr(optimizer, "single_partition_of_fp32_groups")
