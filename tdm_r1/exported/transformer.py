"""Both families' transformers as exported graphs, with the interface of the models themselves.

Shapes: B batch, T text tokens, P caption tokens padded to a multiple of 32, n image tokens, I image
tokens padded likewise, D width, H head width, K steps, M modulation vectors, C latent channels, h w
latent size.

Two graphs make one transformer. `context` runs once per prompt batch; the times of the schedule
are constants in it, and so is all that follows from them alone. `transformer` runs once per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_r1.errors import ConfigError
from tdm_r1.exported.manifest import Manifest
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.layers import Transformer
from tdm_r1.models.sd3 import check_condition
from tdm_r1.models.zimage_layout import padded_lengths, position_ids, rope_table


class ExportedTransformer(Transformer):
    """What the graphs of both families share; parameters it has none."""

    recordable = ()

    def __init__(self, config: Any, head_dim: int, manifest: Manifest, graphs: Mapping[str, Any]):
        super().__init__()
        self.config, self.manifest = config, manifest
        self.encode, self.step = graphs["context"], graphs["transformer"]
        self.init_runtime("auto", head_dim)
        self.frozen = True
        self.bind_ops()

    @property
    def device(self) -> torch.device:
        """Where latents are taken and returned."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what the graphs take and return."""
        return torch.float32

    def modulation(self, context: Any, t_KB: Tensor) -> Tensor:
        """Return the schedule's modulation, fp32 [K, M, B or 1, 1, D].

        Raises ConfigError for any other times: the graphs hold no others.
        """
        schedule = self.manifest.schedule
        if t_KB.flatten().tolist() != list(schedule.timesteps):
            raise ConfigError(
                f"this export answers at the times of {schedule.num_steps} {schedule.solver} steps"
                f" only, {schedule.timesteps}"
            )
        return context.modulation_KMB1D

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError for a latent size outside the export's axes."""
        scale = self.manifest.vae["scale_factor"]
        self.manifest.check(height=height * scale, width=width * scale)


@dataclass(frozen=True)
class SD3Outputs:
    """What SD3's `context` graph makes of a prompt batch."""

    tokens_BTD: Tensor
    modulation_KMB1D: Tensor


class ExportedSD3(ExportedTransformer):
    """SD3 and SD3.5."""

    family = "sd3"

    def context(self, cond: Condition, height: int, width: int) -> SD3Outputs:
        """As in `SD3Transformer`; ConfigError for sizes outside the export's axes, too."""
        self.check_size(height, width)
        pooled_BE = check_condition(cond, self.config)
        num_text = cond.tokens_BTE.shape[1] - self.manifest.text["clip_length"]
        self.manifest.check(batch=len(cond), text=num_text)
        return SD3Outputs(*self.encode(cond.tokens_BTE, pooled_BE))

    def forward(self, x_BChw: Tensor, context: SD3Outputs, mod_MB1D: Tensor) -> Tensor:
        """As in `SD3Transformer`."""
        b = x_BChw.shape[0]
        self.manifest.check(batch=b)
        tokens_BTD = context.tokens_BTD.expand(b, -1, -1)
        return self.step(x_BChw, tokens_BTD, mod_MB1D.expand(-1, b, -1, -1))[0]


@dataclass(frozen=True)
class Captions:
    """The prompts of a batch that pad to the same length, and the rotations that go with it."""

    rows: Sequence[int]
    text_BPD: Tensor
    rope_image_1I1H: Tensor
    rope_text_1P1H: Tensor


@dataclass(frozen=True)
class ZImageOutputs:
    """What Z-Image's `context` graph makes of a prompt batch, length by length."""

    groups: tuple[Captions, ...]
    modulation_KMB1D: Tensor


class ExportedZImage(ExportedTransformer):
    """Z-Image. Prompts that pad to different lengths run apart, so that no graph needs a mask."""

    family = "zimage"
    sign = -1.0

    def context(self, cond: Condition, height: int, width: int) -> ZImageOutputs:
        """As in `ZImageTransformer`; ConfigError for sizes outside the export's axes, too."""
        self.check_size(height, width)
        padded = padded_lengths(cond, self.config)
        self.manifest.check(batch=len(cond))
        for length in cond.lengths_B.tolist():
            self.manifest.check(text=length)
        p = self.config.patch_size
        groups = []
        for num_text in sorted(set(padded)):
            rows = [i for i, length in enumerate(padded) if length == num_text]
            group = cond.rows(rows)
            tokens = group.tokens_BTE[:, :num_text]
            tokens_BPE = F.pad(tokens, (0, 0, 0, num_text - tokens.shape[1]))
            ids = position_ids([num_text], height // p, width // p, self.device)
            rope_text, rope_image = (rope_table(part, self.config) for part in ids)
            text_BPD, modulation = self.encode(tokens_BPE, group.lengths_B, rope_text)
            groups.append(Captions(rows, text_BPD, rope_image, rope_text))
        return ZImageOutputs(tuple(groups), modulation)

    def forward(self, x_BChw: Tensor, context: ZImageOutputs, mod_MB1D: Tensor) -> Tensor:
        """As in `ZImageTransformer`."""
        b, _, height, width = x_BChw.shape
        self.manifest.check(batch=b)
        num_image = height * width // self.config.patch_size**2
        if len(context.groups) == 1:
            return self._run(x_BChw, context.groups[0], mod_MB1D)[:, :num_image]
        outs = [self._run(x_BChw[g.rows], g, mod_MB1D)[:, :num_image] for g in context.groups]
        order = torch.tensor([row for group in context.groups for row in group.rows])
        return torch.cat(outs)[order.argsort()]

    def _run(self, x_BChw: Tensor, group: Captions, mod_MB1D: Tensor) -> Tensor:
        """Patches of all padded image rows [B, I, p p C]."""
        text_BPD = group.text_BPD.expand(x_BChw.shape[0], -1, -1)
        ropes = group.rope_image_1I1H, group.rope_text_1P1H
        return self.step(x_BChw, text_BPD, *ropes, mod_MB1D)[0]
