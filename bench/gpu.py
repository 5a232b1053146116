"""Full-size Z-Image and SD3.5-Medium on one GPU: where the time goes, and how far from the floor.

    python -m bench.gpu [--quick] [--output FILE] [--budget SECONDS] [--compile-mode MODE]

Random weights, no network. After the roofs (products in bf16 and e4m3, a copy) come both models at
512 and 1024 pixels, batch 1, 4 and 24: the four steps of the transformer by diffusers, ours eager,
on graphs and on graphs in fp8, timed in turn; text and VAE alone; and all from a new prompt to
pixels on the host. A second row of a size, if there is time for a compiler, times the steps and the
whole once more, diffusers compiled among them. `% of floor` divides the time that the products and
attention of the four steps need at the measured roofs by the time they took.

A cell that fails, or that the budget has no time for, says why in its place; FILE is rewritten
after every stage. Each model has a process of its own, which ends with its share of the budget: an
illegal access, or a compiler that never returns, costs the other nothing. `--tiny` runs all of it
on small models, on any machine: it tests this program and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/gpu.py`, too

from bench.full_size import FAMILIES, Subject, make
from bench.timing import Times, environment, interleaved, report, roofs, store
from tdm_r1.engine import Engine
from tdm_r1.graphs import FakeGraphs
from tdm_r1.trajectory import finish, hand_over

ROOF_SIZES = {False: (8192, 2**30), True: (64, 2**16)}  # of a product, of a copy; by --tiny
COMPILE_SECONDS = 100.0  # what must be left before a compiler is started
STAGE_SECONDS = 6.0
ROUNDS = 7  # the fewest of a stage: to see that it works, how long it takes, and five that count
START_SECONDS = 15.0  # of a process, before its clock runs
INTERRUPTED = {"skipped": "interrupted"}


class Clock:
    """The time that is left, and cells that end early when it is gone."""

    def __init__(self, budget: float, stage: float = 0.0) -> None:
        """After five rounds of a stage, others take at most `stage` seconds."""
        self.end, self.stage = time.monotonic() + budget, stage

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - time.monotonic()

    def cell(self, call: Callable[[], Any]) -> Any:
        """Return call(), or the reason why there is no such result."""
        if self.left <= 0:
            return {"skipped": "the budget is spent"}
        try:
            return call()
        except Exception as error:  # whatever it is, the other cells must not be lost
            lines = str(error).splitlines()
            return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        finally:
            if torch.cuda.is_available():
                gc.collect()
                with suppress(RuntimeError):  # of a lost device, which the cells speak of
                    torch.cuda.empty_cache()

    def times(self, variants: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Time variants in turn, as often as the time left allows; each is tried alone first."""
        found: dict[str, Any] = {}
        works: dict[str, Callable[[], Any]] = {}
        for name, call in variants.items():
            if (failure := self.cell(partial(_try, call))) is not None:
                found[name] = failure
            else:
                works[name] = call
        start = time.monotonic()
        for call in works.values():
            call()
            _wait()
        a_round = time.monotonic() - start
        if (ROUNDS - 2) * a_round > self.left:
            reason = f"a round takes {a_round:.1f} s, and {self.left:.0f} s are left"
            return found | {name: {"skipped": reason} for name in works}
        repeats = max(5, min(30, int(self.stage / max(a_round, 1e-6))))
        return found | interleaved(works, repeats=repeats, warmup=0)


def _try(call: Callable[[], Any]) -> None:
    call()
    _wait()


