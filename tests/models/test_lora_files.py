"""LoRA files: three layouts written and read, and that others read them as we do."""

import json

import pytest
import safetensors.torch
import torch

from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.models import lora
from tdm_r1.models import lora_files as files
from tdm_r1.models.lora import LoraTensors
from tests.models.common import relative_error
from tests.models.lora_pairs import build, inject_trained

FAMILIES = ("sd3", "zimage")
EXTRA = {
    "sd3": ["attn2.to_k", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "norm1.linear"],
    "zimage": ["w1", "w2", "w3", "adaLN_modulation.0"],
}


def mixed_adapters(model, family):
    """Adapters on every linear that ComfyUI has a name for, of unequal ranks and scales."""
    g = torch.Generator().manual_seed(5)
    blocks = [
        n for n, _ in lora.find_targets(model, [*lora.TARGETS[family], *EXTRA[family]]).items()
    ]
    tensors = {}
    for index, name in enumerate(n for n in blocks if "final" not in n):
        weight, rank = model.get_submodule(name).weight, 2 + index % 2
        a = 0.3 * torch.randn(rank, weight.shape[1], generator=g)
        b = 0.3 * torch.randn(weight.shape[0], rank, generator=g)
        tensors[name] = LoraTensors(a, b, (0.5, 1.0, 2.0)[index % 3])
    return tensors


def assert_equal(read, written, dtype=torch.float32):
    assert set(read) == set(written)
    for name, (a, b, scale) in written.items():
        assert torch.equal(read[name].a_rI, a.to(dtype)) and torch.equal(
            read[name].b_Or, b.to(dtype)
        )
        assert read[name].a_rI.dtype == dtype and read[name].scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", files.LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_reads_back_tensor_by_tensor(family, layout, dtype, tmp_path):
    ours, *_ = build(family)
    inject_trained(ours, family)
    written = lora.adapter_tensors(ours, "policy")
    files.write_lora(tmp_path, written, layout, dtype=dtype)
    assert_equal(files.load_lora_file(tmp_path), written, dtype)


