"""Cross-validation of the demo: which captions a run sees, and what the runs say together."""

from __future__ import annotations

import json

import pytest

from bench import folds
from tdm_r1.config import load_recipe, save_recipe
from tdm_r1.errors import ConfigError

SMALL = (
    "iterations=2", "distillation.critic_warmup=0", "rollout.num_prompts=2", "rollout.group_size=2",
    "rollout.micro_groups=2", "evaluation.num_prompts=4", "evaluation.held_out_families=[single]",
)  # fmt: skip


def ended(run, before, after):
    """The files of a run that ended."""
    run.output.mkdir(parents=True)
    save_recipe(load_recipe(folds.RECIPE, run.overrides), run.output / "recipe.yaml")
    held_out = {"held_out_before": {"reward": 0.6}, "held_out_after": {"reward": 0.7}}
    rewards = {"reward_before": before, "reward_after": after, "seconds": 99.6}
    run.summary.write_text(json.dumps(rewards | held_out))


def test_runs_of_one_seed_hold_every_caption_out_once(tmp_path):
    recipes = [
        load_recipe(folds.RECIPE, folds.Run(fold, 3, tmp_path, ("iterations=70",)).overrides)
        for fold in range(folds.NUM_FOLDS)
    ]
    assert [r.evaluation.split for r in recipes] == ["test/0", "test/1", "test/2", "test/3"]
    assert [r.prompts.split for r in recipes] == ["train/0", "train/1", "train/2", "train/3"]
    assert {(r.seed, r.iterations) for r in recipes} == {(3, 70)}
    assert len({r.output for r in recipes}) == 4


def test_the_runs_that_ended_are_reported_together(tmp_path, capsys):
    gains = {0: (0.4, 0.5), 1: (0.3, 0.5), 3: (0.5, 0.65)}
    for fold, rewards in gains.items():
        ended(folds.Run(fold, 0, tmp_path, ()), *rewards)
    arguments = ["--output", str(tmp_path), "--aggregate", "--write", str(tmp_path / "results")]
    assert folds.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "results" / "folds.json").read_text())
    assert [(row["fold"], row["gain"]) for row in result["rows"]] == [(0, 0.1), (1, 0.2), (3, 0.15)]
    assert result["mean"]["gain"] == 0.15 and result["mean"]["held_out_after"] == 0.7
    # 0.15 -+ t s / sqrt(3), t = 4.3027 with two degrees of freedom, s = 0.05
    assert result["gain_interval95"] == pytest.approx([0.0258, 0.2742], abs=1e-4)


def test_runs_of_another_recipe_are_refused(tmp_path, capsys):
    run = folds.Run(0, 0, tmp_path, ("iterations=90",))
    ended(run, 0.4, 0.5)
    for how, message in (
        (["--aggregate"], "holds a run of another recipe"),
        ([], "holds runs of an earlier bench"),
        (["--set", "iteration=9", "--resume"], "iterations"),
    ):
        assert folds.main(["--output", str(tmp_path), *how]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no finished runs"):
        folds.result_of([folds.Run(1, 0, tmp_path, ())])


def test_a_run_that_fails_names_its_log(tmp_path, capsys):
    settings = [part for key in ("model=no/such", *SMALL) for part in ("--set", key)]
    assert folds.main(["--output", str(tmp_path), *settings]) == 1
    error = capsys.readouterr().err
    assert "fold 0, seed 0 ended with status" in error and "fold0-seed0.log" in error
    assert "no/such" in (tmp_path / "fold0-seed0.log").read_text()


@pytest.mark.slow
def test_four_folds_train_and_are_kept(tmp_path, capsys):
    settings = [part for key in SMALL for part in ("--set", key)]
    arguments = ["--output", str(tmp_path), "--jobs", "2", *settings]
    assert folds.main(arguments) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["fold"] for row in first["rows"]] == [0, 1, 2, 3]
    made = (tmp_path / "fold1-seed0" / "summary.json").stat().st_mtime_ns
    broken_off = tmp_path / "fold2-seed0" / "summary.json"
    broken_off.unlink()
    assert folds.main([*arguments, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["gain"] for row in again["rows"]] == [row["gain"] for row in first["rows"]]
    assert (tmp_path / "fold1-seed0" / "summary.json").stat().st_mtime_ns == made
    assert broken_off.is_file()
