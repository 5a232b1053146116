"""The GenEval reward: known pictures, GenEval's own verdict, and bounds of the dense value."""

import numpy as np
import pytest
from PIL import Image

from tdm_r1 import geneval, shapes
from tdm_r1.errors import ConfigError
from tdm_r1.geneval import Clause, Spec
from tdm_r1.rewards import load_reward, score
from tdm_r1.rewards.colours import hsv_vote
from tdm_r1.rewards.detectors import Detected
from tdm_r1.rewards.geneval import GenEval, judge

BLANK = Image.new("RGB", (100, 100))
FAMILIES = [family for family in shapes.FAMILIES if family != "words"]


def world(step=1):
    rng = np.random.default_rng(0)
    captions = [c for family in FAMILIES for c in shapes.captions(family)[::step]]
    return captions, [Image.fromarray(shapes.render(caption, rng)) for caption in captions]


def test_true_pictures_of_the_world_score_one():
    captions, pictures = world()
    for spec in ("geneval(detector=shapes)", "geneval:strict(detector=shapes)"):
        assert score(load_reward(spec), pictures, captions).tolist() == [1.0] * len(captions)


def test_another_captions_picture_scores_what_it_shows():
    captions, pictures = world(step=3)
    shifted = captions[5:] + captions[:5]
    dense_B = score(load_reward("geneval(detector=shapes)"), pictures, shifted)
    strict_B = score(load_reward("geneval:strict(detector=shapes)"), pictures, shifted)
    world_B = score(load_reward("shapes:strict"), pictures, shifted)
    assert ((0 <= dense_B) & (dense_B <= 1)).all() and set(strict_B) == {0.0, 1.0}
    assert ((dense_B == 1) == (strict_B == 1)).all()
    assert (strict_B >= world_B).all()  # GenEval does not mind what else is in the picture
    assert 0.2 < dense_B.mean() < 0.9 and strict_B.mean() < 0.3


def test_blank_pictures_score_zero_and_nothing_is_asked_twice():
    reward = load_reward("geneval(detector=shapes)")
    prompts = ["a red circle", "a circle left of a square", "a red circle and a blue square"]
    assert score(reward, [BLANK] * 3, prompts).tolist() == [0.0] * 3
    assert score(reward, [BLANK], ["two circles"]).tolist() == [0.5]  # not three or more


def fixed(found):
    """A detector that finds the same in every picture."""

    class Fixed:
        labels = ("cat", "dog", "cup")

        def __call__(self, images, threshold):
            return [[d for d in found if d.score > threshold] for _ in images]

    return Fixed()


def box(x, y, size=10):
    return (x, y, x + size, y + size)


@pytest.mark.parametrize(
    ("number", "dense"),
    [(0, 1 / 2), (1, 3 / 4), (2, 1.0), (3, (1 + 3 / 4) / 2), (6, (1 + 3 / 7) / 2)],
)
def test_miscounts_cost_more_the_further_they_are_off(number, dense):
    found = [Detected("cat", 0.95, box(12 * i, 0)) for i in range(number)]
    got, strict = judge(geneval.parse("two cats"), BLANK, found, hsv_vote)
    assert got == pytest.approx(dense) and strict == (number == 2)


def test_counting_wants_more_confidence_and_no_more_than_sixteen_are_seen():
    found = [Detected("cat", s, box(12 * i, 0)) for i, s in enumerate((0.95, 0.92, 0.9, 0.31, 0.3))]
    assert judge(geneval.parse("two cats"), BLANK, found, hsv_vote)[1]
    spec = Spec("", "single_object", (Clause("cat"),), (Clause("cat", 5),))
    assert judge(spec, BLANK, found, hsv_vote)[1]  # four above 0.3
    many = [Detected("cat", 0.95, box(0, 0))] * 40
    spec = Spec("", "counting", (Clause("cat", 16),), (Clause("cat", 17),))
    assert judge(spec, BLANK, many, hsv_vote)[1]


def test_a_failed_position_costs_its_own_term_once():
    spec = geneval.parse("a cat left of a dog")
    cat, dog = Detected("cat", 0.9, box(70, 40)), Detected("dog", 0.8, box(10, 40))
    assert judge(spec, BLANK, [cat, dog], hsv_vote) == (pytest.approx(2 / 3), False)
    assert judge(spec, BLANK, [cat], hsv_vote) == (pytest.approx(1 / 3), False)
    # the less confident dog on the right does not count
    right = Detected("dog", 0.7, box(90, 40))
    assert not judge(spec, BLANK, [cat, dog, right], hsv_vote)[1]
    assert judge(spec, BLANK, [cat, right._replace(score=0.85), dog], hsv_vote) == (1.0, True)