@pytest.mark.parametrize("layout", files.LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_ranks_and_scales_have_the_same_effect(family, layout, tmp_path):
    first, *_ = build(family)
    second, *_ = build(family)
    written = mixed_adapters(first, family)
    lora.merge_lora(first, written)
    files.write_lora(tmp_path, written, layout)
    lora.merge_lora(second, files.load_lora_file(tmp_path))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_peft_reads_its_layout(family, mixed, tmp_path):
    from peft import PeftModel

    ours, theirs, velocity, their_velocity = build(family)
    plain = velocity(ours)
    if mixed:
        written = mixed_adapters(ours, family)
    else:
        inject_trained(ours, family)
        written = lora.adapter_tensors(ours, "policy")
    files.write_lora(tmp_path, written, "peft")
    merged, *_ = build(family)
    lora.merge_lora(merged, written)
    expected = velocity(merged)
    PeftModel.from_pretrained(theirs, tmp_path)  # injects into `theirs` itself
    assert relative_error(their_velocity(theirs), expected) <= 1e-5
    assert relative_error(plain, expected) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_diffusers_reads_unequal_ranks_and_scales(family, tmp_path):
    ours, theirs, velocity, their_velocity = build(family)
    written = mixed_adapters(ours, family)
    lora.merge_lora(ours, written)
    load_in_diffusers(family, theirs, files.write_lora(tmp_path, written))
    assert relative_error(their_velocity(theirs), velocity(ours)) <= 1e-5


def as_comfyui_applies_it(weights, path):
    """ComfyUI's rule for one weight: W += alpha / r * B A, every key of the file used."""
    tensors = safetensors.torch.load_file(path)
    for key in [k for k in tensors if k.endswith(".lora_B.weight")]:
        name = key.removesuffix(".lora_B.weight")
        b, a, alpha = (
            tensors.pop(key),
            tensors.pop(f"{name}.lora_A.weight"),
            tensors[f"{name}.alpha"],
        )
        scale = tensors.pop(f"{name}.alpha").item() / a.shape[0]
        assert alpha.ndim == 0
        weights[name.removeprefix("diffusion_model.")] += scale * b @ a
    assert not tensors


@pytest.mark.parametrize("adapters", ["equal", "mixed", "query only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_gets_its_fused_weights_right(family, adapters, tmp_path):
    ours, *_ = build(family)
    if adapters == "mixed":
        written = mixed_adapters(ours, family)
    else:
        inject_trained(ours, family)
        written = lora.adapter_tensors(ours, "policy")
    if adapters == "query only":
        written = {name: value for name, value in written.items() if name.endswith("to_q")}
    base, *_ = build(family)
    fused = fused_weights(base, family)
    as_comfyui_applies_it(fused, files.write_lora(tmp_path, written, "comfyui"))
    lora.merge_lora(base, written)
    for name, expected in fused_weights(base, family).items():
        torch.testing.assert_close(fused[name], expected, msg=name)


def fused_weights(model, family):
    """The weights of the blocks under ComfyUI's names, those of the original repositories."""
    state = {k.removesuffix(".weight"): v for k, v in model.state_dict().items()}
    fused = {}
    if family == "zimage":
        for block in [
            k.removesuffix(".attention.to_q") for k in state if k.endswith("attention.to_q")
        ]:
            qkv = [state[f"{block}.attention.to_{x}"] for x in "qkv"]
            fused[f"{block}.attention.qkv"] = torch.cat(qkv)
            fused[f"{block}.attention.out"] = state[f"{block}.attention.to_out.0"].clone()
            for name in (
                "feed_forward.w1",
                "feed_forward.w2",
                "feed_forward.w3",
                "adaLN_modulation.0",
            ):
                if f"{block}.{name}" in state:  # text blocks are not modulated
                    fused[f"{block}.{name}"] = state[f"{block}.{name}"].clone()
        return fused
    for i in range(3):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for source, target in (
            ("attn.to_{}", "x_block.attn"),
            ("attn.add_{}_proj", "context_block.attn"),
            ("attn2.to_{}", "x_block.attn2"),
        ):
            names = [f"{ours}.{source.format(x)}" for x in "qkv"]
            if names[0] in state:
                fused[f"{theirs}.{target}.qkv"] = torch.cat([state[name] for name in names])
        for source, target in (
            ("attn.to_out.0", "x_block.attn.proj"),
            ("attn2.to_out.0", "x_block.attn2.proj"),
            ("attn.to_add_out", "context_block.attn.proj"),
            ("ff.net.0.proj", "x_block.mlp.fc1"),
            ("ff.net.2", "x_block.mlp.fc2"),
            ("ff_context.net.0.proj", "context_block.mlp.fc1"),
            ("norm1.linear", "x_block.adaLN_modulation.1"),
        ):
            if f"{ours}.{source}" in state:
                fused[f"{theirs}.{target}"] = state[f"{ours}.{source}"].clone()
    return fused


def test_an_adapter_trained_on_the_fused_matrix_is_read(tmp_path):
    a, b = torch.randn(4, 8), torch.randn(18, 4)
    name = "diffusion_model.layers.3.attention"
    tensors = {
        f"{name}.qkv.lora_down.weight": a,
        f"{name}.qkv.lora_up.weight": b,
        f"{name}.qkv.alpha": torch.tensor(2.0),
        f"{name}.out.lora_down.weight": a.clone(),
        f"{name}.out.lora_up.weight": b.clone(),
    }
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, file)
    read = files.load_lora_file(file)
    assert set(read) == {f"layers.3.attention.to_{x}" for x in ("q", "k", "v", "out.0")}
    parts = [read[f"layers.3.attention.to_{x}"] for x in "qkv"]
    fused = torch.cat([scale * up @ down for down, up, scale in parts])
    torch.testing.assert_close(fused, 0.5 * b @ a)
    tensors[f"{name}.qkv.lora_up.weight"] = b[:-1].contiguous()
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(LoadError, match="layers.3.attention.qkv: 17 rows do not split in 3"):
        files.load_lora_file(file)


@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_of_diffusers_draw_the_engines_pictures(family, request, tmp_path):
    import diffusers

    directory = request.getfixturevalue(f"{family}_dir")
    engine = Engine.from_pretrained(directory, device="cpu")
    plain = engine.pipeline.transformer.unfreeze()
    inject_trained(plain, family)
    file = files.save_lora(tmp_path, plain, "policy", dtype=torch.float16)
    kind = diffusers.StableDiffusion3Pipeline if family == "sd3" else diffusers.ZImagePipeline
    pipeline = kind.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0, "max_sequence_length": 24}
    if family == "zimage":
        options = {"num_inference_steps": 4, "guidance_scale": 0.0}
    draw = {"latents": start, "output_type": "latent", **options}
    before = pipeline("two red circles", height=64, width=64, **draw).images
    pipeline.load_lora_weights(file.parent)
    theirs = pipeline("two red circles", height=64, width=64, **draw).images
    for layout in files.LAYOUTS:
        file = files.write_lora(tmp_path / layout, files.load_lora_file(tmp_path), layout)
        engine = Engine.from_pretrained(directory, device="cpu", lora=file)
        mine = engine.generate("two red circles", latents=start, output_type="latent")
        assert (mine - theirs).abs().max() <= 1e-4 < 1e-2 < (mine - before).abs().max(), layout


@pytest.mark.parametrize("family", ["sd3", "zimage"])
@pytest.mark.parametrize("rank, alpha", [(4, 8.0), (2, 3.0), (8, 1.0)])
@torch.no_grad()
def test_saved_adapters_have_the_same_effect_here_and_in_diffusers(family, rank, alpha, tmp_path):
    ours, theirs, velocity, their_velocity = build(family)
    inject_trained(ours, family, rank=rank, alpha=alpha)
    lora.set_adapter(ours, "policy")
    expected = velocity(ours)
    file = files.save_lora(tmp_path, ours, "policy", {"steps": "4"})
    assert file == tmp_path / files.WEIGHTS_NAME
    tensors = files.load_lora_file(tmp_path)
    assert {entry.scale for entry in tensors.values()} == {alpha / rank}
    merged, *_ = build(family)
    lora.merge_lora(merged, tensors)
    assert relative_error(velocity(merged), expected) <= 1e-5
    load_in_diffusers(family, theirs, file)
    assert relative_error(their_velocity(theirs), expected) <= 1e-5


def load_in_diffusers(family, theirs, file):
    from diffusers import StableDiffusion3Pipeline, ZImagePipeline

    kind = StableDiffusion3Pipeline if family == "sd3" else ZImagePipeline
    state, metadata = kind.lora_state_dict(str(file), return_lora_metadata=True)
    kind.load_lora_into_transformer(state, transformer=theirs, metadata=metadata)


def test_reads_an_adapter_that_peft_saved(tmp_path):
    from peft import LoraConfig

    ours, theirs, velocity, their_velocity = build()
    config = LoraConfig(r=4, lora_alpha=10, init_lora_weights=False, target_modules=["attn.to_q"])
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path, adapter_name="default")
    lora.merge_lora(ours, files.load_lora_file(tmp_path))
    with torch.no_grad():
        assert relative_error(velocity(ours), their_velocity(theirs)) <= 1e-5


