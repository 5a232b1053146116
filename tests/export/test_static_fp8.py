"""Fixed scales of e4m3: their rounding, and which layers may have them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from tdm_r1 import flow
from tdm_r1.calibrate import PROMPTS, Calibration, LayerError, Runs
from tdm_r1.errors import ConfigError, ExportError
from tdm_r1.export import static_fp8
from tdm_r1.export.onnx_graph import LOW_OPSET
from tdm_r1.export.precision import load_low
from tdm_r1.export.static_fp8 import calibrate_static, emulated, fixed_scale, to_e4m3
from tdm_r1.exported.session import Session
from tests import tiny

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

E4M3 = sorted({v for v in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
               if not math.isnan(v)})  # fmt: skip


def nearest(x: float) -> float:
    """The e4m3 number next to x, found by looking at all of them; of two the even one."""
    near = sorted(E4M3, key=lambda v: abs(v - x))[:2]
    if abs(near[0] - x) < abs(near[1] - x):
        return near[0]
    bits = torch.tensor(near).to(torch.float8_e4m3fn).view(torch.uint8)
    return near[0] if bits[0] % 2 == 0 else near[1]


class TestScales:
    def test_the_next_power_of_two(self):
        amax = torch.tensor([448.0, 449.0, 1.0, 0.0, 3e38, 5.5, 896.0])
        wanted = [1.0, 2.0, 2.0**-8, 2.0**-126, 2.0**120, 2.0**-6, 2.0]
        assert fixed_scale(amax).tolist() == wanted
        random = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs().bfloat16()
        found = fixed_scale(random)
        assert found.log2().frac().count_nonzero() == 0
        assert (random.float() <= 448 * found).all() and (random.float() > 224 * found).all()

    def test_rounding_to_the_nearest_even(self):
        x = torch.tensor([0.3, 17.0, 18.0, 19.0, -500.0, 2.0**-10, 1.5 * 2.0**-9, 460.0, -0.07])
        for scale in (1.0, 0.25):
            found = to_e4m3(scale * x, scale).float().tolist()
            assert found == [nearest(value) for value in x.tolist()]

    def test_onnx_runtime_rounds_every_bf16_number_alike(self, tmp_path):
        # What the gate runs is what PyTorch emulates: saturated, the even neighbour of two.
        make, kinds = onnx.helper, onnx.TensorProto
        scale = 2.0**-3
        nodes = [
            make.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=kinds.FLOAT8E4M3FN),
            make.make_node("DequantizeLinear", ["q", "s"], ["y"]),
        ]
        ends = [make.make_tensor_value_info(name, kinds.FLOAT, ["n"]) for name in "xy"]
        held = [make.make_tensor("s", kinds.FLOAT, (), [scale])]
        graph = make.make_graph(nodes, "pair", ends[:1], ends[1:], held)
        opset = make.make_opsetid("", LOW_OPSET)
        onnx.save(make.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "pair")
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16)
        x = x[~x.isnan()]
        (found,) = Session(tmp_path / "pair")(x.float())
        assert found.abs().max() == 448 * scale
        assert torch.equal(found, static_fp8.round_trip(x, scale).float())  # exact in bf16


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """A random SD3 of three blocks, without T5."""
    return tiny.make_sd3(tmp_path_factory.mktemp("models") / "sd3", with_t5=False)


def emulate(model, products):
    """Linears replaced: rows and weights divided, rounded by table, multiplied."""
    table = torch.tensor(E4M3)

    def round_by_table(x, scale):
        x = (x.float() / scale).clamp(-448, 448)
        above = torch.searchsorted(table, x).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        up = (high - x < x - low) | ((high - x == x - low) & (above % 2 == 0))
        return torch.where(up, high, low) * scale

    for path, product in products.items():
        linear = model.get_submodule(path)
        power = 2.0 ** torch.ceil(torch.log2(linear.weight.detach().float().abs().amax(1) / 448))
        weight = round_by_table(linear.weight.detach(), power[:, None])

        def forward(x, weight=weight, linear=linear, scale=product["scale"]):
            return F.linear(round_by_table(x, scale).bfloat16(), weight.bfloat16(), linear.bias)

        linear.forward = forward


class TestCalibration:
    def calibrate(self, model, report=None):
        pipeline = load_low(model, None, "bf16")
        schedule = flow.schedule(pipeline.default_solver, 4, pipeline.shift)
        return pipeline, schedule, calibrate_static(pipeline, schedule, report)

    def test_what_is_told_is_what_is_emulated(self, sd3):
        pipeline, schedule, static = self.calibrate(sd3)
        assert len(static.found.quantized) == 3 and static.found.measured < 0.05
        # The first block attends twice; the last one's text asks nothing and goes nowhere.
        assert len(static.products) == 16 + 12 + 8
        for product in static.products.values():
            assert 2 * product["amax"] <= 448 * product["scale"] < 4 * product["amax"]
        runs = Runs(pipeline, schedule, PROMPTS, seed=0)
        with emulated(pipeline.transformer, static.scales):
            found, _ = runs.follow([])
        assert pipeline.transformer.frozen
        whole = load_low(sd3, None, "bf16")
        whole.transformer.unfreeze()
        runs = Runs(whole, schedule, PROMPTS, seed=0)
        exact, _ = runs.follow([])
        emulate(whole.transformer, static.products)
        wanted, _ = runs.follow([])
        assert torch.equal(found, wanted)
        error = ((wanted - exact).norm() / exact.norm()).item()
        assert error == pytest.approx(static.found.measured, rel=1e-4) and error > 1e-3

    def test_an_outlier_stays_in_bf16(self, sd3, tmp_path):
        pipeline = load_low(sd3, None, "bf16")
        mlp = pipeline.transformer.unfreeze().transformer_blocks[1].ff.net
        # A hidden number that nobody reads: its scale leaves no bits to the others.
        mlp[0].proj.bias.data[5], mlp[2].weight.data[:, 5] = 60000.0, 0.0
        pipeline.transformer.freeze()
        schedule = flow.schedule(pipeline.default_solver, 4, pipeline.shift)
        static = calibrate_static(pipeline, schedule, write_report(tmp_path, limit=0.03))
        assert static.found.kept == ("transformer_blocks.1",)
        rows = {row.name: row for row in static.found.layers}
        assert rows["transformer_blocks.1"].own > 2 * rows["transformer_blocks.0"].own
        assert not [path for path in static.products if path.startswith("transformer_blocks.1.")]

    def test_a_report_limits_the_choice(self, sd3, tmp_path):
        report = write_report(tmp_path, limit=0.5, kept=("transformer_blocks.0",))
        _, _, static = self.calibrate(sd3, report)
        assert static.found.kept == ("transformer_blocks.0",) and static.found.limit == 0.5
        assert static.report == str(report) and len(static.found.layers) == 3
        with pytest.raises(
            ExportError, match="no layer of .* is left for fp8 by the limit of 1e-0"
        ):
            self.calibrate(sd3, write_report(tmp_path, limit=1e-5))
        with pytest.raises(ConfigError, match="reports on the layers of another model"):
            self.calibrate(sd3, write_report(tmp_path, limit=0.5, layers=2))


def write_report(root, limit, kept=(), layers=3):
    """What `python -m tdm_r1.calibrate -o` writes."""
    rows = tuple(LayerError(f"transformer_blocks.{i}", 0.1, 0.01) for i in range(layers))
    found = Calibration(rows, limit, kept, 0.014, 0.014)
    (root / "report.json").write_text(json.dumps(asdict(found)))
    return root / "report.json"
