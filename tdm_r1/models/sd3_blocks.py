"""The blocks of SD3 and SD3.5 (MMDiT): an image and a text stream that attend to each other.

Shapes: B batch, T text tokens, n image tokens, D width, N heads, H head width, M modulation vectors
of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tdm_kernels import Ops
from tdm_kernels.layout import product_dtype
from tdm_kernels.quantized import Quantized
from torch import Tensor, nn

from tdm_r1.models.layers import Attention, norm_weight
from tdm_r1.models.packing import Layer, Packable

EPS = 1e-6
# (scale, shift) of the norm of the image rows that comes next, and of the text rows; its ops.
Following = tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None], Ops]


class FeedForward(Packable):
    """Linear, GELU-tanh, linear."""

    groups = ("up", "down")
    activated = ("up",)

    def __init__(self, dim: int) -> None:
        super().__init__()
        up: Any = nn.Module()
        up.proj = nn.Linear(dim, 4 * dim)
        self.net: Any = nn.ModuleList([up, nn.Identity(), nn.Linear(4 * dim, dim)])

    def siblings(self, group: str) -> list[Any]:
        """Return the linear up or down."""
        return [self.net[0].proj if group == "up" else self.net[2]]

    def forward(self, x_BTD: Tensor, ops: Ops) -> Tensor:
        activated = self.joint("up")
        hidden = ops.gelu_tanh(self.linear("up", x_BTD)) if activated is None else activated(x_BTD)
        return self.linear("down", hidden)


class AdaLayerNorm(nn.Module):
    """Holder of one modulation linear; the model runs all of them together in `modulation`."""

    def __init__(self, dim: int, num_chunks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_chunks * dim)


class JointAttention(Attention):
    """Attention over [image, text] with separate projections for each stream."""

    groups = ("qkv", "out", "added", "added_out")

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, context_out: bool) -> None:
        super().__init__(dim, num_heads, bias=True, qk_norm=qk_norm, eps=EPS)
        # The output projection is registered again after these: parameter order is part of the
        # format of checkpoints that store a positional list.
        to_out: Any = self._modules.pop("to_out")
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.add_q_proj = nn.Linear(dim, dim)
        self.to_out = to_out
        self.to_add_out = nn.Linear(dim, dim) if context_out else None
        self.norm_added_q = self.head_norm(qk_norm)
        self.norm_added_k = self.head_norm(qk_norm)

    def siblings(self, group: str) -> list[Any]:
        """Return q, k, v of the image ("qkv") or of the text ("added"), or what follows them."""
        if group == "added":
            return [self.add_q_proj, self.add_k_proj, self.add_v_proj]
        if group == "added_out":
            return [] if self.to_add_out is None else [self.to_add_out]
        return super().siblings(group)

    def forward(
        self, y_BnD: Tensor, yc_BTD: Tensor, ops: Ops, out_BnD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the projected image rows, and the text rows (None in the last block).

        `out_BnD`: where the packed projection writes the image rows.
        """
        n = y_BnD.shape[1]
        q, k, v = self.image_and_text(y_BnD, yc_BTD, ops)
        if self.to_add_out is None:
            # The text output of the last block is never read, so its queries are not asked.
            return self.linear("out", ops.joint_attention(q[:, :n], k, v), out=out_BnD), None
        o = ops.joint_attention(q, k, v)
        # A linear on a strided batch runs as a batched GEMM with the weight repeated: copy instead,
        # and cast on the way what autocast would cast.
        image, text = (x.to(product_dtype(o)).contiguous() for x in (o[:, :n], o[:, n:]))
        return self.linear("out", image, out=out_BnD), self.linear("added_out", text)

    def image_and_text(self, y_BnD: Tensor, yc_BTD: Tensor, ops: Ops) -> tuple[Tensor, ...]:
        """Return q, k, v [B, n + T, N, H], q and k normalised, the image's rows before the text's.

        Packed, both projections write into one buffer, and one op normalises all its rows.
        """
        weights = norm_weight(self.norm_q), norm_weight(self.norm_k)
        added = norm_weight(self.norm_added_q), norm_weight(self.norm_added_k)
        n, image, text = y_BnD.shape[1], self.joint("qkv"), self.joint("added")
        parts = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if image is None or text is None or parts:
            q, k, v = self.qkv(y_BnD, ops)
            qc, kc, vc = self.project("added", yc_BTD)
            qc, kc = ops.qk_norm_rope(qc, kc, *added, eps=self.eps)
            # Text queries of the last block would never be read.
            q = q if self.to_add_out is None else torch.cat([q, qc], dim=1)
            return q, torch.cat([k, kc], dim=1), torch.cat([v, vc], dim=1)
        shape = (len(y_BnD), n + yc_BTD.shape[1], 3 * y_BnD.shape[2])
        rows = new_rows(y_BnD, shape)
        image(y_BnD, rows[:, :n])
        text(yc_BTD, rows[:, n:])
        q, k, v = rows.unflatten(-1, (3, *self.heads)).unbind(2)
        if weights[0] is not None:
            q, k = ops.qk_norm_rope(q, k, *weights, tail=(n, *added), eps=self.eps)
        return q, k, v


