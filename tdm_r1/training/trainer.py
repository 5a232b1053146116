"""One trainer for every method: roles, engines, loop, EMA, evaluation, checkpoints, logs.

A method (`sft.py`, `tdm.py`) supplies `accumulation`, which roles it trains and how many backward
passes each makes per iteration, and `step(iteration)`, which makes them. Everything else is here.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tdm_r1 import rewards
from tdm_r1.config import Optimizer, Recipe, save_recipe
from tdm_r1.engine import Engine
from tdm_r1.errors import ConfigError, LoadError, NotFinite, RewardError, TdmError
from tdm_r1.models.loading import save_transformer
from tdm_r1.models.lora_files import save_lora
from tdm_r1.models.lora_list import load_lora
from tdm_r1.pipeline import load_pipeline
from tdm_r1.training import checkpoint, distributed, embeddings, identity, report, snapshot
from tdm_r1.training.descent import Descent
from tdm_r1.training.evaluate import Evaluator
from tdm_r1.training.history import History
from tdm_r1.training.offload import Offload
from tdm_r1.training.progress import Progress
from tdm_r1.training.roles import Role, build_roles, follow
from tdm_r1.training.rollout import describe
from tdm_r1.training.sft import Sft
from tdm_r1.training.tdm import Tdm

log = logging.getLogger(__name__)
METHODS: dict[str, Callable[[Any], Any]] = {"sft": Sft, "tdm": Tdm, "tdm_r1": Tdm}


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the iteration under way was finished and a checkpoint written."""


