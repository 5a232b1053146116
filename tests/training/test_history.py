"""Which evaluation was best, and when the guard rings."""

import json

import pytest

from tdm_r1.training.history import History


def evaluation(held_out=None, reward=0.5):
    panel = {"sharpness": 1.0, "saturation": 0.5}
    if held_out is not None:
        panel = {"held_out_reward": held_out, **panel}
    return {"reward": reward, "panel": panel}


def run(*pairs):
    """A history of (training reward, held-out reward) per evaluation, after one at iteration 0."""
    history = History()
    history.add(0, evaluation(0.5))
    for i, (training, held_out) in enumerate(pairs, start=1):
        history.reward(training - 0.1)
        history.reward(training + 0.1)
        history.add(10 * i, evaluation(held_out))
    return history


def test_the_best_is_of_the_held_out_scorer_and_was_trained():
    history = run((0.1, 0.4), (0.2, 0.45), (0.3, 0.45), (0.4, 0.2))
    assert history.best == 20  # iteration 0 has 0.5; the first of two equals
    history = History()
    assert history.best is None
    for iteration, reward in ((0, 0.9), (5, 0.3), (10, 0.4)):
        history.add(iteration, evaluation(reward=reward))
    assert history.best == 10


def test_the_guard_rings_when_the_reward_rises_and_the_panel_falls_n_times():
    history = run((0.1, 0.50), (0.2, 0.45), (0.3, 0.40), (0.4, 0.35))
    assert history.alarm(0) is None
    message = history.alarm(3)
    assert message is not None
    assert "rose (0.100 -> 0.400)" in message and "at 3 evaluations in a row" in message
    assert "held_out_reward 0.500 -> 0.350" in message
    assert history.alarm(4) is None  # before the first iteration there was no training reward


@pytest.mark.parametrize(
    "pairs",
    [
        [(0.1, 0.5), (0.2, 0.4), (0.3, 0.45)],  # the panel recovers
        [(0.1, 0.5), (0.2, 0.4), (0.2, 0.3)],  # the training reward stands still
        [(0.3, 0.5), (0.2, 0.4), (0.1, 0.3)],  # both fall: not what the guard is for
        [(0.1, 0.5), (0.2, 0.4)],  # one fall is not two
        [],
    ],
)
def test_the_guard_keeps_quiet(pairs):
    assert run(*pairs).alarm(2) is None


def test_it_survives_json():
    history = run((0.1, 0.5), (0.2, 0.4))
    history.reward(0.7)
    copy = History()
    copy.load_state(json.loads(json.dumps(history.state())))
    for one in (history, copy):
        one.reward(0.1)
        one.add(30, evaluation(0.3))
    assert copy.state() == history.state()
    assert copy.entries[-1]["training_reward"] == pytest.approx(0.4)
    assert copy.alarm(2) == history.alarm(2) is not None
    assert copy.seen(30) and not copy.seen(31)
    assert copy.result(0) == evaluation(0.5) and copy.result(7) == {}
    assert copy.result() == evaluation(0.3)


def grown(member):
    """Two evaluations as they were, then three with one more member of the panel, after a resume.

    Training rewards rise; so does what the first two are ranked by, and the new member falls.
    """
    history = History()
    history.add(0, evaluation(reward=0.9))
    history.reward(0.1)
    history.add(10, evaluation(reward=0.95))
    for i, value in enumerate((0.5, 0.4, 0.3), start=2):
        history.reward(0.1 * i)
        result = evaluation(reward=0.9)
        result["panel"] |= {member: value, "sharpness": 1.0 + i}
        history.add(10 * i, result)
        yield history


@pytest.mark.parametrize("member", ["held_out_reward", "diversity"])
def test_only_panels_of_the_same_members_are_compared(member):
    found = [(history.best, history.alarm(2)) for history in grown(member)]
    assert [best for best, _ in found] == [20, 20, 20]  # not 10, whose score is of another scorer
    assert [alarm is None for _, alarm in found] == [True, True, False]
    assert f"{member} 0.500 -> 0.300" in found[-1][1]
