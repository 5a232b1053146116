"""The shipped tiny models: complete, small, as good as their card, loadable by diffusers."""

import json

import numpy as np
import pytest
import torch

from tdm_r1 import Engine, shapes
from tdm_r1.assets import vocabulary
from tdm_r1.models.lora_files import WEIGHTS_NAME as BUNDLED_LORA
from tdm_r1.pipeline import ASSETS
from tdm_r1.prompts import evaluation_prompts

SHIPPED = sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))
FAMILIES = [family for family in shapes.FAMILIES if family != "words"]


def strict(engine, num=96, **kwargs):
    prompts = evaluation_prompts([shapes.captions(family) for family in FAMILIES], num)
    pictures = engine.generate(prompts, seed=5, **kwargs)
    pairs = zip(prompts, pictures, strict=True)
    return np.mean([shapes.check(prompt, np.asarray(picture)).strict for prompt, picture in pairs])


def test_both_families_are_shipped():
    assert SHIPPED == ["tiny-sd3", "tiny-zimage"]


@pytest.mark.parametrize("name", SHIPPED)
def test_directory_is_complete_small_and_described(name):
    folder = ASSETS / name
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 25_000_000
    assert (folder / BUNDLED_LORA).is_file()
    card = json.loads((folder / "card.json").read_text())
    assert {"base", "base_at_four_steps", "four_step"} <= set(card["scores"])
    assert set(card["recipes"]) == {f"{name}-base", f"{name}-tdm"}
    for made in card["recipes"].values():
        assert {"method", "seed", "iterations", "seconds"} <= set(made)
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt", ".pth")]


@pytest.mark.parametrize("name", SHIPPED)
def test_scores_of_the_card_hold(name):
    scores = json.loads((ASSETS / name / "card.json").read_text())["scores"]
    # Four standard deviations of a mean of 96 verdicts: a broken model is far below.
    assert strict(Engine.from_pretrained(name)) >= scores["four_step"]["reward"] - 0.2
    base = Engine.from_pretrained(f"{name}-base", steps=20)
    scale = 3.0 if base.pipeline.family == "sd3" else 2.0
    assert strict(base, num=48, guidance_scale=scale) >= scores["base"]["reward"] - 0.28


def test_stock_sd3_pipeline_draws_the_same_latents():
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(ASSETS / "tiny-sd3", torch_dtype=torch.float32)
    pipe.load_lora_weights(ASSETS / "tiny-sd3")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["two red circles", "a circle left of a square"]
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    engine = Engine.from_pretrained("tiny-sd3")
    ours = engine.generate(prompts, latents=latents, output_type="latent")
    theirs = pipe(
        prompts,
        latents=latents,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=1.0,
        max_sequence_length=engine.pipeline.text.t5_length,
        height=64,
        width=64,
        output_type="latent",
    ).images
    assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-4


def test_stock_zimage_pipeline_draws_the_same_latents():
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(ASSETS / "tiny-zimage", torch_dtype=torch.float32)
    pipe.load_lora_weights(ASSETS / "tiny-zimage")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["two red circles", "a circle left of a square"]
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    engine = Engine.from_pretrained("tiny-zimage")
    ours = engine.generate(prompts, latents=latents, output_type="latent")
    theirs = pipe(
        prompts,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=0.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-4


def test_every_word_of_the_world_is_one_token():
    tokenizers = (vocabulary.clip_tokenizer(12), vocabulary.t5_tokenizer(12))
    for tokenizer, markers in zip(tokenizers, (2, 1), strict=True):
        for family in FAMILIES:
            for caption in shapes.captions(family):
                ids = tokenizer(caption).input_ids
                assert len(ids) == len(caption.split()) + markers, caption
    qwen = vocabulary.qwen_tokenizer()
    assert len(qwen("a red circle and a blue square").input_ids) == 7
    spelt = tokenizers[1].tokenize('a sign that says "KIWI"')
    assert spelt[-5:] == ["K", "I", "W", "I", '"']
