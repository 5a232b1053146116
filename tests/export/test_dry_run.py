"""`tdm-r1-export --dry-run`: published transformers at full width, traced without weights."""

from __future__ import annotations

import re

import pytest
import torch

from tdm_r1.export.cli import main
from tdm_r1.export.dry_run import dry_run
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "tiny-sd3", "--dry-run"), "--model is 'tiny-sd3'; allowed with --dry-run: "),
        (("--model", "Tongyi-MAI/Z-Image", "--dry-run"), "Did you mean 'Tongyi-MAI/Z-Image-Turbo'"),
        (("--model", ZIMAGE_TURBO, "--dry-run", "--trt"), "--trt does not go with --dry-run"),
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
