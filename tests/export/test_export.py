"""Exports run by ONNX Runtime, against the Engine on PyTorch."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from bench.export import check
from bench.export import main as bench
from tdm_r1.__main__ import main as draw
from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.export import parity
from tdm_r1.export.graphs import Axis, Graph, VAEDecoder
from tdm_r1.export.onnx_graph import write_graph
from tdm_r1.exported.manifest import read_manifest
from tdm_r1.exported.session import Session
from tdm_r1.graphs import FakeGraphs
from tdm_r1.models.lora_files import WEIGHTS_NAME

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow  # whichever comes first waits for an export

NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a compiler")
PROMPTS = ["two red circles", 'a sign that says "go"', ""]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same_pictures(exported: Engine, engine: Engine, prompts, **settings) -> None:
    pair = [each.generate(prompts, seed=3, output_type="latent", **settings)
            for each in (exported, engine)]  # fmt: skip
    assert relative_error(*pair) <= parity.TOLERANCE
    pictures = [each.generate(prompts, seed=3, **settings) for each in (exported, engine)]
    for ours, theirs in zip(*pictures, strict=True):
        assert np.abs(np.subtract(np.int16(ours), np.int16(theirs))).max() <= 1


class TestSD3:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"height": 32, "width": 96}, {"height": 96, "width": 48}],
        ids=["default", "wide", "tall"],
    )
    def test_pictures_of_several_prompts(self, sd3_onnx, sd3_engine, settings):
        assert_same_pictures(sd3_onnx, sd3_engine, PROMPTS, **settings)

    def test_pictures_of_one_prompt(self, sd3_onnx, sd3_engine):
        assert_same_pictures(sd3_onnx, sd3_engine, PROMPTS[0], num_images_per_prompt=3)

    def test_guidance(self, sd3_onnx, sd3_engine):
        assert_same_pictures(sd3_onnx, sd3_engine, PROMPTS[0], guidance_scale=3.0)

    def test_an_export_needs_no_backend_to_be_named(self, sd3_export):
        engine = Engine.from_pretrained(sd3_export)
        assert engine.pipeline.path == sd3_export and engine.device.type == "cpu"

    @pytest.mark.parametrize("precision", ["fp8", "int8"])
    def test_its_precision_was_chosen_when_it_was_made(self, sd3_export, precision):
        with pytest.raises(ConfigError, match=f"{precision}'; allowed for an export: 'auto', for"):
            Engine.from_pretrained(sd3_export, precision=precision)

    def test_the_command_line_draws_from_an_export(self, sd3_export, tmp_path, capsys):
        path = tmp_path / "out.png"
        assert draw(["generate", "a cat", "--model", str(sd3_export), "-o", str(path)]) == 0
        assert capsys.readouterr().out == f"{path}\n" and path.is_file()

    def test_the_manifest_says_what_was_exported(self, sd3_export, sd3_engine):
        manifest = read_manifest(sd3_export)
        assert manifest.schedule == sd3_engine.schedule
        assert manifest.axes["height"] == manifest.axes["width"] == (32, 96)
        assert manifest.axes["batch"] == (1, 3)
        assert manifest.lora is None and WEIGHTS_NAME in manifest.source  # its own is in there
        assert "transformer/diffusion_pytorch_model.safetensors" in manifest.source
        assert {graph["file"] for graph in manifest.graphs.values()} <= manifest.files.keys()
        assert torch.__version__.startswith(manifest.versions["torch"])

    def test_every_part_was_compared_at_three_sizes_per_axis(self, sd3_export):
        measured = read_manifest(sd3_export).parity
        parts = {"context", "transformer", "vae_decoder", "loop"}
        parts |= {f"text_encoder{suffix}" for suffix in ("", "_2", "_3")}
        assert measured["worst"].keys() == parts
        assert all(0 <= found["error"] <= 1e-4 for found in measured["worst"].values())
        for axis in ("batch", "height", "width", "text"):
            assert len({sizes[axis] for sizes in measured["sizes"]}) >= 3

    def test_axes_are_dynamic_and_named(self, sd3_export):
        inputs = read_manifest(sd3_export).graphs["transformer"]["inputs"]
        assert inputs["x_BChw"] == ["batch", 16, "2*rows", "2*cols"]
        assert inputs["tokens_BTD"][:2] == ["batch", "text"]

    def test_graphs_hold_onnx_ops_only_and_no_embedder_of_times(self, sd3_export):
        import onnx

        model = onnx.load(sd3_export / "transformer.onnx")
        assert {node.domain for node in model.graph.node} == {""}
        names = {t.name for t in onnx.load(sd3_export / "context.onnx").graph.initializer}
        assert "model.time_text_embed.text_embedder.linear_1.bias" in names
        assert not [name for name in names if "timestep_embedder" in name]

    def test_the_gate_names_the_worst_tensor(self, sd3_onnx, sd3_engine, monkeypatch):
        vae = sd3_onnx.pipeline.vae
        decode = type(vae).decode
        monkeypatch.setattr(type(vae), "decode", lambda self, x_BChw: decode(self, x_BChw) * 1.01)
        axes = {**read_manifest(sd3_onnx.pipeline.path).axes, "batch": (1, 1)}
        message = "vae_decoder differs.*images_B3HW by 0.01 .*allowed: 0.0001"
        with pytest.raises(ExportError, match=message):
            parity.check(sd3_engine, sd3_onnx, axes)

    def test_other_times_are_refused(self, sd3_onnx):
        cond = sd3_onnx.pipeline.text.encode(PROMPTS[:1])
        with pytest.raises(ConfigError, match="times of 4 .* steps only"):
            sd3_onnx.score(torch.zeros(1, 16, 8, 8), torch.tensor([500.0]), cond)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"height": 112}, "height is 112; allowed in this export: 32 to 96 .*--heights"),
            ({"width": 16}, "width is 16; allowed in this export: 32 to 96 .*--widths"),
            ({"num_images_per_prompt": 4}, "batch is 4; allowed in this export: 1 to 3"),
        ],
    )
    def test_shapes_outside_the_axes(self, sd3_onnx, settings, message):
        with pytest.raises(ConfigError, match=message):
            sd3_onnx.generate("a cat", seed=0, **settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"steps": 8}, "steps is 8 .* made for 4 steps"),
            ({"solver": "dpm2m"}, "solver is 'dpm2m'; this export was made for 4 steps of 'euler'"),
            ({"lora": "x.safetensors"}, "lora is 'x.safetensors': merge it with"),
            ({"device": "cuda"}, "device is 'cuda'; allowed"),
            ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; allowed"),
        ],
    )
    def test_what_an_export_cannot_do(self, sd3_export, settings, message):
        with pytest.raises(ConfigError, match=message):
            Engine.from_pretrained(sd3_export, backend="onnx", **settings)

    def test_a_shipped_name_is_the_shipped_model(self, sd3_export, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tiny-sd3").symlink_to(sd3_export)
        assert Engine.from_pretrained("tiny-sd3", device="cpu").pipeline.schedule is None
        assert Engine.from_pretrained("./tiny-sd3").pipeline.schedule is not None

    def test_pictures_above_the_limit_are_decoded_whole(self, sd3_export, sd3_onnx):
        small = Engine.from_pretrained(sd3_export, backend="onnx", decode_limit=1024)
        whole, tiled = (e.generate("a cat", seed=0, output_type="pt") for e in (sd3_onnx, small))
        assert torch.equal(whole, tiled)

    def test_encoding_pictures_is_refused(self, sd3_onnx):
        with pytest.raises(ConfigError, match="decoder only"):
            sd3_onnx.pipeline.vae.encode(torch.zeros(1, 3, 64, 64))

    def test_missing_onnx_runtime(self, sd3_export, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ConfigError, match="pip install onnxruntime"):
            Engine.from_pretrained(sd3_export, backend="onnx")


class TestZImage:
    def test_prompts_that_pad_alike_and_apart(self, zimage_pair):
        short = "a red circle"
        longer = "two red circles and a blue square " * 6
        lengths = zimage_pair[0].pipeline.text.encode([short, longer]).lengths_B
        assert len({-(-length // 32) for length in lengths.tolist()}) == 2
        assert_same_pictures(*zimage_pair, [longer, short, longer])
        assert_same_pictures(*zimage_pair, [short, ""], height=48, width=80)

    def test_pictures_of_one_prompt_and_guidance(self, zimage_pair):
        assert_same_pictures(*zimage_pair, PROMPTS[0], num_images_per_prompt=3)
        assert_same_pictures(*zimage_pair, PROMPTS[0], guidance_scale=2.0, height=96, width=32)

    def test_every_text_length_is_recorded(self, zimage_export):
        engine = Engine.from_pretrained(zimage_export, backend="onnx", graphs=FakeGraphs())
        assert engine.warmup() == 3  # 32, 64 and 96 tokens
        assert engine.warmup(num_prompts=2) == 3 + 5  # and two that pad apart

    def test_prompts_beyond_the_axis(self, zimage_pair):
        with pytest.raises(ConfigError, match="text is .*; allowed in this export: 2 to 96"):
            zimage_pair[0].generate("red " * 100, seed=0)


def test_a_decoder_with_attention(sd3_dir, tmp_path):
    vae = Engine.from_pretrained(sd3_dir, device="cpu").pipeline.vae
    assert vae.model.decoder.mid_block.attentions[0] is not None  # the shipped models' have none
    sides = Axis.ranging("rows", 2, 6, 2, 2), Axis.ranging("cols", 2, 6, 6, 2)
    inputs = {"latents_BChw": (Axis.ranging("batch", 1, 3, 2), 16, *sides)}
    entry = write_graph(Graph("decoder", VAEDecoder(vae), inputs, ("images_B3HW",)), tmp_path)
    decode = Session(tmp_path / entry["file"])
    for shape in ((1, 16, 4, 4), (2, 16, 12, 6), (3, 16, 8, 8)):
        x_BChw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert relative_error(*decode(x_BChw), vae.decode(x_BChw)) <= parity.TOLERANCE


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ([], []),
        pytest.param(["--compile"], ["torch.compile"], marks=NEEDS_COMPILER),
    ],
)
def test_bench(options, others, sd3_export, capsys, tmp_path):
    output, threads = tmp_path / "export.json", str(torch.get_num_threads())
    arguments = ["--export", str(sd3_export), "--batches", "2", "--repeats", "5", *options]
    assert bench([*arguments, "--threads", threads, "--output", str(output)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    (row,) = result["rows"]
    assert row["batch"] == 2 and row["latent_error"].keys() == {"onnxruntime", *others}
    assert max(row["latent_error"].values()) <= parity.TOLERANCE
    names = {"engine", "onnxruntime", *others}
    assert all(times.keys() == names for times in row["ms"].values())
    ratio = row["ms"]["DiT"]["engine"]["p50"] / row["ms"]["DiT"]["onnxruntime"]["p50"]
    assert row["speedup over"]["DiT"]["engine"] == round(ratio, 2)


def test_bench_refuses_to_time_other_pictures(sd3_engine):
    each = {"onnxruntime": Engine(sd3_engine.pipeline, solver="dpm2m"), "engine": sd3_engine}
    with pytest.raises(RuntimeError, match="onnxruntime differs from the Engine: latents by"):
        check(each, sd3_engine.noise([0], 64, 64), exact=True)
