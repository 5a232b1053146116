"""The one file that knows DeepSpeed: process group, and a role's optimizer behind an engine."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import cpp_extension

from tdm_r1.config import Optimizer
from tdm_r1.training import optimizer as optimizers

log = logging.getLogger(__name__)

# What says to a process which group it is of: its children are of none.
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What ZeRO-3 does besides: keep nothing whole (small tensors by default), fetch nothing ahead, sum
# gradients without a standing buffer, leave torch.nn.functional.linear alone.
_ZERO3 = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "contiguous_gradients": False,
    "reduce_bucket_size": 250_000_000,
    "memory_efficient_linear": False,
}


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

    _spare_the_compiler(deepspeed)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # Rank 0 evaluates alone while the others wait: the default of ten minutes is too short.
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(hours=4))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def _spare_the_compiler(deepspeed: Any) -> None:
    """DeepSpeed compiles its shared-memory reductions where it runs: not for a process alone.

    Their lock outlives a process killed while it compiled, and later ones wait for it in silence.
    """
    op = "deepspeed_shm_comm"
    if os.environ["WORLD_SIZE"] == "1":
        deepspeed.ops.__compatible_ops__[op] = False
    elif (lock := Path(cpp_extension._get_build_directory(op, verbose=False), "lock")).exists():
        log.warning("waiting for %s: remove it if no other process compiles", lock)


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


def cut(module: nn.Module) -> None:
    """ZeRO-3: leave each rank its share of every parameter of `module`, as rank 0 has it."""
    import deepspeed

    deepspeed.zero.Init(module=module, mem_efficient_linear=False, dtype=torch.float32)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Whole parameters on every rank while inside, for reading; shares again afterwards.

    Every rank has to enter. Does nothing for parameters that are not cut, or are gathered already.
    """
    absent = [p for p in parameters if hasattr(p, "ds_tensor") and not p.numel()]
    if not absent:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(absent)


def held(parameter: Tensor) -> Tensor:
    """What this rank stores of a parameter: its flat share of a cut one, or all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def share(parameter: Tensor, value: Tensor) -> Tensor:
    """Of a whole tensor `value` in the parameter's shape, what `held(parameter)` is of that."""
    if not hasattr(parameter, "ds_tensor"):
        return value
    size = held(parameter).numel()
    flat = F.pad(value.flatten(), (0, size * world_size() - value.numel()))
    return flat[rank() * size :][:size]


def whole(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Values on rank 0, nothing on the others; cut ones on the CPU. Every rank has to call it."""
    with gathered(parameters.values()):
        if rank():
            return {}
        return {
            name: p.detach().cpu() if hasattr(p, "ds_tensor") else p
            for name, p in parameters.items()
        }


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

    Under ZeRO-3 the parameters that `role` itself registers are whole from its forward to the end
    of its backward pass. They are read wherever it likes to: hooks of the modules inside, or of
    "leaf" modules, would miss weights that are read from outside of those, and their gradients.
    """
    import deepspeed

    optimizer = optimizers.build(parameters, config)
    if not zero_stage:  # DeepSpeed would clip too, and forget the norm
        optimizer.register_step_pre_hook(_Clip(list(parameters.values()), config.clip))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage, **(_ZERO3 if zero_stage == 3 else {})},
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
    if _is_sharded(sharded):
        kept = [share for group in sharded.averaged_gradients.values() for share in group or ()]
    else:
        kept = [parameter.grad for parameter in engine.module.parameters()]
    gradients = [gradient for gradient in kept if gradient is not None]
    flags = [gradient.isfinite().all() for gradient in gradients]
    return not flags or bool(torch.stack(flags).all())


def drop_gradients(engine) -> None:
    """End an accumulation without a step: as if its backward passes had not been made."""
    sharded = engine.optimizer
    if _is_sharded(sharded):  # as its own step does after an overflow
        sharded.zero_grad(set_to_none=True)
        sharded.averaged_gradients.clear()
        if hasattr(sharded, "all_grad_tensors"):  # ZeRO-3 starts over by `zero_grad` alone
            sharded.micro_step_id = -1
            sharded.all_grad_tensors.clear()
    else:
        engine.zero_grad()
    engine.micro_steps += 1


def optimizer_state(engine) -> tuple[dict[str, Tensor], list[int]]:
    """`optimizer.state_tensors` of an engine, the same for every ZeRO stage and number of ranks.

    Every rank has to call it: what ZeRO has cut into shares is put together again, a tensor at a
    time, on the CPU of rank 0; the others have no tensors.
    """
    sharded = engine.optimizer
    if not _is_sharded(sharded):
        return optimizers.state_tensors(sharded)
    import deepspeed

    tensors: dict[str, Tensor] = {}
    steps: list[int] = []
    for flat, parameters in _flat_shares(sharded):
        state = sharded.optimizer.state.get(flat, {})
        for parameter in parameters:
            for slot in sorted(set(state) - {"step"}):
                found = deepspeed.utils.safe_get_full_optimizer_state(parameter, slot)
                if rank() == 0:
                    tensors[f"{len(steps):05d}.{slot}"] = found.cpu()
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
    groups = list(_flat_shares(sharded))
    count = sum(len(parameters) for _, parameters in groups)
    if count != len(steps):
        raise ValueError(f"the checkpoint's optimizer has {len(steps)} tensors, this one {count}")
    slots = sorted({name.split(".", 1)[1] for name in tensors})
    first = 0
    for flat, parameters in groups:
        if steps[first]:
            empty = {slot: torch.zeros_like(flat) for slot in slots}
            sharded.optimizer.state[flat] = {"step": torch.tensor(float(steps[first])), **empty}
        first += len(parameters)
    cut_parameters = hasattr(sharded, "set_local_hp_param")  # ZeRO-3
    if any(steps) and not cut_parameters:
        sharded._lazy_init_hp_params_optimizer_state()  # what its first step does: views of shares
    sharded.refresh_fp32_params()  # the copy that its step starts from
    for index, parameter in enumerate(p for _, parameters in groups for p in parameters):
        for slot in slots if steps[index] else ():
            value = tensors[f"{index:05d}.{slot}"]
            if cut_parameters:
                sharded.set_local_hp_param(share(parameter, value), parameter, slot)
            else:
                parameter.set_full_hp_param(value, slot)


def _is_sharded(optimizer) -> bool:
    """Whether it is that of a stage of ZeRO but 0."""
    return hasattr(optimizer, "averaged_gradients")


def _flat_shares(sharded) -> Iterator[tuple[Tensor, list[Any]]]:
    """The flat fp32 tensors that ZeRO steps, each with the parameters of which it holds shares."""
    if hasattr(sharded, "single_partition_of_fp32_groups"):
        return zip(sharded.single_partition_of_fp32_groups, sharded.bit16_groups, strict=True)
    return zip(sharded.fp32_partitioned_groups_flat, sharded.fp16_groups, strict=True)
