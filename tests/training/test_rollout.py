"""What a rollout draws, by seed, group and boundary, and which prompt a picture is scored by."""

import torch

from tdm_r1.training.clock import Clock
from tdm_r1.training.rollout import renoised, roll_out, score_batches
from tests.training.test_tdm import make

GROUPS = [(5, "two circles"), (6, "a circle and a square")]


def test_noise_follows_the_seed_and_guidance_the_empty_prompt(tmp_path, sd3_dir):
    trainer = make(tmp_path, sd3_dir)
    role, engine = trainer.roles["generator"], trainer.engine
    batches = [roll_out(engine, role, GROUPS, 3, seed) for seed in (0, 1)]
    assert not torch.equal(*(batch.x[0] for batch in batches))
    empty = engine.pipeline.text.encode([""]).repeat(6)
    assert torch.equal(batches[0].uncond.tokens_BTE, empty.tokens_BTE)


def test_boundaries_of_a_micro_batch_are_noised_apart(tmp_path, sd3_dir):
    trainer = make(tmp_path, sd3_dir)
    batch = roll_out(trainer.engine, trainer.roles["generator"], GROUPS, 3, 0)
    how = {"lower": 0.95, "shift": 3.0, "key": (1, 2), "shared": False, "num_prompts": 2}
    first, second = (renoised(batch, k, trainer.engine.schedule, **how)[2] for k in (1, 2))
    assert not torch.equal(first, second)


def test_every_picture_is_scored_by_the_prompt_of_its_group(tmp_path, sd3_dir):
    trainer = make(tmp_path, sd3_dir)
    role, seen = trainer.roles["generator"], []
    batch = roll_out(trainer.engine, role, GROUPS, 3, 0)

    def reward(images, prompts):
        seen.extend(prompts)
        return [1.0, 1.0, 1.0, 0.0, 1.0, 2.0]

    metrics = score_batches(trainer.engine, role, [batch], reward, Clock())
    assert seen == [text for _, text in GROUPS for _ in range(3)]
    assert metrics["flat_groups"] == 0.5  # the first
