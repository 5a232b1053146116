"""The ops of a transformer as nodes of their own, which an engine may have a kernel for.

Shapes: B batch, T tokens, D width, F feed-forward width, N heads, H head width.

While a graph is traced, `bind` puts a node in place of what an op would compute. All that a kernel
holds as a constant is in the node's name, so that a node has no numbers of its own: a plugin of
TensorRT is known by namespace and name alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tdm_kernels import reference
from tdm_kernels.registry import Ops
from torch import Tensor

from tdm_r1.exported.manifest import DTYPES

NAMESPACE = "tdm_r1"  # of the plugins, and the domain of the nodes
# What NVIDIA's parser reads: where the plugin is, and that its kernel belongs into the engine.
ATTRIBUTES: dict[str, Any] = {"plugin_namespace": NAMESPACE, "aot": True}


@dataclass(frozen=True)
class PluginOp:
    """One op, with everything that its kernel holds as a constant.

    width: D, F or H. inputs: those it has, in the kernel's order. num_heads: N of qk_norm_rope,
    else None. per_sample: whether modulation, or the rotary table, has a row for each sample.
    precision: of the inputs that are neither modulation nor table, and of the outputs.
    """

    op: str
    width: int
    precision: str
    inputs: tuple[str, ...]
    num_outputs: int = 1
    num_heads: int | None = None
    per_sample: bool = False
    eps: float | None = None

    @property
    def name(self) -> str:
        """A name that no other op has, of letters, digits and underscores."""
        heads = "" if self.num_heads is None else f"{self.num_heads}x"
        words = [self.op, f"{heads}{self.width}", self.precision, *self.inputs]
        words += ["per_sample"] if self.per_sample else []
        words += [] if self.eps is None else [f"{self.eps:g}".replace(".", "p").replace("-", "m")]
        return "_".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest holds of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PluginOp:
        """Return the op that a manifest's entry is of; keys that are not its own are ignored."""
        found = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**found, "inputs": tuple(found["inputs"])})


