"""Generator, fake score, surrogate reward and their copies: models that share what they can.

`full`: every role owns a copy of the transformer. `lora`: one frozen base, a named adapter each,
but for those that `roles.full` names. Either way a role is a module whose forward is a velocity,
and `tensors()` is what training changes.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tdm_r1.config import Roles as RolesConfig
from tdm_r1.errors import ConfigError
from tdm_r1.models import lora
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.layers import Transformer
from tdm_r1.training import distributed

TRAINED = {
    "sft": ("generator",),
    "tdm": ("generator", "fake"),
    "tdm_r1": ("generator", "fake", "surrogate"),
}
COPIES = {"sft": ("ema",), "tdm": ("ema",), "tdm_r1": ("ema", "lag")}
ORIGIN = {"ema": "generator", "lag": "surrogate", "reference": "surrogate"}


class Role(nn.Module):
    """A view of a transformer: with one of its adapters switched on, or as it is.

    Registers only its own tensors, so that an optimizer engine around it broadcasts, reduces and
    clears these and never another role's.
    """

    def __init__(
        self, name: str, transformer: Transformer, adapter: str | None, bf16: bool
    ) -> None:
        super().__init__()
        self.name = name
        self._shared = (transformer,)  # a tuple hides the module from registration
        self.adapter = adapter
        self.bf16 = bf16
        # Its own, not a child's: ZeRO-3 gathers what a module itself has, before its forward.
        for index, tensor in enumerate(self.tensors().values()):
            self.register_parameter(f"own_{index}", tensor)

    @property
    def transformer(self) -> Transformer:
        """The module behind this role; with LoRA, the same for all roles."""
        return self._shared[0]

    def forward(self, x_BChw: Tensor, t_B: Tensor, cond: Condition) -> Tensor:
        """v_BChw (fp32) at t = 1000 sigma."""
        with self.active():
            return self.transformer.velocity(x_BChw, t_B, cond).float()

    @contextmanager
    def active(self) -> Iterator[Transformer]:
        """The transformer as this role: weights whole, adapter chosen, autocast entered."""
        lora.set_adapter(self.transformer, self.adapter)
        with self.gathered(), self.precision():
            yield self.transformer

    def gathered(self) -> AbstractContextManager:
        """What this role owns, whole on every rank while inside: `distributed.gathered`."""
        return distributed.gathered(self.parameters())

    def precision(self) -> AbstractContextManager:
        """Autocast to bf16, or nothing."""
        device = self.transformer.device.type
        return torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext()

    def tensors(self) -> dict[str, nn.Parameter]:
        """What this role owns: its adapter, or the whole transformer. Empty for a LoRA base."""
        if self.adapter is not None:
            return lora.adapter_parameters(self.transformer, self.adapter)
        if any(True for _ in lora.lora_modules(self.transformer)):
            return {}
        return dict(self.transformer.named_parameters())

    def sha256(self) -> str:
        """Hash of `tensors()`, names and bytes."""
        digest = hashlib.sha256()
        with self.gathered():
            for name, tensor in sorted(self.tensors().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def stacked(rows: Sequence[tuple[Role, int]]) -> Iterator[Transformer]:
    """The transformer of several roles as all of them: (role, how many samples), in batch order."""
    first = rows[0][0]
    assert all(role.transformer is first.transformer for role, _ in rows)
    lora.set_rows(first.transformer, [(role.adapter, count) for role, count in rows])
    with first.gathered(), first.precision():
        yield first.transformer


def build_roles(
    base: Transformer,
    method: str,
    config: RolesConfig,
    *,
    few_step: dict[str, lora.LoraTensors] | None,
    bf16: bool,
    ema_reference: bool = False,
    checkpoint_blocks: bool = False,
    cut: bool = False,
) -> dict[str, Role]:
    """All roles of a method over `base` (trainable modules, nothing packed), and "base" itself.

    What a role owns is fp32 whatever the base is stored in. `few_step` is the LoRA that makes the
    base a few-step model: the generator starts from it, the fake score and the surrogate start from
    the base. `cut` (ZeRO-3) leaves each rank its share of every full copy, one copy at a time.
    """
    names = (*TRAINED[method], *COPIES[method], *(("reference",) if ema_reference else ()))
    base.requires_grad_(False)
    base.checkpoint_blocks = checkpoint_blocks
    roles: dict[str, Role] = {}
    adapters = []
    for name in names:
        origin = ORIGIN.get(name, name)
        if config.kind == "lora" and origin not in config.full:
            adapters.append(name)
            continue
        transformer = copy.deepcopy(base).float()
        if few_step and origin == "generator":
            lora.merge_lora(transformer, few_step)
        roles[name] = Role(name, transformer, None, bf16)
        if cut:
            distributed.cut(roles[name])
    if adapters:
        targets = config.targets or lora.TARGETS[base.family]
        lora.inject(base, adapters, rank=config.rank, alpha=config.alpha, targets=targets)
        roles |= {name: Role(name, base, name, bf16) for name in adapters}
        if few_step and "generator" in adapters:
            _start_from(roles["generator"], few_step)
        for name in set(adapters) & set(ORIGIN):
            follow(roles[name], roles[ORIGIN[name]], 1.0)
    roles["base"] = Role("base", base, None, bf16)
    if bf16:
        base.hold_linears(torch.bfloat16)
    if adapters:
        base.pack_siblings(adapters=True)
    else:
        base.freeze()
    for name, role in roles.items():
        for tensor in role.tensors().values():
            tensor.requires_grad_(name in TRAINED[method])
    return roles


def _start_from(role: Role, few_step: dict[str, lora.LoraTensors]) -> None:
    """Load a LoRA of the same rank and targets into a role's adapter, its alpha folded into B."""
    tensors = role.tensors()
    wanted = {key.rsplit(".lora_", 1)[0] for key in tensors}
    if set(few_step) != wanted:
        facts = []
        for odd, verb in ((set(few_step) - wanted, "lack"), (wanted - set(few_step), "add")):
            if odd:
                facts.append(f"{verb} {len(odd)}, such as {min(odd)}")
        raise ConfigError(
            "an adapter that starts from the few-step LoRA has the same modules, and roles.targets "
            f"{' and '.join(facts)}; set roles.targets=[{', '.join(_targets(few_step))}], "
            f"roles.rank={next(iter(few_step.values())).a_rI.shape[0]}, or roles.kind=full"
        )
    modules = dict(lora.lora_modules(role.transformer))
    assert role.adapter is not None
    with torch.no_grad():
        for name, (a, b, scale) in few_step.items():
            if a.shape[0] != modules[name].ranks[role.adapter]:
                raise ConfigError(
                    f"roles.rank is {modules[name].ranks[role.adapter]}, "
                    f"the few-step LoRA has rank {a.shape[0]}"
                )
            tensors[f"{name}.lora_A.weight"].copy_(a)
            tensors[f"{name}.lora_B.weight"].copy_(b * (scale / modules[name].scale(role.adapter)))


def _targets(modules: Iterable[str]) -> list[str]:
    """Ends of names, by which `lora.inject` finds these modules."""
    return sorted({re.sub(r"^\w+\.\d+\.", "", name) for name in modules})


@torch.no_grad()
def follow(copy_: Role, origin: Role, rate: float) -> None:
    """copy <- copy + rate (origin - copy), tensor by tensor; rate 1 copies bit for bit.

    Both roles are cut alike, if they are: every rank moves its own share.
    """
    source = origin.tensors()
    for name, tensor in copy_.tensors().items():
        mine, towards = distributed.held(tensor), distributed.held(source[name])
        if rate == 1.0:
            mine.copy_(towards)
        else:
            mine.lerp_(towards, rate)


@contextmanager
def transferred(origin: Role, target: Role, share: float) -> Iterator[None]:
    """target <- target + share (origin after - origin before), once what is inside has ended well.

    Both are whole transformers, nothing of them cut. An error inside leaves `target` alone.
    """
    if not share:
        yield
        return
    before = {name: tensor.detach().clone() for name, tensor in origin.tensors().items()}
    yield
    tensors = target.tensors()
    with torch.no_grad():
        for name, tensor in origin.tensors().items():
            tensors[name].add_(tensor - before[name], alpha=share)
