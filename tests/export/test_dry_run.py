"""`tdm-r1-export --dry-run`: published transformers at full width, traced without weights."""

from __future__ import annotations

import re
import sys
import tempfile

import pytest
import torch

from tdm_r1.export.cli import main
from tdm_r1.export.dry_run import _text, _vae, dry_build, dry_run
from tdm_r1.export.tensorrt import Target
from tdm_r1.models.published import CONFIGS, SD35_MEDIUM, ZIMAGE_TURBO
from tdm_r1.training import sizes

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


def parameters_of_clip(width: int) -> int:
    """Of two layers; position table, projection and every bias and norm included."""
    layer = 4 * (width**2 + width) + 8 * width**2 + 5 * width + 4 * width
    return (49408 + 77) * width + 2 * layer + 2 * width + width**2


# T5's last norm and position biases; Qwen3 without its last layer and norm.
T5 = 32128 * 4096 + 2 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096) + 4096 + 32 * 64
QWEN3 = 151936 * 2560 + (2 * 32 + 2 * 8) * 128 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
ENCODERS = {
    SD35_MEDIUM: {
        "text_encoder": parameters_of_clip(768),
        "text_encoder_2": parameters_of_clip(1280),
        "text_encoder_3": T5,
    },
    ZIMAGE_TURBO: {"text_encoder": QWEN3},
}


@pytest.mark.parametrize("name", [SD35_MEDIUM, ZIMAGE_TURBO])
def test_the_other_parts_have_the_sizes_of_the_published_files(name):
    with torch.device("meta"):
        text, vae = _text(name, None, torch.bfloat16), _vae(torch.bfloat16)
    features = [text.features] if name == ZIMAGE_TURBO else [f for _, f in (*text.clips, text.t5)]
    found = [sum(p.numel() for p in module.parameters()) for module in (*features, vae.model)]
    published = sizes.describe(name, 0)
    assert found == [*published.text.values(), published.vae]


def test_half_precision_keeps_what_transformers_keeps_in_fp32():
    with torch.device("meta"):
        t5 = _text(SD35_MEDIUM, 1, torch.float16).t5[1].model
    kept = {name for name, p in t5.named_parameters() if p.dtype == torch.float32}
    assert kept == {"encoder.block.0.layer.1.DenseReluDense.wo.weight"}
    assert t5.shared.weight is t5.encoder.embed_tokens.weight


@pytest.mark.slow
@pytest.mark.parametrize("name", [SD35_MEDIUM, ZIMAGE_TURBO])
def test_two_blocks_of_full_width(name):
    heard = []
    context, step, *encoders, decoder = dry_run(name, layers=2, precision="bf16", say=heard.append)
    assert (context.name, step.name, decoder.name) == ("context", "transformer", "vae_decoder")
    assert step.parameters == parameters_of_diffusers(name, 2)
    assert step.bytes >= 2 * step.parameters and step.nodes > 100
    assert step.inputs["x_BChw"] == ["batch", 16, "2*rows", "2*cols"]
    tokens, axis = ("text_BPD", "captions") if name == ZIMAGE_TURBO else ("tokens_BTD", "text")
    assert step.inputs[tokens] == ["batch", axis, CONFIGS[name].dim]
    assert {encoder.name: encoder.parameters for encoder in encoders} == ENCODERS[name]
    others = (*encoders, decoder)  # with tables of positions and frequencies
    assert all(0 <= part.bytes - 2 * part.parameters < 2000 for part in others)
    ids = [encoder.inputs["ids_BT"] for encoder in encoders]
    fixed = [["batch", 77]] * (len(ids) - 1)  # CLIP's
    assert ids == [*fixed, ["batch", "text"]]
    assert decoder.inputs["latents_BChw"] == ["batch", 16, "2*rows", "2*cols"]
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
