"""Compile the Triton kernels for GPUs this machine does not have, and read what became of them.

`capture` runs the ops on meta tensors of production shapes and records every launch, so what is
compiled is what a launch would compile: the same signature, constants, alignment and num_warps.
`measure` reads registers, local and shared memory from the binary and access widths from the PTX.
`python -m tdm_kernels.aot` prints the most that any architecture uses: the tests' budget.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tdm_kernels import attention, fp8, glu, group_norm, norm, qk_norm_rope, solver
from tdm_kernels.reference import GroupNorm

ARCHS = (80, 89, 90, 100, 120)
FIRST_FP8_ARCH = 89
_COPIED = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+)")  # bytes
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel, its positional arguments, its constants and options."""

    kernel: Any
    args: tuple
    options: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Per thread: registers, bytes of local memory (spills); bytes of shared memory; the numbers of
    global loads and stores narrower than 16 bytes in the code.
    """

    registers: int
    local: int
    shared: int
    narrow_loads: int
    narrow_stores: int


def capture(run: Callable[[], Any]) -> list[Launch]:
    """Return the launches that `run` makes, none of which happens."""
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **options):
        launches.append(Launch(kernel, args, options))

    with patch.object(JITFunction, "run", record):
        run()
    return launches


def archs_for(launch: Launch) -> tuple[int, ...]:
    """Return the compute capabilities a launch is compiled for: e4m3 is not for all of them."""
    e4m3 = any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in launch.args)
    return tuple(arch for arch in ARCHS if arch >= FIRST_FP8_ARCH or not e4m3)


def compiled_for(launch: Launch, capability: int) -> Any:
    """Compile a launch for one compute capability, such as 90."""
    target = GPUTarget("cuda", capability, 32)
    backend, kernel = make_backend(target), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.args, **launch.options)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, {"debug": False, **launch.options}, bound, specialization, None
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def measure(launch: Launch, capability: int) -> Usage:
    """Compile a launch for one compute capability, and return what it uses."""
    compiled = compiled_for(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    counts = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    return Usage(
        registers=counts["REG"],
        local=counts["STACK"] + counts["LOCAL"],
        shared=compiled.metadata.shared,
        narrow_loads=_narrow(compiled.asm["ptx"], "ld"),
        narrow_stores=_narrow(compiled.asm["ptx"], "st"),
    )


def _narrow(ptx: str, instruction: str) -> int:
    """Count global accesses of less than 16 bytes per thread, copies to shared memory included."""
    found = re.findall(rf"\b{instruction}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    narrow = sum(int(lanes or 1) * int(bits) < 128 for lanes, bits in found)
    if instruction == "ld":
        narrow += sum(int(size, 16) < 16 for size in _COPIED.findall(ptx))
    return narrow


def _rows(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _vectors(d: int, count: int, grad: bool) -> tuple[Tensor, ...]:
    """Modulations, a row per sample, as slices of one table."""
    return _rows(count, 2, 1, d, dtype=torch.float32, grad=grad).unbind()


def _qkv(b: int, t: int, heads: int, h: int) -> tuple[Tensor, ...]:
    return _rows(b, t, 3 * heads * h).unflatten(-1, (3, heads, h)).unbind(2)


def _zimage(grad: bool) -> dict[str, Callable[[], Any]]:
    """Z-Image at 1024 x 1024 with 128 text tokens. `grad`: of weights and modulation as well."""
    x, branch = _rows(2, 4224, 3840), _rows(2, 4224, 3840)
    scale, gate = _vectors(3840, 2, grad)
    weight, branch_weight = (_rows(3840, grad=grad) for _ in range(2))
    heads: dict[str, Any] = {
        "weight_q_H": _rows(128, grad=grad),
        "weight_k_H": _rows(128, grad=grad),
    }
    rope = _rows(1, 4224, 1, 128, dtype=torch.float32, grad=False)
    norms: dict[str, Any] = {"branch_weight_D": branch_weight, "weight_D": weight}
    halves = _rows(2, 4224, 2 * 10240)
    return {
        "norm_modulate": lambda: norm.norm_modulate(x, scale, weight_D=weight),
        "gate_residual": lambda: norm.gate_residual(x, branch, gate, branch_weight_D=weight),
        "gate_residual_norm": lambda: norm.gate_residual_norm(x, branch, gate, scale, **norms),
        "qk_norm_rope": lambda: qk_norm_rope.qk_norm_rope(
            *_qkv(2, 4224, 30, 128)[:2], **heads, rope_BTNH=rope
        ),
        "swiglu": lambda: glu.swiglu(*halves.chunk(2, -1)),
    }


def _sd3(grad: bool) -> dict[str, Callable[[], Any]]:
    """SD3.5-Medium at 1024 x 1024, the image's rows. `grad`: of modulation and weights as well."""
    x, branch, hidden = _rows(2, 4096, 1536), _rows(2, 4096, 1536), _rows(2, 4096, 6144)
    table = _rows(9, 2, 1, 1536, dtype=torch.float32, grad=grad)
    shift, scale, gate = table[:3].unbind()
    heads: dict[str, Any] = {"weight_q_H": _rows(64, grad=grad), "weight_k_H": _rows(64, grad=grad)}
    return {
        "norm_modulate": lambda: norm.norm_modulate(x, scale, shift),
        "norm_modulate_2": lambda: norm.norm_modulate(x, table[1:8:6], table[0:7:6]),
        "gate_residual": lambda: norm.gate_residual(x, branch, gate),
        "gate_residual_norm": lambda: norm.gate_residual_norm(x, branch, gate, scale, shift),
        "qk_norm_rope": lambda: qk_norm_rope.qk_norm_rope(*_qkv(2, 4096, 24, 64)[:2], **heads),
        "gelu_tanh": lambda: glu.gelu_tanh(hidden),
    }


