"""Specs, weighted sums, files, and every way in which a reward can misbehave."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tdm_r1.errors import ConfigError, RewardError
from tdm_r1.rewards import load_reward, score

PROMPTS = ["two red circles", "a blue square"]
IMAGES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]


def _noise(size: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


def _write(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "answer",
    [
        [1, 0.5],
        (np.float32(1), np.float32(0.5)),
        np.array([1, 0.5], np.float16),
        torch.tensor([1.0, 0.5], requires_grad=True),
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        [torch.tensor(1.0), torch.tensor(0.5)],
    ],
)
def test_any_sequence_of_numbers_becomes_float64(answer):
    got_B = score(lambda images, prompts: answer, IMAGES, PROMPTS)
    assert got_B.dtype == np.float64
    assert got_B.tolist() == [1.0, 0.5]


def test_booleans_count_as_numbers():
    assert score(lambda images, prompts: [True, False], IMAGES, PROMPTS).tolist() == [1.0, 0.0]


def _one_too_few(images, prompts):
    return [1.0]


@pytest.mark.parametrize(
    ("answer", "shape"),
    [([1.0], r"\[1\]"), ([1.0] * 3, r"\[3\]"), ([[1.0], [2.0]], r"\[2, 1\]"), (1.0, r"\[\]")],
)
def test_a_wrong_shape_is_named(answer, shape):
    with pytest.raises(RewardError, match=rf"must return 2 numbers.*shape {shape}"):
        score(lambda images, prompts: answer, IMAGES, PROMPTS)


@pytest.mark.parametrize("answer", [None, ["a", "b"], {"a": 1, "b": 2}, [1.0, None], [1j, 2j]])
def test_what_is_no_number_is_refused(answer):
    with pytest.raises(RewardError, match="must return one number per image"):
        score(lambda images, prompts: answer, IMAGES, PROMPTS)


def test_a_ragged_answer_is_refused():
    with pytest.raises(RewardError, match="raised ValueError"):
        score(lambda images, prompts: [[1.0], [1.0, 2.0]], IMAGES, PROMPTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_with_its_prompt(value):
    with pytest.raises(RewardError, match=f"returned {value} for image 1, prompt 'a blue square'"):
        score(lambda images, prompts: [1.0, value], IMAGES, PROMPTS)


def test_the_error_names_the_reward_and_keeps_the_cause():
    def broken(images, prompts):
        raise KeyError("weights")

    with pytest.raises(RewardError, match="broken' raised KeyError: 'weights'") as caught:
        score(broken, IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_is_not_the_rewards_fault():
    def interrupted(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, IMAGES, PROMPTS)


def test_images_and_prompts_must_agree_in_number():
    with pytest.raises(ConfigError, match="prompts: got 1 for 2 images"):
        score(_one_too_few, IMAGES, PROMPTS[:1])
    with pytest.raises(ConfigError, match="metadata: got 3 for 2 images"):
        score(_one_too_few, IMAGES, PROMPTS, metadata=[None] * 3)


def test_an_empty_batch_is_not_passed_on():
    got_B = score(_one_too_few, [], [])
    assert got_B.shape == (0,) and got_B.dtype == np.float64
    assert score(load_reward("jpeg + shapes"), [], []).shape == (0,)


def test_metadata_reaches_only_those_who_take_it():
    def takes(images, prompts, metadata=None):
        return metadata

    def takes_anything(images, prompts, **extra):
        return extra["metadata"]

    for reward in (takes, takes_anything):
        assert score(reward, IMAGES, PROMPTS, metadata=[3, 4]).tolist() == [3.0, 4.0]
    assert score(load_reward("jpeg"), IMAGES, PROMPTS, metadata=[3, 4]).shape == (2,)


def test_a_sum_is_weighted_and_hands_metadata_on(tmp_path):
    path = _write(
        tmp_path,
        "def ones(images, prompts):\n    return [1.0] * len(images)\n"
        "def tags(images, prompts, metadata):\n    return metadata\n",
    )
    reward = load_reward(f"0.5*{path}:ones + 1e+1*{path}:tags+{path}:ones")
    assert [term.weight for term in reward.terms] == [0.5, 10.0, 1.0]
    assert score(reward, IMAGES, PROMPTS, metadata=[1, -2]).tolist() == [11.5, -18.5]


def test_a_negative_weight_is_a_penalty():
    plain, minus = load_reward("jpeg"), load_reward("-2*jpeg")
    np.testing.assert_array_equal(score(minus, IMAGES, PROMPTS), -2 * score(plain, IMAGES, PROMPTS))


def test_a_sum_names_the_term_that_failed(tmp_path):
    path = _write(tmp_path, "def bad(images, prompts):\n    return [float('nan')] * len(images)\n")
    with pytest.raises(RewardError, match=r"mine.py:bad' returned nan for image 0"):
        score(load_reward(f"jpeg+{path}:bad"), IMAGES, PROMPTS)


def test_a_files_dataclasses_and_callable_objects_work(tmp_path):
    path = _write(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Constant:\n"
        "    value: float\n"
        "    def __call__(self, images, prompts):\n"
        "        return [self.value] * len(images)\n"
        "seven = Constant(7.0)\n",
    )
    assert score(load_reward(f"{path}:seven"), IMAGES, PROMPTS).tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shape", "unknown name 'shape'. Did you mean 'shapes'"),
        ("0.5*ocr+oct", "unknown name 'oct'. Did you mean 'ocr'"),
        ("ocr:exakt", "Did you mean 'ocr:exact'"),
        ("", "expected a spec"),
        (None, "expected a spec"),
        ("jpeg+", "cannot read the term ''"),
        ("2*3*jpeg", "cannot read the term '2\\*3\\*jpeg'"),
        ("x*jpeg", "weight 'x'.*is not a number"),
        ("nan*jpeg", "weight 'nan'.*is not a number"),
        ("inf*jpeg", "weight 'inf'.*is not a number"),
        ("*jpeg", "weight ''.*is not a number"),
        ("nowhere.py:score", "there is no file nowhere.py"),
    ],
)
def test_a_bad_spec_says_what_is_wrong(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(spec)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def scores(images, prompts): ...", "score", "Did you mean 'scores'.*It has: scores"),
        ("score = 3", "score", "no callable named 'score'.*It has: none"),
        ("import nowhere_to_be_found", "score", "raised ModuleNotFoundError"),
        ("def (", "score", "raised SyntaxError"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, text, name, message):
    path = _write(tmp_path, text)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=message):
        load_reward(f"{path}:{name}")
    leftovers = set(sys.modules) - before
    assert "raised" not in message or not leftovers


def test_jpeg_prefers_the_plain_picture():
    plain, noisy = score(load_reward("jpeg"), [IMAGES[0], _noise(8)], PROMPTS)
    assert noisy < plain < 0


def test_jpeg_counts_thousands_of_bytes_and_ignores_the_mode():
    image = _noise(64)
    (reward,) = score(load_reward("jpeg"), [image], ["any"])
    assert 4e3 < -reward * 500e3 < 64 * 64 * 3
    with_alpha = image.convert("RGBA")
    assert score(load_reward("jpeg"), [with_alpha], ["any"])[0] == reward


def test_importing_the_package_loads_no_inference_engine():
    code = (
        "import sys, tdm_r1.rewards; "
        "sys.exit(any(name in sys.modules for name in ('rapidocr', 'onnxruntime', 'torch', 'cv2')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