def bind(ops: Ops, seen: dict[str, PluginOp]) -> Ops:
    """Return `ops` whose norms, gated norms, QK norm and activations are nodes of their own.

    `seen` collects by name those that are traced. What no kernel takes stays with `ops`: two
    modulations of one norm, and QK norm of which nothing is asked.
    """

    def emit(op: PluginOp, tensors: Sequence[Tensor]) -> list[Tensor]:
        seen[op.name] = op
        first = tensors[0]
        made = torch.onnx.ops.symbolic_multi_out(
            f"{NAMESPACE}::{op.name}",
            tensors,
            ATTRIBUTES,
            dtypes=[first.dtype] * op.num_outputs,
            shapes=[first.shape] * op.num_outputs,
            version=1,
        )
        return list(made)

    def norm_modulate(
        x_BTD: Tensor,
        scale_BTD: Tensor | None = None,
        shift_BTD: Tensor | None = None,
        *,
        weight_D: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        if scale_BTD is not None and scale_BTD.ndim != 3:
            return ops.norm_modulate(x_BTD, scale_BTD, shift_BTD, weight_D=weight_D, eps=eps)
        vectors = {"scale": scale_BTD, "shift": shift_BTD}
        op, tensors = _with_vectors("norm_modulate", {"x": x_BTD}, vectors, {"weight": weight_D})
        return emit(replace(op, eps=eps), tensors)[0]

    def gate_residual_norm(
        x_BTD: Tensor,
        branch_BTD: Tensor,
        gate_BTD: Tensor | None = None,
        scale_BTD: Tensor | None = None,
        shift_BTD: Tensor | None = None,
        *,
        branch_weight_D: Tensor | None = None,
        weight_D: Tensor | None = None,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]:
        vectors = {"gate": gate_BTD, "scale": scale_BTD, "shift": shift_BTD}
        weights = {"branch_weight": branch_weight_D, "weight": weight_D}
        if branch_BTD.ndim != 3 or any(v is not None and v.ndim != 3 for v in vectors.values()):
            return ops.gate_residual_norm(
                x_BTD, branch_BTD, *vectors.values(),
                branch_weight_D=branch_weight_D, weight_D=weight_D, eps=eps,
            )  # fmt: skip
        rows: dict[str, Tensor | None] = {"x": x_BTD, "branch": branch_BTD}
        op, tensors = _with_vectors("gate_residual_norm", rows, vectors, weights)
        h_BTD, y_BTD = emit(replace(op, eps=eps, num_outputs=2), tensors)
        return h_BTD, y_BTD

    def qk_norm_rope(
        q_BTNH: Tensor,
        k_BTNH: Tensor,
        weight_q_H: Tensor | None = None,
        weight_k_H: Tensor | None = None,
        rope_BTNH: Tensor | None = None,
        *,
        tail: reference.Tail | None = None,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]:
        assert tail is None, "a traced model norms its text rows apart"
        if weight_q_H is None and weight_k_H is None and rope_BTNH is None:
            return q_BTNH, k_BTNH
        rows = {"q": q_BTNH, "k": k_BTNH, "weight_q": weight_q_H, "weight_k": weight_k_H}
        op, tensors = _with_vectors("qk_norm_rope", rows, {"rope": rope_BTNH}, {})
        heads = q_BTNH.shape[2]
        q_BTNH, k_BTNH = emit(replace(op, num_heads=heads, eps=eps, num_outputs=2), tensors)
        return q_BTNH, k_BTNH

    def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        op, tensors = _with_vectors("swiglu", {"gate": gate_BTF, "up": up_BTF}, {}, {})
        return emit(op, tensors)[0]

    def gelu_tanh(x_BTF: Tensor) -> Tensor:
        op, tensors = _with_vectors("gelu_tanh", {"x": x_BTF}, {}, {})
        return emit(op, tensors)[0]

    return replace(
        ops,
        norm_modulate=norm_modulate,
        gate_residual_norm=gate_residual_norm,
        qk_norm_rope=qk_norm_rope,
        swiglu=swiglu,
        gelu_tanh=gelu_tanh,
    )


def compute(op: PluginOp, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return what the reference makes of an op's inputs, in their order."""
    given = dict(zip(op.inputs, tensors, strict=True))
    options: dict[str, Any] = {} if op.eps is None else {"eps": op.eps}
    if op.op == "qk_norm_rope":
        optional = (given.get(name) for name in ("weight_q", "weight_k", "rope"))
        return reference.qk_norm_rope(given["q"], given["k"], *optional, **options)
    if op.op in ("norm_modulate", "gate_residual_norm"):
        weights = {f"{n}_D": given.pop(n) for n in ("branch_weight", "weight") if n in given}
        call = getattr(reference, op.op)
        found = call(**{f"{name}_BTD": x for name, x in given.items()}, **weights, **options)
    else:
        found = getattr(reference, op.op)(*tensors)
    return found if isinstance(found, tuple) else (found,)


def _with_vectors(
    name: str,
    rows: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None],
    weights: dict[str, Tensor | None],
) -> tuple[PluginOp, list[Tensor]]:
    """An op with those of its inputs that are given, in the kernel's order; `vectors` in fp32."""
    first = next(iter(rows.values()))
    assert first is not None
    full = {key: None if x is None else x.float() for key, x in vectors.items()}
    given = {key: x for key, x in {**rows, **full, **weights}.items() if x is not None}
    counts = [x.shape[0] for x in full.values() if x is not None]
    apart = {not (isinstance(count, int) and count == 1) for count in counts}
    assert len(apart) < 2, f"{name} of vectors for all samples and for each: {counts}"
    (precision,) = (key for key, dtype in DTYPES.items() if dtype == first.dtype)
    op = PluginOp(name, int(first.shape[-1]), precision, tuple(given), per_sample=True in apart)
    return op, list(given.values())
