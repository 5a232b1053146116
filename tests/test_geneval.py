"""GenEval's language: the published prompts, parsing, disjoint splits, and the rule of places."""

import hashlib
import itertools

import pytest

from tdm_r1 import geneval, shapes
from tdm_r1.errors import ConfigError
from tdm_r1.geneval import Clause, Spec
from tdm_r1.prompts import evaluation_prompts, load_prompts


def test_the_published_prompts_come_out_of_their_draws():
    by_task = geneval.published()
    assert [len(by_task[task]) for task in geneval.TASKS] == [80, 99, 80, 94, 100, 100]
    # As quoted from the published list in reports on other models.
    for task, prompt in {
        "two_object": "a photo of a tennis racket and a wine glass",
        "counting": "a photo of three snowboards",
        "colors": "a photo of a pink skateboard",
        "position": "a photo of a tv remote left of an umbrella",
        "color_attr": "a photo of a yellow dining table and a pink dog",
    }.items():
        assert prompt in by_task[task]
    first = [f"a photo of a {name}" for name in ("bench", "cow", "bicycle")]
    assert list(by_task["single_object"][:3]) == first
    # Another random stream in a later numpy would change the benchmark without a word.
    text = "\n".join(itertools.chain(*by_task.values()))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "4de60dfc3c29f9d3db69ec45cf03a964627c2d82f2c224c3f75645e137f7126b"


@pytest.mark.parametrize(
    ("prompt", "task", "include", "exclude"),
    [
        ("a photo of an orange", "single_object", [Clause("orange")], []),
        ("a photo of an orange orange", "colors", [Clause("orange", 1, "orange")], []),
        ("a photo of four buses", "counting", [Clause("bus", 4)], [Clause("bus", 5)]),
        ("a photo of two skises", "counting", [Clause("skis", 2)], [Clause("skis", 3)]),
        ("two red benchs.", "counting", [Clause("bench", 2, "red")], [Clause("bench", 3)]),
        (
            "two cats above a cup",
            "position",
            [Clause("cup"), Clause("cat", 2, position=("above", 0))],
            [Clause("cat", 3)],
        ),
        ("one cat", "counting", [Clause("cat")], [Clause("cat", 2)]),
        (
            "a photo of a tv remote and a hot dog",
            "two_object",
            [Clause("tv remote"), Clause("hot dog")],
            [],
        ),
        (
            "a photo of a dog right of a teddy bear",
            "position",
            [Clause("teddy bear"), Clause("dog", position=("right of", 0))],
            [],
        ),
        (
            "a photo of a white car and an orange tie",
            "color_attr",
            [Clause("car", 1, "white"), Clause("tie", 1, "orange")],
            [],
        ),
    ],
)
def test_parse(prompt, task, include, exclude):
    assert geneval.parse(prompt) == Spec(prompt, task, tuple(include), tuple(exclude))


def test_metadata_of_the_published_form_reads_as_its_prompt():
    entry = {
        "tag": "position",
        "include": [
            {"class": "teddy bear", "count": 1},
            {"class": "dog", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a dog right of a teddy bear",
    }
    assert geneval.from_metadata(entry) == geneval.parse(entry["prompt"])
    entry = {
        "tag": "counting",
        "include": [{"class": "bus", "count": 4, "color": "red"}],
        "exclude": [{"class": "bus", "count": 5}],
        "prompt": "a photo of four red buses",
    }
    assert geneval.from_metadata(entry) == geneval.parse(entry["prompt"])


@pytest.mark.parametrize(
    "entry",
    [
        {"tag": "counting"},
        {"tag": "counting", "include": [{"class": "bus"}]},
        {"tag": "counting", "include": [{"class": "bus", "count": 0}]},
        {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "teal"}]},
        {"tag": "counts", "include": [{"class": "bus", "count": 1}]},
        {"tag": "position", "include": [{"class": "a", "count": 1, "position": ["above", 3]}]},
        {"tag": "position", "include": [{"class": "a", "count": 1, "position": ["near", 0]}]},
        [],
    ],
)
def test_other_metadata_is_refused(entry):
    with pytest.raises(ConfigError, match="GenEval"):
        geneval.from_metadata(entry)


