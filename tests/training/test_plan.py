"""The arithmetic of `--dry-run`, against models, graphs and runs that are really there."""

import re
from dataclasses import replace

import pytest
import torch
from tdm_kernels import native

from tdm_r1 import train
from tdm_r1.config import Optimizer, load_recipe
from tdm_r1.errors import ConfigError
from tdm_r1.models import lora
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.sd3 import SD3Config, SD3Transformer
from tdm_r1.models.zimage import ZImageConfig, ZImageTransformer
from tdm_r1.pipeline import load_pipeline
from tdm_r1.training import budget, plan, sizes
from tdm_r1.training.queries import num_forwards
from tdm_r1.training.trainer import Trainer
from tests.training.common import recipe

SD35, TURBO = sizes.KNOWN
D = 256


def test_published_models_have_their_published_sizes():
    sd3, zimage = (sizes.describe(name, 128) for name in (SD35, TURBO))
    assert (sd3.parameters, sd3.buffers) == (2_243_171_520, 147456 * 1536)
    assert zimage.parameters == 6_154_908_736
    assert round(sd3.adapter_parameters(32, ()) / 1e6, 2) == 18.78
    assert round(zimage.adapter_parameters(32, ()) / 1e6, 2) == 33.42
    assert len(lora.find_targets(sd3.transformer, lora.TARGETS["sd3"])) == 382 // 2
    assert len(lora.find_targets(zimage.transformer, lora.TARGETS["zimage"])) == 272 // 2
    assert (sd3.text_tokens, sizes.describe(SD35, 0).text_tokens) == (205, 333)


