"""Which implementation of each op runs where: resolved once, when a model is built."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from tdm_kernels import int8, native, native_cuda, reference, reference_fp8
from tdm_kernels.layout import ATTENTION_HEAD_DIMS
from tdm_kernels.quantized import E4M3_CAPABILITY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What an op will be asked to run on: the static facts a check may look at."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grad: bool


@dataclass(frozen=True)
class Ops:
    """The bound functions a model calls; semantics and argument names are those of `reference`.

    Bound for rows in 8 bits, the ops of `FP8_OPS` make such rows and multiply them.
    """

    norm_modulate: Callable
    gate_residual: Callable
    gate_residual_norm: Callable
    qk_norm_rope: Callable
    swiglu: Callable
    gelu_tanh: Callable
    joint_attention: Callable
    pack_linear: Callable
    pack_conv: Callable
    record: Callable
    solver_step: Callable


@dataclass(frozen=True)
class Impl:
    """One implementation of one op.

    `fn` is the function, or "module:function" where importing the module needs an optional package.
    `check` returns "" where the implementation can run and the reason where it cannot. `grad` says
    whether it has a backward pass; one without is never selected for training, unless the op itself
    is for inference only. `device` is the kind the implementation is written for, "" for any: what
    a backend claims differs between devices.
    """

    op: str
    backend: str
    fn: Callable | str
    check: Callable[[Target], str]
    grad: bool
    device: str = ""

    def reason_against(self, target: Target) -> str:
        """Return why this implementation cannot serve `target`, or ""."""
        if target.grad and not self.grad and self.op not in INFERENCE_OPS:
            return "has no backward pass"
        return self.check(target)

    def bind(self) -> Callable:
        """Return the function, its module imported."""
        if not isinstance(self.fn, str):
            return self.fn
        module, _, name = self.fn.partition(":")
        return getattr(importlib.import_module(module), name)


def _always(_target: Target) -> str:
    return ""


def _triton(target: Target) -> str:
    if target.device.type != "cuda":
        return "needs a CUDA device"
    if target.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"reads float32, bfloat16 and float16, not {target.dtype}"
    try:
        importlib.import_module("triton")
    except ImportError:
        return "is not installed"
    return ""


def _triton_fp8(target: Target) -> str:
    reason = _triton(target)
    if reason:
        return reason
    if target.dtype != torch.bfloat16:
        return f"multiplies e4m3 into bfloat16, not into {target.dtype}"
    if not torch.cuda.is_available():
        return "needs a CUDA device that is here, to read its compute capability"
    major, minor = torch.cuda.get_device_capability(target.device)
    if (major, minor) < E4M3_CAPABILITY:
        return f"needs compute capability 8.9 for e4m3, not {major}.{minor}"
    return ""


def _int8(target: Target) -> str:
    if target.grad:
        return "has no backward pass"
    if target.device.type not in ("cpu", "cuda"):
        return "needs a CPU or a CUDA device"
    return ""


def _triton_attention(target: Target) -> str:
    reason = _triton(target)
    if not reason and target.head_dim not in ATTENTION_HEAD_DIMS:
        return f"takes heads {ATTENTION_HEAD_DIMS} wide, not {target.head_dim}"
    return reason


def _triton_impl(op: str, fn: str) -> Impl:
    check = _triton_attention if op == "joint_attention" else _triton
    return Impl(op, "triton", fn, check, grad=op not in INFERENCE_OPS)


def _native(target: Target) -> str:
    if target.device.type != "cpu":
        return "runs on a CPU only"
    if target.dtype not in (torch.float32, torch.bfloat16):
        return f"computes in float32 and bfloat16, not in {target.dtype}"
    return native.load()


def _native_cuda(target: Target) -> str:
    if target.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"reads float32, bfloat16 and float16, not {target.dtype}"
    if target.head_dim > native_cuda.MAX_HEAD:
        return f"reads heads of at most {native_cuda.MAX_HEAD}, not {target.head_dim}"
    return native_cuda.load(target.device)


# Ops whose contract has no gradient: a model that trains binds them all the same.
INFERENCE_OPS = ("solver_step",)
OP_NAMES = tuple(field.name for field in fields(Ops))
# Fastest first: "auto" takes the first backend whose check passes, op by op.
BACKENDS = ("triton", "native", "reference")
TRITON_OPS = {
    "norm_modulate": "tdm_kernels.norm:norm_modulate",
    "gate_residual": "tdm_kernels.norm:gate_residual",
    "gate_residual_norm": "tdm_kernels.norm:gate_residual_norm",
    "qk_norm_rope": "tdm_kernels.qk_norm_rope:qk_norm_rope",
    "swiglu": "tdm_kernels.glu:swiglu",
    "gelu_tanh": "tdm_kernels.glu:gelu_tanh",
    "pack_linear": "tdm_kernels.linear:pack_linear",
    "pack_conv": "tdm_kernels.group_norm:pack_conv",
    "joint_attention": "tdm_kernels.attention:joint_attention",
    "solver_step": "tdm_kernels.solver:solver_step",
}
# What stands in, with fp8, for the ops that feed a linear and for the linear.
FP8_OPS = {
    "norm_modulate": "tdm_kernels.norm:norm_modulate_fp8",
    "gate_residual_norm": "tdm_kernels.norm:gate_residual_norm_fp8",
    "swiglu": "tdm_kernels.fp8:swiglu_fp8",
    "gelu_tanh": "tdm_kernels.fp8:gelu_tanh_fp8",
    "pack_linear": "tdm_kernels.fp8:pack_linear_fp8",
}
FP8_NAMES = {op: f"{op}_fp8" for op in FP8_OPS}
ROWS = ("fp8", "int8")
NATIVE_OPS = tuple(op for op in OP_NAMES if hasattr(native, op))
IMPLS = (
    *(_triton_impl(op, fn) for op, fn in TRITON_OPS.items()),
    *(Impl(op, "native", getattr(native, op), _native, True, "cpu") for op in NATIVE_OPS),
    Impl("record", "native", "tdm_kernels.recording:record", _native, True, "cpu"),
    Impl("pack_linear", "native", "tdm_kernels.panel_linear:pack_linear", _native, True, "cpu"),
    Impl("pack_conv", "native", "tdm_kernels.conv:pack_conv", _native, True, "cpu"),
    *(
        Impl(
            op, "native", getattr(native_cuda, op, getattr(native, op)), _native_cuda, False, "cuda"
        )
        for op in native_cuda.OPS
    ),
    *(Impl(op, "reference", getattr(reference, op), _always, grad=True) for op in OP_NAMES),
    *(Impl(FP8_NAMES[op], "triton", fn, _triton_fp8, grad=False) for op, fn in FP8_OPS.items()),
    *(
        Impl(op, "reference", getattr(reference_fp8, op), _always, grad=False)
        for op in FP8_NAMES.values()
    ),
)


def select(
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    grad: bool = True,
    rows: str | None = None,
) -> Ops:
    """Bind every op to an implementation; those of `FP8_OPS` to their form in `rows`, of `ROWS`.

    An explicit `backend` must be able to run every op it claims to: otherwise ValueError with every
    reason; ops it does not claim on this kind of device are the reference's. "auto" takes, per op,
    the first backend in `BACKENDS` that can run; in int8 the forms are made of these ops, and run
    on a CPU or a CUDA device. No form in 8 bits has a backward pass: `rows` with `grad` raises
    ValueError.
    """
    target = Target(torch.device(device), dtype, head_dim, grad)
    if rows not in (None, *ROWS):
        raise ValueError(f"rows={rows!r} is unknown; use one of {ROWS}")
    if rows == "int8":
        if reason := _int8(target):
            raise ValueError(f"rows='int8' cannot run on {target}: {reason}")
        ops = select(backend, device, dtype, head_dim, grad)
        return replace(ops, **int8.forms(ops))
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {('auto', *BACKENDS)}")
    chosen: dict[str, Impl] = {}
    refused: list[str] = []
    names = {op: FP8_NAMES.get(op, op) if rows == "fp8" else op for op in OP_NAMES}
    for op in names.values():
        for impl in _candidates(op, backend, target):
            reason = impl.reason_against(target)
            if not reason:
                chosen[op] = impl
                break
            refused.append(f"{op}: {impl.backend} {reason}")
    missing = [op for op in names.values() if op not in chosen]
    if missing:
        raise ValueError(
            f"backend={backend!r} cannot run {missing} on {target}: {'; '.join(refused)}"
        )
    logger.debug("ops for %s: %s", target, {op: impl.backend for op, impl in chosen.items()})
    return Ops(**{op: chosen[name].bind() for op, name in names.items()})


def explain(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    grad: bool = True,
) -> dict[str, dict[str, str]]:
    """Return op -> backend -> "ok" or the reason it cannot run."""
    target = Target(torch.device(device), dtype, head_dim, grad)
    return {
        op: {
            impl.backend: impl.reason_against(target) or "ok"
            for impl in _candidates(op, "auto", target)
        }
        for op in (*OP_NAMES, *FP8_NAMES.values())
    }


def _candidates(op: str, backend: str, target: Target) -> list[Impl]:
    """Implementations of `op` that `backend` allows, fastest first, at most one of each backend.

    One that is written for another kind of device stands in for a missing one, to say why not,
    unless `backend` has other ops for this kind: then it does not claim this one here.
    """
    kind, found = target.device.type, []
    claims = any(impl.backend == backend and impl.device == kind for impl in IMPLS)
    for name in BACKENDS if backend == "auto" else (backend,):
        impls = [impl for impl in IMPLS if impl.op == op and impl.backend == name]
        here = [impl for impl in impls if impl.device in ("", kind)]
        found += here or ([] if claims else impls[:1])
    return found or [impl for impl in IMPLS if impl.op == op and impl.backend == "reference"]
