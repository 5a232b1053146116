"""Evaluation: how scores are grouped, and how many pictures a reward gets at a time."""

import numpy as np
import pytest
from PIL import Image

from tdm_r1 import geneval
from tdm_r1.engine import Engine
from tdm_r1.pipeline import load_pipeline
from tdm_r1.training import evaluate
from tdm_r1.training.evaluate import BATCH, NUM_SHOWN, Evaluator, bootstrap_interval, by_family
from tdm_r1.training.trainer import Trainer
from tests.training.common import recipe


def test_scores_are_grouped_by_the_worlds_families_and_genevals_tasks():
    prompts = ["two red circles", "one circle", "a photo of a cat", "a cat left of a dog", "hello"]
    families = by_family(np.array([1.0, 0.0, 1.0, 0.25, 0.5]), prompts)
    assert families == {"counting": 0.5, "single_object": 1.0, "position": 0.25, "all": 0.5}


def test_the_six_task_mean_does_not_depend_on_the_number_of_prompts_per_task():
    prompts = [p for task in geneval.TASKS for p in geneval.prompts(task, "test")]
    values = np.array([float(geneval.parse(p).task == "colors") for p in prompts])
    families = by_family(values, prompts)
    assert tuple(families) == geneval.TASKS
    assert np.mean(list(families.values())) == 1 / 6 != values.mean()


def test_a_scorer_named_twice_is_loaded_once(tmp_path, sd3_dir):
    file, loads = tmp_path / "mine.py", tmp_path / "loads"
    lines = f"open({str(loads)!r}, 'a').write('x')", "def score(images, prompts):", "    return [0]"
    file.write_text("\n".join(lines) + "\n")
    spec = f"{file}:score"
    evaluation = {"families": ["counting"], "num_prompts": 4, "reward": spec}
    trainer = Trainer(recipe(tmp_path, sd3_dir, reward=spec, evaluation=evaluation))
    assert loads.read_text() == "x"
    assert trainer.method.reward is trainer.evaluator.reward
    other = {**evaluation, "reward": f"2*{spec}", "held_out_reward": "jpeg"}
    trainer = Trainer(recipe(tmp_path, sd3_dir, reward=spec, evaluation=other))
    assert trainer.method.reward is not trainer.evaluator.reward
    assert loads.read_text() == "xxx"


@pytest.mark.parametrize(
    ("reward", "named", "found"),
    [
        ("shapes", "", "shapes:strict"), ("shapes:clean", "", "shapes:clean"),
        ("mine.py:score", "", "mine.py:score"), ("0.5*shapes+0.5*jpeg", "", "0.5*shapes+0.5*jpeg"),
        ("mine.py:score", "shapes", "shapes"),
    ],
)  # fmt: skip
def test_an_evaluation_is_by_the_runs_own_reward(reward, named, found, tmp_path, sd3_dir):
    loaded = []
    made = recipe(tmp_path, sd3_dir, reward=reward, evaluation={"reward": named})
    Evaluator(made, load_pipeline(sd3_dir, dtype="float32"), loaded.append)
    assert loaded == [found]


def test_rewards_get_as_many_pictures_at_a_time_as_are_drawn(tmp_path, sd3_dir, monkeypatch):
    values = {"families": ["counting"], "num_prompts": 150, "held_out_reward": "jpeg"}
    made = recipe(tmp_path, sd3_dir, evaluation=values)
    evaluator = Evaluator(made, load_pipeline(sd3_dir, dtype="float32"))
    greys, calls = np.random.default_rng(0).integers(0, 256, 150), []
    pictures = [Image.new("RGB", (8, 8), (int(grey),) * 3) for grey in greys]

    def judge(images, prompts):
        calls.append(list(prompts))
        return [float(np.asarray(image).mean()) for image in images]

    monkeypatch.setattr(evaluator, "pictures", lambda role, prompts, seed: pictures)
    monkeypatch.setattr(evaluator, "reward", judge)
    monkeypatch.setattr(evaluator, "held_out_reward", judge)
    result, sample = evaluator.run(None)
    assert result["reward"] == pytest.approx(greys.mean())
    assert result["panel"]["held_out_reward"] == pytest.approx(greys.mean())
    assert sample.values == pytest.approx(greys[:NUM_SHOWN])
    assert max(map(len, calls)) <= BATCH < 150
    assert sum(calls, []) == evaluator.prompts * 2


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_those_of_the_engine(guidance, tmp_path, sd3_dir, monkeypatch):
    rollout = {"solver": "dpm2m", "num_prompts": 2, "group_size": 3, "micro_groups": 1}
    values = {"families": ["counting"], "num_prompts": 3, "guidance": guidance}
    trainer = Trainer(recipe(tmp_path, sd3_dir, evaluation=values, rollout=rollout))
    monkeypatch.setattr(evaluate, "BATCH", 2)
    texts = ["two circles", "a square", "two circles"]
    found = trainer.evaluator.pictures(trainer.roles["base"], texts, 7)
    engine = Engine(load_pipeline(sd3_dir, dtype="float32"), solver="dpm2m")
    for i, (text, picture) in enumerate(zip(texts, found, strict=True)):
        (like,) = engine.generate(text, seed=7 + i, guidance_scale=guidance)
        assert abs(np.asarray(picture).astype(int) - np.asarray(like)).max() <= 1


def test_intervals_resample_prompts_not_pictures():
    prompts = ["a"] * 50 + ["b"] * 50  # means of 0, 1/2 and 1
    assert list(bootstrap_interval(np.repeat([0.0, 1.0], 50), prompts, seed=0)) == [0.0, 1.0]


def test_means_are_over_pictures_and_over_families_and_no_noise_comes_twice(
    tmp_path, sd3_dir, monkeypatch
):
    values = {"families": ["counting", "two"], "num_prompts": 3, "held_out_families": ["single"]}
    made = recipe(tmp_path, sd3_dir, evaluation={**values, "seed": 11})
    evaluator, seeds = Evaluator(made, load_pipeline(sd3_dir, dtype="float32")), []

    def pictures(role, prompts, seed):
        seeds.append(seed)
        return [Image.new("RGB", (8, 8))] * len(prompts)

    monkeypatch.setattr(evaluator, "pictures", pictures)
    judge = lambda images, prompts: [float("and" in p) for p in prompts]  # noqa: E731
    monkeypatch.setattr(evaluator, "reward", judge)
    result, _ = evaluator.run(None)
    assert result["reward"] == pytest.approx(1 / 3) and result["family_mean"] == 0.5
    assert seeds == [11, 14]
