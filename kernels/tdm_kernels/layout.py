"""What the wrappers of kernels share: layouts, checks, sums, and where a launch happens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from tdm_kernels import reference, reference_fp8

ATTENTION_HEAD_DIMS = (16, 32, 64, 128)  # what tiles of the tensor cores are made of


def traced_as_reference(op: Callable) -> Callable:
    """Let torch.compile and torch.export trace the reference of the same name in place of `op`.

    Compilers fuse it themselves, and could not look into a kernel.
    """
    home = reference if hasattr(reference, op.__name__) else reference_fp8
    plain = getattr(home, op.__name__)

    @wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if torch.compiler.is_compiling() else op(*args, **kwargs)

    return call


def unit(x: Tensor) -> Tensor:
    """Return `x` with unit stride along its last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on(x: Tensor) -> AbstractContextManager:
    """Make the device of `x` current: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def warps_for(width: int, per_thread: int) -> int:
    """Return num_warps, 1 to 16, so that a thread holds about `per_thread` of `width` elements."""
    return max(1, min(16, width // (32 * per_thread)))


def rows_per_program(t: int, summed: bool) -> int:
    """Return how many tokens one backward program takes.

    One, unless something is summed over tokens: then 2 to 16, so that the partial sums stay small
    beside the rows and a sequence still gives at least 64 programs where it has 64 tokens.
    """
    return max(1, min(16, -(-t // 64))) if summed else 1


def check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless `others` are where `x` is: kernels take addresses."""
    device = x.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, not on {other.device}")


def check_rows(name: str, x: Tensor, like: Tensor | None = None, ndim: int = 3) -> None:
    """Raise ValueError unless `x` is a float tensor with `ndim` axes, and `like`'s shape."""
    if not x.is_floating_point() or x.dtype == torch.float64:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {x.dtype}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, not the shape {tuple(x.shape)}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name} must be {tuple(like.shape)}, not {tuple(x.shape)}")


def check_weight(name: str, weight: Tensor | None, width: int) -> Tensor | None:
    """Return a contiguous [width] weight; raise ValueError for any other shape."""
    if weight is None:
        return None
    if weight.shape != (width,):
        raise ValueError(f"{name} must be ({width},), not {tuple(weight.shape)}")
    return weight.contiguous()


def check_vectors(name: str, v: Tensor | None, x_BTD: Tensor, max_sets: int) -> Tensor | None:
    """Return a [B or 1, 1, D] or [M, B or 1, 1, D] modulation with unit stride along D.

    Raises ValueError for any other shape, and for more than `max_sets` modulations M.
    """
    if v is None:
        return None
    b, _, d = x_BTD.shape
    sets = v.shape[0] if v.ndim == 4 else 1
    fits = v.ndim in (3, 4) and v.shape[-3] in (1, b) and v.shape[-2] == 1 and v.shape[-1] == d
    if not fits or not 1 <= sets <= max_sets or (v.ndim == 4 and max_sets == 1):
        several = f" or [1 to {max_sets}, {b} or 1, 1, {d}]" if max_sets > 1 else ""
        raise ValueError(f"{name} must be [{b} or 1, 1, {d}]{several}, not {list(v.shape)}")
    return unit(v)


def vector_strides(v: Tensor | None) -> tuple[int, int]:
    """Return the strides of a modulation over M and over B, 0 where it is shared or absent."""
    if v is None:
        return 0, 0
    return (v.stride(0) if v.ndim == 4 else 0), (v.stride(-3) if v.shape[-3] > 1 else 0)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return what the linear after a norm reads: autocast's dtype under autocast."""
    if x.is_cpu:  # asked for most often, and the answer must not cost more than a small op
        kind = "cpu"
    else:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind):
            return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def vector_grad(partial: Tensor | None, vector: Tensor | None) -> Tensor | None:
    """Sum [M, B, num_blocks, D] partial sums into a modulation's gradient, over B where shared."""
    if partial is None or vector is None:
        return None
    sums_MB1D = partial.sum(-2, keepdim=True)
    if vector.ndim == 3:
        sums_MB1D = sums_MB1D[0]
    return sums_MB1D.sum_to_size(vector.shape).to(vector.dtype)


def weight_grad(partial: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """Sum [..., D] partial sums into the gradient of a [D] weight."""
    if partial is None or weight is None:
        return None
    return partial.flatten(0, -2).sum(0).to(weight.dtype)
