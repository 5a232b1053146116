"""What the `memory` section does to a run: the same numbers from fewer resident bytes."""

import weakref

import pytest
import torch

from tdm_r1 import Engine
from tdm_r1.config import load_recipe
from tdm_r1.errors import ConfigError
from tdm_r1.models.loading import load_transformer
from tdm_r1.pipeline import load_pipeline
from tdm_r1.training import embeddings
from tdm_r1.training.offload import Offload
from tdm_r1.training.trainer import Trainer
from tests.training.common import hashes, recipe, write_recipe

TIGHT = {"checkpoint_blocks": True, "precompute_text": True, "offload": True, "decode_batch": 2}

MOVABLE = """class Mine:
    def __call__(self, images, prompts):
        return [0.0] * len(images)
    def to(self, device):
        self.device = device
score = Mine()
"""


@pytest.fixture
def values(bright):
    return {
        "reward": bright,
        "evaluation": {"families": ["counting"], "num_prompts": 2, "reward": "jpeg"},
        "iterations": 1,
    }


@pytest.mark.parametrize("family", ["sd3", "zimage"])
def test_a_tight_run_is_bitwise_the_same(family, tmp_path, sd3_dir, zimage_dir, values):
    directory = sd3_dir if family == "sd3" else zimage_dir
    plain = Trainer(recipe(tmp_path / "plain", directory, **values))
    plain.run()
    tight = Trainer(recipe(tmp_path / "tight", directory, memory=TIGHT, **values))
    assert isinstance(tight.pipeline.text, embeddings.StoredText)
    before = hashes(tight)
    tight.run()
    assert hashes(tight) == hashes(plain)
    changed = {name for name, value in hashes(tight).items() if value != before[name]}
    assert changed == {"generator", "fake", "surrogate", "ema", "lag"}


def test_lora_roles_train_in_fp32_over_a_bf16_base(tmp_path, sd3_dir, values):
    trainer = Trainer(recipe(tmp_path, sd3_dir, memory={"base": "bf16"}, **values))
    base = trainer.roles["base"].transformer
    frozen = {p.dtype for name, p in base.named_parameters() if ".lora_" not in name}
    assert frozen == {torch.bfloat16}
    assert trainer.pipeline.vae.dtype == torch.bfloat16
    for name in ("generator", "fake", "surrogate", "ema", "lag"):
        assert {p.dtype for p in trainer.roles[name].tensors().values()} == {torch.float32}
    state = {name: p.clone() for name, p in base.named_parameters() if ".lora_" not in name}
    before = hashes(trainer)
    trainer.run()
    after = hashes(trainer)
    assert all(before[name] != after[name] for name in ("generator", "fake", "surrogate"))
    assert all(torch.equal(p, state[n]) for n, p in base.named_parameters() if n in state)
    optimizer = trainer.engines["generator"].optimizer
    assert {slot["exp_avg"].dtype for slot in optimizer.state.values()} == {torch.float32}


def test_full_roles_are_fp32_over_a_bf16_base(tmp_path, sd3_dir, values):
    settings = {"memory": {"base": "bf16"}, "roles": {"kind": "full"}, "method": "tdm"}
    trainer = Trainer(recipe(tmp_path, sd3_dir, **{**values, **settings}))
    assert trainer.roles["base"].transformer.dtype == torch.bfloat16
    stored = dict(trainer.roles["base"].transformer.named_parameters())
    for name in ("generator", "fake", "ema"):
        for key, parameter in trainer.roles[name].tensors().items():
            assert torch.equal(parameter, stored[key].float()), key


def test_by_default_the_base_is_the_file_in_fp32(tmp_path, sd3_dir, values):
    trainer = Trainer(recipe(tmp_path, sd3_dir, roles={"kind": "full"}, **values))
    file = load_transformer(sd3_dir, dtype=torch.float32).state_dict()
    for name in ("base", "generator", "surrogate", "lag"):
        found = trainer.roles[name].transformer.state_dict()
        assert found.keys() == file.keys()
        assert all(torch.equal(found[key], file[key]) for key in file), name


def test_a_pipeline_for_training_keeps_the_transformer_as_stored():
    pipeline = load_pipeline("tiny-sd3", dtype="float32", merge=False)
    stored = load_transformer(pipeline.path, dtype=torch.float32).state_dict()
    assert pipeline.lora is not None and not pipeline.transformer.frozen
    found = pipeline.transformer.state_dict()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_embeddings_are_computed_once_and_the_encoders_dropped(sd3_dir, tmp_path, monkeypatch):
    pipeline = load_pipeline(sd3_dir, dtype="float32", t5_length=7)
    prompts = ["", "two red circles", 'a "cat"', "two red circles\n"]
    wanted = [pipeline.text.encode([prompt]) for prompt in prompts]
    encoder = weakref.ref(pipeline.text.clips[0][1])
    embeddings.precompute(pipeline, prompts[:2], tmp_path)
    pipeline.text = load_pipeline(sd3_dir, dtype="float32", t5_length=7).text
    calls = []
    real = type(pipeline.text)._encode
    monkeypatch.setattr(
        type(pipeline.text), "_encode", lambda self, p: calls.extend(p) or real(self, p)
    )
    embeddings.precompute(pipeline, prompts, tmp_path)
    assert calls == ["", *prompts[2:]]  # "" tells the dtype; the other two were there
    assert encoder() is None
    for prompt, cond in zip(prompts, wanted, strict=True):
        found = pipeline.text.encode([prompt])
        assert torch.equal(found.tokens_BTE, cond.tokens_BTE)
        assert torch.equal(found.pooled_BE, cond.pooled_BE)
        assert torch.equal(found.lengths_B, cond.lengths_B)
    with pytest.raises(ConfigError, match="'a dog' was not among the run's prompts"):
        pipeline.text.encode(["a dog"])
    other = load_pipeline(sd3_dir, dtype="float32", t5_length=9)
    embeddings.precompute(other, [""], tmp_path)
    assert other.text.encode([""]).tokens_BTE.shape[1] == wanted[0].tokens_BTE.shape[1] + 2


