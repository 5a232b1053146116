"""The held-out panel on pictures whose numbers are known, and against OpenCV."""

import cv2
import numpy as np
import pytest
from PIL import Image

from tdm_r1.training import panel


def plain(colour, size=8):
    return Image.new("RGB", (size, size), colour)


def noise(seed, size=(24, 17)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def test_sharpness_of_known_pictures():
    checkers = np.indices((10, 10)).sum(0) % 2 * 255
    ramp = np.tile(np.arange(0, 250, 25), (10, 1))
    for grey, expected in ((checkers, 16.0), (ramp, 0.0)):
        image = Image.fromarray(np.repeat(grey[..., None], 3, -1).astype(np.uint8))
        assert panel.sharpness(image) == pytest.approx(expected, abs=1e-12)
    assert panel.sharpness(plain("orange")) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 3 x 3"):
        panel.sharpness(plain("red", 2))


def test_sharpness_agrees_with_opencv_and_falls_with_blur():
    image = noise(0)
    luma = np.asarray(image, np.float64) / 255 @ [0.299, 0.587, 0.114]
    expected = cv2.Laplacian(luma, cv2.CV_64F)[1:-1, 1:-1].var()
    assert panel.sharpness(image) == pytest.approx(expected, rel=1e-9)
    blurred = Image.fromarray(cv2.GaussianBlur(np.asarray(image), (5, 5), 1.0))
    assert panel.sharpness(blurred) < 0.2 * expected


def test_saturation_of_known_pictures():
    for colour, expected in (
        ("white", 0.0), ("grey", 0.0), ("black", 0.0), ("red", 1.0), ("yellow", 1.0),
        ((200, 100, 100), 0.5),
    ):  # fmt: skip
        assert panel.saturation(plain(colour)) == pytest.approx(expected)
    image = noise(1)
    expected = cv2.cvtColor(np.asarray(image, np.float32) / 255, cv2.COLOR_RGB2HSV)[..., 1].mean()
    assert panel.saturation(image) == pytest.approx(expected, rel=1e-5)


def test_diversity_of_known_groups():
    black, white, red = plain("black"), plain("white"), plain("red")
    assert panel.diversity([black, white], ["a", "a"]) == pytest.approx(1.0)
    assert panel.diversity([black, red], ["a", "a"]) == pytest.approx((1 / 3) ** 0.5)
    assert panel.diversity([red, red, red], ["a"] * 3) == 0
    # pairs: black-white 1, black-black 0, black-white 1; the other group 0; a single one: left out
    images, prompts = [black, red, white, red, black, white], ["a", "b", "a", "b", "a", "c"]
    assert panel.diversity(images, prompts) == pytest.approx((2 / 3 + 0) / 2)
    assert panel.diversity([black, white], ["a", "b"]) is None


def test_statistics_leave_diversity_out_where_no_prompt_is_repeated():
    assert set(panel.statistics([noise(0), noise(1)], ["a", "b"])) == {"sharpness", "saturation"}
    found = panel.statistics([plain("red"), plain("grey")], ["a", "a"])
    assert found["saturation"] == 0.5 and found["sharpness"] < 1e-12 and found["diversity"] > 0


def members(sharp, saturated, diverse, reward=None):
    found = {"sharpness": sharp, "saturation": saturated, "diversity": diverse}
    return found if reward is None else {"held_out_reward": reward, **found}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (members(1.0, 0.5, 0.2), False),  # as it was
        (members(2.0, 0.5, 0.1), True),  # over-sharp and less diverse
        (members(0.5, 0.9, 0.3), True),  # blurred and lurid
        (members(1.0, 0.5, 0.1), False),  # one of three
        (members(0.9, 0.4, 0.1, reward=0.7), False),  # the second scorer alone decides
        (members(1.0, 0.5, 0.3, reward=0.5), True),
    ],
)
def test_a_panel_falls_by_its_scorer_or_else_by_the_majority(now, expected):
    scorer = 0.6 if "held_out_reward" in now else None
    start = members(1.0, 0.5, 0.2, scorer)
    assert panel.fell(start, now, start) is expected


def test_zeros_do_not_break_the_drift():
    black = members(0.0, 0.0, 0.0)
    assert panel.fell(black, black, black) is False
    assert panel.fell(black, members(0.1, 0.1, 0.0), black) is True