def published_verdict(spec, found, colours):
    """GenEval's evaluation as published: all clauses must hold, without partial credit."""
    threshold = 0.9 if spec.task == "counting" else 0.3
    seen = {}
    for d in sorted(found, key=lambda d: -d.score):
        if d.score > threshold:
            seen.setdefault(d.label, []).append(d)
    groups = []
    for clause in spec.include:
        group = seen.get(clause.name, [])[:16][: clause.count]
        good = len(group) == clause.count
        if good and clause.colour:
            good = all(c == clause.colour for c in colours(None, group))
        if good and clause.position:
            target = groups[clause.position[1]]
            good = target is not None and all(
                geneval.holds(a.box, clause.position[0], b.box) for a in group for b in target
            )
        groups.append(group if good else None)
    excluded = any(len(seen.get(c.name, [])[:16]) >= c.count for c in spec.exclude)
    return None not in groups and not excluded


def test_the_strict_verdict_is_genevals():
    rng = np.random.default_rng(0)
    prompts = [
        "a cat", "a cat and a dog", "two cats", "three red cats", "a red cat", "a cat above a dog",
        "a red cat and a green dog", "one dog", "two dogs", "a red dog left of a cat",
    ]  # fmt: skip

    def colours(image, found):
        return [("red", "green")[int(d.box[0]) % 2] for d in found]

    verdicts = []
    for number in range(3000):
        spec = geneval.parse(prompts[number % len(prompts)], ("cat", "dog"))
        found = [
            Detected(
                str(rng.choice(["cat", "dog"])),
                float(rng.choice([0.2, 0.5, 0.95])) + 1e-3 * i,
                box(*(int(v) for v in rng.integers(0, 80, 2))),
            )
            for i in range(int(rng.integers(0, 6)))
        ]
        found.sort(key=lambda d: -d.score)
        dense, strict = judge(spec, BLANK, found, colours)
        assert strict == published_verdict(spec, found, colours), (spec.prompt, found)
        assert 0 <= dense <= 1 and (dense == 1) == strict
        verdicts.append(strict)
    assert 0.1 < np.mean(verdicts) < 0.5


def test_metadata_goes_before_the_prompt():
    reward = GenEval(fixed([Detected("cup", 0.5, box(0, 0))]), hsv_vote, only_strict=True)
    entry = {"tag": "single_object", "include": [{"class": "cup", "count": 1}], "prompt": "x"}
    assert score(reward, [BLANK] * 2, ["a cat", "a cat"], metadata=[entry, None]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a unicorn", "unknown class 'unicorn'"), ("draw a cat", "not of GenEval's form")],
)
def test_a_prompt_that_cannot_be_judged_is_the_users_mistake(prompt, message):
    with pytest.raises(ConfigError, match=message):
        score(load_reward("geneval(detector=shapes)"), [BLANK], [prompt])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("geneval(detecter=shapes)", "'detecter=shapes'; allowed.*Did you mean 'detector'"),
        ("geneval(shapes)", "cannot take the option 'shapes'"),
        ("geneval(detector=shapes,detector=shapes)", "allowed once each"),
        ("genevl(detector=shapes)", "unknown name 'genevl'.*Did you mean 'geneval'"),
        ("jpeg(quality=3)", "'jpeg' takes none"),
        ("genevl", "Did you mean 'geneval'"),
        ("geneval(detector=no/such/place)", "cannot load the detector 'no/such/place'"),
        ("geneval(detector=shapes, clip=no/such/place)", "cannot load the CLIP model"),
        ("geneval(detector=shapes, clip=., device=tpu0)", "device is 'tpu0'"),
    ],
)
def test_bad_options_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(spec)


def test_options_ride_in_a_weighted_sum():
    reward = load_reward("0.5*geneval(detector=shapes, device=cpu)+1e+0*jpeg")
    assert [term.weight for term in reward.terms] == [0.5, 1.0]
    assert reward.terms[0].name == "geneval(detector=shapes, device=cpu)"
