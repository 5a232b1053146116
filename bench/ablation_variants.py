"""The variants of `bench.ablation` as small changes of the trainer's method, and one run of one.

    python -m bench.ablation_variants VARIANT --seed S --before FILE --output FILE --work FOLDER

A run trains the variant from the shipped weights, evaluates it once, at the end, and writes one
JSON object. VARIANT "before" only evaluates the weights that all start from.

Shapes: B rows (a micro-batch of whole groups), C h w latents, K steps with levels s_0 > ... > s_K.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/ablation_variants.py`, too

from bench.timing import environment
from tdm_r1 import flow
from tdm_r1.config import load_recipe
from tdm_r1.errors import ConfigError, report
from tdm_r1.training.queries import Noised, Query, ask
from tdm_r1.training.roles import Role, follow
from tdm_r1.training.rollout import Batch, keyed_generator, start
from tdm_r1.training.tdm import Tdm
from tdm_r1.trajectory import check_finite

if TYPE_CHECKING:
    from tdm_r1.training.losses import Metrics
    from tdm_r1.training.trainer import Trainer

RECIPE = "tiny-sd3-shapes"
NO_TRANSFER = "reinforcement.transfer=0"


class PreferenceAlone(Tdm):
    """The group preference loss (`losses.surrogate_loss`) and no other: only the judge is trained.

    Its base and its reference are what `roles["base"]` is.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        if transfer := self.recipe.reinforcement.transfer:
            raise ConfigError(
                f"reinforcement.transfer is {transfer}; allowed with the preference loss alone: 0"
            )
        self.accumulation = {self.judge: self.accumulation[self.judge]}

    def _backward(self, iteration: int, batch: Batch, k: int, j: int, slot: int) -> Metrics:
        judged = self._draw_inputs(iteration, batch, k, j, slot)[2]
        assert judged is not None
        at, roles = (judged.x_BChw, judged.s_B, batch.cond), self.trainer.roles
        with self.clock.phase("queries"):
            v = ask(self.engine, [Query(roles["base"], *at), Query(roles["lag"], *at)])
        return self._surrogate(batch, judged, j, dict(zip(("base_j", "lag"), v, strict=True)))[1]


class DirectDgpo(PreferenceAlone):
    """DGPO (arXiv 2510.08425) straight on the few-step generator: no surrogate, no fake score.

        d_i = mean_elements (v* - v_theta)^2 at x_s = renoise(x_{j+1}, s), d_ref_i of the reference
        L   = (j+1)/K * [ mean_i sigmoid(beta/G sum_g A (d - d_ref)) A_i d_i
                          + drift_weight mean (v_theta - v_ref)^2 ]

    Rollouts, rewards, advantages, the draws of (j, s, eps), both gates and the drift term are the
    surrogate's in TDM-R1; only who is trained differs. The reference is frozen: the generator
    before its first step, as the surrogate's is what the surrogate starts from. The lag copy
    follows the generator; the optimizer is the recipe's for the generator. Nothing else pulls on
    it: no teacher, no KL.
    """

    judge = "generator"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        roles, theta = trainer.roles, trainer.roles["generator"]
        frozen = copy.deepcopy(theta.transformer).requires_grad_(False)
        roles["base"] = Role("base", frozen, theta.adapter, theta.bf16)
        follow(roles["lag"], theta, 1.0)


class FrozenSurrogate(Tdm):
    """The generator follows a surrogate that somebody else has trained, or nobody: then it is still
    the base, and its term is left with the base's guidance. Fake score as ever.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        del self.accumulation["surrogate"]

    def _draw_inputs(
        self, iteration: int, batch: Batch, k: int, j: int, slot: int
    ) -> tuple[Noised, Noised | None, None]:
        """As in TDM-R1, but that nothing is drawn to be judged: x_r is only queried."""
        distil, pull, _ = super()._draw_inputs(iteration, batch, k, j, slot)
        return distil, pull, None


class WithoutKl(Tdm):
    """No KL to the teacher, and so no fake score: the base stands in for it, KL = base_c - base_c.

    The guidance and reward terms of the generator keep their weights.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        del self.accumulation["fake"]

    def _fake(self, batch: Batch, distil: Noised, k: int, v_base: Tensor) -> tuple[Tensor, Metrics]:
        return v_base, {}