@pytest.mark.parametrize(
    "layout, scale",
    [
        ({"a": "transformer.m.to_q.lora_A.weight", "b": "transformer.m.to_q.lora_B.weight"}, 1.0),
        (
            {
                "a": "base_model.model.m.to_q.lora_A.default.weight",
                "b": "base_model.model.m.to_q.lora_B.default.weight",
            },
            1.0,
        ),
        (
            {
                "a": "transformer.m.to_q.lora.down.weight",
                "b": "transformer.m.to_q.lora.up.weight",
                "alpha": "transformer.m.to_q.alpha",
            },
            1.5,
        ),
        (
            {"a": "m.to_q.lora_down.weight", "b": "m.to_q.lora_up.weight", "alpha": "m.to_q.alpha"},
            1.5,
        ),
    ],
)
def test_key_layouts(layout, scale, tmp_path):
    values = {"a": torch.randn(2, 5), "b": torch.randn(3, 2), "alpha": torch.tensor(3.0)}
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: values[kind] for kind, key in layout.items()}, file)
    ((name, (a, b, s)),) = files.load_lora_file(file).items()
    assert name == "m.to_q" and s == scale
    assert torch.equal(a, values["a"]) and torch.equal(b, values["b"])


def test_alpha_comes_from_the_config_beside_a_peft_file(tmp_path):
    tensors = {
        "base_model.model.m.lora_A.weight": torch.randn(2, 5),
        "base_model.model.m.lora_B.weight": torch.randn(3, 2),
    }
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert files.load_lora_file(tmp_path)["m"].scale == 4.0


@pytest.mark.parametrize(
    "keys, message",
    [
        (["transformer.m.lora_A.weight"], "half a pair"),
        (["transformer.m.weight"], "transformer.m.weight"),
        (
            [f"m.lora_{x}.{name}.weight" for name in ("one", "two") for x in "AB"],
            "two.weight .a second adapter",
        ),
        (
            [f"layers.0.attention.{m}.lora_{x}.weight" for m in ("out", "to_out.0") for x in "AB"],
            "two adapters for layers.0.attention.to_out.0",
        ),
        (["text_encoder.m.lora_A.weight", "text_encoder.m.lora_B.weight"], "text_encoder.m"),
        ([], "empty"),
    ],
)
def test_foreign_files_are_refused(keys, message, tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2, 2) for key in keys}, file)
    with pytest.raises(LoadError, match=message):
        files.load_lora_file(file)


def test_missing_and_damaged_files_are_named(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(LoadError, match="x.safetensors"):
        files.load_lora_file(file)
    file.write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(LoadError, match="x.safetensors"):
        files.load_lora_file(file)
    with pytest.raises(LoadError, match="no pytorch_lora_weights.safetensors"):
        files.load_lora_file(tmp_path)


@pytest.mark.parametrize(
    ("name", "layout", "target", "message"),
    [
        ("layers.0.attention.to_q", "comfy", "", "Did you mean 'comfyui'"),
        ("layers.0.attention.to_q", "peft", "x.safetensors", "directory of two files"),
        ("transformer_blocks.0.norm1_context.linear", "comfyui", "", "norm1_context"),
        ("all_final_layer.2-1.linear", "comfyui", "", "all_final_layer"),
        (None, "diffusers", "", "no adapter to write"),
    ],
)
def test_what_cannot_be_written_is_refused(name, layout, target, message, tmp_path):
    tensors = {name: LoraTensors(torch.ones(2, 4), torch.ones(4, 2), 1.0)} if name else {}
    with pytest.raises(ConfigError, match=message):
        files.write_lora(tmp_path / target, tensors, layout)
    assert not list(tmp_path.iterdir())
