"""One trainer for every method: roles, engines, loop, EMA, evaluation, checkpoints, logs.

A method (`sft.py`, `tdm.py`) supplies `accumulation`, how many backward passes each role makes per
iteration, and `step(iteration)`, which makes them. Everything else is here.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tdm_r1.config import Optimizer, Recipe, save_recipe
from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, LoadError, RewardError, TdmError
from tdm_r1.models.loading import load_transformer, save_transformer
from tdm_r1.models.lora_files import save_lora
from tdm_r1.models.lora_list import load_lora
from tdm_r1.pipeline import load_pipeline
from tdm_r1.training import checkpoint, distributed
from tdm_r1.training.descent import Descent
from tdm_r1.training.evaluate import Evaluator
from tdm_r1.training.progress import Progress
from tdm_r1.training.roles import TRAINED, Role, build_roles, follow
from tdm_r1.training.rollout import describe
from tdm_r1.training.sft import Sft
from tdm_r1.training.tdm import Tdm

log = logging.getLogger(__name__)
METHODS = {"sft": Sft, "tdm": Tdm, "tdm_r1": Tdm}


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the iteration under way was finished and a checkpoint written."""


class Trainer:
    """Builds a recipe's run; `run()` trains it. Rank 0 alone logs, evaluates and writes."""

    def __init__(self, recipe: Recipe, *, resume: bool = False) -> None:
        """Raises ConfigError or LoadError before anything is trained."""
        distributed.init()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.output = Path(recipe.output)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline = load_pipeline(
            recipe.model,
            lora=recipe.lora or None,
            device=device,
            dtype="float32",
            t5_length=recipe.t5_length or None,
        )
        if recipe.resolution % self.pipeline.size_unit:
            unit = self.pipeline.size_unit
            raise ConfigError(f"resolution is {recipe.resolution}; allowed: a multiple of {unit}")
        self.pipeline.default_size = recipe.resolution or self.pipeline.default_size
        base = load_transformer(self.pipeline.path, device=device, dtype=torch.float32)
        self.pipeline.transformer = base  # the packed one has served; engines run the roles'
        few_step = load_lora(self.pipeline.lora, base) if self.pipeline.lora else None
        bf16 = recipe.precision == "bf16"
        self.roles = build_roles(
            base,
            recipe.method,
            recipe.roles,
            few_step=few_step,
            bf16=bf16,
            ema_reference=recipe.reinforcement.reference == "ema",
        )
        self.engine = Engine(
            self.pipeline, steps=recipe.rollout.steps, solver=recipe.rollout.solver
        )
        self.iteration = 0
        self.stop_signal: int | None = None
        self.evaluator = Evaluator(recipe, self.pipeline)
        self.method: Any = METHODS[recipe.method](self)
        self.engines = {name: self._wrap(name) for name in TRAINED[recipe.method]}
        self.descent = Descent(self.engines)
        found = checkpoint.latest_checkpoint(self.output)
        if resume:
            self._resume(found)
        elif found is not None:
            raise ConfigError(
                f"output {self.output} holds {found.name} of an earlier run: "
                "pass --resume to go on from it, or choose another output"
            )

    def _wrap(self, name: str):
        return distributed.wrap(
            self.roles[name],
            self.roles[name].tensors(),
            getattr(self.recipe.optimizers, name),
            accumulation=self.method.accumulation[name],
            zero_stage=self.recipe.zero_stage,
        )

    def run(self) -> dict[str, Any]:
        """Train to the last iteration; returns the evaluations {"before", "after"} (rank 0's).

        A few-step model is evaluated before its first iteration too: it is what training must beat.

        SIGINT and SIGTERM drop the step if no role has changed yet, else finish it; then a
        checkpoint is written and Interrupted raised. A failing reward leaves a checkpoint of the
        last whole iteration; any other error may have struck halfway and writes none.
        """
        recipe, main = self.recipe, distributed.rank() == 0
        if main:
            self.output.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, self.output / "recipe.yaml")
        progress = Progress(self.output, recipe.iterations, self.iteration, enabled=main)
        caught = (signal.SIGTERM, signal.SIGINT)
        handlers = [signal.signal(number, self._on_signal) for number in caught]
        try:
            before = {} if recipe.method == "sft" or self.iteration else self._evaluate(progress)
            self.stop_if_asked()
            while self.iteration < recipe.iterations:
                self._iterate(progress)
            after = self._evaluate(progress)
        except RewardError:  # raised on every rank, before any role changed
            self.save_checkpoint()
            raise
        finally:
            for number, handler in zip(caught, handlers, strict=True):
                signal.signal(number, handler)
            progress.close()
        self.export()
        for name in TRAINED[recipe.method]:
            log.info("role hash %s %s", name, self.roles[name].sha256())
        distributed.barrier()
        return {"before": before, "after": after}

    def _iterate(self, progress: Progress) -> None:
        recipe, start = self.recipe, time.perf_counter()
        for name, engine in self.engines.items():
            rate = learning_rate(
                getattr(recipe.optimizers, name), self.iteration, recipe.iterations
            )
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
        metrics = self.method.step(self.iteration)
        for name, engine in self.engines.items():
            metrics[f"grad_norm_{name}"] = distributed.grad_norm(engine)
        follow(self.roles["ema"], self.roles["generator"], 1 - self._ema_decay())
        self.iteration += 1
        metrics["seconds"] = time.perf_counter() - start
        progress.update(self.iteration, metrics)
        self.stop_if_asked()
        if recipe.checkpoint_every and self.iteration % recipe.checkpoint_every == 0:
            self.save_checkpoint()
        every = recipe.evaluation.every
        if every and self.iteration % every == 0 and self.iteration < recipe.iterations:
            self._evaluate(progress)

    def stop_if_asked(self) -> None:
        """Where every rank may stop: if any got a signal, save and raise Interrupted on all."""
        stopped = max(distributed.gather(self.stop_signal or 0))
        if stopped:
            self.stop_signal = stopped
            self.save_checkpoint()
            raise Interrupted(f"{signal.Signals(stopped).name} after iteration {self.iteration}")

    def _ema_decay(self) -> float:
        # A long average must not remember the start: (1 + n) / (10 + n) as in the usual warm-up.
        return min(self.recipe.ema_decay, (1 + self.iteration) / (10 + self.iteration))

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop_signal = number
        log.warning("%s: stopping at the next safe point, then saving", signal.Signals(number).name)

    def _evaluate(self, progress: Progress) -> dict[str, Any]:
        result: dict[str, Any] = {}
        failure: Exception | None = None
        if distributed.rank() == 0:
            try:
                result = self.evaluator.run(self.roles["ema"])
                progress.evaluation(self.iteration, result)
            except Exception as error:  # the other ranks wait below
                failure = error
        message = distributed.gather(None if failure is None else describe(failure))[0]
        if failure is not None:
            raise failure
        if message is not None:
            raise TdmError(f"evaluation failed on rank 0: {message}")
        return result

    def save_checkpoint(self) -> None:
        """Write roles, copies, optimizers and position of the last whole iteration."""
        optimizers = {
            name: distributed.optimizer_state(engine) for name, engine in self.engines.items()
        }
        if distributed.rank() == 0:
            tensors: dict[str, Mapping[str, torch.Tensor]] = {
                name: role.tensors() for name, role in self.roles.items() if name != "base"
            }
            state: dict[str, Any] = {"iteration": self.iteration, **self._identity()}
            state["method"] = self.method.state() if hasattr(self.method, "state") else {}
            for name, (moments, steps) in optimizers.items():
                tensors[f"optimizer-{name}"] = moments
                state[f"optimizer-{name}"] = steps
            path = checkpoint.checkpoint_path(self.output, self.iteration)
            checkpoint.save_checkpoint(path, tensors, state, keep_last=self.recipe.keep_checkpoints)
        distributed.barrier()

    def _identity(self) -> dict[str, Any]:
        recipe = self.recipe
        return {"model": recipe.model, "training": recipe.method, "seed": recipe.seed}

    def _resume(self, path: Path | None) -> None:
        if path is None:
            raise LoadError(f"nothing to resume: no checkpoint in {self.output}")
        tensors, state = checkpoint.load_checkpoint(path)
        for key, value in self._identity().items():
            if state[key] != value:
                raise LoadError(f"{path} was written with {key} {state[key]!r}, this is {value!r}")
        for name, role in self.roles.items():
            _load_tensors(role, tensors.get(name, {}), path) if name != "base" else None
        for name, engine in self.engines.items():
            key = f"optimizer-{name}"
            if key not in tensors:
                raise LoadError(f"{path} holds no optimizer of {name}")
            try:
                distributed.load_optimizer_state(engine, tensors[key], state[key])
            except ValueError as error:
                raise LoadError(f"{path}: {name}: {error}") from error
        self.iteration = state["iteration"]
        if state["method"]:
            self.method.load_state(state["method"])
        log.info("resumed %s at iteration %d", path, self.iteration)

    def export(self) -> None:
        """Write the EMA generator in fp16: a LoRA file, or a whole model directory."""
        if distributed.rank() == 0:
            ema = self.roles["ema"]
            if ema.adapter is not None:
                save_lora(self.output, ema.transformer, ema.adapter, dtype=torch.float16)
            else:
                target = self.output / "model"
                ignore = shutil.ignore_patterns(
                    "transformer", "*.md", "card.json", "pytorch_lora_weights.safetensors"
                )
                shutil.copytree(self.pipeline.path, target, dirs_exist_ok=True, ignore=ignore)
                save_transformer(ema.transformer, target / "transformer", dtype=torch.float16)
        distributed.barrier()


def learning_rate(config: Optimizer, iteration: int, total: int) -> float:
    """lr * min(1, (n + 1) / warmup), then a half cosine to 0 at `total` if `decay` asks for it."""
    rate = config.lr * min(1.0, (iteration + 1) / config.warmup) if config.warmup else config.lr
    if config.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * iteration / total))
    return rate


@torch.no_grad()
def _load_tensors(role: Role, tensors: dict[str, torch.Tensor], path: Path) -> None:
    own = role.tensors()
    if set(own) != set(tensors):
        raise LoadError(f"{path}: role {role.name} does not match this recipe's roles")
    for name, tensor in own.items():
        shape, wanted = list(tensors[name].shape), list(tensor.shape)
        if shape != wanted:
            raise LoadError(f"{path}: {role.name}.{name} is {shape}, not {wanted}")
        tensor.copy_(tensors[name])
