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


def ended(run, before, after, held_out=({"reward": 0.6}, {"reward": 0.7})):
    """The files of a run that ended."""
    run.work.mkdir(parents=True)
    save_recipe(load_recipe(folds.RECIPE, run.overrides), run.work / "recipe.yaml")
    found = {"reward_before": before, "reward_after": after, "seconds": 99.6}
    found |= {"held_out_before": held_out[0], "held_out_after": held_out[1]}
    run.file.write_text(json.dumps(found))


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
    """Two seeds of quarter 0 weigh as much as one of another."""
    for fold, seed, rewards in (
        (0, 0, (0.4, 0.5)), (0, 1, (0.4, 0.6)), (1, 0, (0.3, 0.5)), (3, 1, (0.5, 0.6))
    ):  # fmt: skip
        ended(folds.Run(fold, seed, tmp_path / "runs"), *rewards)
    (tmp_path / "runs").rename(tmp_path / "moved")
    arguments = ["--output", str(tmp_path / "moved"), "--aggregate", "--seeds", "0", "1"]
    assert folds.main([*arguments, "--write", str(tmp_path / "results")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "results" / "folds.json").read_text())
    assert [row["gain"] for row in result["rows"]] == [0.1, 0.2, 0.2, 0.1]
    assert result["missing"] == ["fold2-seed0", "fold3-seed0", "fold1-seed1", "fold2-seed1"]
    assert result["mean"]["gain"] == 0.15 and result["mean"]["before"] == 0.4
    assert result["mean"]["held_out_after"] == 0.7 and result["others"] == 0.15
    # 0.15 -+ t s / sqrt(3), t = 4.3027 with two degrees of freedom, s = 0.05
    assert result["gain_interval95"] == pytest.approx([0.0258, 0.2742], abs=1e-4)


def test_a_demo_without_held_out_families_is_reported(tmp_path):
    run = folds.Run(2, 0, tmp_path, ("evaluation.held_out_families=[]",))
    ended(run, 0.4, 0.5, held_out=(None, None))
    result = folds.result_of([run])
    assert set(result["mean"]) == {"before", "after", "gain"} and result["gain_interval95"] is None


def test_unfit_folders_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folds, "run_all", None)
    run = folds.Run(3, 0, tmp_path, ("iterations=90",))
    ended(run, 0.4, 0.5)
    for how, message in (
        (["--resume"], "holds a run of another recipe"),
        (["--aggregate"], "holds a run of another recipe"),
        ([], "holds runs of an earlier bench"),
        (["--set", "iteration=9", "--resume"], "iterations"),
    ):
        assert folds.main(["--output", str(tmp_path), *how]) == 2
        assert message in capsys.readouterr().err
    run.file.write_text("{")
    assert folds.main(["--output", str(tmp_path), "--set", "iterations=90", "--aggregate"]) == 2
    assert "is damaged" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no finished runs"):
        folds.result_of([folds.Run(1, 0, tmp_path)])


def test_runs_that_fail_name_their_logs(tmp_path, capsys):
    settings = [part for key in ("model=no/such", *SMALL) for part in ("--set", key)]
    assert folds.main(["--output", str(tmp_path), "--jobs", "2", *settings]) == 1
    error = capsys.readouterr().err
    assert "4 of 4 runs failed" in error and "fold3-seed0.log" in error and "no/such" in error


@pytest.mark.slow
def test_folds_train_and_are_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folds, "NUM_FOLDS", 2)
    settings = [part for key in SMALL for part in ("--set", key)]
    arguments = ["--output", str(tmp_path), "--jobs", "2", *settings]
    assert folds.main(arguments) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["fold"] for row in first["rows"]] == [0, 1] and not first["missing"]
    kept, broken_off = (folds.Run(fold, 0, tmp_path) for fold in (0, 1))
    assert (kept.work / "before_after.png").is_file() and not (kept.work / "model").exists()
    assert kept.progress() == 2
    made = kept.file.stat().st_mtime_ns
    broken_off.file.unlink()
    assert folds.main([*arguments, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["gain"] for row in again["rows"]] == [row["gain"] for row in first["rows"]]
    assert kept.file.stat().st_mtime_ns == made