class StochasticRollout(Tdm):
    """Rollouts that noise the clean estimate of every step anew, as consistency models sample.

        x0_k = x_k - s_k v_theta(x_k)        x_{k+1} = (1 - s_{k+1}) x0_k + s_{k+1} eps_{k+1}

    eps_{k+1} is a pure function of (seed, group, k + 1), so that a path can be replayed. Losses and
    rewards are those of TDM-R1; the reward of x_K is no longer that of every x_k on its way, since
    fresh noise comes in between. Evaluation samples deterministically, as for every variant.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        if self.schedule.solver != "euler":
            raise ConfigError(
                f"rollout.solver is {self.schedule.solver}; allowed with stochastic rollouts: euler"
            )

    @torch.no_grad()
    def _trajectories(self, groups: list[tuple[int, str]]) -> Batch:
        role, size = self.trainer.roles["generator"], self.recipe.rollout.group_size
        batch = start(self.engine, groups, size, self.recipe.seed)
        x = batch.x[0]
        path = [x]
        for k, t in enumerate(self.schedule.timesteps):
            with role.active() as transformer:
                t_B = torch.full((len(x),), t, device=x.device)
                v = self.engine.score(x, t_B, batch.cond, transformer).float()
            x0 = flow.x0_from_v(x, v, self.schedule.sigmas[k])
            x = flow.renoise(x0, 0.0, self.schedule.sigmas[k + 1], self._fresh(batch, k + 1))
            path.append(x)
        check_finite(torch.isfinite(x).flatten(1).all(1)[None], self.trainer.pipeline)
        return replace(batch, x=tuple(path))

    def _clean(self, batch: Batch, k: int) -> Tensor:
        s = self.schedule.sigmas[k + 1]
        return (batch.x[k + 1] - s * self._fresh(batch, k + 1)) / (1 - s)

    def _fresh(self, batch: Batch, boundary: int) -> Tensor:
        """eps [B, C, h, w] that entered at a boundary from 1 to K; 0 is the rollout's own noise."""
        shape = (batch.group_size, *batch.x[0].shape[1:])
        draws = [
            torch.randn(shape, generator=keyed_generator(self.recipe.seed, group, boundary))
            for group in batch.group_ids
        ]
        return torch.cat(draws).to(batch.x[0].device)


@dataclass(frozen=True)
class Variant:
    """What a run is called, its method, and the recipe's keys that differ.

    pretrained: a run of `PreferenceAlone` comes first, with the same seed, prompts, noise and as
    many iterations, and hands its surrogate on.
    """

    label: str
    method: type[Tdm] = Tdm
    overrides: tuple[str, ...] = ()
    pretrained: bool = False


VARIANTS = {
    "tdm-r1": Variant("TDM-R1"),
    "no-reward": Variant("no reward", FrozenSurrogate),  # a surrogate that is still the base
    "no-transfer": Variant("no transfer of weights", overrides=(NO_TRANSFER,)),
    "direct-dgpo": Variant("DGPO straight on the generator", DirectDgpo, (NO_TRANSFER,)),
    "stochastic": Variant("stochastic rollouts", StochasticRollout),
    "ema-reference": Variant("EMA reference", overrides=("reinforcement.reference=ema",)),
    "frozen-surrogate": Variant("frozen pre-trained surrogate", FrozenSurrogate, pretrained=True),
    "no-kl": Variant("no KL", WithoutKl),
    "all-states": Variant("every state judged", overrides=("reinforcement.judged=trajectory",)),
}


def evaluate(overrides: Sequence[str], work: Path) -> dict[str, Any]:
    """`Evaluator.run` on the weights that every variant starts from."""
    from tdm_r1.training.trainer import Trainer

    trainer = Trainer(load_recipe(RECIPE, [*overrides, f"output={work}"]))
    return trainer.evaluator.run(trainer.roles["ema"])[0]


def train(
    variant: Variant, seed: int, overrides: Sequence[str], work: Path, before: dict[str, Any]
) -> dict[str, Any]:
    """{"after", "rewards", "skipped"}: the last evaluation, the training reward of every step that
    was taken, the number of steps that were not finite. `before` stands for the first evaluation.
    """
    from tdm_r1.training.curves import read_metrics
    from tdm_r1.training.trainer import Trainer

    def make(name: str, method: type[Tdm], *more: str) -> Trainer:
        own = (f"seed={seed}", f"output={work / name}", "checkpoint_every=0", *more)
        return Trainer(load_recipe(RECIPE, [*overrides, *variant.overrides, *own]), method=method)

    trainer = make("run", variant.method)
    trainer.history.add(0, before)
    if variant.pretrained:
        few = (NO_TRANSFER, "evaluation.num_prompts=1", "evaluation.held_out_families=[]")
        teacher = make("surrogate", PreferenceAlone, *few)
        teacher.run()
        follow(trainer.roles["surrogate"], teacher.roles["surrogate"], 1.0)
        del teacher
    after = trainer.run()["after"]
    steps = read_metrics(work / "run")[0]
    rewards = [round(step["reward"], 5) for step in steps if "reward" in step]
    return {"after": after, "rewards": rewards, "skipped": len(steps) - len(rewards)}


def main(argv: list[str] | None = None) -> int:
    """One run; its JSON appears whole or not at all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("variant", choices=("before", *VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--before", type=Path, help="the JSON of VARIANT before")
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run's own files")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    if args.variant != "before" and args.before is None:
        parser.error("--before is needed to train")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    clock = time.perf_counter()
    try:
        result: dict[str, Any] = {"variant": args.variant, "settings": args.overrides}
        if args.variant == "before":
            result["before"] = evaluate(args.overrides, args.work)
        else:
            before = json.loads(args.before.read_text())["before"]
            variant = VARIANTS[args.variant]
            result |= {"seed": args.seed}
            result |= train(variant, args.seed, args.overrides, args.work, before)
    except Exception as error:  # the boundary of the program
        return report(error, "error", details=True)
    spent = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time()}
    result |= {name: round(value, 1) for name, value in spent.items()}
    result["environment"] = environment()
    unfinished = args.output.with_suffix(".part")
    unfinished.write_text(json.dumps(result) + "\n")
    os.replace(unfinished, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