def test_every_published_prompt_parses_to_its_task():
    for task, prompts in geneval.published().items():
        assert {geneval.parse(prompt).task for prompt in prompts} == {task}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo of a unicycle", "unknown class 'unicycle'. Did you mean 'bicycle'"),
        ("a photo of a teal car", "unknown class 'teal car'"),
        ("a photo of two car", "unknown class 'car'. Did you mean 'cars'"),
        ("a photo of a red unicycle", "unknown class 'unicycle'"),
        ("draw me a sheep", "prompt part 'draw me a sheep' is not of GenEval's form"),
        ("", "prompt part ''"),
    ],
)
def test_other_prompts_are_refused(prompt, message):
    with pytest.raises(ConfigError, match=message):
        geneval.parse(prompt)


def test_the_embedded_worlds_captions_are_of_this_language():
    for family in shapes.FAMILIES[:-1]:
        for caption in shapes.captions(family):
            theirs, ours = shapes.parse(caption), geneval.parse(caption, shapes.SHAPES)
            things = [Clause(t.shape, t.count, t.colour) for t in theirs.things]
            if theirs.relation:
                things = [things[1], Clause(things[0].name, position=(theirs.relation, 0))]
            assert ours.include == tuple(things)
            assert bool(ours.exclude) == (family == "counting")


def test_no_training_prompt_asks_for_a_test_picture():
    for task in geneval.TASKS:
        test, train = (geneval.prompts(task, split) for split in ("test", "train"))
        assert len(set(train)) == len(train) and not set(test) & set(train)
        assert geneval.prompts(task, "all") == test + train
        assert {geneval.parse(prompt).task for prompt in train[:500]} <= {task}
    sizes = [len(geneval.prompts(task, "train")) for task in geneval.TASKS]
    pairs = 80 * 79 // 2  # in either order
    assert sizes == [0, pairs - 99, 240 - 80, 790 - 94, 10_000, 10_000]
    two = [geneval.parse(prompt).include for prompt in geneval.prompts("two_object", "all")]
    assert len({frozenset(clause.name for clause in clauses) for clauses in two}) == pairs
    assert "a photo of a dog above a cow" in geneval.prompts("position", "test")
    assert "a photo of a cow below a dog" not in geneval.prompts("position", "train")


def test_prompt_sources_know_it():
    train = load_prompts("geneval", ["counting", "position"], "train")
    assert train == (geneval.prompts("counting", "train"), geneval.prompts("position", "train"))
    every = evaluation_prompts(load_prompts("geneval", geneval.TASKS, "test"), 0)
    assert len(every) == len(set(every)) == 553
    with pytest.raises(ConfigError, match="single_object have no prompts in split 'train'"):
        load_prompts("geneval", ["single_object"], "train")
    with pytest.raises(ConfigError, match="task must be one of single_object"):
        load_prompts("geneval", ["colours"])
    with pytest.raises(ConfigError, match="split must be"):
        geneval.prompts("colors", "val")


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((10, 10, 30, 30), {"left of", "above"}),  # a diagonal is both: 0.64 of each
        ((44, 40, 64, 60), set()),  # 4 pixels of offset, 4 pixels of tolerance
        ((40, 40, 60, 60), set()),
        ((45, 40, 65, 60), set()),  # 1 of 5 pixels is left
        ((49, 40, 69, 60), {"right of"}),  # 5 of 9
        ((20, 24, 40, 44), {"left of"}),  # above by 12 of 25.6
    ],
)
def test_places_relative_to_a_box_in_the_middle(box, relations):
    middle = (40, 40, 60, 60)
    assert {r for r in geneval.RELATIONS if geneval.holds(box, r, middle)} == relations
    assert not any(geneval.holds(middle, r, box) for r in relations)
