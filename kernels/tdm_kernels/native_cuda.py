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
    except NotImplementedError:  # a library without CUDA
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
    q, k = unit(q_BTNH), unit(k_BTNH)
    if tail is not None:
        t, tail_q, tail_k = tail
        out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
        parts = (slice(t), weight_q_H, weight_k_H), (slice(t, None), tail_q, tail_k)
        for rows, *weights in parts:
            _launch(*(x[:, rows] for x in (q, k, out_q, out_k)), *weights, None, eps)
        return out_q, out_k
    q_idle, k_idle = (w is None and rope_BTNH is None for w in (weight_q_H, weight_k_H))
    out_q = q_BTNH if q_idle else q.new_empty(q.shape)
    out_k = k_BTNH if k_idle else k.new_empty(k.shape)
    alike = q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if alike and not q_idle and not k_idle:
        _launch(q, k, out_q, out_k, weight_q_H, weight_k_H, rope_BTNH, eps)
        return out_q, out_k
    if not q_idle:
        _launch(q, None, out_q, None, weight_q_H, None, rope_BTNH, eps)
    if not k_idle:
        _launch(k, None, out_k, None, weight_k_H, None, rope_BTNH, eps)
    return out_q, out_k


def _launch(*args: Any) -> None:
    *tensors, weight_q, weight_k, rope, eps = args
    q, k, out_q, out_k = tensors
    native.native_op("head_norms")(q, k, weight_q, weight_k, rope, eps, out_q, out_k)
