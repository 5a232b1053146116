"""Our kernels as TensorRT carries them: PTX, and how to launch it, without a GPU or TensorRT.

Shapes: B batch, T tokens, D width, F feed-forward width, N heads, H head width.

An engine launches a kernel of its own accord: with the inputs, then int32 values that follow from
shapes, then the outputs; once, without scratch memory, and with no other numbers. So every op that
an exported graph can use has an entry here, around the kernel that PyTorch launches: it takes
contiguous tensors, as an engine has them, works out their strides from T, and holds epsilon and all
widths as constants.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tdm_kernels.aot import Launch, compiled_for
from tdm_kernels.glu import MAX_BLOCK, gelu_tanh_kernel, swiglu_kernel
from tdm_kernels.layout import next_power_of_2, warps_for
from tdm_kernels.norm import residual_norm_kernel
from tdm_kernels.qk_norm_rope import BLOCK_N, qk_norm_rope_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_SHARED = 48 * 1024  # bytes that a launch may have without asking for more
# Of a thread of the norms. Left alone, ptxas finds 40 enough for constant strides, and spills one.
NORM_REGISTERS = 64


@triton.jit(do_not_specialize=["T"])
def norm_modulate_entry(
    x_ptr, scale_ptr, shift_ptr, weight_ptr, T, y_ptr,
    D: tl.constexpr, PER_SAMPLE: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [B, T, D], scale and shift [B or 1, 1, D], weight [D] -> y [B, T, D]."""
    residual_norm_kernel(
        x_ptr, None, None, None, weight_ptr, scale_ptr, shift_ptr, None, y_ptr, None, None,
        T * D, D, 0, 0, 0, 0, 0, 0, PER_SAMPLE * D, 0, PER_SAMPLE * D, 0,
        T, EPS, D, 1, 1, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def gate_residual_norm_entry(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, branch_weight_ptr, weight_ptr, T,
    h_ptr, y_ptr,
    D: tl.constexpr, PER_SAMPLE: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x, branch [B, T, D], gate, scale and shift [B or 1, 1, D], weights [D] -> h, y [B, T, D]."""
    residual_norm_kernel(
        x_ptr, branch_ptr, gate_ptr, branch_weight_ptr, weight_ptr, scale_ptr, shift_ptr,
        h_ptr, y_ptr, None, None,
        T * D, D, 0, T * D, D, 0, PER_SAMPLE * D, 0, PER_SAMPLE * D, 0, PER_SAMPLE * D, 0,
        T, EPS, D, 1, 1, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def qk_norm_rope_entry(
    q_ptr, k_ptr, weight_q_ptr, weight_k_ptr, rope_ptr, T, out_q_ptr, out_k_ptr,
    N: tl.constexpr, H: tl.constexpr, PER_SAMPLE: tl.constexpr, EPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """q, k [B, T, N, H], weights [H], rope [B or 1, T, 1, H] -> q, k."""
    qk_norm_rope_kernel(
        q_ptr, k_ptr, weight_q_ptr, weight_k_ptr, None, None, rope_ptr, out_q_ptr, out_k_ptr,
        T * N * H, N * H, H, T * N * H, N * H, H, PER_SAMPLE * T * H, H,
        T, 0, EPS, N, H, BLOCK_N, BLOCK_H,
    )  # fmt: skip


@triton.jit
def swiglu_entry(gate_ptr, up_ptr, out_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """gate, up [B, T, F] -> [B, T, F]."""
    swiglu_kernel(gate_ptr, up_ptr, out_ptr, F, F, F, BLOCK_F)


@triton.jit
def gelu_tanh_entry(x_ptr, out_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """x [B, T, F] -> [B, T, F]."""
    gelu_tanh_kernel(x_ptr, out_ptr, F, F, BLOCK_F)


@dataclass(frozen=True)
class Op:
    """An entry and its inputs: those it must have, and those it may, all in the entry's order.

    `vectors` of them are fp32, the others have the dtype of the op.
    """

    entry: Any
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    num_outputs: int = 1
    takes_tokens: bool = True


_MODULATION = ("gate", "scale", "shift")
OPS = {
    "norm_modulate": Op(norm_modulate_entry, ("x",), ("scale", "shift", "weight"), _MODULATION),
    "gate_residual_norm": Op(
        gate_residual_norm_entry,
        ("x", "branch"),
        ("gate", "scale", "shift", "branch_weight", "weight"),
        _MODULATION,
        num_outputs=2,
    ),
    "qk_norm_rope": Op(
        qk_norm_rope_entry, ("q", "k"), ("weight_q", "weight_k", "rope"), ("rope",), num_outputs=2
    ),
    "swiglu": Op(swiglu_entry, ("gate", "up"), takes_tokens=False),
    "gelu_tanh": Op(gelu_tanh_entry, ("x",), takes_tokens=False),
}


@dataclass(frozen=True)
class Code:
    """What an engine launches: the entry `name` of `ptx`, with so many threads a program.

    shared: bytes of shared memory.
    """

    name: str
    ptx: str
    threads: int
    shared: int


@dataclass(frozen=True)
class Plugin:
    """An op for one dtype and width: its parameters are `inputs`, T if `takes_tokens`, and outputs.

    `launch` is one that compiles to it, and `columns` the number of programs along a row.
    """

    op: str
    inputs: tuple[str, ...]
    num_outputs: int
    takes_tokens: bool
    launch: Launch
    columns: int

    def grid(self, shape: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Return the grid for a first input [B, T, ...]: numbers, or expressions that multiply."""
        return shape[0] * shape[1], self.columns, 1

    def extra(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """Return the int32 arguments between inputs and outputs, for the same shape."""
        return (shape[1],) if self.takes_tokens else ()

    def compile(self, capability: int) -> Code:
        """Compile for one compute capability, such as 89.

        Raises ValueError for a kernel that an engine could not launch.
        """
        compiled = compiled_for(self.launch, capability)
        meta = compiled.metadata
        scratch = meta.global_scratch_size + meta.profile_scratch_size
        if scratch or meta.shared > MOST_SHARED:
            raise ValueError(
                f"{self.op} needs {scratch} bytes of scratch memory and {meta.shared} of shared"
                f" memory; allowed: 0 and {MOST_SHARED}"
            )
        count = len(self.inputs) + self.takes_tokens + self.num_outputs
        ptx = _with_parameters(compiled.asm["ptx"], meta.name, count)
        return Code(meta.name, ptx, 32 * meta.num_warps, meta.shared)


def make_plugin(
    op: str,
    width: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    optional: Sequence[str] = (),
    num_heads: int | None = None,
    per_sample: bool = False,
    eps: float = 1e-6,
) -> Plugin:
    """Return the plugin of an op.

    `width` is D, F or H, `optional` the inputs beside the required ones, `num_heads` N of
    qk_norm_rope, and `per_sample` says whether modulation, or the rotary table, has a row for each
    sample. Raises ValueError for an unknown op, input or dtype, no width, a shift without a scale,
    and N without heads or heads without N.
    """
    spec = _spec(op, width, dtype, optional, num_heads)
    names = (*spec.required, *spec.optional)
    inputs = tuple(name for name in names if name in spec.required or name in optional)
    given = [
        torch.empty(1, dtype=torch.float32 if name in spec.vectors else dtype, device="meta")
        if name in inputs
        else None
        for name in names
    ]
    outputs = [torch.empty(1, dtype=dtype, device="meta") for _ in range(spec.num_outputs)]
    block, columns = next_power_of_2(width), 1
    options: dict[str, Any]
    if num_heads is not None:
        columns = -(-num_heads // BLOCK_N)
        options = {"N": num_heads, "H": width, "BLOCK_N": BLOCK_N, "BLOCK_H": block}
        options["num_warps"] = warps_for(BLOCK_N * block, 8)
    elif spec.takes_tokens:
        options = {"D": width, "BLOCK_D": block, "num_warps": warps_for(block, 16)}
        options["maxnreg"] = NORM_REGISTERS
    else:
        block = min(MAX_BLOCK, block)
        columns = -(-width // block)
        options = {"F": width, "BLOCK_F": block, "num_warps": warps_for(block, 16)}
    if spec.takes_tokens:
        options |= {"EPS": eps, "PER_SAMPLE": int(per_sample)}
    launch = Launch(spec.entry, (*given, *([1] * spec.takes_tokens), *outputs), options)
    return Plugin(op, inputs, spec.num_outputs, spec.takes_tokens, launch, columns)


def _spec(
    op: str, width: int, dtype: torch.dtype, optional: Sequence[str], num_heads: int | None
) -> Op:
    if op not in OPS:
        raise ValueError(f"op is {op!r}; allowed: {', '.join(OPS)}")
    spec = OPS[op]
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(map(str, DTYPES))}")
    if unknown := [name for name in optional if name not in spec.optional]:
        allowed = ", ".join(spec.optional) or "none"
        raise ValueError(f"{op} has no optional input {unknown[0]!r}; allowed: {allowed}")
    if "shift" in optional and "scale" not in optional:
        raise ValueError(f"{op} shifts only what it scales: optional is {tuple(optional)}")
    if (num_heads is not None) != (op == "qk_norm_rope"):
        raise ValueError(f"num_heads is {num_heads}, which goes with qk_norm_rope, not {op}")
    for name, value in (("width", width), ("num_heads", num_heads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; allowed: from 1")
    return spec


def _with_parameters(ptx: str, name: str, count: int) -> str:
    """Leave `count` parameters: Triton adds pointers to scratch memory, which nobody would pass."""
    found = re.search(rf"\.entry {re.escape(name)}\(\n(.*?)\n\)", ptx, re.DOTALL)
    assert found is not None, f"no entry {name}"
    parameters, body = found[1].split(",\n"), ptx[found.end() :]
    for parameter in parameters[count:]:
        assert f"[{parameter.split()[-1]}" not in body, f"{name} uses {parameter}"
    return ptx[: found.start(1)] + ",\n".join(parameters[:count]) + ptx[found.end(1) :]
