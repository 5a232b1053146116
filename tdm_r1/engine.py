"""Few-step generation: `generate` for users, `rollout` and `score` for a trainer, one trajectory.

Shapes: B images, K steps, C h w latents, H W pixels, E text width. Latents are fp32 throughout and
normalised (what the diffusion model sees); a velocity is eps - x0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tdm_kernels.quantized import version_of
from torch import Tensor

from tdm_r1 import arguments, flow
from tdm_r1.calibrate import apply_precision, dtype_beside
from tdm_r1.errors import ConfigError
from tdm_r1.exported.loading import BACKENDS, is_export, load_exported
from tdm_r1.exported.refit import refit
from tdm_r1.graphs import Backend, device_errors, graph_pool
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.layers import Transformer
from tdm_r1.models.live import LiveWeights, Update
from tdm_r1.pipeline import SHIPPED, Pipeline, load_pipeline
from tdm_r1.trajectory import (
    DECODE_LIMIT,
    Plan,
    Sampler,
    Trajectory,
    check_finite,
    consistent_states,
    decode,
    draw_noise,
    example_conditions,
    finish,
    hand_over,
)

_REMEMBERED_PLANS = 8  # SD3.5: 13 MB each


class Engine:
    """A pipeline bound to a number of steps and a solver."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        steps: int = 4,
        solver: str = "auto",
        graphs: str | Backend = "auto",
        strict_graphs: bool = False,
        decode_limit: int = DECODE_LIMIT,
    ) -> None:
        """`solver="auto"` follows the model's stored scheduler.

        `graphs="auto"` records trajectories, decoding included, as CUDA graphs on a CUDA device;
        "off" records none; a backend of graphs.py records with that. `strict_graphs` refuses every
        shape that `warmup` has not seen. `decode_limit` bounds the memory of decoding, in pixels
        that the VAE makes at a time: batches are split, and a picture above it is decoded in tiles.
        Raises ConfigError for an unknown solver or `graphs`, `steps` that `flow.schedule` refuses,
        a schedule other than the one that a pipeline is tied to, strictness without graphs, or a
        limit below the smallest tile.
        """
        arguments.check_solver(solver)
        self.pipeline = pipeline
        name = pipeline.default_solver if solver == "auto" else solver
        self.schedule = flow.schedule(name, steps, pipeline.shift)
        only = pipeline.schedule
        if only is not None and only != self.schedule:
            raise ConfigError(
                f"steps is {steps} and solver is {name!r}; this export was made for"
                f" {only.num_steps} steps of {only.solver!r}"
            )
        arguments.check_decode_limit(pipeline, decode_limit)
        self.decode_limit = decode_limit  # a graph keeps what it was recorded with
        self.last_seed: int | None = None
        self.graphs = graph_pool(pipeline.device, graphs, strict_graphs)
        self.weights_version = 0
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()
        self._seen: tuple[int, int] = (0, 0)
        self._live: LiveWeights | None = None
        self._t_K1 = torch.tensor(self.schedule.timesteps, device=pipeline.device)[:, None]

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        lora: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        steps: int = 4,
        solver: str = "auto",
        backend: str = "auto",
        graphs: str | Backend = "auto",
        strict_graphs: bool = False,
        decode_limit: int = DECODE_LIMIT,
        precision: str = "auto",
        calibration: str | Path | None = None,
    ) -> Engine:
        """Load a shipped model, a diffusers-format directory or a Hub id; see `load_pipeline`.

        `backend="onnx"` opens a directory made by `tdm-r1-export`, and so does "auto" for one;
        "tensorrt-rtx" and "tensorrt" run the engines in it, on a GPU.
        `graphs`, `strict_graphs` and `decode_limit` are the constructor's. `precision="fp8"`, and
        "int8" where there is no fp8, multiply 8-bit rows in layers that the report `calibration`
        allows, or that are measured now, and give back the weights that those stand for.
        """
        if backend == "auto" and str(name_or_dir) not in SHIPPED and is_export(name_or_dir):
            backend = "onnx"
        dtype = dtype_beside(precision, dtype, calibration, exported=backend in BACKENDS)
        load: Any = load_exported if backend in BACKENDS else load_pipeline
        pipeline = load(name_or_dir, lora=lora, device=device, dtype=dtype, backend=backend)
        recording: dict[str, Any] = {"graphs": graphs, "strict_graphs": strict_graphs}
        made = cls(pipeline, steps=steps, solver=solver, decode_limit=decode_limit, **recording)
        if precision != "auto":
            apply_precision(pipeline, made.schedule, precision, calibration)
        return made

    @property
    def device(self) -> torch.device:
        """Where latents and images are made."""
        return self.pipeline.device

    def generate(
        self,
        prompts: str | list[str],
        *,
        seed: int | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        callback: Callable[[int, float, Tensor], None] | None = None,
        guidance_scale: float | None = None,
    ):
        """Draw images; B = len(prompts) * num_images_per_prompt, a prompt's images side by side.

        Image j of prompt i starts from the noise of seed + i * num_images_per_prompt + j, or from
        `latents` [B, C, height/8, width/8] (floating point). `seed=None` draws one and keeps it in
        `last_seed`. `callback(k, t, x_BChw)` sees the latents after every step, to read only.
        `guidance_scale` has the family's meaning in diffusers, against the empty prompt: SD3
        u + g (c - u), on above 1; Z-Image c + g (c - u), on above 0; None is off.

        Returns by `output_type`: "pil" a list of images, "np" fp32 [B,H,W,3] in [0,1], "pt" fp32
        [B,3,H,W] in [0,1], "latent" fp32 [B,C,h,w]. Raises ConfigError for a bad argument,
        NumericsError, naming prompt and seed, for pictures with NaN or infinities, DeviceError for
        a device that is out of memory or lost.
        """
        prompts = arguments.check_choices(prompts, output_type, num_images_per_prompt, callback)
        num_images_per_prompt = int(num_images_per_prompt)
        height, width = arguments.picture_size(self.pipeline, height, width, latents)
        count = len(prompts) * num_images_per_prompt
        weight = arguments.guidance_weight(self.pipeline.family, guidance_scale)
        seeds = None
        if latents is None:
            seeds = arguments.picture_seeds(seed, count)
            self.last_seed = seeds[0]
        with device_errors(f"{count} images of {height} x {width}"):
            if latents is None:
                x_BChw = self.noise(seeds or [], height, width)
            else:
                x_BChw = arguments.given_latents(self.pipeline, latents, count, height, width)
            cond = self.pipeline.text.encode(prompts)
            uncond = None if weight == 1.0 else self.pipeline.text.encode([""])
            if len(prompts) > 1:  # one prompt's single row serves all its images as it is
                cond = cond.repeat(num_images_per_prompt)
            with torch.inference_mode():
                version = self._settle()
                if len(prompts) == 1 and uncond is None:
                    plan = self._remembered_plan(prompts[0], cond, x_BChw, version)
                else:
                    plan = self._plan(self.pipeline.transformer, cond, uncond, x_BChw)
                out, finite_2B = self._draw(plan, x_BChw, weight, output_type, callback)
            names = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
            check_finite(finite_2B, self.pipeline, names, seeds)
        return hand_over(out, output_type)

    @torch.no_grad()
    def rollout(
        self,
        cond: Condition,
        noise_BChw: Tensor,
        *,
        transformer: Transformer | None = None,
        guidance: float = 1.0,
        uncond: Condition | None = None,
        consistent: bool = False,
    ) -> Trajectory:
        """Run the whole schedule from noise_BChw (fp32) and keep every latent.

        `cond` has B rows, or one row that serves the whole batch (a group of one prompt).
        `transformer` replaces the pipeline's own: a trainer rolls out its live module.
        `guidance` is w of v = u + w (c - u), for both families; 1 is off, anything else needs
        `uncond`. `consistent` runs the forward that a loss will differentiate, one velocity a step,
        so that replaying x_k through `velocity` gives x_{k+1} bit for bit; without it the faster
        forward differs by rounding. The results are ordinary tensors without a graph, fit for a
        later autograd pass. Raises ConfigError for guidance without `uncond` or with `consistent`,
        NumericsError for rows with NaN or infinities.
        """
        if guidance != 1.0 and uncond is None:
            raise ConfigError(
                f"guidance is {guidance}, which needs `uncond`; allowed without it: 1"
            )
        if guidance != 1.0 and consistent:
            raise ConfigError(f"guidance is {guidance}; allowed with consistent=True: 1")
        transformer = self.pipeline.transformer if transformer is None else transformer
        own = transformer is self.pipeline.transformer
        with device_errors(f"a rollout of {list(noise_BChw.shape)}"):
            if consistent:
                states = tuple(consistent_states(transformer, self.schedule, noise_BChw, cond))
            else:
                self._settle()
                other = None if guidance == 1.0 else uncond
                plan = self._plan(transformer, cond, other, noise_BChw)
                states = self._roll_out(plan, noise_BChw, guidance)
            check_finite(torch.isfinite(states[-1]).flatten(1).all(1)[None], self.pipeline)
        version = self.weights_version if own else None
        return Trajectory((noise_BChw, *states), self.schedule, version)

    @torch.no_grad()
    def score(
        self, x_BChw: Tensor, t_B: Tensor, cond: Condition, transformer: Transformer | None = None
    ) -> Tensor:
        """Return v_BChw (fp32, eps - x0) at times t_B in 0..1000, without a graph."""
        if transformer is None:
            transformer = self.pipeline.transformer
        with device_errors(f"a velocity of {list(x_BChw.shape)}"):
            return transformer.velocity(x_BChw, t_B, cond)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Return images_B3HW, fp32 in [0, 1], for normalised latents."""
        with device_errors(f"decoding {list(latents_BChw.shape)}"):
            return decode(self.pipeline.vae, latents_BChw, self.decode_limit)

    def warmup(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        num_prompts: int = 1,
        num_images_per_prompt: int = 1,
        text_lengths: Sequence[int] | None = None,
        output_type: str = "pil",
        guidance_scale: float | None = None,
        rollout: bool = False,
        callback: bool = False,
    ) -> int:
        """Record the graphs of `generate`, or of `rollout`, for these shapes; returns how many are.

        `text_lengths` counts tokens; by default every length that makes a graph of its own: that of
        SD3, the multiples of 32 of Z-Image. `callback`: of calls with one. Of a rollout,
        `guidance_scale` is its `guidance`. Raises ConfigError without graphs.
        """
        if self.graphs is None:
            raise ConfigError(f"warmup records graphs, and this engine on {self.device} has none")
        arguments.check_choices([""] * num_prompts, output_type, num_images_per_prompt)
        height, width = arguments.picture_size(self.pipeline, height, width)
        weight = arguments.guidance_weight(self.pipeline.family, guidance_scale)
        weight = (guidance_scale or 1.0) if rollout else weight
        look_on = (lambda k, t, x_BChw: None) if callback else None
        x_BChw = self.noise([0] * (num_prompts * num_images_per_prompt), height, width)
        uncond = None if weight == 1.0 else self.pipeline.text.encode([""])
        task = f"a warm-up of {list(x_BChw.shape)}"
        with device_errors(task), self.graphs.warming(), torch.inference_mode():
            self._settle()
            for cond in example_conditions(self.pipeline, num_prompts, text_lengths):
                cond = cond.repeat(num_images_per_prompt) if num_prompts > 1 else cond
                plan = self._plan(self.pipeline.transformer, cond, uncond, x_BChw)
                if rollout:
                    self._roll_out(plan, x_BChw, weight)
                else:
                    self._draw(plan, x_BChw, weight, output_type, look_on)
        return self.graphs.num_graphs

    def update_weights(self, source: Any) -> Update:
        """Replace the transformer's weights in place, and say what was replaced.

        `source` is a training role (its adapter is folded in, in fp32), a transformer, or a mapping
        of all weights by name; errors are those of `LiveWeights.update`. Every graph stays valid,
        modulation tables are computed anew, and `weights_version` grows by one.
        """
        transformer = self.pipeline.transformer
        live = self._live
        if live is None or not live.is_of(transformer):
            live = self._live = LiveWeights(transformer)
        with device_errors("an update of the weights"):
            update = live.update(source)
        self._plans.clear()
        self.weights_version += 1
        return update

    def refit(self, lora: str | Path | None) -> None:
        """Give an export made by `--refit` another LoRA, None its own; raises as `refit` there."""
        self._plans.clear()
        if self.graphs is not None:
            self.graphs.clear()  # what recorded an engine may have kept of its weights is unknown
        self.weights_version += 1
        with device_errors("a refit"):
            refit(self.pipeline, lora)

    def noise(self, seeds: list[int], height: int, width: int) -> Tensor:
        """Return fp32 [B, C, height/8, width/8] standard normal noise: see `draw_noise`."""
        return draw_noise(self.pipeline.vae, seeds, height, width).to(self.device)

    def clear_cache(self) -> None:
        """Forget what was computed for prompts: needed after a text encoder's weights change."""
        self.pipeline.text.clear_cache()
        self._plans.clear()

    def _plan(
        self, transformer: Transformer, cond: Condition, uncond: Condition | None, x_BChw: Tensor
    ) -> Plan:
        """Compute once what depends on neither t nor x, and the modulation of every t together."""
        if uncond is not None:
            sides = [side.repeat(len(x_BChw) // len(side)) for side in (cond, uncond)]
            cond = Condition.cat(sides)
        context = transformer.context(cond, x_BChw.shape[2], x_BChw.shape[3])
        return Plan(transformer, context, transformer.modulation(context, self._t_K1))

    def _remembered_plan(
        self, prompt: str, cond: Condition, x_BChw: Tensor, version: tuple[int, int]
    ) -> Plan:
        """The plan of one prompt on the pipeline's transformer, until its weights change."""
        transformer = self.pipeline.transformer
        # Adapters may be switched, which no version counter shows, and autocast changes the plan.
        if not transformer.frozen or torch.is_autocast_enabled(self.device.type):
            return self._plan(transformer, cond, None, x_BChw)
        key = (prompt, *x_BChw.shape[2:], transformer.dtype, version)
        plan = self._plans.pop(key, None)
        if plan is None or plan.transformer is not transformer:
            plan = self._plan(transformer, cond, None, x_BChw)
        self._plans[key] = plan
        if len(self._plans) > _REMEMBERED_PLANS:
            self._plans.popitem(last=False)
        return plan

    def _settle(self) -> tuple[int, int]:
        """Where the frozen weights lie and how often they changed; graphs follow both."""
        transformer = self.pipeline.transformer
        seen = places, _ = self.pipeline.places, version_of(transformer.weights)
        if seen != self._seen:
            if self.graphs is not None:
                if places != self._seen[0]:
                    self.graphs.clear()
                transformer.refresh()  # a replay looks at no version
            self._seen = seen
        return seen

    def _roll_out(self, plan: Plan, x_BChw: Tensor, weight: float) -> tuple[Tensor, ...]:
        """x_1 to x_K from x_0."""
        sampler = Sampler(plan.transformer, self.schedule, weight)

        def whole(*inputs: Any) -> tuple[Tensor, ...]:
            return tuple(sampler.states(*inputs))

        name = "rollout", weight
        return self._replayed(plan, name, whole, x_BChw, plan.context, plan.modulation_KMB1D)

    def _draw(
        self, plan: Plan, x_BChw: Tensor, weight: float, output_type: str, callback: Any
    ) -> tuple[Tensor, Tensor]:
        """`finish` of x_K from x_0: as one graph, or as one a step where a callback looks on."""
        sampler, vae = Sampler(plan.transformer, self.schedule, weight), self.pipeline.vae

        def whole(*inputs: Any) -> tuple[Tensor, Tensor]:
            *_, x_K = sampler.states(*inputs)
            return finish(vae, x_K, output_type, self.decode_limit)

        modulation = plan.modulation_KMB1D
        if callback is None:
            inputs = x_BChw, plan.context, modulation
            return self._replayed(plan, (output_type, weight), whole, *inputs)
        x0_BChw = None
        for k, t in enumerate(self.schedule.timesteps):
            step, name = partial(sampler.step, k), ("step", k, weight)
            x_BChw, x0_BChw = self._replayed(
                plan, name, step, x_BChw, x0_BChw, plan.context, modulation[k]
            )
            callback(k, t, x_BChw)
        last = partial(finish, vae, output_type=output_type, limit=self.decode_limit)
        if output_type == "latent":
            return last(x_BChw)
        return self._replayed(plan, ("decode", output_type), last, x_BChw)

    def _replayed(self, plan: Plan, name: tuple, call: Callable, *inputs: Any) -> Any:
        """call(*inputs), from a graph where the weights behind it stay where they are."""
        model, kind = self.pipeline.transformer, self.device.type
        fixed = plan.transformer is model and model.frozen
        if self.graphs is None or not fixed or torch.is_autocast_enabled(kind):
            return call(*inputs)
        return self.graphs.run(name, call, *inputs)
