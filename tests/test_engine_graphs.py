"""The engine on graphs: eager's bits for every shape, prompt and weight; what it refuses."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, DeviceError, GraphError, LoadError, NumericsError
from tdm_r1.graphs import CudaGraphs, FakeGraphs, GraphPool
from tdm_r1.models import lora
from tdm_r1.models.loading import load_transformer
from tdm_r1.pipeline import load_pipeline
from tdm_r1.training.roles import Role
from tdm_r1.vae import VAE
from tests.test_engine import PROMPTS, latents

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=["sd3_dpm", "zimage"])
def directory(request):
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.fixture(scope="module")
def pipeline(directory):
    # recordings keep buffers of their own, whose addresses change with the weights
    return load_pipeline(directory, device="cpu", backend="reference")


@pytest.fixture
def pair(pipeline):
    """(on graphs, eager), over the same weights."""
    return Engine(pipeline, graphs=FakeGraphs()), Engine(pipeline)


def same(pair, prompts, **kwargs) -> torch.Tensor:
    """Draw on both engines; the bits must agree."""
    kwargs.setdefault("output_type", "pt")
    mine, like = (engine.generate(prompts, **kwargs) for engine in pair)
    assert torch.equal(mine, like) and like.std() > 0.01
    return mine


class TestBitForBit:
    def test_every_kind_of_call(self, pair):
        kinds = [
            {"seed": 1},
            {"seed": 2, "output_type": "latent"},
            {"seed": 3, "num_images_per_prompt": 3},
            {"seed": 4, "guidance_scale": 3.0},
            {"seed": 5, "height": 48, "width": 96},
        ]
        for _ in range(2):  # the second time from the graphs of the first
            for kind in kinds:
                same(pair, PROMPTS[0], **kind)
            same(pair, PROMPTS, seed=6)
        graphs = pair[0].graphs
        assert len(graphs.graphs) == graphs.backend.num_captures == len(kinds) + 1

    def test_pictures(self, pair):
        mine, like = (engine.generate(PROMPTS[0], seed=1) for engine in pair)
        assert mine[0].tobytes() == like[0].tobytes() and mine[0].size == (64, 64)
        before = mine[0].tobytes()
        pair[0].generate(PROMPTS[1], seed=2)
        assert mine[0].tobytes() == before

    def test_another_prompt_of_the_same_length_is_no_new_graph(self, pair):
        first = same(pair, "two red circles", seed=1)
        second = same(pair, "two blue circles", seed=1)
        assert not torch.equal(first, second)
        assert len(pair[0].graphs.graphs) == 1

    def test_callbacks_see_every_step_of_a_graph_each(self, pair):
        seen: list = [[], []]
        for engine, steps in zip(pair, seen, strict=True):
            engine.generate("a", seed=1, callback=lambda k, t, x, to=steps: to.append((k, t, x)))
        assert [s[:2] for s in seen[0]] == [s[:2] for s in seen[1]]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(*seen, strict=True))
        assert len(pair[0].graphs.graphs) == pair[0].schedule.num_steps + 1  # and the decoder

    def test_tiles(self, pipeline):
        pair = [Engine(pipeline, graphs=g, decode_limit=2048) for g in (FakeGraphs(), "off")]
        for _ in range(2):
            same(pair, PROMPTS, seed=1)
        assert pair[0].graphs.backend.num_captures == 1

    def test_rollouts_keep_every_latent(self, pair):
        cond = pair[0].pipeline.text.encode(PROMPTS)
        for _ in range(2):
            mine, like = (engine.rollout(cond, latents(2)) for engine in pair)
            assert all(torch.equal(a, b) for a, b in zip(mine.x, like.x, strict=True))
        assert pair[0].graphs.backend.num_captures == 1

    def test_live_modules_and_autocast_run_without(self, pair):
        engine = pair[0]
        live = type(engine.pipeline.transformer)(engine.pipeline.transformer.config)
        live.load_state_dict(engine.pipeline.transformer.state_dict())
        cond = engine.pipeline.text.encode(PROMPTS)
        engine.rollout(cond, latents(2), transformer=live)
        with torch.autocast("cpu", torch.bfloat16):
            engine.rollout(cond, latents(2))
        assert not engine.graphs.graphs

    def test_fused_ops_and_recordings_below(self, directory):
        fused = load_pipeline(directory, device="cpu")
        same((Engine(fused, graphs=FakeGraphs()), Engine(fused)), PROMPTS, seed=1)

    def test_another_decoder_drops_the_graphs(self, directory):
        pipeline = load_pipeline(directory, device="cpu", backend="reference")
        pair = Engine(pipeline, graphs=FakeGraphs()), Engine(pipeline)
        same(pair, "a", seed=1)
        model = copy.deepcopy(pipeline.vae.model)
        model.decoder.conv_out.weight.data.mul_(0.5)
        pipeline.vae = VAE(model, backend="reference")
        same(pair, "a", seed=1)
        assert pair[0].graphs.backend.num_captures == 2

    def test_a_plan_does_not_outlive_autocast(self, directory):
        engine = Engine(load_pipeline(directory, device="cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            engine.generate("a", seed=1)
        same((engine, Engine(load_pipeline(directory, device="cpu"))), "a", seed=1)

    def test_weights_that_move_drop_the_graphs(self, directory):
        pipeline = load_pipeline(directory, device="cpu", backend="reference")
        pair = Engine(pipeline, graphs=FakeGraphs()), Engine(pipeline)
        same(pair, "a", seed=1)
        pipeline.transformer.to(torch.float64).to(torch.float32)
        same(pair, "a", seed=1)
        assert pair[0].graphs.backend.num_captures == 2


class TestWarmup:
    def test_strict_engines_draw_what_was_warmed_up(self, pipeline):
        engine = Engine(pipeline, graphs=FakeGraphs(), strict_graphs=True)
        with pytest.raises(GraphError, match=r"pt 1.0 of \[1, 16, 8, 8\].*warmup"):
            engine.generate("a", seed=1, output_type="pt")
        number = engine.warmup(output_type="pt")
        assert number == (1 if pipeline.family == "sd3" else 4)  # 32, 64, 96, 128 tokens
        same((engine, Engine(pipeline)), "a", seed=1)
        with pytest.raises(GraphError, match=r"\[1, 16, 8, 4\]"):
            engine.generate("a", seed=1, output_type="pt", width=32)
        assert engine.graphs.backend.num_captures == number

    def test_prompts_of_two_lengths(self, pipeline):
        engine = Engine(pipeline, graphs=FakeGraphs(), strict_graphs=True)
        long = " ".join(["red"] * 40)
        lengths = [64] if pipeline.family == "zimage" else None
        shape = {"num_prompts": 2, "text_lengths": lengths}
        engine.warmup(output_type="latent", guidance_scale=2.0, **shape)
        engine.warmup(output_type="latent", **shape)
        for scale in (None, 2.0):
            same((engine, Engine(pipeline)), ["a", long], seed=1, output_type="latent",
                 guidance_scale=scale)  # fmt: skip
        with pytest.raises(GraphError, match="rollout"):
            engine.rollout(pipeline.text.encode(["a", long]), latents(2))
        engine.warmup(rollout=True, **shape)
        engine.rollout(pipeline.text.encode(["a", long]), latents(2))

    def test_a_callback_and_a_guided_rollout(self, pipeline):
        engine = Engine(pipeline, graphs=FakeGraphs(), strict_graphs=True)
        engine.warmup(callback=True)
        prompt, seen = " ".join(["red"] * 40), []
        engine.generate(prompt, seed=1, callback=lambda k, t, x: seen.append(k))
        assert seen == [0, 1, 2, 3]
        cond, uncond = (engine.pipeline.text.encode([text]) for text in (prompt, ""))
        engine.warmup(rollout=True, guidance_scale=2.0, text_lengths=cond.lengths_B.tolist())
        engine.rollout(cond, latents(1), guidance=2.0, uncond=uncond)

    def test_refusals(self, pipeline):
        with pytest.raises(ConfigError, match="this engine on cpu has none"):
            Engine(pipeline).warmup()
        with pytest.raises(ConfigError, match="height is 60"):
            Engine(pipeline, graphs=FakeGraphs()).warmup(height=60)


class TestFailures:
    def test_overflow_names_prompt_and_seed(self, pair):
        start = latents(4)
        start[2, 0, 0, 0] = float("inf")
        for engine in pair:
            with pytest.raises(NumericsError, match=r"latents of prompt 'b' with the given lat"):
                engine.generate(["a", "b"], latents=start, num_images_per_prompt=2)
            with pytest.raises(NumericsError, match=r"row 2 of 4") as caught:
                engine.rollout(engine.pipeline.text.encode(["a"]), start)
            assert caught.value.rows == (2,)

    def test_a_decoder_that_overflows(self, pair, monkeypatch):
        monkeypatch.setattr(pair[0].pipeline.vae, "scaling", 1e-38)
        for engine in pair:
            with pytest.raises(
                NumericsError,
                match=r"picture of prompt 'a' with seed 5 \(row 0 of 2\), and those of 1 more",
            ):
                engine.generate("a", seed=5, num_images_per_prompt=2, output_type="pt")

    def test_a_device_that_is_gone(self, pair, monkeypatch):
        engine = pair[0]
        engine.generate("a", seed=1)

        def lost(*_):
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore")

        monkeypatch.setattr(GraphPool, "run", lost)
        with pytest.raises(DeviceError, match="during 1 images of 64 x 64 .CUDA error: an illeg"):
            engine.generate("a", seed=1)
        with pytest.raises(DeviceError, match=r"a rollout of \[2, 16, 8, 8\]"):
            engine.rollout(engine.pipeline.text.encode(PROMPTS), latents(2))


class TestUpdates:
    @pytest.fixture
    def base(self, directory):
        return load_transformer(directory, dtype=torch.float32, backend="reference")

    @pytest.fixture
    def role(self, base):
        base.requires_grad_(False)
        targets = [*lora.TARGETS[base.family], {"sd3": "net.2", "zimage": "w2"}[base.family]]
        lora.inject(base, ["theta", "other"], rank=2, alpha=4, targets=targets)
        return Role("theta", base, "theta", bf16=False)

    def test_fifty_updates_are_fifty_fresh_engines(self, directory, role):
        fused = load_pipeline(directory, device="cpu")  # with panels and recordings
        plain = load_pipeline(directory, device="cpu", backend="reference")
        live, graphed = Engine(fused), Engine(plain, graphs=FakeGraphs())
        places = [p.data_ptr() for p in plain.transformer.weights]
        generator = torch.Generator().manual_seed(0)
        cond, start = fused.text.encode(["red"]), latents(1)
        loaded = load_transformer(directory, dtype=torch.float32, backend="reference")
        states = []
        for number in range(1, 51):
            with torch.no_grad():
                for tensor in role.tensors().values():
                    tensor.data.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            for engine in (live, graphed):
                update = engine.update_weights(role)
                assert update.num_tensors == len(plain.transformer.state_dict())
                if number > 1:  # what the adapter does not touch is not read again
                    assert update.num_written == len(role.tensors()) // 2
            fresh = copy.deepcopy(loaded)
            lora.merge_lora(fresh, lora.adapter_tensors(role.transformer, "theta"))
            fresh_plain = Engine(dataclasses.replace(plain, transformer=fresh.freeze()))
            states.append(fresh_plain.rollout(cond, start).x[-1])
            found = graphed.rollout(cond, start)
            assert torch.equal(found.x[-1], states[-1]) and found.weights_version == number
            if number % 10 == 0:
                fresh_fused = load_transformer(directory, dtype=torch.float32)
                fresh_fused.load_state_dict(fresh.state_dict())
                other = Engine(dataclasses.replace(fused, transformer=fresh_fused.freeze()))
                pictures = [e.generate("red", seed=1, output_type="pt") for e in (live, other)]
                assert torch.equal(*pictures)
        assert not torch.equal(states[0], states[1])
        assert graphed.graphs.backend.num_captures == 1 and graphed.weights_version == 50
        assert [p.data_ptr() for p in plain.transformer.weights] == places

    def test_weights_that_moved_are_found(self, directory, base):
        engine = Engine(load_pipeline(directory, device="cpu", backend="reference"))
        transformer, state = engine.pipeline.transformer, base.state_dict()
        for number, moved in enumerate((lambda: None, transformer.float, transformer.freeze)):
            engine.update_weights({name: x * (2 + number) for name, x in state.items()})
            transformer.to(torch.bfloat16).to(torch.float32)
            moved()
            wanted = {name: x * (3 + number) for name, x in state.items()}
            engine.update_weights(wanted)
            found = transformer.state_dict()
            assert all(torch.equal(found[name], x) for name, x in wanted.items())

    def test_a_source_at_the_address_of_one_that_is_gone(self, directory, base):
        engine = Engine(load_pipeline(directory, device="cpu", backend="reference"))
        for number in range(8):
            source = copy.deepcopy(base).requires_grad_(False)
            state = {name: x * (1 + 0.1 * number) for name, x in base.state_dict().items()}
            source.load_state_dict(state, assign=True)
            engine.update_weights(source)
            found = engine.pipeline.transformer.state_dict()
            assert all(torch.equal(found[name], x) for name, x in state.items())
            assert engine.update_weights(source).num_written == 0
            del source, state

    def test_half_precision_rounds_the_fold_once(self, directory, role):
        pipeline = load_pipeline(directory, device="cpu", dtype="bfloat16", backend="reference")
        with torch.no_grad():
            for tensor in role.tensors().values():
                tensor.normal_(std=0.1)
        engine = Engine(pipeline, graphs=FakeGraphs())
        engine.generate("a", seed=1, output_type="pt")
        engine.update_weights(role)
        fresh = load_transformer(directory, dtype=torch.float32, backend="reference")
        lora.merge_lora(fresh, lora.adapter_tensors(role.transformer, "theta"))
        fresh = fresh.to(dtype=torch.bfloat16).freeze()
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(pipeline.transformer.state_dict()[name], tensor), name
        other = Engine(dataclasses.replace(pipeline, transformer=fresh))
        same((engine, other), "a", seed=1)

    def test_full_weights_by_name_and_by_module(self, directory, base):
        engine = Engine(load_pipeline(directory, device="cpu"))
        before = engine.generate("a", seed=1, output_type="pt")
        state = {name: value * 1.1 for name, value in base.state_dict().items()}
        update = engine.update_weights(state)
        assert update.num_written == update.num_tensors == len(state)
        changed = engine.generate("a", seed=1, output_type="pt")
        assert not torch.equal(changed, before)
        assert engine.update_weights(base).checksum != update.checksum
        assert torch.equal(engine.generate("a", seed=1, output_type="pt"), before)

    def test_misfits_are_named_and_nothing_is_written(self, pair, base):
        engine, state = pair[0], base.state_dict()
        first, second, third, *_ = state
        before = engine.pipeline.transformer.state_dict()[second].clone()
        broken = {name: value * 2 for name, value in state.items() if name != first}
        broken |= {"extra.weight": torch.ones(1), third: torch.ones(3)}
        with pytest.raises(LoadError) as caught:
            engine.update_weights(broken)
        for words in (f"missing: {first}", "extra.weight", f"{third} (3,) instead of"):
            assert words in str(caught.value)
        assert torch.equal(engine.pipeline.transformer.state_dict()[second], before)
        assert engine.weights_version == 0

    def test_refusals(self, pair, base):
        engine = pair[0]
        with pytest.raises(ConfigError, match="cannot read what it writes"):
            engine.update_weights(engine.pipeline.transformer)
        with pytest.raises(ConfigError, match="not <class 'int'>"):
            engine.update_weights(3)
        thawed = Engine(dataclasses.replace(engine.pipeline, transformer=base))
        with pytest.raises(ConfigError, match="only a frozen transformer"):
            thawed.update_weights({})

    def test_views_that_overlap_are_found(self, directory, base):
        pipeline = load_pipeline(directory, device="cpu")
        block = next(m for m in pipeline.transformer.modules() if hasattr(m, "to_q"))
        block.to_q.weight.data = block.to_k.weight.data
        with pytest.raises(LoadError, match=r"did not arrive .*to_q.weight"):
            Engine(pipeline).update_weights(base)


class TestConsistency:
    def test_consistent_rollouts_replay_bit_for_bit(self, directory):
        engine = Engine(load_pipeline(directory, device="cpu"))
        live = load_transformer(directory, dtype=torch.float32)
        cond = engine.pipeline.text.encode(PROMPTS)
        for consistent in (True, False):
            x = engine.rollout(cond, latents(2), transformer=live, consistent=consistent).x
            worst, m = 0.0, None
            for k, t in enumerate(engine.schedule.timesteps):
                v = live.velocity(x[k], torch.full((2,), t), cond)
                assert v.requires_grad
                found, m = engine.schedule.step(k, x[k], v.detach(), m)
                worst = max(worst, float((found - x[k + 1]).abs().max()))
            assert worst == 0.0 if consistent else worst < 1e-5
            assert all(not state.requires_grad for state in x)

    def test_guidance_is_refused(self, pair):
        cond = pair[0].pipeline.text.encode(PROMPTS)
        with pytest.raises(ConfigError, match="consistent=True"):
            pair[0].rollout(cond, latents(2), guidance=2.0, uncond=cond, consistent=True)


@pytest.mark.gpu
@GPU
class TestOnAGpu:
    """The same, on real graphs and Triton's ops."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16])
    def pair(self, directory, request):
        pipeline = load_pipeline(directory, device="cuda", dtype=request.param)
        graphed = Engine(pipeline)
        assert isinstance(graphed.graphs.backend, CudaGraphs)
        return graphed, Engine(pipeline, graphs="off")

    def test_bit_for_bit(self, pair):
        for _ in range(2):
            for kind in ({}, {"output_type": "latent"}, {"num_images_per_prompt": 3}):
                same(pair, PROMPTS[0], seed=1, **kind)
            same(pair, PROMPTS, seed=6)
            same(pair, PROMPTS[0], seed=7, guidance_scale=3.0)
        assert None not in pair[0].graphs.graphs.values()

    def test_updates_reach_the_graphs(self, pair, directory):
        before = same(pair, "a", seed=1)
        transformer = pair[0].pipeline.transformer
        state = load_transformer(directory, dtype=transformer.dtype).state_dict()
        pair[0].update_weights({name: value * 1.1 for name, value in state.items()})
        captured = dict(pair[0].graphs.graphs)
        assert not torch.equal(same(pair, "a", seed=1), before)
        assert dict(pair[0].graphs.graphs) == captured

    def test_the_callback_sees_the_same_steps(self, pair):
        seen: list = [[], []]
        for engine, steps in zip(pair, seen, strict=True):
            engine.generate("a", seed=1, callback=lambda k, t, x, to=steps: to.append(x.clone()))
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