class Row:
    """One model at one size and batch: a call for every stage of every variant."""

    def __init__(
        self, subject: Subject, compiled: Any, fp8: Subject | None, size: int, batch: int
    ) -> None:
        self.subject, self.size, self.batch = subject, size, batch
        device = subject.pipeline.device
        graphs = FakeGraphs() if device.type == "cpu" else "auto"
        eager = subject.engine("off")
        self.models = {"diffusers": subject.transformer}
        self.models |= {"diffusers compiled": compiled} if compiled is not None else {}
        self.engines = {"ours eager": eager, "ours graph": subject.engine(graphs)}
        if fp8 is not None:
            self.engines["ours fp8 graph"] = fp8.engine(graphs)
        self.text: Any = subject.pipeline.text
        self.text.size = size
        self.noise = eager.noise(list(range(batch)), size, size)
        self.cond, self.peer_text = self.text.encode(["a"]), subject.encode_peer(size)

    def encode(self) -> dict[str, Callable[[], Any]]:
        """One prompt, by both."""
        return {
            "diffusers": lambda: self.subject.encode_peer(self.size),
            "ours": lambda: self.text.encode(["a"]),
        }

    def sample(self) -> dict[str, Callable[[], Any]]:
        """Four steps from encoded text to final latents."""
        peers = {
            name: partial(self.subject.sample_peer, model, self.peer_text, self.noise)
            for name, model in self.models.items()
        }
        ours = {n: partial(e.rollout, self.cond, self.noise) for n, e in self.engines.items()}
        return peers | ours

    def decode(self) -> dict[str, Callable[[], Any]]:
        """Latents of unit size to uint8 pixels on the device."""
        vae = self.subject.pipeline.vae
        return {
            "diffusers": lambda: self.subject.decode_peer(self.noise),
            "ours": lambda: finish(vae, self.noise, "pil"),
        }

    def draw(self) -> dict[str, Callable[[], Any]]:
        """A new prompt to pictures on the host."""

        def peer(model: Any) -> Any:
            text = self.subject.encode_peer(self.size)
            latents = self.subject.sample_peer(model, text, self.noise)
            return hand_over(self.subject.decode_peer(latents), "pil")

        def ours(engine: Engine) -> Any:
            engine.clear_cache()
            return engine.generate("a", latents=self.noise, num_images_per_prompt=self.batch)

        peers = {name: partial(peer, model) for name, model in self.models.items()}
        return peers | {name: partial(ours, engine) for name, engine in self.engines.items()}

    def unrecorded(self) -> dict[str, int]:
        """How many graphs of each engine could not be had: what they would hold was timed eager."""
        pools = {name: engine.graphs for name, engine in self.engines.items()}
        return {
            name: sum(graph is None for graph in pool.graphs.values())
            for name, pool in pools.items()
            if pool is not None
        }

    def measure(
        self, clock: Clock, floor: dict[str, float], row: dict[str, Any], keep: Callable[[], None]
    ) -> None:
        """Time every stage into `row`, handing over after each; memory beside."""
        row["transformer_ms"] = clock.times(self.sample())
        row["% of floor"] = {
            name: round(100 * floor[kind] / times.p50, 1)
            for name, times in row["transformer_ms"].items()
            if isinstance(times, Times) and (kind := "fp8" if "fp8" in name else "bf16") in floor
        }
        keep()
        stages: dict[str, Callable[[], dict]] = {"whole": self.draw}
        if "diffusers compiled" not in self.models:
            stages = {"text": self.encode, "vae": self.decode} | stages
        for stage, calls in stages.items():
            row[f"{stage}_ms"] = clock.times(calls())
            row["unrecorded"] = self.unrecorded()
            keep()
        row["activations_gb"] = {
            name: clock.cell(partial(_activations, call)) for name, call in self.draw().items()
        }
        if torch.cuda.is_available():
            row["reserved_gb"] = round(torch.cuda.memory_reserved() / 1e9, 2)


def floors(subject: Subject, size: int, batch: int, roof: dict[str, float]) -> dict[str, float]:
    """Milliseconds for the arithmetic of four steps at the roofs: attention always in bf16."""
    flops = subject.flops(size, batch)
    found = {}
    for name in ("bf16", "fp8"):
        if f"flops_per_s_{name}" in roof:
            seconds = flops["products"] / roof[f"flops_per_s_{name}"]
            found[name] = 1e3 * (seconds + flops["attention"] / roof["flops_per_s_bf16"])
    return found


def _activations(call: Callable[[], Any]) -> float | None:
    """What a call allocates at most on top of what is there; a graph holds its own already."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Sizes and batches, what is asked most often first: a budget may end before the list does."""
    if args.tiny:
        return [(64, 2)]
    if args.quick:
        return [(512, 1)]
    return [(512, 1), (1024, 1), (512, 24), (512, 4), (1024, 4), (1024, 24)]


