"""Whether the C++ library has kernels for a CUDA device: norms, gates and q and k, forward only."""

from __future__ import annotations

import re

import torch

from tdm_kernels import native

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
