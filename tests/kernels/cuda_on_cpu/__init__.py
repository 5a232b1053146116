"""csrc's CUDA kernels, compiled by a C++ compiler and run on CPU tensors: the same source files."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
from tdm_kernels import native, native_cuda

HERE = Path(__file__).parent
CSRC = Path(__file__).parents[3] / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("c++")


def build(folder: Path) -> None:
    """Compile and load the ops as torch.ops.tdm_emulated."""
    library = folder / "emulated.so"
    kernels = sorted(str(path) for path in CSRC.glob("*.cu"))
    command = [
        str(COMPILER), "-shared", "-fPIC", "-O1", "-std=c++20",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}", f"-isystem{TORCH / 'include'}",
        str(HERE / "ops.cpp"), "-x", "c++", *kernels, "-x", "none", "-o", str(library),
        f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-Wl,-Bsymbolic",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]
    torch.ops.load_library(str(library))


def ops() -> SimpleNamespace:
    """The wrappers of `native` as they are on a CUDA tensor; `op` must find the emulated ones."""
    return SimpleNamespace(
        norm_modulate=native.norm_modulate,
        gate_residual=native.gate_residual,
        gate_residual_norm=native.gate_residual_norm,
        qk_norm_rope=native_cuda.qk_norm_rope,
    )


def op(name: str):
    """An emulated op by name, for `native.native_op`."""
    return getattr(torch.ops.tdm_emulated, name).default
