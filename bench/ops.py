"""How fast is each op next to the reference, torch.compile and, for attention, the library's best?

    python -m bench.ops [--device cpu|cuda] [--only OP] [--threads 2] [--output FILE]

Every op is first held to the tests' rule: at most twice the reference's error against fp64, plus
2 ulp; one that errs more, or fails, has the reason in place of times, and the status is 1 in the
end. "Trained" is a forward with the gradients of the rows, as adapters need them; "e4m3" the form
of `precision="fp8"`, whose linears are timed against bf16. Variants are timed in turn, on a GPU by
its own clock: what Python takes to launch them is not counted. `bytes` counts each operand and each
result of a pass once; the roof of a bandwidth is a copy of 1 GB (CPU: 64 MB) on the same machine,
that of attention and convolutions a bf16 matrix product of 8192 (CPU: fp32, 1024), that of a linear
one in e4m3. An interrupt ends the run and keeps the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from tdm_kernels import reference, reference_fp8, select
from tdm_kernels.quantized import Quantized
from tdm_kernels.reference import GroupNorm
from tdm_kernels.registry import FP8_OPS
from tdm_kernels.testing import allowed_error, in_double
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/ops.py`, too

from bench.timing import NAMES, Times, environment, interleaved, report, roofs, store

LIBRARY = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
# How many arguments, the first, are the rows of what is also timed in training.
ROWS = {"norm_modulate": 1, "gate_residual_norm": 2, "qk_norm_rope": 2, "swiglu": 2, "gelu_tanh": 1}


@dataclass
class Case:
    """One call of an op; `flops` where arithmetic, not traffic, is what it costs.

    The first `trained` arguments get the gradient of half the sum of all squared outputs.
    """

    op: str
    shape: str
    args: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    flops: int = 0
    trained: int = 0
    rows: ClassVar[str | None] = None  # the `rows` to `select` its op by

    def function(self, module: Any) -> Callable[..., Any]:
        """The op as `module` has it."""
        return getattr(module, self.op)

    def call(self, function: Callable[..., Any]) -> tuple[Any, ...]:
        """Outputs of `function`, then gradients."""
        if not self.trained:
            return _tuple(function(*self.args, **self.options))
        leaves = [x.detach().requires_grad_() for x in self.args[: self.trained]]
        with torch.enable_grad():
            out = _tuple(function(*leaves, *self.args[self.trained :], **self.options))
        seeds = [y.detach() for y in out]
        return (*seeds, *torch.autograd.grad(out, leaves, seeds))

    def exact(self) -> tuple[Tensor, ...]:
        """What `call` errs against, in fp64."""
        args = [_double(a) for a in self.args]
        options = {key: _double(value) for key, value in self.options.items()}
        with in_double():
            case = replace(self, args=args, options=options)
            return case.call(case.function(reference))

    def in_training(self) -> Case:
        """The same with gradients of the rows."""
        return replace(self, shape=f"{self.shape} trained", trained=ROWS[self.op])

    def in_e4m3(self) -> Case:
        """The form of a linear's input whose rows leave in e4m3."""
        return Producer(self.op, f"{self.shape} e4m3", self.args, self.options)


class Producer(Case):
    """An op whose rows leave in e4m3: held to the op as it is, in fp64."""

    rows = "fp8"

    def function(self, module: Any) -> Callable[..., Any]:
        """The form as `module` has it."""
        if module is reference:
            return getattr(reference_fp8, f"{self.op}_fp8")
        return getattr(module, self.op)

    def exact(self) -> tuple[Tensor, ...]:
        """What the op returns before its rows are quantised."""
        return Case(self.op, self.shape, self.args, self.options).exact()


class Linear(Producer):
    """`pack_linear` of (x, W), x in e4m3 already: the product alone."""

    def function(self, module: Any) -> Callable[..., Any]:
        """The linear, packed once."""
        x, weight_FD = self.args
        packed = super().function(module)(weight_FD, None, [weight_FD])
        return lambda x, weight_FD: packed(x)

    def exact(self) -> tuple[Tensor, ...]:
        """The product of what both stand for."""
        x, weight_FD = self.args[0], reference_fp8.quantize_rows(self.args[1])
        return (_double(x) @ _double(weight_FD).mT,)


