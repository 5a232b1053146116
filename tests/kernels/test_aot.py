"""Compiles the Triton kernels for GPUs that are not here, and holds the result to a budget.

`python -m tdm_kernels.aot > tests/kernels/aot_budget.json` writes the budget anew: a change that
needs more of anything has to say why.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from tdm_kernels import aot, glu, norm  # noqa: E402

BUDGET = json.loads((Path(__file__).parent / "aot_budget.json").read_text())
# One launch per kernel and pass, the largest: what `make quick` compiles, for one architecture.
QUICK = [
    "zimage/gate_residual_norm/train",
    "zimage/gate_residual_norm/backward",
    "zimage/qk_norm_rope/infer",
    "zimage/qk_norm_rope/backward",
    "zimage/swiglu/infer",
    "zimage/swiglu/backward",
    "sd3/norm_modulate_2/backward",
    "sd3/gelu_tanh/infer",
    "sd3/gelu_tanh/backward",
    "zimage/gate_residual_norm/fp8",
    "zimage/swiglu/fp8",
    "zimage/joint_attention_ragged/infer",
    "sd3/solver_step/infer",
    "vae/group_moments_kernel_512/infer",
    "vae/group_affine_kernel_512/infer",
    "vae/affine_silu_kernel_512/infer",
]


@pytest.fixture(scope="module")
def launches():
    return aot.production_launches()


def excess(name, launch, arch):
    """What a launch uses beyond its budget."""
    used = asdict(aot.measure(launch, arch))
    return {k: (name, arch, v, BUDGET[name][k]) for k, v in used.items() if v > BUDGET[name][k]}


@pytest.mark.parametrize("name", QUICK)
def test_kernels_keep_their_budget(launches, name):
    assert not excess(name, launches[name], 90)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_every_launch_keeps_its_budget(launches, arch):
    runs = {n: launch for n, launch in launches.items() if arch in aot.archs_for(launch)}
    assert not [over for n, launch in runs.items() if (over := excess(n, launch, arch))]


def test_the_budget_allows_no_spills_and_only_scalars_to_be_narrow(launches):
    assert set(BUDGET) == set(launches)
    kernels = {launch.kernel for launch in launches.values()}
    # Four ops' families both ways, one that quantises, attention, a solver's step, GroupNorm's 3.
    assert len(kernels) == 14
    assert kernels == {launches[name].kernel for name in QUICK}
    for name, row in BUDGET.items():
        assert row["local"] == 0, name
        if name.endswith("fp8"):
            # A row's scale, and the blocks of a row, 8 bytes a thread: five of 10240.
            assert row["narrow_loads"] == 0 and row["narrow_stores"] <= 6, name
        else:
            # At most a row's mean, 1/sigma and 1/rms; and the [H] partial sums of q and k.
            assert row["narrow_loads"] <= 3 and row["narrow_stores"] <= 3, name
        if name.startswith("vae"):
            # Once per program: vectors over the channels, which lie 8 to a thread in the pixels.
            assert row["narrow_loads"] <= 3 and row["narrow_stores"] <= 2, name
            if "silu" in name:
                assert not row["narrow_stores"], name
        elif name.endswith("infer"):
            # A sample's length.
            assert row["narrow_loads"] == ("ragged" in name) and not row["narrow_stores"], name
        assert row["shared"] <= 99 * 1024, name  # of sm_89 and sm_120
        # 65536 registers serve at least one program of this many threads.
        assert row["registers"] * launches[name].options["num_warps"] * 32 <= 65536, name


def test_measures_spills_and_narrow_accesses(launches):
    """The numbers move when they should: too few threads spill, odd strides cannot be vectors."""
    big = launches["zimage/gate_residual_norm/backward"]
    starved = replace(big, options={**big.options, "num_warps": 1})
    assert aot.measure(starved, 90).local > 0
    x = torch.empty(2, 4096, 6147, dtype=torch.bfloat16, device="meta")
    (odd,) = aot.capture(lambda: glu.gelu_tanh(x[..., :6144]))
    assert aot.measure(odd, 90).narrow_loads > 0


def test_e4m3_is_rounded_by_the_hardware_where_there_is_any(launches):
    launch = launches["sd3/quantize_rows/fp8"]
    assert aot.archs_for(launch) == (89, 90, 100, 120)
    # From fp32 in one step; by way of a truncated fp16 on 8.9.
    for arch, source in ((89, "f16x2"), (90, "f32"), (120, "f32")):
        ptx = aot.compiled_for(launch, arch).asm["ptx"]
        assert set(re.findall(r"cvt\.\w+\.satfinite\.e4m3x2\.\w+", ptx)) == {
            f"cvt.rn.satfinite.e4m3x2.{source}"
        }
    with pytest.raises(triton.CompilationError, match="fp8e4nv not supported"):
        aot.measure(launch, 80)


def test_no_power_of_attention_comes_from_a_fused_operation(launches):
    """Its product is not rounded as the maximum was: of large logits the largest would not be 0."""
    names = [name for name in launches if "joint_attention" in name]
    assert len(names) == 3
    for name in names:
        ptx = aot.compiled_for(launches[name], 90).asm["ptx"]
        made = {to: by for by, to in re.findall(r"^\s*([\w.]+)\s+(%\w+),", ptx, re.MULTILINE)}
        powers = re.findall(r"\bex2\.\S+\s+%\w+,\s*(%\w+);", ptx)
        assert powers and {made[x].split(".")[0] for x in powers} == {"mul"}, name


def test_capture_records_what_a_launch_would_compile():
    x = torch.empty(2, 7, 24, device="meta")
    (launch,) = aot.capture(lambda: norm.norm_modulate(x))
    assert launch.kernel is norm.residual_norm_kernel
    assert launch.args[0] is x and launch.options == {
        "D": 24, "NUM_SETS": 1, "NUM_BRANCHES": 1, "BLOCK_D": 32, "num_warps": 1,
    }  # fmt: skip