class JointBlock(Layer):
    """One MMDiT block: joint attention, in some layers a second image-only attention, two MLPs."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, dual: bool, last: bool) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(dim, 9 if dual else 6)
        self.norm1_context = AdaLayerNorm(dim, 2 if last else 6)
        self.attn = JointAttention(dim, num_heads, qk_norm=qk_norm, context_out=not last)
        self.attn2 = (
            Attention(dim, num_heads, bias=True, qk_norm=qk_norm, eps=EPS) if dual else None
        )
        self.ff = FeedForward(dim)
        self.ff_context = None if last else FeedForward(dim)
        self.num_image_chunks = 9 if dual else 6
        self.num_chunks = self.num_image_chunks + (2 if last else 6)

    def scale_chunks(self) -> list[bool]:
        """Return, per modulation vector of this block, whether it is a scale (stored as 1 + s)."""
        # The last block's text norm is the one place where the scale comes before the shift.
        text = [True, False] if self.ff_context is None else [False, True, False] * 2
        return [False, True, False] * (self.num_image_chunks // 3) + text

    def norms(
        self, h_BnD: Tensor, c_BTD: Tensor, mod_MB1D: Tensor, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """Return what the attentions read: image rows (of two attentions, [2, B, n, D]), text."""
        ops = self.ops_for(ops)
        y = ops.norm_modulate(h_BnD, *self.image_modulation(mod_MB1D), eps=EPS)
        return y, ops.norm_modulate(c_BTD, *self.text_modulation(mod_MB1D), eps=EPS)

    def image_modulation(self, mod_MB1D: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift of the image's first norm, [2, B, 1, D] for two attentions."""
        if self.attn2 is None:
            return mod_MB1D[1], mod_MB1D[0]
        # Both attentions read the same normalised rows: vectors 0-2 and 6-8, one pass for both.
        return mod_MB1D[1:8:6], mod_MB1D[0:7:6]

    def text_modulation(self, mod_MB1D: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift of the text's first norm."""
        first = self.num_image_chunks
        scale, shift = (first, first + 1) if self.ff_context is None else (first + 1, first)
        return mod_MB1D[scale], mod_MB1D[shift]

    def forward(
        self,
        h_BnD: Tensor,
        c_BTD: Tensor,
        y: Tensor,
        yc_BTD: Tensor,
        mod_MB1D: Tensor,
        following: Following,
        ops: Ops,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return both streams and what follows reads of them (text None in the last block).

        y and yc are this block's `norms`: one pass over a stream ends a block and begins the next.
        """
        scale2, shift2 = mod_MB1D[4], mod_MB1D[3]
        mine, after = self.ops_for(ops), following[2]
        o, gate, oc = self.attentions(y, yc_BTD, mod_MB1D, mine)
        if isinstance(o, list):
            h_BnD = ops.gate_residual(h_BnD, o[0], gate[0])
            o, gate = o[1], gate[1]
        h_BnD, y = mine.gate_residual_norm(h_BnD, o, gate, scale2, shift2, eps=EPS)
        f = self.ff(y, mine)
        h_BnD, y = after.gate_residual_norm(h_BnD, f, mod_MB1D[5], *following[0], eps=EPS)
        if self.ff_context is None or oc is None:
            return h_BnD, None, y, None
        gate1c, shift2c, scale2c, gate2c = mod_MB1D[self.num_image_chunks + 2 :].unbind()
        c_BTD, yc = mine.gate_residual_norm(c_BTD, oc, gate1c, scale2c, shift2c, eps=EPS)
        f = self.ff_context(yc, mine)
        c_BTD, yc = after.gate_residual_norm(c_BTD, f, gate2c, *following[1], eps=EPS)
        return h_BnD, c_BTD, y, yc

    def attentions(
        self, y: Tensor, yc_BTD: Tensor, mod_MB1D: Tensor, ops: Ops
    ) -> tuple[Any, Any, Tensor | None]:
        """Return the image's branch and gate, a pair of each for two attentions, and the text's."""
        if self.attn2 is None:
            o, oc = self.attn(y, yc_BTD, ops)
            return o, mod_MB1D[2], oc
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            o, oc = self.attn(y[0], yc_BTD, ops)
            return [o, self.attn2.attend(y[1], ops)], [mod_MB1D[2], mod_MB1D[8]], oc
        both = new_rows(y, y.shape) if isinstance(y, Quantized) else torch.empty_like(y)
        _, oc = self.attn(y[0], yc_BTD, ops, both[0])
        self.attn2.attend(y[1], ops, out=both[1])
        return both, mod_MB1D[2:9:6], oc


def new_rows(like: Tensor | Quantized, shape: Sequence[int]) -> Tensor:
    """Return memory of this shape for what a linear makes of rows like these."""
    if isinstance(like, Quantized):
        return like.values.new_empty(shape, dtype=like.dtype)
    return like.new_empty(shape, dtype=product_dtype(like))
