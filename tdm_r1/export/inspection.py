"""What a builder tells of the layers of an engine that it has made, after fusing: without a GPU.

TensorRT's inspector takes a loaded engine, and so a GPU. But where it is asked for detailed
profiling, TensorRT-RTX 1.7 writes the same lines to its logger when a build ends.
"""

from __future__ import annotations

import re
from collections import Counter

HEADING = "Layers:\n"  # of the message
_LINE = re.compile(r"Name: .*?, LayerType: (\w+), Inputs: ")
_TENSOR = re.compile(r"\{ Name: .*?Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")


def fused_layers(message: str) -> dict[str, dict[str, int]]:
    """Return, by kind such as "gemm", how many layers have tensors of which dtypes.

    Dtypes are TensorRT's, as in "BFloat16" or "BFloat16+Float": those of what a layer reads, writes
    and holds as a constant, single numbers left out. Layers without any, such as waits, are not
    counted. Empty for a message of another form, which is another version's.
    """
    found: dict[str, Counter[str]] = {}
    for line in message.removeprefix(HEADING).splitlines():
        layer = _LINE.match(line)
        if layer is None:
            if found:
                break  # the engine's inputs and outputs follow
            continue
        tensors = _TENSOR.findall(line)
        dtypes = sorted({dtype for sizes, dtype in tensors if sizes.strip() not in ("", "1")})
        if dtypes:
            found.setdefault(layer[1], Counter())["+".join(dtypes)] += 1
    return {kind: dict(counts) for kind, counts in found.items()}
