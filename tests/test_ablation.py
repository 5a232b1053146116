"""The ablation bench: which runs it makes, how it goes on, and what it computes from them."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from bench import ablation, runs
from bench.ablation import Run, aggregate, interval95, length, main, table
from bench.runs import run_all
from tdm_r1.errors import TdmError

# A run that takes no time: it says that it was made, and fails if a file tells it to.
FAKE = """import json, pathlib, sys
name, variant, seed, file, settings = sys.argv[1:]
folder = pathlib.Path(file).parent
with (folder / "made.txt").open("a") as made:
    print(name, file=made)
if (folder / f"break-{name}").exists():
    sys.exit("error: the disk is full")
held = {"reward": 0.6, "num_prompts": 6}
score = {"reward": 0.4 + 0.1 * int(seed), "held_out": held, "num_prompts": 6}
result = {"variant": variant, "settings": json.loads(settings), "seconds": 2, "cpu_seconds": 1}
result |= {"environment": {"processor": "p", "torch": "t"}}
more = {"before": score} if variant == "before" else {
    "after": score, "rewards": [0.5], "skipped": 0, "seed": int(seed)}
pathlib.Path(file).write_text(json.dumps(result | more))
"""


@pytest.fixture
def fake(monkeypatch):
    def command(run, settings):
        own = [run.name, run.variant, str(run.seed), str(run.file), json.dumps(settings)]
        return [sys.executable, "-c", FAKE, *own]

    monkeypatch.setattr(ablation, "command", command)


def made(folder):
    """The runs made since the last look."""
    file = folder / "made.txt"
    names = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return names


def test_a_bench_that_was_broken_off_makes_only_what_is_missing(fake, tmp_path, capsys):
    out, kept = tmp_path / "runs", tmp_path / "kept"
    arguments = ["--output", str(out), "--variants", "tdm-r1", "no-kl", "--seeds", "1", "2", "1"]
    everything = ["before", "tdm-r1-1", "no-kl-1", "tdm-r1-2", "no-kl-2"]
    out.mkdir()
    (out / "break-no-kl-1").touch()
    assert main(arguments) == 1  # the others are made nevertheless
    assert made(out) == everything
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ablation: 1 of 4 runs failed: no-kl-1 (error: the disk is full; ")
    (out / "break-no-kl-1").unlink()
    (out / "tdm-r1-2.json").unlink()
    assert main(arguments) == 2
    assert "holds 3 runs of an earlier bench: pass --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--prompts", "8"]) == 2
    error = capsys.readouterr().err
    assert "other settings, iterations=48 rollout.num_prompts=16, than iterations=48" in error
    assert made(out) == []
    assert main([*arguments, "--resume", "--write", str(kept), "--jobs", "2"]) == 0
    assert sorted(made(out)) == ["no-kl-1", "tdm-r1-2"]
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert lines[2].startswith("| TDM-R1 | +0.150 [-0.485, +0.785] (+0.100, +0.200) | +0.000 ")
    assert result == json.loads((kept / "ablation.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["tdm-r1", "no-kl"]
    assert (result["iterations"], result["prompts"], result["group_size"]) == (48, 16, 12)
    assert result["pictures"] == [6, 6] and result["processor"] == "p"
    assert Image.open(kept / "ablation.png").size[0] > 900
    assert not list(out.glob("work/*"))

    (out / "no-kl-2.json").unlink()
    assert main([*arguments, "--aggregate"]) == 0  # of what there is
    assert made(out) == []
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["seeds"] for row in result["rows"]] == [[1, 2], [1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aggregate"], "holds no finished runs to aggregate"),
        (["--set", "rollout.num_promts=3"], "num_prompts"),
        (["--iterations", "0"], "iterations must be at least 1"),
        (["--seeds", "0", "-1"], "seed must be at least 0; got -1"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, fake, tmp_path, capsys):
    assert main(["--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err and made(tmp_path) == []


def test_without_a_start_nothing_is_trained(fake, tmp_path, capsys):
    (tmp_path / "break-before").touch()
    assert main(["--output", str(tmp_path), "--seeds", "0"]) == 1
    assert made(tmp_path) == ["before"]
    for wrong in (["--jobs", "0"], ["--variants", "tdm"], ["--resume", "--aggregate"]):
        with pytest.raises(SystemExit, match="2"):
            main(["--output", str(tmp_path), *wrong])


def test_an_interruption_stops_the_runs_under_way(fake, tmp_path, capsys, monkeypatch):
    def command(run, settings):
        return [sys.executable, "-c", "import time; time.sleep(100)"]

    def sleep(seconds):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ablation, "command", command)
    monkeypatch.setattr(runs.time, "sleep", sleep)
    handler, start = signal.getsignal(signal.SIGTERM), time.perf_counter()
    assert main(["--output", str(tmp_path)]) == 130
    assert time.perf_counter() - start < 50  # run_all waits for what it has stopped
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "--resume goes on" in capsys.readouterr().err


def test_runs_share_the_threads_and_tell_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MASTER_PORT", "1")  # of a trainer of this process
    found = "os.environ['OMP_NUM_THREADS'] + os.environ.get('MASTER_PORT', '')"
    code = f"import os, sys; open(sys.argv[1], 'w').write({found})"
    both = [Run("no-kl", seed, tmp_path) for seed in (0, 1)]

    def command(run):
        return [sys.executable, "-c", code, str(run.file)]

    run_all(both, command, lambda run: 1, jobs=2, threads=3)
    assert [run.file.read_text() for run in both] == ["3", "3"]
    both[0].file.unlink()
    with pytest.raises(TdmError, match=r"1 of 2 runs failed: no-kl-0 \(no word; "):  # no result
        run_all(both, lambda run: [sys.executable, "-c", ""], lambda run: 1, jobs=1, threads=1)
    for part, lines in (("surrogate", 3), ("run", 2)):
        (both[0].work / part).mkdir(parents=True)
        records = [{"iteration": n, "seconds": 1.0, "seconds_rollout": 1.0} for n in range(lines)]
        records += [{"iteration": lines, "evaluation": {"reward": 0.5, "seed": 1}}]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (both[0].work / part / "metrics.jsonl").write_text(text)
    assert both[0].progress() == 5 and both[1].progress() == 0
    lengths = {"before": 0, "no-kl": 5, "frozen-surrogate": 10}
    assert lengths == {name: length(Run(name, 0, tmp_path), 5) for name in lengths}


def test_a_run_is_asked_for_as_the_user_would(tmp_path):
    run = Run("no-kl", 2, tmp_path)
    assert ablation.command(run, ["iterations=3"])[1:] == [
        str(Path(ablation.__file__).with_name("ablation_variants.py")), "no-kl", "--seed", "2",
        "--before", str(tmp_path / "before.json"), "--output", str(tmp_path / "no-kl-2.json"),
        "--work", str(tmp_path / "work" / "no-kl-2"), "--set", "iterations=3",
    ]  # fmt: skip
    assert "--before" not in ablation.command(Run("before", 0, tmp_path), [])


def finished(variant, seed, reward, held_out, **values):
    after = {"reward": reward, "held_out": {"reward": held_out}}
    run = {"variant": variant, "seed": seed, "after": after, "rewards": [reward], "skipped": 0}
    return {**run, "seconds": 10.0 + seed, "cpu_seconds": 9.0, **values}


def test_rows_are_means_and_student_intervals_over_seeds():
    before = {"reward": 0.4, "held_out": {"reward": 0.6}}
    runs = [
        finished("no-kl", 0, 0.3, 0.6),
        finished("tdm-r1", 2, 0.7, 0.6, skipped=2),
        finished("tdm-r1", 0, 0.5, 0.65),
        finished("tdm-r1", 1, 0.6, 0.7),
    ]
    first, second = aggregate(before, runs)
    # gains .1 .2 .3: mean .2, deviation .1, t(.975, 2) = 4.302653: .2 -+ 4.302653 * .1 / sqrt(3)
    assert first["variant"] == "tdm-r1" and first["seeds"] == [0, 1, 2]
    assert first["trained"] == {
        "after": 0.6, "gain": 0.2, "interval": [-0.0484, 0.4484], "per_seed": [0.1, 0.2, 0.3],
    }  # fmt: skip
    # gains .05 .1 0: the same, halved, around .05
    assert first["held_out"]["gain"] == 0.05
    assert first["held_out"]["interval"] == [-0.0742, 0.1742]
    assert (first["seconds"], first["cpu_seconds"], first["skipped"]) == (11.0, 9.0, 2)
    assert first["rewards"] == [[0.5], [0.6], [0.7]]
    assert second["trained"]["gain"] == -0.1 and second["trained"]["interval"] is None
    lines = table([first, second]).splitlines()
    assert lines[2] == (
        "| TDM-R1 | +0.200 [-0.048, +0.448] (+0.100, +0.200, +0.300) "
        "| +0.050 [-0.074, +0.174] (+0.050, +0.100, +0.000) | 11 (9) |"
    )
    assert lines[3] == "| no KL | -0.100 (-0.100) | +0.000 (+0.000) | 10 (9) |"
    assert {line.count("|") for line in lines} == {5}


def test_an_interval_needs_two_seeds():
    assert interval95([0.3]) is None
    assert interval95([0.25, 0.25]) == [0.25, 0.25]
    # mean .5, deviation .7071, t(.975, 1) = 12.7062: .5 -+ 12.7062 * .5
    assert interval95([0.0, 1.0]) == [-5.8531, 6.8531]