def test_built_in_encoders_and_vae_are_those_of_the_libraries():
    import transformers
    from diffusers import AutoencoderKL

    def count(model):
        return sum(p.numel() for p in model.parameters())

    def deep(layers, build):  # every layer is as large as the second
        one, two = count(build(1)), count(build(2))
        return one + (layers - 1) * (two - one)

    def clip(width, heads, layers):
        return transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=heads, projection_dim=width,
            )
        )  # fmt: skip

    def t5(layers):
        return transformers.T5EncoderModel(
            transformers.T5Config(
                d_model=4096, d_kv=64, d_ff=10240, num_layers=layers, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip

    def qwen(layers):
        model = transformers.Qwen3Model(
            transformers.Qwen3Config(
                vocab_size=151936, hidden_size=2560, intermediate_size=9728, head_dim=128,
                num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
            )
        )  # fmt: skip
        model.norm = torch.nn.Identity()  # never run, as its last layer of 36
        return model

    with torch.device("meta"):
        counts = {
            "CLIP-L": deep(12, lambda layers: clip(768, 12, layers)),
            "CLIP-G": deep(32, lambda layers: clip(1280, 20, layers)),
            "T5-XXL": deep(24, t5),
            "Qwen3-4B": deep(35, qwen),
        }
        vae = AutoencoderKL(
            latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    sd3, zimage = (sizes.describe(name, 128) for name in (SD35, TURBO))
    assert {**sd3.text, **zimage.text} == counts
    assert sd3.vae == zimage.vae == count(vae)


@pytest.mark.parametrize("family", ["sd3", "zimage"])
def test_a_directory_is_as_large_as_what_loads_from_it(family, sd3_dir, zimage_dir):
    directory = sd3_dir if family == "sd3" else zimage_dir
    size, loaded = sizes.describe(str(directory), 0), load_pipeline(directory, dtype="float32")
    assert size.parameters == sum(p.numel() for p in loaded.transformer.parameters())
    assert size.vae == sum(p.numel() for p in loaded.vae.model.parameters())
    assert size.default_side == loaded.default_size and size.vae_scale == loaded.vae.scale_factor
    assert size.side_unit == loaded.size_unit
    if family == "sd3":
        cond = loaded.text.encode(["two"])
        assert cond.tokens_BTE.shape[1:] == (size.text_tokens, size.text_width)


def random_model(family, layers):
    if family == "zimage":
        config = ZImageConfig(
            dim=D, n_layers=layers, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=64,
            axes_dims=(16, 24, 24),
        )  # fmt: skip
        return ZImageTransformer(config)
    config = SD3Config(
        sample_size=32, num_layers=layers, num_attention_heads=4, caption_projection_dim=D,
        joint_attention_dim=64, pooled_projection_dim=32, pos_embed_max_size=32,
        dual_attention_layers=tuple(range(layers)) if family == "dual" else (), qk_norm="rms_norm",
    )  # fmt: skip
    return SD3Transformer(config)


def kept_bytes(family, layers, kind, checkpointed, side, rows=2, tokens=32):
    """Bytes that the graph of a forward of `side` x `side` tokens keeps, weights left out."""
    model = random_model(family, layers)
    if kind == "lora":
        model.to(torch.bfloat16).requires_grad_(False)
        lora.inject(model, ["a"], rank=2, alpha=2.0, targets=lora.TARGETS[model.family])
        lora.set_adapter(model, "a")
        model.pack_siblings(adapters=True)
    model.checkpoint_blocks = checkpointed
    sizes_, alive = {}, []

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        sizes_[storage.data_ptr()] = storage.nbytes()
        return tensor

    pooled = torch.zeros(rows, 32) if family != "zimage" else None
    cond = Condition(torch.randn(rows, tokens, 64), torch.full((rows,), tokens), pooled)
    x = torch.randn(rows, 16, 2 * side, 2 * side)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.velocity(x, torch.full((rows,), 500.0), cond)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in sizes_.items() if pointer not in weights)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd3", "dual", "zimage"])
def test_kept_bytes_are_those_of_a_real_graph(family, kind, checkpointed, monkeypatch):
    # At the sizes that are planned for, attention is the library's where it is trained.
    monkeypatch.setattr(native, "_MAX_ROWS_BACKWARD", 0)

    def per_block(side):
        more, less = (kept_bytes(family, n, kind, checkpointed, side) for n in (3, 2))
        return more - less

    found = per_block(16) - per_block(8)  # of tokens: modulation and weights are kept but once
    run = load_recipe("sd35m-ocr")
    run = replace(run, roles=replace(run.roles, kind=kind))
    run = replace(run, memory=replace(run.memory, checkpoint_blocks=checkpointed))
    size = replace(sizes.describe(SD35, 0), transformer=random_model(family, 3), text_tokens=32)
    large, small = (
        budget.block_bytes(run, size, 16 * side, family == "dual", kept=True) for side in (16, 8)
    )
    assert found == pytest.approx(2 * (large - small), rel=0.03)


def test_roles_and_rows_are_those_of_a_real_iteration(tmp_path, sd3_dir, monkeypatch):
    (tmp_path / "mine.py").write_text("def score(images, prompts): return [*range(len(images))]\n")
    made = recipe(
        tmp_path, sd3_dir, reward=f"{tmp_path}/mine.py:score", reinforcement={"trunc_steps": 4}
    )
    trainer, planned = Trainer(made), plan.make_plan(made)
    own = {name: role.tensors() for name, role in trainer.roles.items() if name != "base"}
    counts = {name: sum(p.numel() for p in found.values()) for name, found in own.items()}
    assert counts == planned.roles
    rows = {"trained": 0, "others": 0}
    real = type(trainer.roles["base"].transformer).forward

    def counting(self, x, *args):
        rows["trained" if torch.is_grad_enabled() else "others"] += len(x)
        return real(self, x, *args)

    monkeypatch.setattr(type(trainer.roles["base"].transformer), "forward", counting)
    trainer.method.step(0)
    pictures = made.rollout.num_prompts * made.rollout.group_size
    assert rows["trained"] == planned.forwards["trained"] * pictures
    passes = made.rollout.num_prompts // made.rollout.micro_groups
    pairs = [pair for i in range(passes) for pair in trainer.method._draw_steps(0, i)]
    schedule, shift = trainer.engine.schedule, trainer.method.shift
    asked = sum(num_forwards(made, schedule, shift, *pair) - 3 for pair in pairs)
    assert rows["others"] == planned.forwards["rollout"] * pictures + asked * pictures / passes


def test_forwards_of_every_method():
    made = load_recipe("sd35m-ocr")
    size = sizes.describe(SD35, 128)
    assert plan.make_plan(made).forwards == pytest.approx(
        {"rollout": 4.0, "queries": 10.4, "trained": 6.0, "backward": 6.0}
    )
    geneval = budget.forwards_per_picture(load_recipe("sd35m-geneval"), size)
    assert geneval["queries"] == pytest.approx(10.5456, abs=1e-4)
    tdm = budget.forwards_per_picture(replace(made, method="tdm"), size)
    assert tdm == {"rollout": 4.0, "queries": 4.0, "trained": 4.0, "backward": 4.0}
    half = replace(made, reinforcement=replace(made.reinforcement, trunc_steps=2))
    assert budget.forwards_per_picture(half, size)["queries"] == pytest.approx(9.4)
    twice = replace(made, distillation=replace(made.distillation, fake_updates=2))
    assert budget.forwards_per_picture(twice, size)["trained"] == 8.0
    sft = budget.forwards_per_picture(load_recipe("tiny-sd3-base"), size)
    assert sft == {"trained": 1.0, "backward": 1.0}


def test_weights_are_transferred_by_reinforcement_alone():
    made = load_recipe("tiny-sd3-shapes")

    def names(recipe):
        return [phase.name for phase in plan.make_plan(recipe).phases]

    assert "transfer" in names(made)
    assert "transfer" not in names(replace(made, method="tdm"))


def test_what_does_not_fit_is_refused_with_the_key_to_change():
    made = load_recipe("sd35m-ocr-1gpu", ["memory.checkpoint_blocks=false"])
    planned = plan.make_plan(made)
    assert not planned.fits and planned.peak.name == "train"
    with pytest.raises(ConfigError, match="needs .* GiB.*set memory.checkpoint_blocks=true"):
        plan.require_fit(planned)
    plan.require_fit(plan.make_plan(plan.turned(made, "memory.checkpoint_blocks", True)))
    loose = load_recipe("sd35m-ocr", ["memory={gpus: 1, gpu_gib: 24}", "rollout.micro_groups=4"])
    with pytest.raises(ConfigError) as caught:
        plan.require_fit(plan.make_plan(loose))
    for key in ("checkpoint_blocks", "micro_groups=1", "base=bf16"):
        assert key in str(caught.value)
    hopeless = load_recipe("zimage-turbo-ocr-1gpu", ["memory.gpu_gib=16"])
    with pytest.raises(ConfigError, match="that is not enough: take GPUs of 3[0-9] GiB"):
        plan.require_fit(plan.make_plan(hopeless))


def test_zero_is_no_advice_for_muon_or_one_gpu():
    keys = ["memory.gpu_gib=60", "zero_stage=0"]
    full = load_recipe("sd35m-ocr-full", keys)
    for made, advised in (
        (full, True),
        (load_recipe("sd35m-ocr-full", [*keys, "optimizers.fake.name=muon"]), False),
        (load_recipe("sd35m-ocr-full", [*keys, "memory.gpus=1"]), False),
    ):
        with pytest.raises(ConfigError) as caught:
            plan.require_fit(plan.make_plan(made))
        assert ("zero_stage=3" in str(caught.value)) == advised
    cut = load_recipe("sd35m-ocr-full", ["memory.gpu_gib=24", "zero_stage=3"])
    with pytest.raises(ConfigError, match="set roles.kind=lora with zero_stage=2"):
        plan.require_fit(plan.make_plan(cut))
    adapters = load_recipe("sd35m-ocr", ["memory.gpu_gib=8"])
    with pytest.raises(ConfigError) as caught:
        plan.require_fit(plan.make_plan(adapters))
    assert "zero_stage=3" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        ["optimizers.fake.name=adamw", "memory.gpus=2", "memory.gpu_gib=1.2"],
        ["reinforcement.transfer=0", "memory.gpu_gib=1.2"],
    ],
)
def test_what_is_advised_is_what_a_recipe_may_say(keys):
    made = load_recipe("tiny-sd3-shapes", keys)
    with pytest.raises(ConfigError) as caught:
        plan.require_fit(plan.make_plan(made))
    advised = re.findall(r"(?:set|then|with) ([\w.]+=\w+)", str(caught.value))
    assert advised
    load_recipe("tiny-sd3-shapes", [*keys, *advised])
    assert ("roles.kind=lora" in advised) == (made.reinforcement.transfer == 0)


