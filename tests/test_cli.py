"""`python -m tdm_r1`: files written, one line per mistake, exit statuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image

from tdm_r1.__main__ import main
from tdm_r1.models.loading import empty_transformer
from tdm_r1.models.lora import TARGETS, find_targets
from tdm_r1.models.lora_list import load_lora


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
        (["a", "-o", "folder.png"], "--output is 'folder.png', a directory"),
        (["a", "--lora", "absent.safetensors"], "absent.safetensors"),
        (["a", "--dtype", "float16"], "float16"),
        (["a", "--backend", "magic"], "magic"),
        (["a", "--seed", -5], "seed is -5"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
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


class TestConvertLora:
    """`convert-lora`: a published list or a file in, one layout out."""

    @pytest.fixture
    def lists(self, sd3_dir, tmp_path):
        model, _ = empty_transformer(sd3_dir)
        values = []
        for linear in find_targets(model, TARGETS["sd3"]).values():
            values += [torch.ones(2, linear.in_features), torch.ones(linear.out_features, 2)]
        torch.save({"ema_parameters": values}, tmp_path / "in.ckpt")
        return tmp_path / "in.ckpt"

    def test_every_layout_in_turn(self, lists, sd3_dir, tmp_path, capsys):
        source, expected = lists, load_lora(lists, empty_transformer(sd3_dir)[0])
        for layout in ("diffusers", "comfyui", "peft", "diffusers"):
            target = tmp_path / layout
            arguments = ["convert-lora", source, target, "--layout", layout, "--model", sd3_dir]
            assert main([*map(str, arguments), "--dtype", "float16"]) == 0
            (line,) = capsys.readouterr().out.splitlines()
            assert line.startswith(str(target)) and line.endswith(".safetensors")
            source = target
        read = load_lora(source)
        assert set(read) == set(expected) and all(entry.scale == 2.0 for entry in read.values())
        assert read[next(iter(read))].a_rI.dtype == torch.float16

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["IN", "out", "--layout", "comfy"], "Did you mean 'comfyui'"),
            (["IN", "out", "--layout", "peft", "--model", "tiny-sd3"], "this sd3 model needs 94"),
            (["IN", "out", "--layout", "peft"], "name the model"),
            (["absent.ckpt", "out", "--layout", "peft"], "absent.ckpt"),
            (["absent", "out", "--layout", "peft"], "absent"),
        ],
    )
    def test_mistakes(self, lists, sd3_dir, tmp_path, arguments, message, capsys):
        arguments = [str(lists) if a == "IN" else a for a in arguments]
        arguments[1] = str(tmp_path / "out")
        if "comfy" in arguments:
            arguments += ["--model", str(sd3_dir)]
        assert main(["convert-lora", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith("tdm-r1: ") and err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_help_does_not_import_torch():
    code = (
        "import sys; from tdm_r1.__main__ import main; status = main(['--help']);"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
