"""The embedded world's checker behind the reward interface."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tdm_r1 import shapes
from tdm_r1.errors import ConfigError
from tdm_r1.rewards import load_reward, score

CAPTIONS = [shapes.captions(family)[0] for family in shapes.FAMILIES if family != "words"]


def _pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(shapes.render(caption, rng)) for caption in CAPTIONS]


@pytest.mark.parametrize("spec", ["shapes", "shapes:strict"])
def test_a_true_picture_scores_one_and_a_blank_or_noisy_one_less(spec):
    reward = load_reward(spec)
    assert score(reward, _pictures(), CAPTIONS).tolist() == [1.0] * len(CAPTIONS)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    spoilt = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")]
    spoilt_B = score(reward, [*spoilt, Image.fromarray(noise)], CAPTIONS[:3])
    assert spoilt_B.max() < 0.5


def test_clean_reads_no_caption_and_wants_every_shape_of_one_colour():
    reward, pictures = load_reward("shapes:clean"), _pictures()
    assert score(reward, pictures, CAPTIONS[1:] + CAPTIONS[:1]).tolist() == [1.0] * len(CAPTIONS)
    blank = Image.new("RGB", (64, 64), "white")
    spoilt = [blank.copy(), blank]
    draw = ImageDraw.Draw(spoilt[0])
    draw.pieslice((18, 18, 46, 46), 0, 180, fill=shapes.COLOURS["red"])
    draw.pieslice((18, 18, 46, 46), 180, 360, fill=shapes.COLOURS["yellow"])
    assert score(reward, spoilt, ["", ""]).tolist() == [0.0, 0.0]


def test_strict_is_all_or_nothing_and_never_above_dense():
    pictures, captions = _pictures(), CAPTIONS[1:] + CAPTIONS[:1]  # each with another's caption
    strict_B = score(load_reward("shapes:strict"), pictures, captions)
    dense_B = score(load_reward("shapes"), pictures, captions)
    assert set(strict_B) <= {0.0, 1.0} and (strict_B <= dense_B).all()
    assert ((0 <= dense_B) & (dense_B <= 1)).all()


def test_transparency_does_not_change_the_verdict():
    images = [picture.convert("RGBA") for picture in _pictures()]
    assert score(load_reward("shapes"), images, CAPTIONS).min() == 1.0


def test_a_caption_outside_the_world_is_the_users_mistake():
    with pytest.raises(ConfigError, match="unicorn"):
        score(load_reward("shapes"), _pictures()[:1], ["a photo of a unicorn"])