def test_zero_cuts_optimizer_gradients_and_weights():
    full = load_recipe("sd35m-ocr-full")
    plans = {stage: plan.make_plan(replace(full, zero_stage=stage)) for stage in (0, 2, 3)}
    by_stage = {stage: made.phases[-1].parts for stage, made in plans.items()}
    trained = 3 * 2_243_171_520
    assert by_stage[0]["optimizer"] == 8 * trained and by_stage[0]["gradients"] == 4 * trained
    assert by_stage[2]["optimizer"] == 12 * trained / 8
    assert by_stage[2]["gradients"] == pytest.approx(4 * trained / 8 + 2e9)
    for name in ("optimizer", "gradients", "kept", "base"):
        assert by_stage[3][name] == by_stage[2][name], name
    one, table = trained // 3, 4 * 5 * plans[3].size.buffers
    assert by_stage[2]["roles"] == 4 * 5 * one + table
    assert by_stage[3]["roles"] == 4 * 5 * one / 8 + table
    gathered = {phase.name: phase.parts.get("gathered", 0) / one for phase in plans[3].phases}
    assert gathered == {
        "encode prompts": 0, "evaluate": 4, "roll out": 4, "decode and score": 0, "ask": 8,
        "train": 4,
    }  # fmt: skip
    assert not any(phase.parts.get("gathered") for phase in plans[2].phases)
    plan.require_fit(plan.make_plan(plan.turned(plans[3].recipe, "memory.gpu_gib", 79.0)))


