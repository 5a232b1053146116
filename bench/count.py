"""How many kernels does one forward launch, and how many bytes do they move, eager and fused?

    python -m bench.count [--output FILE]

Z-Image and SD3.5-Medium at full size and 1024 x 1024, batch 1, bf16, on the meta device: shapes run
through the models and nothing is computed. `eager` is diffusers' module, every aten op that is not
a view counting as one launch. `fused` is our forward with the Triton ops, what does not depend on
the latents hoisted out of it as the engine does. `bytes` is what moves between kernels outside
matrix products and attention: each operand once, each result once.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tdm_kernels.registry import IMPLS, OP_NAMES, Ops
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/count.py`, too

from bench.timing import report
from tdm_r1.models import zimage
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.sd3 import SD3Config, SD3Transformer
from tdm_r1.models.zimage import ZImageConfig, ZImageTransformer

LATENT = 128  # 1024 x 1024 pixels
NUM_TEXT = {"zimage": 128, "sd35m": 333}
GEMMS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "convolution")
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "_unsafe_view")
ZIMAGE = ZImageConfig(axes_lens=(1536, 512, 512))
SD35M = SD3Config(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip


@dataclass
class Tally:
    """Launches of every kind, and the bytes of those that are neither product nor attention."""

    launches: Counter = field(default_factory=Counter)
    bytes: int = 0

    def add(self, kind: str, operands: list[Any]) -> None:
        """Count one launch that reads or writes `operands`."""
        self.launches[kind] += 1
        if kind not in ("gemm", "attention"):
            self.bytes += sum(_size(x) for x in operands if isinstance(x, Tensor))

    def result(self) -> dict[str, Any]:
        """The numbers of this tally, as JSON takes them."""
        kinds = dict(self.launches.most_common())
        return {"launches": self.launches.total(), "bytes": self.bytes, "kinds": kinds}


class CountAten(TorchDispatchMode):
    """Tallies every aten op that launches something."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            operands = [*tree_leaves((args, kwargs)), *tree_leaves(out)]
            self.tally.add("gemm" if name in GEMMS else name, operands)
        return out


class CountAttention(TorchFunctionMode):
    """Tallies attention as the one kernel it is on a GPU: on meta torch would take it apart."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.tally.add("attention", [])
            with torch.utils._python_dispatch._disable_current_modes():
                return torch.empty_like((*args, *(kwargs or {}).values())[0])
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], Any]) -> dict[str, Any]:
    """Run `call` on meta tensors and tally it; Triton launches are recorded instead of made."""
    from triton.runtime.jit import JITFunction

    tally = Tally()

    def record(kernel, *args, grid, warmup, **options):
        tally.add("attention" if "attention" in kernel.__name__ else "triton", list(args))

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(patch.object(JITFunction, "run", record))
        stack.enter_context(CountAten(tally))
        stack.enter_context(CountAttention(tally))
        call()
    return tally.result()


def triton_ops() -> Ops:
    """The ops a GPU would get: Triton's where there is one, else the reference's."""
    found: dict[str, Callable] = {}
    for op in OP_NAMES:
        for impl in IMPLS:
            if impl.op == op and impl.backend in ("triton", "reference"):
                found.setdefault(op, impl.bind())
    return Ops(**found)


def fused(model: Any, cond: Condition) -> dict[str, Any]:
    """One step of our forward; context and modulation come from outside, once per picture."""
    model._ops, model.bind_ops = triton_ops(), lambda: None  # meta would get the reference's
    model.freeze()
    x, made = torch.empty(1, 16, LATENT, LATENT, device="meta"), []

    def prepare() -> None:
        context = model.context(cond, LATENT, LATENT)
        made.extend((context, model.modulation(context, torch.empty(4, 1, device="meta"))))

    # A length on meta cannot be read back: the caption fills its bucket.
    with patch.object(zimage, "padded_lengths", lambda cond, config: [NUM_TEXT["zimage"]]):
        prepared = count(prepare)
    context, modulation = made
    return count(lambda: model(x, context, modulation[0])) | {"prepared": prepared}


def eager(family: str) -> dict[str, Any]:
    """One forward of diffusers' module."""
    import diffusers

    x = torch.empty(1, 16, LATENT, LATENT, device="meta", dtype=torch.bfloat16)
    t, num_text = torch.empty(1, device="meta"), NUM_TEXT[family]
    with torch.device("meta"):
        if family == "zimage":
            peer: Any = diffusers.ZImageTransformer2DModel(axes_lens=list(ZIMAGE.axes_lens))
            text = torch.empty(num_text, 2560, dtype=torch.bfloat16)
            peer.to(torch.bfloat16)
            return count(lambda: peer([x[0][:, None]], t, [text]))
        peer = diffusers.SD3Transformer2DModel(**asdict(SD35M)).to(torch.bfloat16)
        text = torch.empty(1, num_text, 4096, dtype=torch.bfloat16)
        pooled = torch.empty(1, 2048, dtype=torch.bfloat16)
        return count(lambda: peer(x, text, pooled, t))


def measure() -> dict[str, Any]:
    """Both models, both ways."""
    with torch.device("meta"):
        models: dict[str, tuple[Any, int]] = {
            "zimage": (ZImageTransformer(ZIMAGE).to(torch.bfloat16), ZIMAGE.cap_feat_dim),
            "sd35m": (SD3Transformer(SD35M).to(torch.bfloat16), SD35M.joint_attention_dim),
        }
    result = {}
    for family, (model, width) in models.items():
        num_text = NUM_TEXT[family]
        tokens = torch.empty(1, num_text, width, device="meta", dtype=torch.bfloat16)
        pooled = torch.empty(1, 2048, device="meta") if family == "sd35m" else None
        cond = Condition(tokens, torch.empty(1, device="meta"), pooled)
        result[family] = {"eager": eager(family), "fused": fused(model, cond)}
    return result


def _size(x: Tensor) -> int:
    """Bytes of the different elements of a view: a broadcast axis counts once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def main(argv: list[str] | None = None) -> int:
    """Print a table, then the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    result = measure()
    for family, ways in result.items():
        for way, found in ways.items():
            print(
                f"{family:7} {way:6} {found['launches']:5} launches {found['bytes'] / 1e9:7.2f} GB"
            )
    report(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
