"""Prompts that ask for text: what they promise the OCR reward, and how they are split."""

import numpy as np
import pytest

from tdm_r1 import signs
from tdm_r1.errors import ConfigError
from tdm_r1.prompts import load_prompts
from tdm_r1.training.evaluate import by_family


def quoted(prompt):
    assert prompt.count('"') == 2, prompt
    return prompt.split('"')[1]


@pytest.mark.parametrize("family", signs.FAMILIES)
def test_every_prompt_asks_for_one_text_of_its_family(family):
    words = {"word": range(1, 2), "phrase": range(2, 4), "line": range(4, 9)}[family]
    train, test = (signs.prompts(family, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (signs.TRAIN_SIZE, signs.TEST_SIZE)
    assert len(set(train + test)) == len(train + test)
    assert signs.prompts(family) == train + test
    for prompt in train + test:
        text = quoted(prompt)
        assert 3 <= len(text) <= signs.MAX_LENGTH and len(text.split()) in words, prompt
        assert signs.family_of(prompt) == family


def test_no_text_is_in_both_splits_whatever_its_case():
    train, test = (
        {quoted(p).lower() for family in signs.FAMILIES for p in signs.prompts(family, split)}
        for split in ("train", "test")
    )
    assert not train & test
    assert len(test) > 400


def test_prompts_are_drawn_once_and_for_all():
    again = signs.prompts.__wrapped__("phrase", "test")
    assert again == signs.prompts("phrase", "test")
    assert load_prompts("ocr", ["word", "line"], "test") == (
        signs.prompts("word", "test"),
        signs.prompts("line", "test"),
    )


def test_the_ocr_reward_finds_the_text():
    ocr = pytest.importorskip("tdm_r1.rewards.ocr")
    for family in signs.FAMILIES:
        prompt = signs.prompts(family, "test")[0]
        assert ocr.target_text(prompt) == quoted(prompt)


def test_evaluation_tells_the_families_apart():
    values = np.array([0.0, 1.0, 0.5])
    found = by_family(values, ['a mug with "Tea"', 'a "Hot Tea" sign', "my mug"])
    assert found == {"word": 0.0, "phrase": 1.0, "all": 0.5}


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="family must be one of word, phrase, line; got 'lines'"):
        signs.prompts("lines")
    with pytest.raises(ConfigError, match="split must be one of train, test, all; got 'dev'"):
        signs.prompts("word", "dev")
    for prompt in ("a cat", 'a cat with ""', 'a cat with "'):
        with pytest.raises(ConfigError, match="no text in double quotes"):
            signs.family_of(prompt)