def _inference() -> dict[str, Callable[[], Any]]:
    """What has no backward pass here, by MODEL/OP. SD3.5 adds 333 text rows to the image's."""
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    image, both, head = _rows(2, 4096, 1536), _rows(2, 2, 4096, 1536), _rows(64)
    table = _rows(9, 2, 1, 1536, dtype=torch.float32)
    attend = attention.joint_attention
    joint = _rows(2, 4429, 24, 64)
    x = _rows(2, 16, 128, 128, dtype=torch.float32)
    out, coefficients = _rows(2, 4096, 64), {"sigma": 0.5, "c_x": 0.5, "c_m": 0.5, "patch": 2}
    return {
        "zimage/joint_attention": lambda: attend(*_qkv(2, 4224, 30, 128)),
        "zimage/joint_attention_ragged": lambda: attend(*_qkv(2, 4224, 30, 128), lengths),
        "zimage/solver_step": lambda: solver.solver_step(x, out, **coefficients),
        "sd3/solver_step": lambda: solver.solver_step(x, out, x, c_prev=-0.5, **coefficients),
        "sd3/gate_residual_norm_2": lambda: norm.gate_residual_norm(
            image, both, table[2:9:6], table[4], table[3]
        ),
        "sd3/qk_norm_rope_tail": lambda: qk_norm_rope.qk_norm_rope(
            *_qkv(2, 4429, 24, 64)[:2], head, head, tail=(4096, head, head)
        ),
        "sd3/joint_attention": lambda: attend(joint, joint, joint),
        "sd3/joint_attention_image": lambda: attend(*_qkv(2, 4096, 24, 64)),
    }


