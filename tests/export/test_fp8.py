"""Exports in fp8: the pairs in the file, what is refused, and what is built."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdm_r1 import flow
from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.export import static_fp8, tensorrt
from tdm_r1.export.cli import _parser, main
from tdm_r1.export.emulation import write_rounded, write_wide
from tdm_r1.export.graphs import Axis, Graph
from tdm_r1.export.onnx_graph import LOW_OPSET, write_graph
from tdm_r1.export.parity import TOLERANCE
from tdm_r1.export.precision import load_low
from tdm_r1.export.quantize import check_pairs
from tdm_r1.export.static_fp8 import calibrate_static, weight_scale
from tdm_r1.export.tensorrt import Target, build_engine
from tdm_r1.exported.manifest import read_manifest
from tdm_r1.exported.session import Session
from tdm_r1.exported.tensorrt import rebuild_command
from tests import tiny
from tests.export.test_runtime import small_manifest
from tests.export.test_static_fp8 import nearest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

TENSOR = re.compile(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")  # in the builder's log
SIZES = ("--batch", "2", "--heights", "32", "64", "--widths", "48", "64")


class Model(nn.Module):
    """Two linears that read the same rows, and a third that stays in bf16."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(16, 32) for _ in range(3))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw).bfloat16()
        self.first.weight.data[3] *= 1000  # a scale for every output

    def forward(self, x):
        x = x.bfloat16()
        return (self.first(x) * self.second(x) + self.last(x)).float()


class Whole(nn.Module):
    """As the graphs hold a transformer."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


SCALES = {"first": 0.125, "second": 0.125}


def as_graph(model: Model) -> Graph:
    return Graph("part", Whole(model), {"x": (Axis.ranging("b", 1, 4, 2), 5, 16)}, ("y",))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(model, its file, its entry in a manifest), two of three products in e4m3."""
    root, model = tmp_path_factory.mktemp("pairs"), Model()
    for name in SCALES:
        weight = model.get_submodule(name).weight
        weight.data = static_fp8.round_trip(weight.data, weight_scale(weight.data))
    entry = write_graph(as_graph(model), root, LOW_OPSET, scales=SCALES)
    return model, root / entry["file"], entry


