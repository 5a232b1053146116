"""Finding a model, reading how it is sampled, merging a LoRA, and refusing what is not a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tdm_r1.errors import LoadError
from tdm_r1.models.lora_files import WEIGHTS_NAME
from tdm_r1.pipeline import SHIPPED, load_pipeline, resolve_dtype


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.fixture
def copy(sd3_dir, tmp_path):
    return shutil.copytree(sd3_dir, tmp_path / "model")


def test_facts_of_a_directory(sd3_dir, sd3_dpm_dir, zimage_dir):
    sd3, dpm, zimage = (load_pipeline(d, device="cpu") for d in (sd3_dir, sd3_dpm_dir, zimage_dir))
    assert [p.family for p in (sd3, dpm, zimage)] == ["sd3", "sd3", "zimage"]
    assert [p.default_solver for p in (sd3, dpm, zimage)] == ["euler", "dpm2m", "euler"]
    assert [p.shift for p in (sd3, dpm, zimage)] == [3.0, 3.0, 3.0]
    assert [p.default_size for p in (sd3, dpm, zimage)] == [64, 64, 64]
    assert all(p.transformer.family == p.text.family == p.family for p in (sd3, dpm, zimage))
    assert not any(p.requires_grad for p in sd3.transformer.parameters())
    assert sd3.path == sd3_dir and sd3.name == str(sd3_dir)


def test_bfloat16_everywhere(sd3_dir):
    pipeline = load_pipeline(sd3_dir, device="cpu", dtype="bfloat16")
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.bfloat16
    assert pipeline.text.encode(["a"]).tokens_BTE.dtype == torch.bfloat16


def random_lora(transformer, rank=2):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_v")):
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator)
            tensors[f"transformer.{name}.lora_A.weight"] = down
            tensors[f"transformer.{name}.lora_B.weight"] = up
    return tensors


def test_lora_is_merged_only_when_named(sd3_dir, copy):
    from safetensors.torch import save_file

    plain = load_pipeline(sd3_dir, device="cpu").transformer
    tensors = random_lora(plain)
    path = copy / "pytorch_lora_weights.safetensors"
    save_file(tensors, path)
    unasked = load_pipeline(copy, device="cpu").transformer.state_dict()
    pipeline = load_pipeline(copy, device="cpu", lora=copy)  # the folder of a LoRA, too
    assert pipeline.lora == path
    merged = pipeline.transformer.state_dict()
    for key, before in plain.state_dict().items():
        assert torch.equal(unasked[key], before)
        stem = f"transformer.{key.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in tensors:
            assert torch.equal(merged[key], before)
            continue
        delta = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(merged[key], before + delta, atol=1e-5, rtol=1e-5)


def test_merged_lora_equals_diffusers(sd3_dir, copy):
    from diffusers import StableDiffusion3Pipeline
    from safetensors.torch import save_file

    from tdm_r1.engine import Engine

    engine = Engine.from_pretrained(sd3_dir, device="cpu")
    tensors = {k: 0.1 * v for k, v in random_lora(engine.pipeline.transformer).items()}
    save_file(tensors, copy / "lora.safetensors", metadata={"format": "pt"})
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_dir)
    pipeline.load_lora_weights(copy, weight_name="lora.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "two red circles", sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0,
        max_sequence_length=24, latents=start, output_type="latent",
    ).images  # fmt: skip
    plain = engine.generate("two red circles", latents=start, output_type="latent")
    engine = Engine.from_pretrained(sd3_dir, device="cpu", lora=copy / "lora.safetensors")
    mine = engine.generate("two red circles", latents=start, output_type="latent")
    assert (mine - theirs).abs().max() <= 1e-4 < (plain - theirs).abs().max()


class TestRefusals:
    def test_misspelt_shipped_name(self):
        with pytest.raises(LoadError, match="Did you mean 'tiny-sd3'") as caught:
            load_pipeline("tiny-sd4")
        assert all(name in str(caught.value) for name in SHIPPED)

    def test_hub_id_offline(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(LoadError, match="'nobody/nothing' is not a local directory"):
            load_pipeline("nobody/nothing")

    def test_a_file(self, sd3_dir):
        with pytest.raises(LoadError, match="is a file"):
            load_pipeline(sd3_dir / "model_index.json")

    def test_not_a_model(self, tmp_path):
        with pytest.raises(LoadError, match="model_index.json"):
            load_pipeline(tmp_path)

    @pytest.mark.parametrize(
        ("file", "hint"),
        [
            ("model/model_index.json", "model is one"),
            (WEIGHTS_NAME, f"{WEIGHTS_NAME} is a LoRA, for `lora`"),
            ("export.json", "it is an export, which takes backend='onnx'"),
        ],
    )
    def test_what_a_run_or_an_export_left(self, tmp_path, file, hint):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        with pytest.raises(LoadError, match=f"no model in diffusers' format: .*{hint}"):
            load_pipeline(tmp_path)

    def test_another_model(self, copy):
        edit_json(copy / "model_index.json", _class_name="FluxPipeline")
        with pytest.raises(LoadError, match="FluxPipeline; supported: StableDiffusion3Pipeline"):
            load_pipeline(copy)

    def test_another_scheduler(self, copy):
        edit_json(copy / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
        with pytest.raises(LoadError, match="DDIMScheduler"):
            load_pipeline(copy)

    @pytest.mark.parametrize(
        "change", [{"shift": 0}, {"shift": "3"}, {"use_dynamic_shifting": True}]
    )
    def test_bad_scheduler(self, copy, change):
        edit_json(copy / "scheduler" / "scheduler_config.json", **change)
        with pytest.raises(LoadError, match=next(iter(change))):
            load_pipeline(copy)

    def test_broken_json(self, copy):
        (copy / "model_index.json").write_text("{")
        with pytest.raises(LoadError, match="is not JSON"):
            load_pipeline(copy)

    @pytest.mark.parametrize("folder", ["transformer", "vae", "scheduler", "text_encoder"])
    def test_missing_part(self, copy, folder):
        shutil.rmtree(copy / folder)
        with pytest.raises(LoadError, match=folder):
            load_pipeline(copy, device="cpu")

    @pytest.mark.parametrize("folder", ["transformer", "vae"])
    def test_truncated_weights(self, copy, folder):
        weights = copy / folder / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        with pytest.raises(LoadError, match=folder):
            load_pipeline(copy, device="cpu")

    def test_incomplete_vae(self, copy):
        from safetensors.torch import load_file, save_file

        weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        del tensors["decoder.conv_in.bias"]
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(LoadError, match="decoder.conv_in.bias"):
            load_pipeline(copy, device="cpu")

    def test_vae_of_another_kind(self, copy):
        config = copy / "vae" / "config.json"
        config.write_text(config.read_text().replace('"silu"', '"gelu"'))
        with pytest.raises(LoadError, match="act_fn is 'gelu'; supported: silu"):
            load_pipeline(copy, device="cpu")

    @pytest.mark.parametrize("lora", ["absent.safetensors"])
    def test_missing_lora(self, sd3_dir, lora):
        with pytest.raises(LoadError, match="absent"):
            load_pipeline(sd3_dir, device="cpu", lora=lora)

    @pytest.mark.parametrize("device", ["cdua", "tpu:0"])
    def test_device(self, sd3_dir, device):
        with pytest.raises(LoadError, match=f"device is '{device}'"):
            load_pipeline(sd3_dir, device=device)

    @pytest.mark.parametrize("dtype", ["float16", torch.float16, "fp8"])
    def test_dtype(self, dtype):
        with pytest.raises(LoadError, match="dtype is"):
            resolve_dtype(dtype, torch.device("cpu"))

    def test_weights(self, sd3_dir):
        with pytest.raises(LoadError, match="weights is 'ema'"):
            load_pipeline(sd3_dir, weights="ema")
