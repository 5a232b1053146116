"""Engine: the whole pipeline against diffusers', seeds, guidance, rollouts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError
from tdm_r1.graphs import FakeGraphs
from tdm_r1.models.conditioning import Condition
from tdm_r1.pipeline import load_pipeline

PROMPTS = ["two red circles", "a photo of a green square and a very small blue cat, far away"]
SIGMAS = [1.0, 0.75, 0.5, 0.25]
TOLERANCE = 1e-4  # absolute, on latents of unit size after four steps


@pytest.fixture(scope="module")
def sd3(sd3_dir):
    return Engine.from_pretrained(sd3_dir, device="cpu")


@pytest.fixture(scope="module")
def zimage(zimage_dir):
    return Engine.from_pretrained(zimage_dir, device="cpu")


@pytest.fixture(params=["sd3", "zimage"])
def engine(request):
    return request.getfixturevalue(request.param)


def latents(count: int, seed: int = 7, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(count, 16, *size, generator=torch.Generator().manual_seed(seed))


def peer(class_name: str, directory):
    import diffusers

    pipeline = getattr(diffusers, class_name).from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.dtype == torch.float32 and mine.shape == theirs.shape
    assert theirs.std() > 0.1  # a comparison of zeros would prove nothing
    assert (mine - theirs).abs().max() <= TOLERANCE


class TestAgainstDiffusers:
    @pytest.mark.parametrize("guidance", [None, 4.0])
    def test_sd3_euler(self, sd3, sd3_dir, guidance):
        theirs = peer("StableDiffusion3Pipeline", sd3_dir)(
            list(PROMPTS), sigmas=SIGMAS, guidance_scale=guidance or 1.0, max_sequence_length=24,
            latents=latents(2), output_type="latent",
        ).images  # fmt: skip
        mine = sd3.generate(
            PROMPTS, latents=latents(2), output_type="latent", guidance_scale=guidance
        )
        assert_same(mine, theirs)

    @pytest.mark.parametrize("steps", [1, 2, 4, 7])
    def test_sd3_dpm(self, sd3_dpm_dir, steps):
        engine = Engine.from_pretrained(sd3_dpm_dir, device="cpu", steps=steps)
        assert engine.schedule.solver == "dpm2m"
        theirs = peer("StableDiffusion3Pipeline", sd3_dpm_dir)(
            list(PROMPTS), num_inference_steps=steps, guidance_scale=1.0, max_sequence_length=24,
            latents=latents(2), output_type="latent",
        ).images  # fmt: skip
        assert_same(engine.generate(PROMPTS, latents=latents(2), output_type="latent"), theirs)

    @pytest.mark.parametrize("guidance", [None, 3.0])
    @pytest.mark.parametrize("size", [(64, 64), (96, 48)])
    def test_zimage(self, zimage, zimage_dir, guidance, size):
        height, width = size
        start = latents(2, size=(height // 8, width // 8))
        theirs = peer("ZImagePipeline", zimage_dir)(
            list(PROMPTS), num_inference_steps=4, guidance_scale=guidance or 0.0, latents=start,
            height=height, width=width, output_type="latent",
        ).images  # fmt: skip
        mine = zimage.generate(
            PROMPTS, latents=start, output_type="latent", guidance_scale=guidance
        )
        assert_same(mine, theirs)

    def test_images_per_prompt(self, zimage, zimage_dir):
        theirs = peer("ZImagePipeline", zimage_dir)(
            list(PROMPTS), num_inference_steps=4, guidance_scale=0.0, latents=latents(6),
            height=64, width=64, num_images_per_prompt=3, output_type="latent",
        ).images  # fmt: skip
        mine = zimage.generate(
            PROMPTS, latents=latents(6), num_images_per_prompt=3, output_type="latent"
        )
        assert_same(mine, theirs)

    def test_pictures(self, sd3, sd3_dir):
        theirs = peer("StableDiffusion3Pipeline", sd3_dir)(
            PROMPTS[0], sigmas=SIGMAS, guidance_scale=1.0, max_sequence_length=24,
            latents=latents(1),
        ).images[0]  # fmt: skip
        mine = sd3.generate(PROMPTS[0], latents=latents(1))[0]
        assert mine.size == theirs.size == (64, 64)
        difference = np.asarray(mine).astype(int) - np.asarray(theirs).astype(int)
        assert abs(difference).max() <= 1


class TestSeeds:
    def test_same_seed_same_noise_whatever_the_batch(self, engine):
        together = engine.noise([3, 4, 5], 64, 48)
        assert together.shape == (3, 16, 8, 6) and together.dtype == torch.float32
        assert torch.equal(engine.noise([5], 64, 48)[0], together[2])

    def test_image_j_of_prompt_i(self, engine):
        many = engine.generate(PROMPTS, seed=10, num_images_per_prompt=2, output_type="latent")
        one = engine.generate(PROMPTS[1], seed=10 + 1 * 2 + 1, output_type="latent")
        assert (many[3] - one[0]).abs().max() <= TOLERANCE
        assert (many[3] - many[2]).abs().max() > 0.1

    def test_same_call_same_bits(self, engine):
        first = engine.generate(PROMPTS, seed=1, output_type="pt")
        assert torch.equal(first, engine.generate(PROMPTS, seed=1, output_type="pt"))

    def test_a_known_prompt_is_not_stale(self, engine):
        transformer = engine.pipeline.transformer
        before = engine.generate("red", seed=1, output_type="latent")
        name = {"sd3": "context_embedder", "zimage": "cap_embedder.1"}[transformer.family]
        weight = transformer.get_submodule(name).weight
        with torch.no_grad():
            weight.mul_(2.0)  # a power of two: halving restores the bits
        try:
            changed = engine.generate("red", seed=1, output_type="latent")
        finally:
            with torch.no_grad():
                weight.mul_(0.5)
        fresh = Engine(engine.pipeline).generate("red", seed=1, output_type="latent")
        assert (changed - before).abs().max() > 1e-4
        assert torch.equal(engine.generate("red", seed=1, output_type="latent"), before)
        assert torch.equal(fresh, before)

    def test_a_drawn_seed_is_remembered(self, engine):
        first = engine.generate("a", output_type="latent")
        again = engine.generate("a", seed=engine.last_seed, output_type="latent")
        assert torch.equal(first, again)
        engine.generate("a", output_type="latent")
        assert not torch.equal(engine.generate("a", output_type="latent"), first)

    def test_the_prompt_matters(self, engine):
        red, blue = engine.generate(["red", "blue"], latents=latents(1).repeat(2, 1, 1, 1),
                                    output_type="latent")  # fmt: skip
        assert (red - blue).abs().max() > 1e-3


class TestOutputs:
    def test_types(self, engine):
        kwargs = {"seed": 0, "height": 64, "width": 48}
        pil = engine.generate(PROMPTS, output_type="pil", **kwargs)
        array = engine.generate(PROMPTS, output_type="np", **kwargs)
        tensor = engine.generate(PROMPTS, output_type="pt", **kwargs)
        assert len(pil) == 2 and isinstance(pil[0], Image.Image) and pil[0].size == (48, 64)
        assert array.shape == (2, 64, 48, 3) and array.dtype == np.float32
        assert tensor.shape == (2, 3, 64, 48) and tensor.dtype == torch.float32
        assert 0 <= array.min() and array.max() <= 1
        assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
        assert np.array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype(np.uint8))

    @pytest.mark.parametrize("output_type", ["latent", "pt"])
    def test_tensors_are_ordinary(self, engine, output_type):
        out = engine.generate("a", seed=0, output_type=output_type)
        out.mul_(1.0)
        scale = torch.ones(1, requires_grad=True)
        (out * scale).sum().backward()
        assert scale.grad is not None

    def test_default_size(self, engine):
        assert engine.generate("a", seed=0)[0].size == (64, 64)

    def test_callback_sees_every_step(self, engine):
        seen = []
        out = engine.generate("a", seed=0, output_type="latent", callback=lambda *a: seen.append(a))
        assert [(k, t) for k, t, _ in seen] == list(enumerate(engine.schedule.timesteps))
        assert torch.equal(seen[-1][2], out)

    def test_decoding_in_parts_changes_nothing(self, engine, monkeypatch):
        whole = engine.decode(latents(3))
        monkeypatch.setattr(engine, "decode_limit", 64 * 64)
        torch.testing.assert_close(engine.decode(latents(3)), whole, atol=1e-5, rtol=0)

    def test_a_picture_above_the_limit_is_drawn_in_tiles(self, engine):
        tiled, kwargs = Engine(engine.pipeline, decode_limit=32 * 32), {"seed": 1, "height": 96}
        whole, found = (e.generate("a", output_type="pt", **kwargs) for e in (engine, tiled))
        x_BChw = engine.generate("a", output_type="latent", **kwargs)
        with torch.no_grad():
            expected = engine.pipeline.vae.decode_tiled(x_BChw, 4)
        assert torch.equal(found, expected) and found.shape == whole.shape
        assert not torch.allclose(found, whole, atol=1e-3)

    def test_vae_round_trip_shapes(self, engine):
        images = engine.decode(latents(2))
        back = engine.pipeline.vae.encode(images)
        assert back.shape == (2, 16, 8, 8) and back.dtype == torch.float32


class TestRollout:
    def test_is_generate(self, engine):
        cond = engine.pipeline.text.encode(PROMPTS)
        trajectory = engine.rollout(cond, latents(2))
        assert len(trajectory.x) == engine.schedule.num_steps + 1
        assert trajectory.schedule is engine.schedule
        assert torch.equal(trajectory.x[0], latents(2))
        out = engine.generate(PROMPTS, latents=latents(2), output_type="latent")
        assert torch.equal(trajectory.x[-1], out)
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in trajectory.x)

    def test_one_condition_row_serves_a_group(self, engine):
        cond = engine.pipeline.text.encode(PROMPTS[:1])
        group = engine.rollout(cond, latents(4)).x[-1]
        torch.testing.assert_close(
            group, engine.rollout(cond.repeat(4), latents(4)).x[-1], atol=1e-5, rtol=0
        )

    def test_of_another_transformer(self, engine):
        live = type(engine.pipeline.transformer)(engine.pipeline.transformer.config)
        live.load_state_dict(engine.pipeline.transformer.state_dict())
        cond = engine.pipeline.text.encode(PROMPTS)
        mine = engine.rollout(cond, latents(2)).x[-1]
        torch.testing.assert_close(
            engine.rollout(cond, latents(2), transformer=live).x[-1], mine, atol=1e-5, rtol=0
        )
        with torch.no_grad():  # a trainer steps its weights between rollouts: nothing may be stale
            for parameter in live.parameters():
                parameter.mul_(1.1)
        changed = engine.rollout(cond, latents(2), transformer=live).x[-1]
        assert (changed - mine).abs().max() > 1e-3

    def test_states_can_enter_autograd(self, engine):
        cond = engine.pipeline.text.encode(PROMPTS)
        live = engine.pipeline.transformer
        x = engine.rollout(cond, latents(2)).x[1]
        parameter = next(p for n, p in live.named_parameters() if n.endswith("to_q.weight"))
        parameter.requires_grad_(True)
        try:
            live.velocity(x, torch.full((2,), 500.0), cond).square().mean().backward()
            assert parameter.grad.abs().max() > 0
        finally:
            parameter.requires_grad_(False)
            parameter.grad = None

    def test_score_is_the_velocity(self, engine):
        cond, t_B = engine.pipeline.text.encode(PROMPTS), torch.tensor([300.0, 800.0])
        v = engine.score(latents(2), t_B, cond)
        one = engine.score(latents(2)[1:], t_B[1:], cond.rows([1]))
        assert v.dtype == torch.float32 and not v.requires_grad
        torch.testing.assert_close(v[1:], one, atol=1e-5, rtol=0)

    def test_guided(self, engine):
        cond, uncond = (engine.pipeline.text.encode(p) for p in (PROMPTS, ["", ""]))
        w = 3.0
        x = engine.rollout(cond, latents(2), guidance=w, uncond=uncond).x[1]
        t_B = torch.full((2,), engine.schedule.timesteps[0])
        c, u = (engine.score(latents(2), t_B, side) for side in (cond, uncond))
        expected, _ = engine.schedule.step(0, latents(2), u + w * (c - u))
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)

    def test_guidance_needs_uncond(self, engine):
        cond = engine.pipeline.text.encode(PROMPTS)
        with pytest.raises(ConfigError, match="uncond"):
            engine.rollout(cond, latents(2), guidance=2.0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"prompts": []}, "prompts must be"),
            ({"prompts": [3]}, "prompts must be"),
            ({"output_type": "pli"}, "output_type is 'pli'.*Did you mean 'pil'"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
            ({"height": 60}, "height is 60; allowed: a positive multiple of 16"),
            ({"width": -64}, "width is -64"),
            ({"height": 64.0}, "height is 64.0"),
            ({"width": 0}, "width is 0"),
            ({"seed": -1}, "seed is -1"),
            ({"seed": "1"}, "seed is '1'"),
            ({"latents": torch.zeros(2, 16, 8, 8)}, r"is a tensor of \(2, 16, 8, 8\);.*\(1, 16"),
            ({"latents": torch.zeros(16, 8, 8)}, "latents is a tensor of"),
            ({"latents": [[0.0]]}, "latents is a list; this call needs a tensor of"),
            ({"latents": torch.zeros(1, 16, 8, 8, dtype=torch.int64)}, "dtype torch.int64"),
            ({"latents": torch.zeros(1, 16, 8, 8), "height": 128}, r"of \(1, 16, 16, 8\)"),
            ({"prompts": None}, "prompts must be .* got None"),
            ({"prompts": "a\ud800"}, "is no Unicode text"),
            ({"num_images_per_prompt": True}, "num_images_per_prompt is True"),
            ({"callback": 3}, "callback is 3; allowed: a function"),
            ({"guidance_scale": "4"}, "guidance_scale is '4'"),
            ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ],
    )
    def test_generate(self, engine, kwargs, message):
        with pytest.raises(ConfigError, match=message):
            engine.generate(**{"prompts": "a", **kwargs})

    def test_whole_numbers_of_numpy_are_none(self, engine):
        given = {"seed": np.int64(3), "height": np.int32(64), "num_images_per_prompt": np.int8(2)}
        plain = {name: int(value) for name, value in given.items()}
        pictures = [engine.generate("a", output_type="pt", **how) for how in (given, plain)]
        assert torch.equal(*pictures) and engine.last_seed == 3

    @pytest.mark.parametrize("steps", [0, 51, 2.0, True, None])
    def test_steps(self, engine, steps):
        with pytest.raises(ConfigError, match="steps"):
            Engine(engine.pipeline, steps=steps)

    @pytest.mark.parametrize("limit", [1023, 1e7, True, None])
    def test_decode_limit(self, engine, limit):
        with pytest.raises(ConfigError, match=f"decode_limit is {limit}; .* pixels from 1024"):
            Engine(engine.pipeline, decode_limit=limit)

    def test_solver(self, engine):
        with pytest.raises(ConfigError, match="'eular'.*Did you mean 'euler'"):
            Engine(engine.pipeline, solver="eular")


def test_conditions_of_two_widths_are_refused(sd3, zimage):
    cond = zimage.pipeline.text.encode(["a"])
    assert isinstance(cond, Condition)
    with pytest.raises(ConfigError):
        sd3.rollout(cond, latents(1))


def test_recordings_are_of_one_guidance_each(sd3_dpm_dir):
    pipeline = load_pipeline(sd3_dpm_dir, device="cpu", backend="reference")
    pair = Engine(pipeline, graphs=FakeGraphs()), Engine(pipeline)
    cond, uncond = (pipeline.text.encode(prompts) for prompts in (PROMPTS, ["", ""]))
    for weight in (2.0, 5.0):
        given = {"guidance": weight, "uncond": uncond}
        assert torch.equal(*(each.rollout(cond, latents(2), **given).x[-1] for each in pair))
        given = {"seed": 1, "guidance_scale": weight, "output_type": "latent"}
        for callback in (None, lambda *state: None):
            given["callback"] = callback
            assert torch.equal(*(each.generate("a", **given) for each in pair))


def test_a_rollout_of_another_transformer_has_no_version(engine):
    model = engine.pipeline.transformer
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    cond = engine.pipeline.text.encode(PROMPTS)
    assert engine.rollout(cond, latents(2)).weights_version == 0
    assert engine.rollout(cond, latents(2), transformer=other).weights_version is None


def test_clear_cache_forgets_what_was_made_of_a_prompt(sd3_dir, monkeypatch):
    engine = Engine.from_pretrained(sd3_dir, device="cpu")
    text, how = engine.pipeline.text, {"seed": 1, "output_type": "latent"}
    before, encode = engine.generate("red", **how), text.encode
    monkeypatch.setattr(text, "encode", lambda prompts: encode(["blue"] * len(prompts)))
    engine.clear_cache()
    assert not torch.equal(engine.generate("red", **how), before)