def _fp8() -> dict[str, Callable[[], Any]]:
    """What feeds the linears of both models, attention's output ("quantize_rows") included."""
    x, branch, out = (_rows(2, 4224, 3840, grad=False) for _ in range(3))
    scale, gate = _vectors(3840, 2, False)
    weights = {"branch_weight_D": _rows(3840, grad=False), "weight_D": _rows(3840, grad=False)}
    halves = _rows(2, 4224, 2 * 10240, grad=False)
    image, hidden = _rows(2, 4096, 1536, grad=False), _rows(2, 4096, 6144, grad=False)
    table = _rows(9, 2, 1, 1536, dtype=torch.float32, grad=False)
    shift, scale_2, gate_2 = table[:3].unbind()
    return {
        "zimage/norm_modulate": lambda: norm.norm_modulate_fp8(
            x, scale, weight_D=weights["weight_D"]
        ),
        "zimage/gate_residual_norm": lambda: norm.gate_residual_norm_fp8(
            x, branch, gate, scale, **weights
        ),
        "zimage/swiglu": lambda: fp8.swiglu_fp8(*halves.chunk(2, -1)),
        "zimage/quantize_rows": lambda: fp8.quantize_rows(out),
        "sd3/norm_modulate": lambda: norm.norm_modulate_fp8(image, scale_2, shift),
        "sd3/norm_modulate_2": lambda: norm.norm_modulate_fp8(image, table[1:8:6], table[0:7:6]),
        "sd3/gate_residual_norm": lambda: norm.gate_residual_norm_fp8(
            image, image, gate_2, scale_2, shift
        ),
        "sd3/gelu_tanh": lambda: fp8.gelu_tanh_fp8(hidden),
        "sd3/quantize_rows": lambda: fp8.quantize_rows(image),
    }


def _vae() -> dict[str, Launch]:
    """GroupNorm and SiLU at the widths and sizes of both models' decoder, 1024 x 1024 pixels."""
    found = {}
    for side, channels in ((1024, 128), (512, 256), (128, 512)):
        x, weight = _rows(2, side, side, channels, grad=False), _rows(channels, grad=False)
        norm_ = GroupNorm(weight, weight, 32, 1e-6)
        for launch in capture(partial(group_norm.group_norm_silu, x, norm_)):
            found[f"vae/{launch.kernel.__name__}_{channels}/infer"] = launch
    return found


def _forward_backward(call: Callable[[], Any]) -> None:
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])


def production_launches() -> dict[str, Launch]:
    """Return every launch of both models and their VAE by name: MODEL/OP/PASS.

    Passes: "infer"; "train" and "backward" with all gradients; "frozen", the backward pass where
    only rows need gradients, as in adapter training; "fp8", inference in e4m3.
    """
    found: dict[str, Launch] = {}
    for model, ops_of in (("zimage", _zimage), ("sd3", _sd3)):
        for op, call in ops_of(True).items():
            with torch.no_grad():
                (found[f"{model}/{op}/infer"],) = capture(call)
            both = capture(partial(_forward_backward, call))
            found[f"{model}/{op}/train"], found[f"{model}/{op}/backward"] = both
        for op, call in ops_of(False).items():
            _, found[f"{model}/{op}/frozen"] = capture(partial(_forward_backward, call))
    for name, call in _inference().items():
        with torch.no_grad():
            (found[f"{name}/infer"],) = capture(call)
    for name, call in _fp8().items():
        (found[f"{name}/fp8"],) = capture(call)
    return _distinct(found | _vae())


def _distinct(launches: dict[str, Launch]) -> dict[str, Launch]:
    """Drop the launches that would compile to the same code as one before them."""
    found: dict[tuple, str] = {}
    for name, launch in launches.items():
        kinds = tuple(
            (a.dtype if isinstance(a, Tensor) else None if a is None else type(a))
            for a in launch.args
        )
        options = tuple(sorted(launch.options.items()))
        found.setdefault((launch.kernel, kinds, options), name)
    return {name: launches[name] for name in found.values()}


def budget() -> dict[str, dict[str, int]]:
    """Return, per launch, the most any architecture uses of each resource.

    Registers are rounded up to 8, the step in which the hardware hands them out.
    """
    table = {}
    for name, launch in production_launches().items():
        usages = [asdict(measure(launch, arch)) for arch in archs_for(launch)]
        table[name] = {field: max(usage[field] for usage in usages) for field in usages[0]}
        table[name]["registers"] = -(-table[name]["registers"] // 8) * 8
    return table


def main() -> int:
    """Print the budget as JSON, one launch a line."""
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in budget().items())
    print("{\n" + ",\n".join(lines) + "\n}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
