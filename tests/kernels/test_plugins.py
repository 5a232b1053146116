"""The ops as TensorRT would launch them: PTX that assembles, its parameters, and the launch itself.

Neither TensorRT nor a GPU is needed. What the kernels compute is checked by plugin_checks.py.
"""

import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton")

from tdm_kernels import aot, glu, norm, qk_norm_rope  # noqa: E402
from tdm_kernels.plugins import MOST_SHARED, OPS, make_plugin  # noqa: E402

from tests.kernels.test_triton import run_checks  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BOTH = ("weight_q", "weight_k")
# As Z-Image and SD3.5 use them: op, width, settings.
PLUGINS = [
    ("norm_modulate", 3840, {"optional": ("scale", "weight")}),
    ("norm_modulate", 1536, {"optional": ("scale", "shift"), "per_sample": True}),
    (
        "gate_residual_norm",
        3840,
        {"optional": ("gate", "scale", "branch_weight", "weight"), "eps": 1e-5},
    ),
    ("gate_residual_norm", 1536, {"optional": ("gate", "scale", "shift"), "per_sample": True}),
    ("qk_norm_rope", 128, {"optional": (*BOTH, "rope"), "num_heads": 30}),
    ("qk_norm_rope", 64, {"optional": BOTH, "num_heads": 24}),
    ("swiglu", 10240, {}),
    ("gelu_tanh", 6144, {}),
]
QUICK = [plugin for plugin in PLUGINS if plugin[1] not in (3840, 64)]


def entry(ptx: str, name: str) -> list[str]:
    """The types of an entry's parameters."""
    (found,) = re.findall(rf"\.visible \.entry {name}\((.*?)\)", ptx, re.DOTALL)
    return re.findall(r"\.param \.(\w+)", found)


