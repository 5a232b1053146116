"""How fast is Engine.generate next to the stock diffusers pipeline on the same weights?

    python -m bench.generate [--model tiny-sd3] [--batches 1 24] [--threads 2]

Both draw the same pictures from the same latents (checked first) for one prompt, `batch` images of
it. `new prompt` clears the engine's prompt cache before every call; `known prompt` does not: a peer
has no cache, so the first is the like-for-like row. `reference ops` is a known prompt on an engine
without fused kernels. The stage rows time the parts on their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tdm_kernels import native

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python bench/generate.py`, too

from bench.timing import environment, interleaved, report
from tdm_r1.engine import Engine
from tdm_r1.models.lora_files import WEIGHTS_NAME
from tdm_r1.trajectory import to_output

PROMPT = "two red circles"
PEERS = {"sd3": "StableDiffusion3Pipeline", "zimage": "ZImagePipeline"}
TOLERANCE = {torch.float32: (1e-4, 1), torch.bfloat16: (0.2, 24)}  # latents, 8-bit levels


class Peer:
    """The diffusers pipeline of an engine's model, LoRA fused, called with its settings."""

    def __init__(self, engine: Engine, lora: Path | None) -> None:
        import diffusers

        pipeline = engine.pipeline
        self.family = pipeline.family
        self.pipe = getattr(diffusers, PEERS[self.family]).from_pretrained(
            pipeline.path, torch_dtype=pipeline.transformer.dtype
        )
        if lora is not None:
            self.pipe.load_lora_weights(lora.parent, weight_name=lora.name)
            self.pipe.fuse_lora()
            self.pipe.unload_lora_weights()
        self.pipe.to(pipeline.device)
        self.pipe.set_progress_bar_config(disable=True)
        steps = engine.schedule.num_steps
        self.kwargs: dict = {"num_inference_steps": steps}
        if self.family == "sd3":
            self.kwargs |= {"guidance_scale": 1.0, "max_sequence_length": pipeline.text.t5_length}
            if engine.schedule.solver == "euler":
                self.kwargs["sigmas"] = np.linspace(1, 1 / steps, steps).tolist()
        else:
            self.kwargs["guidance_scale"] = 0.0
        self.scale = pipeline.vae.scale_factor

    def generate(self, latents: torch.Tensor, output_type: str = "pil", **prompt):
        """Images, or latents, from the given latents; `prompt` replaces the text prompt."""
        return self.pipe(
            **({"prompt": PROMPT} if not prompt else prompt),
            num_images_per_prompt=len(latents), latents=latents, output_type=output_type,
            height=latents.shape[2] * self.scale, width=latents.shape[3] * self.scale,
            **self.kwargs,
        ).images  # fmt: skip

    def encode(self) -> dict:
        """Prompt embeddings as keyword arguments of the pipeline."""
        with torch.no_grad():
            if self.family == "zimage":
                tokens, _ = self.pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
                return {"prompt_embeds": tokens, "prompt": None}
            tokens, _, pooled, _ = self.pipe.encode_prompt(
                PROMPT, None, None, do_classifier_free_guidance=False,
                max_sequence_length=self.kwargs["max_sequence_length"],
            )  # fmt: skip
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}

    def decode(self, latents: torch.Tensor):
        """Pictures of final latents, as the pipeline makes them."""
        config = self.pipe.vae.config
        with torch.no_grad():
            z = (latents.to(self.pipe.vae.dtype) / config.scaling_factor) + config.shift_factor
            image = self.pipe.vae.decode(z, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(image, output_type="pil")


def check(engine: Engine, peer: Peer, latents: torch.Tensor) -> dict[str, float]:
    """Both must draw the same pictures, or the comparison means nothing. Raises RuntimeError.

    Latents are compared by |ours - theirs| / |theirs| over the batch: the largest of many elements
    grows with the batch even where nothing but rounding differs.
    """
    settings = {"latents": latents, "num_images_per_prompt": len(latents)}
    mine = engine.generate(PROMPT, output_type="latent", **settings)
    theirs = peer.generate(latents, "latent")
    latent_error = ((mine - theirs).norm() / theirs.norm()).item()
    pair = engine.generate(PROMPT, **settings), peer.generate(latents)
    levels = max(
        np.abs(np.subtract(*map(np.int16, images))).max() for images in zip(*pair, strict=False)
    )
    allowed = TOLERANCE[engine.pipeline.transformer.dtype]
    if latent_error > allowed[0] or levels > allowed[1]:
        raise RuntimeError(f"differs from diffusers: latents {latent_error}, pictures {levels}/255")
    return {"latent_error": latent_error, "picture_error_levels": int(levels)}


def compare(engine: Engine, plain: Engine, peer: Peer, batch: int, repeats: int) -> dict:
    """Time whole calls and stages at one batch size; returns a row of the result."""
    size = engine.pipeline.default_size
    latents = engine.noise(list(range(batch)), size, size)
    row: dict = {"batch": batch, **check(engine, peer, latents)}
    settings = {"latents": latents, "num_images_per_prompt": batch}

    def new_prompt():
        engine.clear_cache()
        return engine.generate(PROMPT, **settings)

    def encode():
        engine.clear_cache()
        return engine.pipeline.text.encode([PROMPT])

    embeds, cond = peer.encode(), encode()
    final = engine.rollout(cond, latents).x[-1]
    row["call_ms"] = call = interleaved(
        {
            "diffusers": lambda: peer.generate(latents),
            "new prompt": new_prompt,
            "known prompt": lambda: engine.generate(PROMPT, **settings),
            "reference ops": lambda: plain.generate(PROMPT, **settings),
        },
        repeats=repeats,
    )
    row["stages_ms"] = interleaved(
        {
            "text, diffusers": peer.encode,
            "text": encode,
            "DiT, diffusers": lambda: peer.generate(latents, "latent", **embeds),
            "DiT": lambda: engine.rollout(cond, latents),
            "VAE, diffusers": lambda: peer.decode(final),
            "VAE": lambda: to_output(engine.decode(final), "pil"),
        },
        repeats=repeats,
    )
    for name in ("new prompt", "known prompt"):
        row[f"speedup, {name}"] = round(call["diffusers"].p50 / call[name].p50, 2)
    row["speedup over reference ops"] = round(
        call["reference ops"].p50 / call["known prompt"].p50, 2
    )
    return row


def main(argv: list[str] | None = None) -> int:
    """Measure and report; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd3")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 24])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="store the JSON here too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    engine, plain = (
        Engine.from_pretrained(arguments.model, dtype=arguments.dtype, backend=backend)
        for backend in ("auto", "reference")
    )
    lora = engine.pipeline.path / WEIGHTS_NAME
    is_base = arguments.model.endswith("-base") or Path(arguments.model).is_dir()
    peer = Peer(engine, None if is_base or not lora.is_file() else lora)
    rows = []
    for batch in arguments.batches:
        rows.append(row := compare(engine, plain, peer, batch, arguments.repeats))
        for name, times in {**row["call_ms"], **row["stages_ms"]}.items():
            quantiles = f"{times.p20:9.2f} {times.p50:9.2f} {times.p80:9.2f} ms"
            print(f"batch {batch:3d}  {name:18s} {quantiles}")
        speedups = (row[f"speedup, {kind} prompt"] for kind in ("new", "known"))
        print(
            "batch {:3d}  {}x faster on a new prompt, {}x on a known one".format(batch, *speedups)
        )
    facts = {"model": arguments.model, "solver": engine.schedule.solver}
    facts["steps"] = engine.schedule.num_steps
    facts["dtype"] = str(engine.pipeline.transformer.dtype).removeprefix("torch.")
    facts["kernels"] = "reference" if native.load() else f"native {native.instruction_set()}"
    report({"bench": "generate", **facts, **environment(), "rows": rows}, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
