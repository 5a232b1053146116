"""`python -m tdm_r1 generate`: files written, one line per mistake, exit statuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from tdm_r1.__main__ import main


@pytest.fixture
def run(sd3_dir, capsys):
    def call(*arguments):
        status = main(
            ["generate", "--model", str(sd3_dir), "--device", "cpu", *map(str, arguments)]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_one_image(run, tmp_path):
    path = tmp_path / "out.png"
    status, out, err = run("two red circles", "--seed", 3, "-o", path)
    assert (status, out) == (0, f"{path}\n")
    assert "seed 3" in err
    assert Image.open(path).size == (64, 64)


def test_many_images_are_numbered(run, tmp_path):
    status, out, _ = run("a", "b", "--num-images", 2, "--height", 32, "-o", tmp_path / "x.jpg")
    names = [tmp_path / f"x-{i}.jpg" for i in range(4)]
    assert status == 0 and out.split() == [str(name) for name in names]
    assert Image.open(names[3]).size == (64, 32)


def test_options_reach_the_engine(run, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    run("a cat", "--seed", 1, "-o", paths[0])
    run("a cat", "--seed", 1, "-o", paths[1])
    run("a cat", "--seed", 1, "-o", paths[2], "--guidance-scale", 5)
    run("a cat", "--seed", 1, "-o", paths[3], "--steps", 8, "--solver", "dpm2m")
    pixels = [Image.open(path).tobytes() for path in paths]
    assert pixels[0] == pixels[1] and len(set(pixels)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--steps", 0], "steps"),
        (["a", "--solver", "dmp2m"], "Did you mean 'dpm2m'"),
        (["a", "--height", 65], "height is 65"),
        (["a", "--model", "tiny-sd"], "Did you mean"),
        (["a", "-o", "picture"], "--output is 'picture'"),
        (["a", "-o", "nowhere/out.png"], "nowhere is not a directory"),
        (["a", "--lora", "absent.safetensors"], "absent.safetensors"),
        (["a", "--dtype", "float16"], "float16"),
        (["a", "--backend", "magic"], "magic"),
        (["a", "--seed", -5], "seed is -5"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err and err.startswith("tdm-r1: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["generate"], ["generate", "a", "--sede", "1"]]
)
def test_argparse_mistakes(arguments, capsys):
    assert main(arguments) == 2
    assert "usage" in capsys.readouterr().err


def test_failure_is_status_1(run, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr("tdm_r1.engine.Engine.generate", fail)
    status, out, err = run("a", "-o", tmp_path / "out.png")
    assert (status, out, err) == (1, "", "tdm-r1: RuntimeError: no luck\n")
    _, _, err = run("a", "-o", tmp_path / "out.png", "--traceback")
    assert "Traceback" in err


def test_help_does_not_import_torch():
    code = (
        "import sys; from tdm_r1.__main__ import main; status = main(['--help']);"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
