"""What the two transformers share: embeddings, patches, attention projections, and the base class.

Shapes: B batch, T tokens, n image tokens, D width, N heads, H head width, K steps, M modulation
vectors, C latent channels, h w latent height and width, p patch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from tdm_kernels import Ops, select
from tdm_kernels.quantized import ScaledRows
from tdm_kernels.reference import to_velocity
from tdm_kernels.registry import BACKENDS, ROWS
from torch import Tensor, nn

from tdm_r1.errors import ConfigError, closest
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.packing import Layer, Packable


def timestep_features(t: Tensor, num_features: int = 256) -> Tensor:
    """Return fp32 [cos(t w_k), sin(t w_k)] on a new last axis, w_k = 1e4^(-2 k / num_features)."""
    half = num_features // 2
    # fp32 and this order of operations on purpose: at t = 1000 another rounding of w_k is visible.
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t.float()[..., None] * torch.exp(exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def check_latent_size(height: int, width: int, patch: int, max_tokens: Sequence[int]) -> None:
    """Raise ConfigError unless the latent is whole patches, at most `max_tokens` on each side."""
    for name, size, limit in zip(("height", "width"), (height, width), max_tokens, strict=True):
        if size <= 0 or size % patch:
            raise ConfigError(f"latent {name}={size} must be a positive multiple of {patch}")
        if size // patch > limit:
            raise ConfigError(f"latent {name}={size} exceeds this model's maximum {limit * patch}")


def patchify(x_BChw: Tensor, patch: int, dtype: torch.dtype, *, channels_last: bool) -> Tensor:
    """Cut latents into row-major patches [B, n, C p p], or [B, n, p p C] if `channels_last`."""
    b, c, height, width = x_BChw.shape
    x = x_BChw.reshape(b, c, height // patch, patch, width // patch, patch)
    x = x.permute((0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5))
    # Cast and layout in one pass.
    return x.to(dtype, memory_format=torch.contiguous_format).reshape(b, -1, c * patch * patch)


def name_some(names: Sequence[str], limit: int = 8) -> str:
    """Join names for an error message, the tail of a long list as a count."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class Attention(Packable):
    """One self-attention layer's parameters under their published names, and its projections."""

    groups: tuple[str, ...] = ("qkv", "out")

    def __init__(self, dim: int, num_heads: int, *, bias: bool, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.heads = (num_heads, dim // num_heads)
        self.eps = eps
        self.norm_q = self.head_norm(qk_norm)
        self.norm_k = self.head_norm(qk_norm)
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out: Any = nn.ModuleList([nn.Linear(dim, dim, bias=bias)])

    def head_norm(self, present: bool) -> nn.RMSNorm | None:
        """Return the holder of one per-head RMSNorm weight, or None for a model without them."""
        return nn.RMSNorm(self.heads[1], eps=self.eps) if present else None

    def siblings(self, group: str) -> list[Any]:
        """Return to_q, to_k, to_v ("qkv") or the output projection ("out")."""
        return [self.to_out[0]] if group == "out" else [self.to_q, self.to_k, self.to_v]

    def project(self, group: str, y_BTD: Tensor) -> Sequence[Tensor]:
        """Return the raw q, k, v of a group, [B, T, N, H] each."""
        joint = self.joint(group)
        if joint is not None:
            return joint(y_BTD).unflatten(-1, (3, *self.heads)).unbind(2)
        return [linear(y_BTD).unflatten(-1, self.heads) for linear in self.siblings(group)]

    def qkv(self, y_BTD: Tensor, ops: Ops, rope_BTNH: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return q, k, v [B, T, N, H], q and k normalised and rotated as the model asks."""
        q, k, v = self.project("qkv", y_BTD)
        weight_q, weight_k = norm_weight(self.norm_q), norm_weight(self.norm_k)
        q, k = ops.qk_norm_rope(q, k, weight_q, weight_k, rope_BTNH, eps=self.eps)
        return q, k, v

    def attend(
        self,
        y_BTD: Tensor,
        ops: Ops,
        rope_BTNH: Tensor | None = None,
        lengths_B: Tensor | None = None,
        num_rows: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the projected self-attention output, of all rows or of the first `num_rows`.

        Of sample b the first `lengths_B[b]` rows are attended, without lengths all. `out`: as in
        `linear`.
        """
        q, k, v = self.qkv(y_BTD, ops, rope_BTNH)
        return self.linear("out", ops.joint_attention(q[:, :num_rows], k, v, lengths_B), out)


def norm_weight(norm: nn.RMSNorm | None) -> Tensor | None:
    """Return the weight of an optional norm."""
    return None if norm is None else norm.weight


class Transformer(Packable):
    """Base of both transformers: op binding, freezing for inference, and the one-call velocity.

    `forward` returns patches [B, n, p p C], channel fastest, so that a sampling step can read them
    as they come; the velocity is `sign` times the picture they make.
    """

    family: ClassVar[str]
    sign: ClassVar[float] = 1.0
    config: Any
    groups: tuple[str, ...] = ("modulation",)
    recordable: tuple[str, ...]  # methods that run ops and make views, nothing else

    def init_runtime(self, backend: str, head_dim: int) -> None:
        """Finish construction once the parameters exist: remember the backend, bind the ops."""
        self.backend = backend
        self.head_dim = head_dim
        self.frozen = False
        self.checkpoint_blocks = False  # recompute every block's activations in the backward pass
        self.quantized: tuple[str, ...] = ()
        self.precision = "fp8"  # of the layers in `quantized`
        self.released: dict[str, ScaledRows] = {}  # by name, weights that are left in 8 bits alone
        self.recorded: dict[str, Callable[..., Tensor]] = {}
        self.weights: tuple[nn.Parameter, ...] = ()  # once frozen: finding them takes its time
        self.bind_ops()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, and of the activations outside autocast."""
        return next(self.parameters()).dtype

    def context(self, cond: Condition, height: int, width: int) -> Any:
        """Return all that depends neither on time nor on the latents. Sizes are latent sizes."""
        raise NotImplementedError

    def modulation(self, context: Any, t_KB: Tensor) -> Tensor:
        """Return the modulation of K steps, indexed by step on the first axis."""
        raise NotImplementedError

    def velocity(self, x_BChw: Tensor, t_B: Tensor, cond: Condition) -> Tensor:
        """Return v = eps - x0 at t = 1000 sigma: context, modulation and forward in one call.

        x_BChw and t_B are fp32; the result is fp32 [B, C, h, w]. Source: rectified flow,
        x_t = (1 - sigma) x0 + sigma eps.
        """
        context = self.context(cond, x_BChw.shape[-2], x_BChw.shape[-1])
        out_Bnf = self(x_BChw, context, self.modulation(context, t_B[None])[0])
        return self.to_velocity(x_BChw, out_Bnf)

    def to_velocity(self, x_BChw: Tensor, out_Bnf: Tensor) -> Tensor:
        """Return v, fp32 and of the shape of the latents x, from what `forward` made of them."""
        height, width = x_BChw.shape[-2:]
        return to_velocity(out_Bnf, height, width, patch=self.config.patch_size, sign=self.sign)

    def project_modulation(self, c: Tensor) -> Tensor:
        """Apply every modulation linear to `c`, results side by side on the last axis.

        Unpacked, this is a loop of linears, not one GEMM over a weight concatenated on the fly: the
        concatenation would copy a third of the model per call and keep it for the backward pass.
        """
        joint = self.joint("modulation")
        if joint is not None:
            return joint(c)
        return torch.cat([linear(c) for linear in self.siblings("modulation")], dim=-1)

    def hold_linears(self, dtype: torch.dtype) -> Transformer:
        """Store the linears in `dtype`, for weights that are never trained under autocast.

        Autocast casts frozen weights at every call; these it finds cast, so the results keep every
        bit. Norms, tables and learned tokens stay, and with them `dtype`, that of the residual
        stream.
        """
        assert not self.frozen, "packed weights are views of joint storage"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(dtype)
        return self

    def freeze(self) -> Transformer:
        """Prepare for inference: no parameter needs a gradient, sibling linears run as one GEMM.

        Later in-place updates and moves are followed; a Parameter replaced by another is not.
        """
        self.requires_grad_(False)
        self.frozen = True
        self.bind_ops()
        for name in self.quantized:
            layer = self.layers_by_name()[name]
            layer.pack_scaled(name, self.scaled_ops(), self.precision)
        self.pack_siblings()
        self.weights = tuple(self.parameters())
        for name in self.recordable:
            self.recorded[name] = self.ops.record(getattr(self, name), self.weights)
        return self

    def pack_siblings(self, *, adapters: bool = False) -> None:
        """Run sibling linears as one GEMM wherever no gradient is asked for; `unfreeze` undoes it.

        With `adapters`, for a frozen base that carries some: so do linears with adapters, with
        gradients too; the others' flow as before, through the linears one by one.
        """
        for module in self.modules():
            if isinstance(module, Packable) and not module.packed:
                module.pack(self.ops, adapters=adapters)

    def unfreeze(self) -> Transformer:
        """Undo the packing of `freeze`; `requires_grad` stays as it is.

        Raises ConfigError after `release`.
        """
        self.check_whole("unpacked or moved")
        for module in self.modules():
            if isinstance(module, Packable):
                module.unpack()
            if isinstance(module, Layer):
                module.scaled = None
        self.recorded, self.weights = {}, ()
        self.frozen = False
        self.bind_ops()
        return self

    def layers_by_name(self) -> dict[str, Layer]:
        """Return the blocks that a sampling step runs, in order: those 8 bits would speed up."""
        raise NotImplementedError

    def quantize(self, names: Sequence[str], precision: str = "fp8") -> None:
        """Let these layers of a frozen transformer, and no others, multiply in fp8 or int8.

        fp8 is e4m3, of a transformer in bfloat16; int8 takes any dtype. Raises ConfigError for an
        unknown layer, one that cannot, another dtype than fp8 takes, or ops that cannot run here,
        with the transformer left in its own dtype; and after `release`.
        """
        if not self.frozen:
            raise ConfigError(f"only a frozen transformer runs in {precision}: call freeze() first")
        if precision not in ROWS:
            allowed = ", ".join(map(repr, ROWS))
            raise ConfigError(f"precision is {precision!r}; allowed: {allowed}")
        if unknown := [name for name in names if name not in self.layers_by_name()]:
            hint = closest(unknown[0], self.layers_by_name())
            raise ConfigError(f"no layer {unknown[0]!r} in this model.{hint}")
        self.check_whole("quantised anew")
        self.quantized, self.precision = tuple(names), precision
        self.unfreeze()
        try:
            self.freeze()
        except ConfigError:
            self.quantized = ()
            self.unfreeze()
            self.freeze()
            raise

    def release(self) -> None:
        """Give back the memory of the weights that quantised layers read no more.

        For good: the transformer stays where it is, frozen as it is. It cannot be copied or saved,
        nor compute with gradients; new weights reach it by `LiveWeights`, folded into 8 bits.
        """
        released = dict(self.released)
        for name in self.quantized:
            layer = self.layers_by_name()[name]
            if not layer.released:
                released |= {f"{name}.{path}": rows for path, rows in layer.release().items()}
        self.released = released

    def check_whole(self, task: str) -> None:
        """Raise ConfigError, naming the task, for a transformer that has released weights."""
        if self.released:
            raise ConfigError(
                f"{self.family} cannot be {task}: {len(self.released)} of its weights are left in"
                f" {self.precision} alone; load it again, without precision={self.precision!r}"
            )

    def scaled_ops(self) -> Ops:
        """Return the ops of quantised layers. Raises ConfigError where there are none."""
        if self.precision == "fp8" and self.dtype != torch.bfloat16:
            raise ConfigError(f"fp8 multiplies into bfloat16: dtype is {self.dtype}")
        target = self.backend, self.device, self.dtype, self.head_dim, False
        try:
            return select(*target, rows=self.precision)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def refresh(self) -> None:
        """Bring what was made of the packed weights up to date now, in place: for CUDA graphs."""
        for module in self.modules():
            if isinstance(module, Packable):
                for packed in module.packed.values():
                    if hasattr(packed, "current"):
                        packed.current()

    def run(self, name: str, *inputs: Any) -> Tensor:
        """Call a recordable method, from its recording where there is one."""
        return self.recorded.get(name, getattr(self, name))(*inputs)

    def __getstate__(self) -> dict[str, Any]:
        self.check_whole("copied")
        return {**super().__getstate__(), "recorded": {}, "weights": ()}

    def bind_ops(self) -> None:
        """Choose the ops for the device and dtype the parameters are on now; frozen, any of them.

        A backend that cannot run here is refused when the ops are used: on its way from a file to
        its device, a model passes through places where nothing is computed.
        """
        if self.backend not in ("auto", *BACKENDS):
            raise ConfigError(f"backend={self.backend!r} is unknown; use auto or one of {BACKENDS}")
        try:
            found = select(self.backend, self.device, self.dtype, self.head_dim, not self.frozen)
            self._ops: Ops | ConfigError = found
        except ValueError as error:
            self._ops = ConfigError(str(error))

    @property
    def ops(self) -> Ops:
        """The bound ops. Raises ConfigError if the backend asked for cannot run here."""
        if isinstance(self._ops, ConfigError):
            raise self._ops
        return self._ops

    @ops.setter
    def ops(self, ops: Ops) -> None:
        """Put `ops` in place of those bound, until they are bound anew."""
        self._ops = ops

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        # A move or cast replaces every parameter's storage: the packed views must be rebuilt.
        was_frozen = self.frozen
        was_packed = any(isinstance(m, Packable) and m.packed for m in self.modules())
        if was_frozen or was_packed:
            self.unfreeze()
        super()._apply(fn, recurse)
        self.bind_ops()
        if was_frozen:
            return self.freeze()
        if was_packed:
            self.pack_siblings(adapters=True)
        return self
