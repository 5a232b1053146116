"""Prompt sources and the sampler whose position can be saved."""

from collections import Counter

import pytest

from tdm_r1 import shapes
from tdm_r1.errors import ConfigError
from tdm_r1.prompts import PromptSampler, evaluation_prompts, load_prompts

POOLS = (("a", "b", "c"), ("x", "y"))


def test_draws_are_a_function_of_seed_and_position():
    whole = PromptSampler(POOLS, seed=3).draw(40)
    parts = PromptSampler(POOLS, seed=3)
    assert parts.draw(7) + parts.draw(33) == whole
    resumed = PromptSampler(POOLS, seed=3)
    resumed.position = 7
    assert resumed.draw(33) == whole[7:]
    assert PromptSampler(POOLS, seed=4).draw(40) != whole


def test_families_take_turns_and_every_prompt_comes_once_per_pass():
    draws = PromptSampler(POOLS, seed=0).draw(12)
    assert [group for group, _ in draws] == list(range(12))
    assert all((prompt in POOLS[0]) == (group % 2 == 0) for group, prompt in draws)
    assert Counter(p for g, p in draws if g % 2 == 0) == {"a": 2, "b": 2, "c": 2}


def test_train_and_test_captions_are_disjoint_and_complete():
    for family in shapes.FAMILIES:
        train, test = (set(shapes.captions(family, split)) for split in ("train", "test"))
        assert not train & test
        assert train | test == set(shapes.captions(family))


def test_every_caption_is_held_out_in_one_of_the_folds():
    for family in shapes.FAMILIES:
        every, first = shapes.captions(family), shapes.captions(family, "test")
        folds = [shapes.captions(family, f"test/{k}") for k in range(shapes.NUM_FOLDS)]
        assert folds[0] == first and sorted(sum(folds, ())) == sorted(every)
        for k, test in enumerate(folds):
            assert len(test) in (len(every) // 4, len(every) // 4 + 1)
            assert set(shapes.captions(family, f"train/{k}")) == set(every) - set(test)
    for split in ("test/4", "all/0", "test/", "valid"):
        with pytest.raises(ConfigError, match="split must be one of all, train, test, train/0"):
            shapes.captions("two", split)


def test_sources(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    assert load_prompts(str(file)) == (("one", "two"),)
    assert load_prompts("shapes", ["two", "position"], "all")[0] == shapes.captions("two")
    assert evaluation_prompts(POOLS, 5) == ["a", "x", "b", "y", "c"]
    file.write_text("\n")
    with pytest.raises(ConfigError, match="prompt list is empty"):
        load_prompts(str(file))
    with pytest.raises(ConfigError, match="neither"):
        load_prompts("no/such.txt")
    with pytest.raises(ConfigError, match="evaluation.prompts_file must be one of"):
        load_prompts("no/such.txt", key="evaluation.prompts_file")
    file.write_bytes("\ufeffgrün\r\nzwei\u2028drei".encode())
    assert load_prompts(str(file)) == (("grün", "zwei\u2028drei"),)
    file.write_bytes(b"one\nt\xffo\n")
    with pytest.raises(ConfigError, match="prompts.source: .*prompts.txt:2 is not UTF-8"):
        load_prompts(str(file))
    with pytest.raises(ConfigError, match="family must be one of"):
        load_prompts("shapes", ["colors"])
    with pytest.raises(ConfigError, match="no prompts in split 'test'"):
        load_prompts("shapes", ["single"], "test")


def test_every_pass_has_an_order_of_its_own():
    prompts = [prompt for _, prompt in PromptSampler([tuple("abcdefgh")], seed=0).draw(16)]
    assert sorted(prompts[:8]) == sorted(prompts[8:]) and prompts[:8] != prompts[8:]
