"""The text encoders against diffusers' own `encode_prompt`, and their cache."""

from __future__ import annotations

import shutil

import pytest
import torch

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.text import load_text_encoder

PROMPTS = ["two red circles", "a photo of a green square and a very small blue cat, far away"]
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def sd3_text(sd3_dir):
    return load_text_encoder(sd3_dir, "sd3", width=64, **CPU)


@pytest.fixture(scope="module")
def zimage_text(zimage_dir):
    return load_text_encoder(zimage_dir, "zimage", width=48, **CPU)


def sd3_reference(directory, prompts, length, **components):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(directory, **components)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return tokens, pooled


def test_sd3_equals_diffusers(sd3_dir, sd3_text):
    cond = sd3_text.encode(PROMPTS)
    tokens, pooled = sd3_reference(sd3_dir, PROMPTS, 24)
    assert cond.tokens_BTE.shape == (2, 16 + 24, 64)
    assert cond.lengths_B.tolist() == [40, 40]
    torch.testing.assert_close(cond.tokens_BTE, tokens, atol=1e-6, rtol=0)
    torch.testing.assert_close(cond.pooled_BE, pooled, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prompt", ["", *PROMPTS])
def test_sd3_traced_for_one_prompt_equals_the_batch(sd3_text, prompt):
    sd3_text.clear_cache()
    one = sd3_text.encode([prompt])
    for _, features in [*sd3_text.clips, sd3_text.t5]:
        assert [tuple(shape) for shape in features._traces] in ([(1, 16)], [(1, 24)])
    sd3_text.clear_cache()
    batch = sd3_text.encode([prompt, "another"]).rows(slice(1))
    torch.testing.assert_close(one.tokens_BTE, batch.tokens_BTE, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.pooled_BE, batch.pooled_BE, atol=1e-6, rtol=0)


def test_sd3_traces_follow_their_weights(sd3_dir, recwarn, caplog):
    text = load_text_encoder(sd3_dir, "sd3", width=64, **CPU)
    before = text.encode(["a"])
    assert not recwarn.list and "transformers" not in caplog.text
    with torch.no_grad():
        for _, features in [*text.clips, text.t5]:
            for parameter in features.parameters():
                parameter.mul_(0.5)
    text.clear_cache()
    after = text.encode(["a"])
    assert not torch.allclose(before.tokens_BTE, after.tokens_BTE, atol=1e-3)
    text.clear_cache()
    batch = text.encode(["a", "b"]).rows(slice(1))
    torch.testing.assert_close(after.tokens_BTE, batch.tokens_BTE, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [8, 128])
def test_sd3_t5_length_can_be_chosen(sd3_dir, length):
    text = load_text_encoder(sd3_dir, "sd3", width=64, t5_length=length, **CPU)
    tokens, _ = sd3_reference(sd3_dir, PROMPTS, length)
    torch.testing.assert_close(text.encode(PROMPTS).tokens_BTE, tokens, atol=1e-6, rtol=0)


def test_sd3_without_t5_has_zeros_there(sd3_no_t5_dir):
    cond = load_text_encoder(sd3_no_t5_dir, "sd3", width=64, **CPU).encode(PROMPTS)
    nothing = {"text_encoder_3": None, "tokenizer_3": None}
    tokens, pooled = sd3_reference(sd3_no_t5_dir, PROMPTS, 256, **nothing)
    assert cond.tokens_BTE.shape == (2, 16 + 256, 64)
    torch.testing.assert_close(cond.tokens_BTE, tokens, atol=1e-6, rtol=0)
    torch.testing.assert_close(cond.pooled_BE, pooled, atol=1e-6, rtol=0)


def test_zimage_equals_diffusers(zimage_dir, zimage_text):
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(zimage_dir)
    prompts = [*PROMPTS, "", " ".join(["a red cat"] * 200)]  # the last is cut at 512 tokens
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    cond = zimage_text.encode(prompts)
    assert cond.pooled_BE is None
    assert cond.lengths_B.tolist() == [len(tokens) for tokens in expected]
    assert cond.lengths_B.max() == 512
    for tokens_TE, row_TE, length in zip(expected, cond.tokens_BTE, cond.lengths_B, strict=True):
        torch.testing.assert_close(row_TE[:length], tokens_TE, atol=2e-5, rtol=1e-5)
        assert not row_TE[length:].any()


@pytest.mark.parametrize("family", ["sd3_text", "zimage_text"])
def test_a_prompt_does_not_depend_on_its_batch(family, request):
    text = request.getfixturevalue(family)
    text.clear_cache()
    together = text.encode(PROMPTS)
    text.clear_cache()
    alone = text.encode(PROMPTS[:1])
    length = int(alone.lengths_B[0])
    torch.testing.assert_close(
        together.tokens_BTE[0, :length], alone.tokens_BTE[0], atol=1e-5, rtol=0
    )


def test_each_prompt_is_run_once(zimage_text, monkeypatch):
    runs = []
    encode = zimage_text._encode
    monkeypatch.setattr(
        zimage_text, "_encode", lambda prompts: runs.append(prompts) or encode(prompts)
    )
    zimage_text.clear_cache()
    cond = zimage_text.encode(["a", "b", "a"])
    zimage_text.encode(["b", "c"])
    assert runs == [["a", "b"], ["c"]]
    assert torch.equal(cond.tokens_BTE[0], cond.tokens_BTE[2])
    zimage_text.clear_cache()
    zimage_text.encode(["a"])
    assert runs[-1] == ["a"]


def test_the_cache_forgets_the_oldest(zimage_text, monkeypatch):
    monkeypatch.setattr(zimage_text, "cache_size", 2)
    zimage_text.clear_cache()
    zimage_text.encode(["a", "b"])
    zimage_text.encode(["a"])
    zimage_text.encode(["c"])
    assert list(zimage_text._cache) == ["a", "c"]
    assert len(zimage_text.encode(["a", "b", "c", "d"])) == 4  # more prompts than the cache holds


def test_features_can_enter_autograd(zimage_text):
    tokens = zimage_text.encode(["a"]).tokens_BTE
    weight = torch.ones(tokens.shape[-1], requires_grad=True)
    (tokens @ weight).sum().backward()
    assert weight.grad.any()


@pytest.mark.parametrize("prompts", [[], "two red circles", [1], [None, "a"]])
def test_bad_prompts(zimage_text, prompts):
    with pytest.raises(ConfigError, match="prompts"):
        zimage_text.encode(prompts)


@pytest.mark.parametrize("length", [0, 513])
def test_bad_t5_length(sd3_dir, length):
    with pytest.raises(ConfigError, match=f"t5_length is {length}"):
        load_text_encoder(sd3_dir, "sd3", width=64, t5_length=length, **CPU)


@pytest.mark.parametrize("folder", ["text_encoder_2", "tokenizer_3"])
def test_missing_component(sd3_dir, tmp_path, folder):
    broken = shutil.copytree(sd3_dir, tmp_path / "broken")
    shutil.rmtree(broken / folder)
    with pytest.raises(LoadError, match=folder):
        load_text_encoder(broken, "sd3", width=64, **CPU)


def test_missing_tensors_are_named(zimage_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(zimage_dir, tmp_path / "broken")
    weights = next((broken / "text_encoder").glob("*.safetensors"))
    tensors = load_file(weights)
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="layers.0.mlp.up_proj.weight"):
        load_text_encoder(broken, "zimage", width=48, **CPU)


def test_truncated_weights(zimage_dir, tmp_path):
    broken = shutil.copytree(zimage_dir, tmp_path / "broken")
    weights = next((broken / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match="text_encoder"):
        load_text_encoder(broken, "zimage", width=48, **CPU)


def test_a_text_that_is_cut_is_said_once_with_its_tokens(sd3_text, zimage_text, caplog):
    long = "far away " * 400
    for text in (sd3_text, zimage_text):
        text.clear_cache()
        text.encode(["short", long])
        text.encode([long])
    length, tokenizer = sd3_text.t5_length, sd3_text.t5[0]
    found = len(tokenizer(long, verbose=False).input_ids)
    first, second = caplog.messages
    assert first.startswith(f"{length} of {found} tokens are read of the prompt 'far away far")
    assert second.startswith("512 of ") and len(second) < 120
    caplog.clear()
    for count in range(1, 9):
        fits = len(tokenizer(text := "far " * count, verbose=False).input_ids) <= length
        sd3_text.encode([text])
        assert bool(caplog.messages) != fits, count
        caplog.clear()