def test_an_interrupted_shard_is_written_again(zimage_dir, tmp_path):
    pipeline = load_pipeline(zimage_dir, dtype="float32")
    embeddings.precompute(pipeline, ["one"], tmp_path)
    (folder,) = (tmp_path / "embeddings").iterdir()
    index = folder / "0000.json"
    kept = index.read_text()
    pipeline = load_pipeline(zimage_dir, dtype="float32")
    embeddings.precompute(pipeline, ["one", "two"], tmp_path)
    index.write_text(kept)  # as if killed between the second shard and its index
    pipeline = load_pipeline(zimage_dir, dtype="float32")
    wanted = pipeline.text.encode(["two"]).tokens_BTE
    embeddings.precompute(pipeline, ["one", "two"], tmp_path)
    assert torch.equal(pipeline.text.encode(["two"]).tokens_BTE, wanted)


def test_ranks_share_the_encoding(zimage_dir, tmp_path, monkeypatch):
    prompts = ["", "one", "two", "three", "four"]
    monkeypatch.setattr(embeddings.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(embeddings.distributed, "barrier", lambda: None)
    for rank in (0, 1):
        monkeypatch.setattr(embeddings.distributed, "rank", lambda rank=rank: rank)
        with monkeypatch.context() as patch:
            patch.setattr(embeddings, "read_index", lambda folder: {})  # as both ranks see it
            pipeline = load_pipeline(zimage_dir, dtype="float32")
            embeddings.precompute(pipeline, prompts, tmp_path)
    (folder,) = (tmp_path / "embeddings").iterdir()
    where = embeddings.read_index(folder)
    assert where.keys() == set(prompts)
    assert [where[prompt][0][:4] for prompt in prompts] == ["0000", "0001"] * 2 + ["0000"]


class Part:
    """Notes where it is moved."""

    def __init__(self):
        self.moves = []

    def to(self, device):
        self.moves.append(str(device))


def test_offload_brings_parts_in_and_always_sends_them_back():
    part, meta = Part(), torch.device("meta")
    offload = Offload([part, None, len], meta, enabled=True)
    with pytest.raises(KeyError), offload():
        assert part.moves == ["cpu", "meta"]
        raise KeyError
    assert part.moves == ["cpu", "meta", "cpu"]
    idle = Part()
    with Offload([idle], meta, enabled=False)():
        pass
    assert not idle.moves


def test_vae_and_rewards_move(sd3_dir, tmp_path):
    from tdm_r1.rewards import load_reward

    vae = load_pipeline(sd3_dir, dtype="float32").vae
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    before, weights = vae.decode(x), {k: v.clone() for k, v in vae.model.state_dict().items()}
    assert vae.to(torch.device("meta")).decode(x.to("meta")).device.type == "meta"
    vae.model.to_empty(device="cpu").load_state_dict(weights)
    vae._bind()
    assert torch.equal(vae.decode(x), before)
    (tmp_path / "mine.py").write_text(MOVABLE)
    reward = load_reward(f"jpeg+{tmp_path}/mine.py:score")
    assert reward.to(torch.device("meta")).terms[1].fn.device.type == "meta"


def test_pictures_are_decoded_as_many_at_a_time_as_the_recipe_says(sd3_dir, monkeypatch):
    engine = Engine(load_pipeline(sd3_dir, dtype="float32"))
    x = torch.randn(5, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    whole, sizes = engine.decode(x), []
    decode = engine.pipeline.vae.decode
    monkeypatch.setattr(
        engine.pipeline.vae, "decode", lambda part: sizes.append(len(part)) or decode(part)
    )
    engine.decode_limit = 2 * 64 * 64
    assert torch.allclose(engine.decode(x), whole, atol=1e-5)
    assert sizes == [2, 2, 1]


def test_bad_memory_settings(tmp_path, sd3_dir):
    file = write_recipe(tmp_path, sd3_dir)
    with pytest.raises(ConfigError, match="memory.base must be one of fp32, bf16; got 'fp16'"):
        load_recipe(file, ["memory.base=fp16"])
    with pytest.raises(ConfigError, match="memory.gpus must be at least 0; got -1"):
        load_recipe(file, ["memory.gpus=-1"])