def test_an_unknown_gpu_refuses_nothing():
    made = load_recipe("zimage-turbo-ocr", ["memory.gpu_gib=0"])
    planned = plan.make_plan(made)
    if not torch.cuda.is_available():
        assert planned.fits and "size unknown" in plan.report(planned)


@pytest.mark.parametrize(
    ("recipe_name", "overrides", "message"),
    [
        ("sd35m-ocr", ["model=someone/else"], "cannot plan for model 'someone/else'"),
        ("sd35m-ocr", ["memory.gpus=5"], "must be a multiple of GPUs x micro_groups = 5 x 2"),
        ("sd35m-ocr", ["resolution=500"], "resolution is 500; allowed: a multiple of 16"),
        ("sd35m-ocr", ["roles.targets=[attn.nope]"], "match no linear"),
        ("tiny-sd3-base", ["memory.gpus=3", "model=tiny-sd3"], "batch_size = 128 must be a mult"),
    ],
)
def test_what_a_run_would_refuse_is_refused(recipe_name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        plan.make_plan(load_recipe(recipe_name, overrides))


def test_a_damaged_weight_file_is_named(tmp_path, sd3_dir):
    with pytest.raises(ConfigError, match="holds no .safetensors"):
        sizes.count_parameters(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="model.safetensors is damaged"):
        sizes.count_parameters(tmp_path)


def test_the_command_prints_the_plan_and_refuses_in_one_line(capsys):
    assert train.main(["--recipe", "sd35m-geneval-1gpu", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for text in ("surrogate", "18.78 M", "train", "1152 pictures", "rows per picture: rollout 4"):
        assert text in shown
    tight = ["--recipe", "sd35m-ocr-1gpu", "--dry-run", "--set", "memory.gpu_gib=12"]
    assert train.main(tight) == 2
    error = capsys.readouterr().err.strip()
    assert "usable" in error and len(error.splitlines()) == 1


PUBLISHED = {"ocr": (10.0, 0.3, 0.3, 4.5), "geneval": (1.0, 0.25, 0.55, 2.5)}


@pytest.mark.parametrize("reward", PUBLISHED)
@pytest.mark.parametrize("model", ["sd35m", "zimage-turbo"])
def test_shipped_recipes_have_the_published_values_and_fit(model, reward):
    whole = load_recipe(f"{model}-{reward}")
    rl = whole.reinforcement
    assert (rl.beta, rl.t_min, rl.t_min_reward, rl.rl_cfg) == PUBLISHED[reward]
    assert (rl.lag_clip, rl.trunc_steps, rl.tdm_weight, rl.rl_weight) == (1e-3, 4, 0.3, 0.7)
    assert (rl.drift_gate, rl.drift_weight, rl.reference) == (0.05, 0.001, "frozen")
    assert (whole.rollout.num_prompts, whole.rollout.group_size, whole.rollout.steps) == (48, 24, 4)
    assert (whole.roles.rank, whole.roles.alpha, whole.resolution) == (32, 64.0, 512)
    assert (whole.distillation.boundaries, whole.distillation.base_drift) == (2, 0.02)
    optimizers = whole.optimizers
    assert optimizers.generator == Optimizer(lr=7.5e-5, betas=(0.0, 0.999))
    assert optimizers.fake == Optimizer(lr=3e-4, betas=(0.0, 0.999))
    assert optimizers.surrogate == Optimizer(lr=3e-4, betas=(0.9, 0.999))
    assert whole.t5_length == (128 if model == "sd35m" else 0)
    one = load_recipe(f"{model}-{reward}-1gpu")
    memory = one.memory
    assert memory.gpu_gib == (24 if model == "sd35m" else 48) and memory.gpus == 1
    assert memory.precompute_text and memory.checkpoint_blocks and memory.offload
    for recipe_ in (whole, one):
        plan.require_fit(plan.make_plan(recipe_))
    same = {"output": "", "memory": one.memory, "rollout": one.rollout}
    assert replace(one, **same) == replace(whole, **same)
    assert replace(one.rollout, micro_groups=1) == replace(whole.rollout, micro_groups=1)
    for steps in (1, 2, 8):
        keys = [f"rollout.steps={steps}", f"distillation.boundaries={min(2, steps)}"]
        planned = plan.make_plan(load_recipe(f"{model}-{reward}", keys))
        assert planned.forwards["rollout"] == steps


@pytest.mark.parametrize("name", ["sd35m-tdm", "sd35m-ocr-full", "sd35m-geneval-full"])
def test_the_other_recipes_fit(name):
    made = load_recipe(name)
    plan.require_fit(plan.make_plan(made))
    assert made.zero_stage == (2 if name.endswith("full") else 0)
