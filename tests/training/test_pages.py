"""Pages of pictures, curves of a log, and what an evaluation looks like in a terminal."""

import json

import numpy as np
import pytest
from PIL import Image

from tdm_r1.training import curves, pages
from tdm_r1.training.evaluate import Sample
from tdm_r1.training.progress import postfix, table


def sample(prompts, seed, values):
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in prompts]
    return Sample(list(prompts), pictures, values)


def cell(page, row, side, columns=1):
    """The pixels of a picture on a page of one column."""
    top = row * (pages._CELL + 2 * pages._LABEL) + pages._LABEL
    left = pages._GAP + side * pages._CELL
    return np.asarray(page)[top : top + pages._CELL - 4, left : left + pages._CELL - 4]


def test_the_page_shows_before_and_now_for_the_same_prompt(tmp_path):
    prompts = ["two red circles"]
    before, now = sample(prompts, 0, [0.25]), sample(prompts, 1, [0.75])
    alone = Image.open(pages.write_sample(tmp_path, 0, before))
    page = Image.open(pages.write_sample(tmp_path, 50, now))
    assert (tmp_path / "samples" / "000050.png").is_file() and page.size == alone.size
    for side, shown in enumerate((before, now)):
        scaled = shown.pictures[0].resize((124, 124), Image.Resampling.NEAREST)
        assert np.array_equal(cell(page, 0, side), np.asarray(scaled))
    label = np.asarray(page)[pages._LABEL + pages._CELL :, pages._CELL + pages._GAP :].astype(int)
    assert (label[..., 1] - label[..., 0]).max() > 80  # green: better than before


def test_the_pictures_before_come_back_pixel_for_pixel(tmp_path):
    stored = sample(["a", "b", "c"], 3, [0.1, 0.2, 1 / 3])
    pages.write_sample(tmp_path, 0, stored)
    found = pages._read_row(tmp_path / "samples" / "before.png")
    assert (found.prompts, found.values) == (stored.prompts, stored.values)
    for one, other in zip(found.pictures, stored.pictures, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_other_prompts_than_before_stand_alone(tmp_path):
    pages.write_sample(tmp_path, 0, sample(["a", "b"], 0, [0, 0]))
    page = Image.open(pages.write_sample(tmp_path, 1, sample(["c"], 0, [0.0])))
    assert (cell(page, 0, 1) == 255).all()


def test_a_new_run_forgets_the_pages_of_an_earlier_one(tmp_path):
    pages.forget(tmp_path)
    for iteration in (0, 50):
        pages.write_sample(tmp_path, iteration, sample(["a"], 0, [0]))
    pages.forget(tmp_path)
    assert not list((tmp_path / "samples").iterdir())


def test_a_long_prompt_ends_in_dots():
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    text = pages._fit("a very long prompt " * 9, 200, font)
    assert text.startswith("a very long") and text.endswith("...") and font.getlength(text) <= 200
    assert pages._fit("short", 200, font) == "short"


def evaluation(reward, **panel):
    return {
        "reward": reward,
        "interval": [reward - 0.1, reward + 0.1],
        "families": {"counting": reward},
        "family_intervals": {"counting": [reward - 0.2, reward + 0.2]},
        "num_prompts": 8,
        "panel": {"sharpness": 0.02, **panel},
    }


def step(i, **values):
    return {"iteration": i, "reward": 0.1 * i, "surrogate_margin": 0.0, "fake_loss": 1.0,
            "seconds": 2.0, "seconds_rollout": 1.0, **values}  # fmt: skip


def write(folder, *records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)


def test_a_resumed_and_a_new_run_replace_what_they_repeat(tmp_path):
    zero, two = {"iteration": 0, "evaluation": 0}, {"iteration": 2, "evaluation": 2}
    write(tmp_path, zero, step(1), step(2, old=1), two, step(3), step(2, new=1))
    steps, evaluations = curves.read_metrics(tmp_path)
    assert [record["iteration"] for record in steps] == [1, 2] and "new" in steps[1]
    assert evaluations == [zero]
    write(tmp_path, zero, step(1), two, step(3), zero, step(1, new=1))
    steps, evaluations = curves.read_metrics(tmp_path)
    assert steps == [step(1, new=1)] and evaluations == [zero]


@pytest.mark.parametrize("short", [False, True])
def test_curves_are_drawn_from_whatever_there_is(short, tmp_path):
    skipped = {"iteration": 3, "skipped": "loss of fake", "seconds": 1.0}
    records = [step(1), step(2), skipped, step(4)]
    ends = [
        {"iteration": i, "evaluation": evaluation(0.3 + i / 10, held_out_reward=0.5)}
        for i in (0, 4)
    ]
    write(tmp_path, *([ends[1]] if short else [ends[0], *records, ends[1]]))
    curves.write_curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as page:
        assert page.size[0] > (300 if short else 1000)


@pytest.mark.parametrize("other", [(0.72, 0.7), (-3.0, 5.0)])
def test_a_held_out_reward_is_drawn_on_no_finer_scale(other):
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    ends = [
        {"iteration": i, "evaluation": evaluation(0.3 + i / 10, held_out_reward=other[i // 4])}
        for i in (0, 4)
    ]
    curves._rewards(axis, [step(1), step(2)], ends)
    left, right = (np.ptp(drawn.get_ylim()) for drawn in axis.figure.axes)
    assert right == pytest.approx(max(left, 1.1 * np.ptp(other)))  # with matplotlib's margins
    low, high = axis.figure.axes[1].get_ylim()
    assert (low + high) / 2 == pytest.approx(sum(other) / 2)


def test_the_bar_shows_the_reward_and_where_the_time_goes():
    shown = postfix({"reward": 0.5, "seconds": 4.0, "seconds_rollout": 1.0, "seconds_reward": 2.0})
    assert shown == "reward=0.500, rollout 25%, reward 50%, rest 25%"
    assert postfix({"sft_loss": 1.0, "seconds": 1.0}) == "sft_loss=1.000"
    assert postfix({"skipped": "loss of fake", "seconds": 1.0}) == "skipped: loss of fake"


def test_an_evaluation_is_a_table():
    lines = table(50, evaluation(0.5, held_out_reward=0.25) | {"held_out": evaluation(0.4)})
    rows = [line.split() for line in lines.splitlines()]
    assert rows[0][:3] == ["evaluation", "after", "50"]
    assert rows[1] == ["reward", "0.500", "[0.400,", "0.600]"]
    assert rows[2] == ["counting", "0.500", "[0.300,", "0.700]"]
    assert rows[3][:3] == ["other", "families", "0.400"]
    assert ["held", "out", "reward", "0.250"] in rows