class TestPairs:
    @pytest.fixture
    def changed(self, written, tmp_path):
        """Check the file with one initializer changed."""
        model, path, entry = written

        def check(name, change, scales=SCALES):
            found = onnx.load(path)
            for value in found.graph.initializer:
                if value.name == name:
                    value.raw_data = change(bytearray(value.raw_data))
            onnx.save(found, tmp_path / "part.onnx")
            check_pairs(tmp_path / "part.onnx", model, entry["weights"], scales)

        return check

    def test_rounded_and_wide(self, written, tmp_path):
        model, path, _ = written
        x = 30 * torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))  # 56 is the end
        assert x.max() > 56
        low = x.bfloat16().float()
        rows = torch.tensor([nearest(8 * value) / 8 for value in low.flatten().tolist()])

        def products(given, rounded):
            read = {"first": given, "second": given, "last": low if rounded else x}
            for name, linear in model.named_children():
                y = F.linear(read[name], linear.weight.float())
                y = (y.bfloat16().float() if rounded else y) + linear.bias.float()
                yield y.bfloat16().float() if rounded else y

        with torch.no_grad():
            write_rounded(path, tmp_path / "rounded.onnx", "fp8")
            first, second, last = products(rows.view_as(x), True)
            wanted = ((first * second).bfloat16().float() + last).bfloat16().float()
            (found,) = Session(tmp_path / "rounded.onnx")(x)
            # Another order of the 16 additions moves some of 480 results by half a bf16 ulp.
            error = (found - wanted).abs() / wanted.abs().clamp_min(1e-3)
            assert (error > 0).float().mean() < 0.02 and error.max() < 2.0**-6
            watched = write_wide(path, tmp_path / "wide.onnx", "fp8")
            first, second, last = products(x, False)
            torch.testing.assert_close(watched(x)[0], first * second + last, rtol=2e-5, atol=1e-3)

    def test_what_is_in_the_file(self, written):
        model, path, _ = written
        held = {value.name: value for value in onnx.load(path).graph.initializer}
        kinds = onnx.TensorProto
        for name, linear in model.named_children():
            weight = held[f"model.{name}.weight"]
            if name == "last":
                assert weight.data_type == kinds.BFLOAT16
                continue
            assert weight.data_type == kinds.FLOAT8E4M3FN and len(weight.raw_data) == 16 * 32
            scale = held[f"model.{name}.weight_scale"]
            assert scale.data_type == kinds.BFLOAT16 and list(scale.dims) == [32]
            values = torch.frombuffer(bytearray(scale.raw_data), dtype=torch.bfloat16).float()
            amax = linear.weight.detach().float().abs().amax(1)
            assert (amax <= 448 * values).all() and (amax > 200 * values).all()
        nodes = [node.op_type for node in onnx.load(path).graph.node]
        assert nodes.count("QuantizeLinear") == 1  # both read the same rows
        assert nodes.count("DequantizeLinear") == 3

    def test_the_file_as_written(self, changed):
        changed("", bytes)

    @pytest.mark.parametrize(
        ("name", "scales", "message"),
        [
            ("model.first.weight", SCALES, "first multiplies by another weight than the Engine"),
            ("model.second.weight_scale", SCALES, "second multiplies by another weight"),
            ("first.input_scale", SCALES, "first reads rows scaled by .*, not by 0.125"),
            ("", {"first": 0.125}, "second reads rows scaled by 0.125, not by None"),
            ("", {**SCALES, "last": 1.0}, "part has 2 products in fp8 of 3"),
        ],
    )
    def test_another_file(self, changed, name, scales, message):
        with pytest.raises(ExportError, match=message):
            changed(name, lambda data: bytes([data[0], data[1] ^ 1, *data[2:]]), scales)

    def test_what_cannot_be_written(self, tmp_path):
        graph = as_graph(Model())
        with pytest.raises(ExportError, match="model.first.weight is not rounded to e4m3"):
            write_graph(graph, tmp_path, LOW_OPSET, scales=SCALES)
        with pytest.raises(ExportError, match="no product of third, which was to be in fp8"):
            write_graph(graph, tmp_path, LOW_OPSET, scales={"third": 1.0})


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--precision", "bf16", "--calibration", "r"), "--calibration goes with --precision"),
            (("--precision", "fp8", "--calibration", "r"), "cannot read r: No such file"),
            (("--precision", "fp8", "--refit"), "--refit does not go with --precision fp8: "),
            (("--precision", "fp8", "--dry-run"), "--precision fp8 does not go with --dry-run: "),
            (("--calibration", "r", "--dry-run"), "--calibration does not go with --dry-run"),
        ],
    )
    def test_options(self, capsys, tmp_path, sd3_dir, options, message):
        output = () if "--dry-run" in options else ("--output", tmp_path / "out")
        assert main([str(a) for a in ("--model", sd3_dir, *output, *options)]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
        assert not list(tmp_path.iterdir())

    def test_the_command_that_rebuilds_engines_names_the_report(self, tmp_path):
        manifest = small_manifest(precision="fp8", fp8={"report": "a report.json"})
        words = shlex.split(rebuild_command(tmp_path, manifest, "tensorrt-rtx"))
        found = _parser().parse_args(words[1:])
        assert (found.precision, found.calibration) == ("fp8", "a report.json")

    def test_widths_that_tensor_cores_do_not_take(self, tmp_path):
        model = tiny.make_zimage(tmp_path / "zimage", layers=2)
        pipeline = load_low(model, None, "fp8")
        message = r"noise_refiner.0 cannot run in fp8: .*w1 is \[170, 64\], and both must be mult"
        with pytest.raises(ConfigError, match=message):
            calibrate_static(pipeline, flow.schedule("euler", 4, 3.0))

    def test_gpus_without_fp8(self, written, capsys, tmp_path, sd3_dir):
        pytest.importorskip("tensorrt_rtx")
        _, path, entry = written
        build = path, tmp_path / "engine", entry["profile"]
        with pytest.raises(ExportError, match="sm86, because the model .*fp8_e4m3"):
            build_engine(*build, Target(("8.6",)), print)  # what we spare the user the way to
        found = build_engine(*build, Target(("8.9", "12.0", "12.1")), print)["fused"]
        assert found["gemm"]["BFloat16+FP8"] == 2
        command = ["--model", str(sd3_dir), "--output", str(tmp_path / "out"), "--trt"]
        chosen = ["--precision", "fp8", "--compute-capability", "8.9", "8.6"]
        assert main([*command, *chosen]) == 2
        error = capsys.readouterr().err.strip()
        message = "--compute-capability is '8.6', whose GPUs multiply no fp8; allowed with --preci"
        assert message in error and "fp8: 8.9, 12.0" in error and "\n" not in error
        Target(("8.6",)).check("bf16")

    def test_plugins(self):
        with pytest.raises(ConfigError, match="--plugins does not go with --precision fp8"):
            Target(runtime="tensorrt", plugins=True).check("fp8")


@pytest.fixture(scope="module", params=["sd3", "zimage"])
def fp8_export(request, tmp_path_factory):
    """A random model of either family in fp8, by the command line."""
    root, text = tmp_path_factory.mktemp("exports"), ()
    if request.param == "sd3":
        model = tiny.make_sd3(root / "sd3", layers=2, with_t5=False)
    else:
        model, text = tiny.make_zimage(root / "zimage", layers=1, heads=6), ("--text", "2", "64")
    command = ["--model", str(model), "--output", str(root / "fp8"), *SIZES, *text]
    assert main([*command, "--precision", "fp8"]) == 0
    return root / "fp8"


@pytest.mark.slow
class TestExports:
    def test_the_gate_and_what_is_told(self, fp8_export):
        manifest = read_manifest(fp8_export)
        told = manifest.fp8
        assert manifest.precision == "fp8" and told["fp8"] and told["report"] is None
        assert {row["name"] for row in told["layers"]} == {*told["fp8"], *told["kept"]}
        assert all(row["own"] > 0.005 for row in told["layers"])
        assert 1e-3 < told["measured"] < 0.1
        for name, found in manifest.parity["worst"].items():
            assert found["error"] <= TOLERANCE, name
        rounded = manifest.parity["rounded"]
        for name, found in rounded["worst"].items():
            assert found["error"] <= found["allowed"] < 0.4, name
        assert all(rounded["worst"][name]["error"] > 1e-3 for name in ("transformer", "loop"))
        assert rounded["drift"].keys() == {"exported", "engine"}
        with pytest.raises(ConfigError, match="is in fp8, whose matrices ONNX Runtime"):
            Engine.from_pretrained(fp8_export)

    def test_which_weights_are_e4m3(self, fp8_export):
        manifest = read_manifest(fp8_export)
        products = manifest.fp8["products"]
        for name, graph in manifest.graphs.items():
            model = onnx.load(fp8_export / graph["file"])
            kind = onnx.TensorProto.FLOAT8E4M3FN
            e4m3 = {w.name for w in model.graph.initializer if w.data_type == kind}
            wanted = {f"model.{path}.weight" for path in products}
            assert e4m3 == (wanted if name == "transformer" else set())
        layers = tuple(f"{name}." for name in manifest.fp8["fp8"])
        assert all(path.startswith(layers) for path in products) and len(products) > 4

    def test_products_of_the_engine_are_fp8(self, fp8_export, tmp_path, monkeypatch):
        pytest.importorskip("tensorrt_rtx")
        logs, count = [], tensorrt.fused_layers
        monkeypatch.setattr(tensorrt, "fused_layers", lambda log: logs.append(log) or count(log))
        manifest = read_manifest(fp8_export)
        graph = manifest.graphs["transformer"]
        path, engine = fp8_export / graph["file"], tmp_path / "engine"
        found = build_engine(path, engine, graph["profile"], Target(("8.9", "12.0")), print)
        fused = {**found["fused"]["gemm"], **found["fused"].get("runtime_fusion", {})}
        assert fused["BFloat16+FP8"] == len(manifest.fp8["products"])
        assert fused.keys() == {"BFloat16+FP8", "BFloat16"}
        lines = [line for line in logs[0].splitlines() if "LayerType: gemm" in line]
        for line in (line for line in lines if "Datatype: FP8" in line):
            parts = re.split(r"Inputs: |, Constants: |, Outputs: |, TacticName: ", line)[1:4]
            dtypes = [
                {dtype for sizes, dtype in TENSOR.findall(part) if sizes != "1"} for part in parts
            ]
            assert dtypes == [{"FP8"}, {"FP8"}, {"BFloat16"}]  # rows, weight, result