class Convolution(Case):
    """`pack_conv` of (x, residual, W, norm's weight, norm's bias), packed at every call."""

    def function(self, module: Any) -> Callable[..., Any]:
        """The op as `module` has it."""

        def call(x, residual, weight_OCKK, weight_C, bias_C):
            norm = GroupNorm(weight_C, bias_C, 32, 1e-6)
            return module.pack_conv(weight_OCKK, None, [weight_OCKK], norm=norm)(x, residual)

        return call


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The shapes of a tiny model and of one 512-pixel Z-Image; on a GPU what 1024 pixels need.

    What is made for a case is free again after the last of its kind.
    """
    zimage = ("Z-Image 512", 1, 1152, 3840, 30, 128)
    if device != "cuda":
        for row in (("tiny", 1, 40, 192, 3, 64), ("tiny group", 24, 40, 192, 3, 64), zimage):
            yield from _rms_cases(*row, device, dtype)
        return
    large = _rms_cases("Z-Image 1024", 1, 4224, 3840, 30, 128, device, dtype)
    sd3 = _layer_norm_cases("SD3.5-M 1024", 4096, 4429, 1536, 24, 64, device, dtype)
    yield from large
    yield from sd3
    yield _solver_step("Z-Image 1024", 16, 128, device, dtype)
    # The largest pictures with as many channels before and after.
    for channels, side in ((128, 1024), (256, 512), (512, 256)):
        yield _convolution("VAE 1024", channels, side, device, dtype)
    for name, rows, width, features in (
        ("Z-Image 1024 w1 w3", 4224, 3840, 20480), ("Z-Image 1024 w2", 4224, 10240, 3840),
        ("SD3.5-M 1024 fc1", 4096, 1536, 6144),
    ):  # fmt: skip
        yield _linear(name, rows, width, features, device, dtype)
    for case in (*large, *sd3):
        if case.op in ROWS:
            yield case.in_training()
        if case.op in FP8_OPS:
            yield case.in_e4m3()
    del large, sd3
    yield from _rms_cases(*zimage, device, dtype)


def _random(device: str) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return randn


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _layer_norm_cases(name, image, t, d, heads, h, device, dtype) -> list[Case]:
    """SD3's forms: norms with a shift, of the image's rows; text rows in the tail of q and k."""
    randn = _random(device)
    x, branch = randn(1, image, d, dtype=dtype), randn(1, image, d, dtype=dtype)
    gate, scale, shift = randn(3, 1, 1, d)
    q, k, v = randn(1, t, 3, heads, h, dtype=dtype).unbind(2)
    weights = randn(4, h)
    tail = {"tail": (image, weights[2], weights[3])}
    flops = 4 * heads * t * t * h
    return [
        Case("norm_modulate", name, [x, scale, shift]),
        Case("norm_modulate", f"{name} two", [x, *randn(2, 2, 1, 1, d)]),
        Case("gate_residual", name, [x, branch, gate]),
        Case("gate_residual_norm", name, [x, branch, gate, scale, shift]),
        Case("qk_norm_rope", name, [q, k, weights[0], weights[1]], tail),
        Case("gelu_tanh", name, [randn(1, image, 4 * d, dtype=dtype)]),
        Case("joint_attention", name, [q, k, v], flops=flops),
    ]


def _solver_step(name, channels, side, device, dtype) -> Case:
    """A step of second order, from patches of 2 x 2."""
    randn = _random(device)
    args = [randn(1, channels, side, side), randn(1, side**2 // 4, 4 * channels, dtype=dtype)]
    step = {"sigma": 0.6, "c_x": 0.5, "c_m": 0.7, "c_prev": -0.2, "sign": -1.0, "patch": 2}
    return Case("solver_step", name, [*args, randn(1, channels, side, side)], step)


def _linear(name, rows, width, features, device, dtype) -> Case:
    """Rows with outliers, as Z-Image's feed-forward has them."""
    randn = _random(device)
    x = reference_fp8.quantize_rows(randn(1, rows, width, dtype=dtype) ** 3)
    weight = randn(features, width, dtype=dtype) / width**0.5
    return Linear("pack_linear", name, [x, weight], flops=2 * rows * width * features)


def _convolution(name, channels, side, device, dtype) -> Case:
    """The second convolution of a residual block."""
    randn = _random(device)
    x, residual = randn(2, 1, side, side, channels, dtype=dtype)
    weight = randn(channels, channels, 3, 3, dtype=dtype) / (3 * channels**0.5)
    weight = weight.contiguous(memory_format=torch.channels_last)
    args = [x, residual, weight, *randn(2, channels, dtype=dtype)]
    flops = 2 * 9 * channels**2 * side**2
    return Convolution("pack_conv", f"{name} {channels}", args, flops=flops)


def _rms_cases(name, b, t, d, heads, h, device, dtype) -> list[Case]:
    """Z-Image's forms, and both activations."""
    randn = _random(device)
    x, branch = randn(b, t, d, dtype=dtype), randn(b, t, d, dtype=dtype)
    gate, scale = randn(b, 1, d), randn(b, 1, d)
    weights = {"branch_weight_D": randn(d), "weight_D": randn(d)}
    q, k, v = randn(b, t, 3, heads, h, dtype=dtype).unbind(2)
    angle = randn(1, t, 1, h // 2)
    rope = torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)
    hidden = randn(b, t, 4 * d, dtype=dtype)
    return [
        Case("norm_modulate", name, [x, scale], {"weight_D": weights["weight_D"]}),
        Case("gate_residual", name, [x, branch, gate]),
        Case("gate_residual_norm", name, [x, branch, gate, scale], weights),
        Case("qk_norm_rope", name, [q, k, randn(h), randn(h), rope]),
        Case("swiglu", name, list(hidden.chunk(2, -1))),
        Case("gelu_tanh", name, [hidden]),
        Case("joint_attention", name, [q, k, v], flops=4 * b * heads * t * t * h),
    ]