class Trainer:
    """Builds a recipe's run; `run()` trains it. Rank 0 alone logs, evaluates and writes."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        resume: bool = False,
        method: Callable[[Trainer], Any] | None = None,
    ) -> None:
        """`method` makes the method, in an experiment with another than `recipe.method` has.

        Raises ConfigError or LoadError before anything is trained.
        """
        distributed.init()
        identity.check_ranks(recipe)
        report.check(recipe.report_to)
        torch.manual_seed(recipe.seed)
        self.recipe, self.resumed = recipe, resume
        self.output = Path(recipe.output)
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"output is {recipe.output!r}, a file; allowed: a folder, old or new")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if recipe.memory.base == "bf16" else torch.float32
        self.pipeline = load_pipeline(
            recipe.model,
            lora=recipe.lora or None,
            device=device,
            dtype=dtype,
            t5_length=recipe.t5_length or None,
            merge=False,
        )
        if recipe.resolution % self.pipeline.size_unit:
            unit = self.pipeline.size_unit
            raise ConfigError(f"resolution is {recipe.resolution}; allowed: a multiple of {unit}")
        self.pipeline.default_size = recipe.resolution or self.pipeline.default_size
        base = self.pipeline.transformer
        few_step = load_lora(self.pipeline.lora, base) if self.pipeline.lora else None
        bf16 = recipe.precision == "bf16"
        self.roles = build_roles(
            base,
            recipe.method,
            recipe.roles,
            few_step=few_step,
            bf16=bf16,
            ema_reference=recipe.reinforcement.reference == "ema",
            checkpoint_blocks=recipe.memory.checkpoint_blocks,
            cut=recipe.zero_stage == 3,
        )
        self.engine = Engine(
            self.pipeline, steps=recipe.rollout.steps, solver=recipe.rollout.solver
        )
        self.iteration = 0
        self.skipped = 0  # steps in a row that were not finite
        self.stopped: str | None = None  # why the guard ended the run
        self.history = History()
        self.stop_signal: int | None = None
        self.load_reward = cache(rewards.load_reward)  # one model for training and evaluation
        self.evaluator = Evaluator(recipe, self.pipeline, self.load_reward)
        if recipe.memory.decode_batch:
            pixels = recipe.memory.decode_batch * self.pipeline.default_size**2
            self.engine.decode_limit = self.evaluator.engine.decode_limit = pixels
        self.method: Any = (method or METHODS[recipe.method])(self)
        if recipe.memory.precompute_text:
            sampler = getattr(self.method, "sampler", None)
            prompts = embeddings.needed_prompts(recipe, sampler, self.evaluator.all_prompts)
            embeddings.precompute(self.pipeline, prompts, self.output)
        judges = [self.evaluator.reward, self.evaluator.held_out_reward]
        parts = [self.pipeline.vae, *judges, getattr(self.method, "reward", None)]
        self.scoring = Offload(parts, self.pipeline.device, enabled=recipe.memory.offload)
        self.engines = {name: self._wrap(name) for name in self.method.accumulation}
        self.descent = Descent(self.engines)
        found = checkpoint.latest_checkpoint(self.output)
        if resume:
            if found is None:
                raise LoadError(f"nothing to resume: no checkpoint in {self.output}")
            snapshot.restore(self, found)
        elif found is not None and found != checkpoint.checkpoint_path(self.output, 0):
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
        """Train to the last iteration, or until the guard ends the run.

        Returns {"before", "after", "stopped"}: two evaluations, and why the guard ended it, or
        None. A few-step model is evaluated before its first iteration too: it is what training must
        beat. With `checkpoint_every` the last iteration leaves a checkpoint too.

        SIGINT and SIGTERM drop the step, at its next micro-batch, if no role has changed yet, else
        finish it; then a checkpoint is written and Interrupted raised. A failing reward or
        evaluation, or `skip_limit` steps in a row that are not finite, leave a checkpoint of the
        last whole iteration; any other error may have struck halfway and writes none.
        """
        recipe, main = self.recipe, distributed.rank() == 0
        if main:
            self.output.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, self.output / "recipe.yaml")
        progress = Progress(recipe, self.iteration, resumed=self.resumed, enabled=main)
        caught = (signal.SIGTERM, signal.SIGINT)
        handlers = [signal.signal(number, self._on_signal) for number in caught]
        try:
            if self._evaluation_due():
                self._evaluate(progress)
            self.stop_if_asked()
            if self.iteration >= recipe.iterations:
                log.info("%d of %d iterations are done", self.iteration, recipe.iterations)
            while self.iteration < recipe.iterations and self.stopped is None:
                self._iterate(progress)
            if self.stopped is not None:
                self._return_to_best()
            self.export()
        except (RewardError, NotFinite):  # raised on every rank, between two iterations
            self.save_checkpoint()
            raise
        finally:
            for number, handler in zip(caught, handlers, strict=True):
                signal.signal(number, handler)
            progress.close()
        for name in self.engines:
            log.info("role hash %s %s", name, self.roles[name].sha256())
        distributed.barrier()
        before, after = self.history.result(0), self.history.result()
        return {"before": before, "after": after, "stopped": self.stopped}

    def _iterate(self, progress: Progress) -> None:
        recipe, start = self.recipe, time.perf_counter()
        for name, engine in self.engines.items():
            wait = recipe.distillation.critic_warmup if name == "generator" else 0
            rate = learning_rate(
                getattr(recipe.optimizers, name),
                max(0, self.iteration - wait),
                recipe.iterations - wait,
            )
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
        metrics: dict[str, Any]
        try:
            metrics = self.method.step(self.iteration)
        except NotFinite as error:
            self.skipped, metrics = self.skipped + 1, {"skipped": str(error)}
        else:
            self.skipped = 0
            for name in self.descent.stepped:
                metrics[f"grad_norm_{name}"] = distributed.grad_norm(self.engines[name])
            follow(self.roles["ema"], self.roles["generator"], 1 - self._ema_decay())
        self.iteration += 1
        metrics["seconds"] = time.perf_counter() - start
        if "reward" in metrics:
            self.history.reward(metrics["reward"])
        progress.update(self.iteration, metrics)
        if self.skipped >= recipe.skip_limit:
            raise NotFinite(
                f"{self.skipped} steps in a row were skipped (skip_limit), the last one because "
                f"these were {metrics['skipped']}"
            )
        self.stop_if_asked()
        every, last = recipe.checkpoint_every, self.iteration == recipe.iterations
        saved = bool(every) and (last or self.iteration % every == 0)
        if saved:  # without the evaluation that may follow: a resumed run makes it again
            self.save_checkpoint()
        if self._evaluation_due():
            self._evaluate(progress)
            best = recipe.evaluation.every and self.history.best == self.iteration
            if self.stopped is not None or (every and best and not saved):
                self.save_checkpoint()

    def _evaluation_due(self) -> bool:
        """Whether the recipe wants an evaluation now that is not there yet."""
        now, every = self.iteration, self.recipe.evaluation.every
        if now == 0:
            wanted = self.recipe.method != "sft"
        else:
            wanted = now == self.recipe.iterations or bool(every and now % every == 0)
        return wanted and not self.history.seen(now)

    def asked_to_stop(self) -> bool:
        """Whether any rank got a signal; all of them have to ask."""
        self.stop_signal = max(distributed.gather(self.stop_signal or 0)) or None
        return self.stop_signal is not None

    def stop_if_asked(self) -> None:
        """Where every rank may stop: if any got a signal, save and raise Interrupted on all."""
        if self.asked_to_stop():
            self.save_checkpoint()
            name = signal.Signals(self.stop_signal or 0).name
            raise Interrupted(f"{name} after iteration {self.iteration}")

    def _ema_decay(self) -> float:
        # A long average must not remember the start: (1 + n) / (10 + n) as in the usual warm-up.
        return min(self.recipe.ema_decay, (1 + self.iteration) / (10 + self.iteration))

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop_signal = number
        log.warning("%s: stopping at the next safe point, then saving", signal.Signals(number).name)

    def _evaluate(self, progress: Progress) -> None:
        """Rank 0 evaluates; every rank learns the result, or what went wrong."""
        result: dict[str, Any] = {}
        failure: Exception | None = None
        ema = self.roles["ema"]
        with ema.gathered():
            if distributed.rank() == 0:
                try:
                    with self.scoring():
                        result, sample = self.evaluator.run(ema)
                    progress.evaluation(self.iteration, result, sample)
                except Exception as error:  # the other ranks wait below
                    failure = error
        try:
            self._fail_together(failure, "evaluation")
        except RewardError:
            raise  # `run` saves
        except Exception:  # no role is in the middle of a step
            self.save_checkpoint()
            raise
        self.history.add(self.iteration, distributed.gather(result)[0])
        self.stopped = self.history.alarm(self.recipe.evaluation.guard)

    def _fail_together(self, failure: Exception | None, what: str) -> None:
        """Raise the failure of rank 0 there, and one of the same kind on every other rank."""
        kind = RewardError if isinstance(failure, RewardError) else TdmError
        message = None if failure is None else describe(failure)
        found = distributed.gather((kind, message))[0]
        if failure is not None:
            raise failure
        if found[1] is not None:
            raise found[0](f"{what} failed on rank 0: {found[1]}")

    def save_checkpoint(self) -> None:
        """Write roles, copies, optimizers and position of the last whole iteration.

        Raises SaveError on rank 0, TdmError on the others, if the disk does not take it.
        """
        tensors, state = snapshot.take(self)
        failure: Exception | None = None
        if distributed.rank() == 0:
            try:
                path = checkpoint.checkpoint_path(self.output, self.iteration)
                keep, best = self.recipe.keep_checkpoints, self._best_checkpoint()
                checkpoint.save_checkpoint(path, tensors, state, keep_last=keep, keep=best)
            except OSError as error:
                failure = error
        self._fail_together(failure, "saving")

    def _best_checkpoint(self) -> Path | None:
        """Where the checkpoint of the best evaluation is, if evaluations are compared at all."""
        best = self.history.best
        if best is None or not self.recipe.evaluation.every:
            return None
        return checkpoint.checkpoint_path(self.output, best)

    def _return_to_best(self) -> None:
        """Make the EMA weights those of the best checkpoint, where checkpoints are written."""
        path = self._best_checkpoint()
        if path is not None and path.is_dir():
            tensors, _ = checkpoint.load_checkpoint(path)
            snapshot.load_role(self.roles["ema"], tensors["ema"], path)
            self.stopped = f"{self.stopped}; best: {path}, whose EMA weights are exported"
        if distributed.rank() == 0:
            log.warning("stopped after iteration %d: %s", self.iteration, self.stopped)

    def export(self) -> None:
        """Write the EMA generator in fp16: a LoRA file, or a whole model directory."""
        ema = self.roles["ema"]
        with ema.gathered():
            if distributed.rank() == 0:
                self._write_model(ema)
        distributed.barrier()

    def _write_model(self, ema: Role) -> None:
        if ema.adapter is not None:
            save_lora(self.output, ema.transformer, ema.adapter, dtype=torch.float16)
            return
        target = self.output / "model"
        ignore = shutil.ignore_patterns(
            "transformer", "*.md", "card.json", "pytorch_lora_weights.safetensors"
        )
        shutil.copytree(self.pipeline.path, target, dirs_exist_ok=True, ignore=ignore)
        save_transformer(ema.transformer, target / "transformer", dtype=torch.float16)


def learning_rate(config: Optimizer, iteration: int, total: int) -> float:
    """lr * min(1, (n + 1) / warmup), then a half cosine to 0 at `total` if `decay` asks for it."""
    rate = config.lr * min(1.0, (iteration + 1) / config.warmup) if config.warmup else config.lr
    if config.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * iteration / total))
    return rate