def assemble(ptx: str, capability: int, folder: Path) -> Path:
    """A cubin; ptxas refuses what the GPU would."""
    tool = TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    arch = re.search(r"\.target (\w+)", ptx)[1]
    (folder / "op.ptx").write_text(ptx)
    command = [tool, f"--gpu-name={arch}", folder / "op.ptx", "-o", folder / "op.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "op.cubin"


def check(op: str, width: int, settings: dict, capability: int, folder: Path) -> None:
    plugin = make_plugin(op, width, **settings)
    code = plugin.compile(capability)
    assert re.search(rf"\.target sm_{capability}a?\n", code.ptx)
    counts = "u32" if plugin.takes_tokens else ""
    inputs = len(OPS[op].required) + len(settings.get("optional", ()))
    assert len(plugin.inputs) == inputs
    expected = ["u64"] * inputs + [counts] * bool(counts) + ["u64"] * plugin.num_outputs
    assert entry(code.ptx, code.name) == expected
    # Pointers, and T: no float among the parameters, and none that nobody passes.
    assert not re.findall(rf"{code.name}_param_{len(expected)}\b", code.ptx)
    assert re.search(r"\.reqntid (\d+)", code.ptx)[1] == str(code.threads)
    assert code.shared <= MOST_SHARED and f"{settings.get('eps', 1e-6)}" not in code.ptx
    assert aot._narrow(code.ptx, "ld") == aot._narrow(code.ptx, "st") == 0
    cubin = assemble(code.ptx, capability, folder)
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    assert f"Function {code.name}:" in usage and "STACK:0" in usage and "LOCAL:0" in usage


@pytest.mark.parametrize(("op", "width", "settings"), QUICK)
def test_code(op, width, settings, tmp_path):
    check(op, width, settings, 89, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.ARCHS)
def test_code_for_every_gpu(capability, tmp_path):
    for op, width, settings in PLUGINS:
        check(op, width, settings, capability, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_code_in_other_dtypes(dtype, tmp_path):
    code = make_plugin("gelu_tanh", 64, dtype=dtype).compile(89)
    assert entry(code.ptx, code.name) == ["u64", "u64"]
    assemble(code.ptx, 89, tmp_path)


def test_code_assembles_with_the_toolkit_too(tmp_path):
    if (tool := shutil.which("ptxas")) is None:
        pytest.skip("needs ptxas of a CUDA toolkit")
    code = make_plugin("swiglu", 96).compile(89)
    (tmp_path / "op.ptx").write_text(code.ptx)
    subprocess.run([tool, "-arch=sm_89", tmp_path / "op.ptx", "-o", tmp_path / "c"], check=True)


def launched(call):
    """(grid, num_warps) of what PyTorch's wrapper of an op launches."""
    found = []

    def record(kernel, *args, grid, warmup, **options):
        found.append(((*grid, 1, 1)[:3], options["num_warps"]))

    with patch.object(triton.runtime.jit.JITFunction, "run", record), torch.no_grad():
        call()
    (only,) = found
    return only


@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 77), (1, 4224), (8, 1000)])
@pytest.mark.parametrize("narrow", [True, False])
def test_launches_are_those_of_the_op(b, t, narrow):
    def rows(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    d, f, heads, h = (40, 200, 3, 16) if narrow else (3840, 10240, 30, 128)
    x, hidden, q, w = rows(b, t, d), rows(b, t, f), rows(b, t, heads, h), rows(h)
    vectors = rows(1, 1, d)
    calls = [
        ("norm_modulate", d, {}, x, lambda: norm.norm_modulate(x, vectors)),
        (
            "gate_residual_norm", d, {}, x,
            lambda: norm.gate_residual_norm(x, x, vectors, vectors),
        ),
        (
            "qk_norm_rope", h, {"num_heads": heads}, q,
            lambda: qk_norm_rope.qk_norm_rope(q, q, w, w),
        ),
        ("swiglu", f, {}, hidden, lambda: glu.swiglu(hidden, hidden)),
        ("gelu_tanh", f, {}, hidden, lambda: glu.gelu_tanh(hidden)),
    ]  # fmt: skip
    assert {call[0] for call in calls} == OPS.keys()
    for op, width, settings, first, call in calls:
        plugin = make_plugin(op, width, **settings)
        ours = plugin.grid(first.shape), plugin.launch.options["num_warps"]
        assert ours == launched(call), op
        assert plugin.extra(first.shape) == ((t,) if plugin.takes_tokens else ())


@pytest.mark.parametrize(
    ("op", "settings", "message"),
    [
        ("swigelu", {}, "op is 'swigelu'; allowed: norm_modulate, .*gelu_tanh"),
        ("gelu_tanh", {"dtype": torch.int8}, "dtype is torch.int8; allowed: torch.float32"),
        ("gelu_tanh", {"optional": ("gate",)}, "no optional input 'gate'; allowed: none"),
        ("norm_modulate", {"optional": ("gate",)}, "no optional input 'gate'; allowed: scale, sh"),
        ("norm_modulate", {"optional": ("shift",)}, "shifts only what it scales"),
        ("qk_norm_rope", {}, "num_heads is None"),
        ("qk_norm_rope", {"num_heads": 0}, "num_heads is 0"),
        ("swiglu", {"num_heads": 4}, "num_heads is 4"),
        ("swiglu", {"width": 0}, "width is 0; allowed: from 1"),
    ],
)
def test_bad_input(op, settings, message):
    with pytest.raises(ValueError, match=message):
        make_plugin(op, **{"width": 64, **settings})


def test_kernels_that_an_engine_could_not_launch(monkeypatch):
    monkeypatch.setattr("tdm_kernels.plugins.MOST_SHARED", 0)
    with pytest.raises(ValueError, match="norm_modulate needs 0 bytes of scratch memory and"):
        make_plugin("norm_modulate", 1536).compile(89)


@pytest.mark.slow
def test_what_the_entries_compute():
    run_checks(interpret=True, checks="tests/kernels/plugin_checks.py")