def measure(args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure one model as far as the budget goes, handing over the result so far at every step."""
    device = torch.device(args.device)
    clock = Clock(args.budget, 0.0 if args.tiny else STAGE_SECONDS)
    (family,) = args.models
    result: dict[str, Any] = {"bench": "gpu", "tiny": args.tiny, "dtype": "bfloat16"}
    result |= environment() | {"budget_s": args.budget, "compile_mode": args.compile_mode}
    result |= {"roof": clock.cell(lambda: roofs(device, *ROOF_SIZES[args.tiny])), "rows": []}
    keep(result)
    start = clock.left
    subject = clock.cell(partial(make, family, device, torch.bfloat16, tiny=args.tiny))
    if not isinstance(subject, Subject):
        result["rows"].append({"model": family} | subject)
        return result
    compiled: Any = None
    if args.compile_mode != "none":
        compiled = clock.cell(partial(subject.compiled, args.compile_mode))
    fp8 = clock.cell(subject.quantized)
    weights = subject.pipeline.transformer.state_dict().values()
    result[f"{family} setup"] = {
        "seconds": round(start - clock.left, 1),
        "transformer_gb": round(sum(x.numel() * x.element_size() for x in weights) / 1e9, 3),
        **{n: x for n, x in (("compiled", compiled), ("fp8", fp8)) if isinstance(x, dict)},
    }
    keep(result)
    # A compiler may take all the time that is left: whatever it competes with comes first.
    peers = (None,) if compiled is None or isinstance(compiled, dict) else (None, compiled)
    fp8 = fp8 if isinstance(fp8, Subject) else None
    for (size, batch), peer in itertools.product(shapes(args), peers):
        if peer is not None and clock.left < COMPILE_SECONDS:
            continue
        row: dict[str, Any] = {"model": family, "size": size, "batch": batch}
        result["rows"].append(row)
        say = partial(keep, result)
        row |= clock.cell(partial(_row, subject, peer, fp8, clock, result["roof"], row, say)) or {}
        keep(result)
        _say(row)
    return result | {"seconds": round(args.budget - clock.left, 1)}


def _row(
    subject: Subject, compiled: Any, fp8: Subject | None, clock: Clock, roof: dict[str, float],
    row: dict[str, Any], keep: Callable[[], None],
) -> dict[str, Any] | None:  # fmt: skip
    """Fill a row; or say why not, where the four steps alone would take the time that is left."""
    floor = row["floor_ms"] = floors(subject, row["size"], row["batch"], roof)
    made = Row(subject, compiled, fp8, row["size"], row["batch"])
    least = ROUNDS * sum(
        floor.get("fp8" if "fp8" in name else "bf16", 0.0) / 1e3 for name in made.sample()
    )
    if least > clock.left:
        return {"skipped": f"it takes {least:.0f} s at the roofs, and {clock.left:.0f} s are left"}
    made.measure(clock, floor, row, keep)
    return None


def apart(args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure several models, each by this program in a process of its own."""
    total = Clock(args.budget)
    result: dict[str, Any] = {"rows": []}
    options = ["--tiny"] * args.tiny + ["--quick"] * args.quick + ["--device", args.device]
    options += ["--compile-mode", args.compile_mode]
    for index, family in enumerate(args.models):
        share = total.left / (len(args.models) - index)
        found = _alone(family, share, options)
        rows = result["rows"] + found.pop("rows", [])
        result = found | result | {"rows": rows, "budget_s": args.budget}
        result["seconds"] = round(args.budget - total.left, 1)
        keep(result)
        if rows[-1:] == [{"model": family} | INTERRUPTED]:
            break
    return result


def _alone(family: str, share: float, options: list[str]) -> dict[str, Any]:
    """One model's result, or as much of it as there was when its process ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        budget = max(1.0, share - START_SECONDS)
        command = [sys.executable, __file__, "--models", family, *options]
        command += ["--budget", str(budget), "--output", str(file)]
        try:
            code = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=share).returncode
            failure = {"error": f"its process ended with status {code}"} if code else None
        except subprocess.TimeoutExpired:
            failure = {"skipped": f"its process was ended after its {share:.0f} s"}
        except KeyboardInterrupt:
            failure = INTERRUPTED
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    if failure is not None:
        found["rows"].append({"model": family} | failure)
    return found


def _say(row: dict[str, Any]) -> None:
    words = [f"{row['model']} {row['size']} x {row['batch']}:"]
    for stage in ("transformer_ms", "whole_ms"):
        for name, times in row.get(stage, {}).items():
            value = f"{times.p50:.1f}" if isinstance(times, Times) else next(iter(times))
            words.append(f"{stage.removesuffix('_ms')} {name} {value},")
    print(" ".join(words), row.get("error", row.get("skipped", "")), file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure; the last line of stdout is one JSON object, also stored as it grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="512 pixels, batch 1, no compiler")
    parser.add_argument("--tiny", action="store_true", help="small models: tests this program")
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="default: 450, quick 110")
    parser.add_argument("--compile-mode", default="max-autotune-no-cudagraphs",
                        help="of torch.compile, or none (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="store the JSON here too")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("full-size models need a CUDA device; --tiny runs anywhere")
    if args.quick:
        args.compile_mode = "none"
    args.budget = args.budget or (110.0 if args.quick else 450.0)

    keep = partial(store, path=args.output)
    with torch.no_grad():
        result = measure(args, keep) if len(args.models) == 1 else apart(args, keep)
    report(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
