"""`tdm-r1-export --dry-run`: published transformers at full width, traced without weights."""

from __future__ import annotations

import re
import sys
import tempfile

import pytest
import torch

from tdm_r1.export.cli import main
from tdm_r1.export.dry_run import dry_build, dry_run
from tdm_r1.export.tensorrt import Target
from tdm_r1.models.published import CONFIGS, SD35_MEDIUM, ZIMAGE_TURBO

pytest.importorskip("onnxscript")


def parameters_of_diffusers(name: str, layers: int) -> int:
    """What diffusers' own class of this width and depth has."""
    from diffusers import SD3Transformer2DModel, ZImageTransformer2DModel

    with torch.device("meta"):
        if name == ZIMAGE_TURBO:
            model = ZImageTransformer2DModel(n_layers=layers, axes_lens=[1536, 512, 512])
        else:
            config = CONFIGS[name]
            model = SD3Transformer2DModel(
                num_layers=layers, num_attention_heads=24, caption_projection_dim=1536,
                pos_embed_max_size=384, dual_attention_layers=(0,), qk_norm="rms_norm",
                joint_attention_dim=config.joint_attention_dim,
            )  # fmt: skip
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", [SD35_MEDIUM, ZIMAGE_TURBO])
def test_two_blocks_of_full_width(name):
    heard = []
    context, step = dry_run(name, layers=2, precision="bf16", say=heard.append)
    assert (context.name, step.name) == ("context", "transformer")
    assert step.parameters == parameters_of_diffusers(name, 2)
    assert step.bytes >= 2 * step.parameters and step.nodes > 100
    assert step.inputs["x_BChw"] == ["batch", 16, "2*rows", "2*cols"]
    tokens, axis = ("text_BPD", "captions") if name == ZIMAGE_TURBO else ("tokens_BTD", "text")
    assert step.inputs[tokens] == ["batch", axis, CONFIGS[name].dim]
    assert heard[0].startswith("batch 1 to 4, height 512 to 1536, width 512 to 1536, text ")
    assert re.match(r"transformer: \d+ nodes over a model of \d+ M parameters, \d", heard[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", [SD35_MEDIUM, ZIMAGE_TURBO])
def test_engines_of_two_blocks_of_full_width(name, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    heard = []
    target = Target(("8.9",))
    found = dry_build(name, target, layers=2, precision="bf16", say=heard.append)
    assert [built.name for built in found] == ["context", "transformer"]
    context, step = found
    # Of the weights the engines hold nearly all, each once, in bf16, and little else.
    held = 2 * parameters_of_diffusers(name, 2)
    assert 0.9 * held < context.bytes + step.bytes < 1.1 * held
    assert set(context.products) == set(step.products) == {"BF16"}
    assert step.products["BF16"] > 20
    assert re.match(r"transformer.engine: \d\.\d\d GB, \d+ s; products: \d+ BF16", heard[-1])
    assert not list(tmp_path.glob("tdm-r1-export-*"))  # nothing is kept


def test_engines_are_asked_for_before_minutes_of_tracing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert main(["--model", ZIMAGE_TURBO, "--dry-run", "--trt"]) == 2
    said = capsys.readouterr()
    assert "pip install tensorrt-rtx" in said.err and not said.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "tiny-sd3", "--dry-run"), "--model is 'tiny-sd3'; allowed with --dry-run: "),
        (("--model", "Tongyi-MAI/Z-Image", "--dry-run"), "Did you mean 'Tongyi-MAI/Z-Image-Turbo'"),
        (
            ("--model", ZIMAGE_TURBO, "--dry-run", "--trt", "--plugins"),
            "--plugins does not go with --dry-run",
        ),
        (("--model", ZIMAGE_TURBO, "--dry-run", "--refit"), "--refit does not go with --dry-run"),
        (("--model", ZIMAGE_TURBO, "--dry-run", "--precision", "x"), "--precision is 'x'"),
        (("--model", ZIMAGE_TURBO), "--output is missing; allowed without it: --dry-run"),
        (("--model", ZIMAGE_TURBO, "--dry-run", "--heights", "8", "64"), "--heights is 8 64"),
    ],
)
def test_options(capsys, options, message):
    assert main(list(options)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
