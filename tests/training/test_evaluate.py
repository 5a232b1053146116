"""Evaluation: how scores are grouped."""

import numpy as np

from tdm_r1 import geneval
from tdm_r1.training.evaluate import by_family


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
