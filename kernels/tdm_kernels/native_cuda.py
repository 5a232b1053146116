"""The C++ library's kernels for a CUDA device, if it has them: norms, gates, q and k; no gradients.

What is not here is `native`'s: the same call serves both devices.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tdm_kernels import native, reference
from tdm_kernels.layout import traced_as_reference, unit

OPS = ("norm_modulate", "gate_residual", "gate_residual_norm", "qk_norm_rope")
MAX_HEAD = 256  # kMaxHead of csrc/cuda.h


def load(device: torch.device) -> str:
    """Load the library; return "" or why its CUDA kernels cannot serve on `device`."""
    reason = native.load()
    if reason:
        return reason
    built = architectures()
    if not built:
        return "was built without CUDA: run `make native` where there is an nvcc"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if not serves(built, major, minor):
            return f"was built for {built}, the device is {major}{minor}"
    return ""


def architectures() -> str:
    """What the kernels were built for, as CMake writes it ("80 90-real"); "" without any."""
    try:
        return torch.ops.tdm_kernels.cuda_architectures()
    except (AttributeError, NotImplementedError):  # a library from before, or without, CUDA
        return ""


def serves(built: str, major: int, minor: int) -> bool:
    """Whether a build for the architectures `built` runs on a device.

    Machine code runs on its major version, from its minor on; PTX, which "-real" leaves out, on
    every later version. Words without a number ("all", "native") are trusted.
    """
    found = re.findall(r"(\d+)(\d)[af]?(-real|-virtual)?", built)
    return not found or any(
        (kind != "-virtual" and int(a) == major and int(b) <= minor)
        or (kind != "-real" and (int(a), int(b)) <= (major, minor))
        for a, b, kind in found
    )


@traced_as_reference
def qk_norm_rope(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    weight_q_H: Tensor | None = None,
    weight_k_H: Tensor | None = None,
    rope_BTNH: Tensor | None = None,
    *,
    tail: reference.Tail | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`reference.qk_norm_rope`: one launch for q and k, one more for a tail.

    A q or k with nothing to do is returned as it is; of another shape, it has a launch of its own.
    """
    if native.wants_grad(q_BTNH, k_BTNH, weight_q_H, weight_k_H):
        raise RuntimeError("the CUDA kernels have no backward pass")
    q, k, weights = unit(q_BTNH), unit(k_BTNH), (weight_q_H, weight_k_H)
    if tail is not None:
        t, *tail_weights = tail
        out = q.new_empty(q.shape), k.new_empty(k.shape)
        for rows, pair in ((slice(t), weights), (slice(t, None), tail_weights)):
            parts = (x[:, rows] for x in (q, k, *out))
            _launch(*parts, *pair, None, eps)
        return out
    idle = [weight is None and rope_BTNH is None for weight in weights]
    outs = [None if still else x.new_empty(x.shape) for still, x in zip(idle, (q, k), strict=True)]
    if not any(idle) and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]:
        _launch(q, k, *outs, *weights, rope_BTNH, eps)
    else:
        for x, out, weight in zip((q, k), outs, weights, strict=True):
            if out is not None:
                _launch(x, None, out, None, weight, None, rope_BTNH, eps)
    return q_BTNH if outs[0] is None else outs[0], k_BTNH if outs[1] is None else outs[1]


def _launch(q, k, out_q, out_k, weight_q, weight_k, rope, eps: float) -> Any:
    native.native_op("head_norms")(q, k, weight_q, weight_k, rope, eps, out_q, out_k)
