"""Compiles csrc/*.cu for GPUs that are not here, and holds the result to a budget.

`python -m tests.kernels.test_cuda_build > tests/kernels/cuda_budget.json` writes the budget anew: a
change that needs more of anything has to say why.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tdm_kernels import native, native_cuda, registry

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
ARCHS = (80, 89, 90, 100, 120)
NVCC = shutil.which("nvcc")
BUDGET_FILE = Path(__file__).with_name("cuda_budget.json")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="needs nvcc")


def measure(source: Path, arch: int) -> dict[str, dict[str, int]]:
    """Compile a file and return, per kernel, what ptxas reports and how wide its accesses are."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(NVCC), "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "--keep",
            "--keep-dir", folder, "-o", f"{folder}/out.cubin", str(source),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-8000:]
        assert "warning" not in result.stderr, result.stderr[-8000:]
        ptx = (Path(folder) / f"{source.stem}.ptx").read_text()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL))
    parts = re.split(r"Compiling entry function '(\w+)'", result.stderr)[1:]
    return {
        name_of(symbol): {**usage_of(report), **accesses_of(bodies[symbol])}
        for symbol, report in zip(parts[::2], parts[1::2], strict=True)
    }


def name_of(symbol: str) -> str:
    """KERNEL/aligned or KERNEL/any from a mangled name, the template argument."""
    kernel, aligned = re.search(r"_cu_[0-9a-f]{8}\d+(\w+?)ILb([01])E", symbol).groups()
    return f"{kernel}/{'aligned' if aligned == '1' else 'any'}"


def usage_of(report: str) -> dict[str, int]:
    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        return int(found[1]) if found else 0

    return {
        "registers": -(-number(r"Used (\d+) registers") // 8) * 8,  # as the hardware hands them out
        "stack": number(r"(\d+) bytes stack frame"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared": number(r"(\d+) bytes smem"),
    }


def accesses_of(body: str) -> dict[str, int]:
    """Accesses of global memory, those of 16 bytes and those of less; the rest would be generic."""
    found = re.findall(r"\b(ld|st)\.((?:global|v\d|[bfsu]\d)[\w.]*)\s", body)
    bits = [
        int((re.search(r"v(\d)", kind) or [0, 1])[1]) * int(re.search(r"[bfsu](\d+)$", kind)[1])
        for _, kind in found
    ]
    assert all(kind.startswith("global") for _, kind in found), found
    return {"narrow": sum(b < 128 for b in bits), "wide": sum(b == 128 for b in bits)}


def excess(arch: int) -> list:
    budget = json.loads(BUDGET_FILE.read_text())
    used = {name: row for source in SOURCES for name, row in measure(source, arch).items()}
    assert set(used) == set(budget)
    return [
        (name, key, value, budget[name][key])
        for name, row in used.items()
        for key, value in row.items()
        if (value > budget[name][key] if key != "wide" else value < budget[name][key])
    ]


@needs_nvcc
@pytest.mark.parametrize(
    "arch", [a if a == 90 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS]
)
def test_kernels_keep_their_budget(arch):
    assert not excess(arch)


def test_the_budget_allows_no_spills_and_only_wide_accesses_where_aligned():
    for name, row in json.loads(BUDGET_FILE.read_text()).items():
        assert row["stack"] == row["spills"] == 0, name
        threads = 1024 if name.startswith("residual_norm") else 256
        assert row["registers"] * threads <= 65536, name  # one block at least fits a processor
        assert row["wide"] > 0 and row["narrow"] == 0 if name.endswith("aligned") else True, name


@pytest.mark.skipif(bool(native.load()), reason=f"the native library {native.load()}")
def test_the_library_needs_no_cuda_to_load():
    """Whatever it was built with: this torch, with CUDA or without, has all that it asks for."""
    assert native.load() == ""
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key(
        "tdm_kernels::residual_norm", "CUDA"
    )
    assert has_kernels == bool(native_cuda.architectures())


def test_machine_code_serves_its_major_version_and_ptx_all_later_ones():
    built = "80 90-real 100-real 120-virtual"
    for capability, served in (
        ((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((11, 0), True),
    ):  # fmt: skip
        assert native_cuda.serves(built, *capability) == served
    assert not native_cuda.serves("90-real 120-virtual", 10, 0)
    assert not native_cuda.serves("90-virtual", 8, 0)
    assert native_cuda.serves("all", 9, 0)


def test_native_serves_inference_on_cuda_after_triton(monkeypatch):
    monkeypatch.setattr(native_cuda, "load", lambda device: "")
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it now raises ImportError
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for backend in ("auto", "native"):
            ops = registry.select(backend, "cuda", dtype, grad=False)
            assert ops.gate_residual_norm is native.gate_residual_norm
            assert ops.swiglu is registry.reference.swiglu
    assert registry.select("auto", "cuda", dtype).norm_modulate is registry.reference.norm_modulate
    with pytest.raises(ValueError, match="norm_modulate: native has no backward pass"):
        registry.select("native", "cuda")
    with pytest.raises(ValueError, match="norm_modulate: native runs on a CPU only"):
        registry.select("native", "mps", grad=False)
    table = registry.explain("cuda", head_dim=512, grad=False)
    assert table["qk_norm_rope"]["native"] == "reads heads of at most 256, not 512"


def test_says_why_the_library_has_no_cuda_kernels(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(native, "load", lambda: "is not built")
    assert native_cuda.load(cuda) == "is not built"
    monkeypatch.setattr(native, "load", lambda: "")
    monkeypatch.setattr(native_cuda, "architectures", lambda: "")
    assert native_cuda.load(cuda).startswith("was built without CUDA")
    monkeypatch.setattr(native_cuda, "architectures", lambda: "90-real")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert native_cuda.load(cuda) == "was built for 90-real, the device is 86"


def main() -> int:
    """Print the budget: per kernel, the most of any architecture, and the fewest wide accesses."""
    table: dict[str, dict[str, int]] = {}
    for source in SOURCES:
        for arch in ARCHS:
            for name, row in measure(source, arch).items():
                known = table.setdefault(name, row)
                for key, value in row.items():
                    known[key] = (min if key == "wide" else max)(known[key], value)
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    print("{\n" + ",\n".join(lines) + "\n}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