def check(case: Case, ops: Any) -> float:
    """Error of the op over what is allowed. Raises RuntimeError above 1."""
    found, like = (case.call(case.function(module)) for module in (ops, reference))
    worst = 0.0
    for *pair, c in zip(found, like, case.exact(), strict=True):
        a, b = (y.dequantize() if isinstance(y, Quantized) else y for y in pair)
        worst = max(worst, float((a.double() - c).abs().max() / allowed_error(b, c)))
    if not worst <= 1:
        raise RuntimeError(f"{case.op} at {case.shape} errs {worst:.2g} times what is allowed")
    return worst


def variants(case: Case, ops: Any, device: str) -> dict[str, Callable[[], Any]]:
    """What is timed: ours and the reference, and on a GPU the compiler and the library."""
    functions = {"ours": case.function(ops), "reference": case.function(reference)}
    linear = isinstance(case, Linear)
    if device == "cuda" and not linear:
        torch._dynamo.reset()  # it gives up on a function of many shapes
        functions["torch.compile"] = torch.compile(functions["reference"], dynamic=False)
    found: dict[str, Callable[[], Any]] = {
        name: partial(case.call, function) for name, function in functions.items()
    }
    if linear:
        rows, weight_FD = case.args
        found[NAMES[weight_FD.dtype]] = partial(F.linear, _double(rows).to(weight_FD), weight_FD)
    if device == "cuda" and case.op == "joint_attention":
        from tdm_kernels.attention import triton_attention

        found["triton"] = lambda: triton_attention(*case.args)  # "ours" may be the library's
        q, k, v = (x.transpose(1, 2) for x in case.args)
        found |= {name: _library(getattr(SDPBackend, name), q, k, v) for name in LIBRARY}
    return found


def _library(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def measure(case: Case, ops: Any, device: str, roof: dict[str, float], repeats: int) -> dict:
    """Check and time one case."""
    error = check(case, ops)
    calls = variants(case, ops, device)
    if case.op == "joint_attention":
        calls = {name: call for name, call in calls.items() if _runs(call)}
    times = interleaved(calls, repeats=repeats, device=device)
    results = case.call(case.function(ops))
    operands = [*case.args, *case.options.values(), *results]
    if case.trained:  # the backward pass reads the rows and gradients of the outputs' size
        operands += [*case.args[: case.trained], *results[: -case.trained]]
    size = sum(map(_bytes, operands))
    peak = (
        "bytes_per_s" if not case.flops else f"flops_per_s_{case.rows or NAMES[results[0].dtype]}"
    )
    work = case.flops or size
    row = {"op": case.op, "shape": case.shape, "error_over_allowed": round(error, 3)}
    per_s = work / times["ours"].p50 * 1e3
    row |= {"us": {name: _microseconds(t) for name, t in times.items()}}
    row |= {"TFLOP/s" if case.flops else "GB/s": round(per_s / (1e12 if case.flops else 1e9), 3)}
    row |= {"% of roof": round(100 * per_s / roof[peak], 1)}
    others = {name: t.p50 / times["ours"].p50 for name, t in times.items() if name != "ours"}
    return row | {"speedup over": {name: round(ratio, 2) for name, ratio in others.items()}}


def _runs(call: Callable[[], Any]) -> bool:
    """Whether a backend of the library takes this shape at all."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def _microseconds(times: Times) -> dict[str, float]:
    return {p: round(getattr(times, p) * 1e3, 1) for p in ("p20", "p50", "p80")}


def _bytes(x: Any) -> int:
    if isinstance(x, Quantized):
        return _bytes(x.values) + _bytes(x.scale)
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0


def _double(x: Any) -> Any:
    if isinstance(x, Quantized):
        return x.dequantize().double()
    if isinstance(x, tuple):
        return tuple(_double(part) for part in x)
    return x.double() if isinstance(x, Tensor) else x


def main(argv: list[str] | None = None) -> int:
    """Print a row per case, then the JSON, stored as it grows; 1 where a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", metavar="OP")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    sizes = (8192, 2**30) if args.device == "cuda" else (1024, 2**26)
    roof = roofs(args.device, *sizes, dtype, args.repeats)
    rows: list[dict] = []
    result = {"bench": "ops", **environment(), "roof": roof, "rows": rows}
    with torch.no_grad():
        for case in cases(args.device, dtype):
            if args.only in (None, case.op):
                head_dim = case.args[0].shape[-1] if case.op == "joint_attention" else 64
                try:
                    grad = case.trained > 0
                    ops = select("auto", args.device, dtype, head_dim, grad, case.rows)
                    rows.append(measure(case, ops, args.device, roof, args.repeats))
                except KeyboardInterrupt:
                    rows.append({"op": case.op, "shape": case.shape, "skipped": "interrupted"})
                    break
                except Exception as error:  # the other cases must not be lost
                    message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    rows.append({"op": case.op, "shape": case.shape, "error": message})
                row = rows[-1]
                said = row.get("speedup over") or row["error"]
                print(f"{row['op']:19} {row['shape']:20} {said}", flush=True)
                store(result, args.output)
    report(result, args.output)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
