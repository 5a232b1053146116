"""Train the 16-channel AutoencoderKL that both tiny models share.

    python -m tdm_r1.assets.autoencoder --output DIR [--steps 2400] [--seed 0]

Loss: mean |x - D(E(x) + s n)| + 4 mean (x - D(..))^2 + 0.02 (mean_c^2 + log^2 var_c), n ~ N(0, 1),
s uniform in [0, 0.3]. The last term whitens every latent channel (which a scalar `scaling_factor`
could not), the noise makes neighbouring latents decode alike, which is what a sampler needs.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .. import shapes

log = logging.getLogger(__name__)
POSTERIOR_STD = 0.1  # of the encoder's constant log-variance; latents have unit variance


def build_autoencoder():
    """AutoencoderKL of 0.97 M parameters: 64x64 -> 16x8x8, no mid attention."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=shapes.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def world_pictures(num: int, seed: int) -> torch.Tensor:
    """Pictures of all families in equal parts. Returns fp32 `[num, 3, 64, 64]` in [-1, 1]."""
    rng = np.random.default_rng(seed)
    texts = [shapes.captions(f) for f in shapes.FAMILIES]
    pictures = [
        shapes.render(texts[i % len(texts)][rng.integers(len(texts[i % len(texts)]))], rng)
        for i in range(num)
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(output: Path, *, steps: int, batch: int, seed: int, num_pictures: int) -> float:
    """Train and save; returns the share of held-out reconstructions that pass the checker."""
    torch.manual_seed(seed)
    model = build_autoencoder()
    freeze_posterior(model)
    data = world_pictures(num_pictures, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.05
    )
    start = time.time()
    for step in range(steps):
        x = data[torch.randint(len(data), (batch,))]
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encoder(x)[:, :16].float()
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
        white = (mean**2 + var.log() ** 2).mean()
        noisy = z + 0.3 * torch.rand(batch, 1, 1, 1) * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            y = model.decoder(noisy).float()
        loss = F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + 0.02 * white
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log.info("step %d loss %.4f white %.4f %.0fs", step, loss, white, time.time() - start)
    model.eval()
    whiten_scalar(model, data[:2048])
    accuracy = reconstruction_accuracy(model, seed + 1)
    model.half().save_pretrained(output)
    log.info("reconstructions that pass the checker: %.4f, %.0fs", accuracy, time.time() - start)
    return accuracy


def freeze_posterior(model) -> None:
    """Make the encoder's log-variance the constant 2 ln POSTERIOR_STD."""
    with torch.no_grad():
        model.encoder.conv_out.weight[16:].zero_()
        model.encoder.conv_out.bias[16:].fill_(2 * float(np.log(POSTERIOR_STD)))


@torch.no_grad()
def whiten_scalar(model, pictures: torch.Tensor) -> None:
    """Set scaling_factor and shift_factor from the latents of `pictures` [N, 3, 64, 64]."""
    z = torch.cat([model.encode(x).latent_dist.mean for x in pictures.split(64)])
    log.info("channel std %s", z.std((0, 2, 3)).numpy().round(2))
    model.register_to_config(scaling_factor=1.0 / z.std().item(), shift_factor=z.mean().item())


@torch.no_grad()
def reconstruction_accuracy(model, seed: int, num: int = 480) -> float:
    """Share of decoded encodings of fresh shape pictures (no words) that pass the strict check."""
    rng = np.random.default_rng(seed)
    families = [f for f in shapes.FAMILIES if f != "words"]
    texts = [str(rng.choice(shapes.captions(families[i % len(families)]))) for i in range(num)]
    x = torch.from_numpy(np.stack([shapes.render(t, rng) for t in texts])).permute(0, 3, 1, 2)
    decoded = torch.cat(
        [
            model.decode(model.encode(b.float() / 127.5 - 1).latent_dist.mean).sample
            for b in x.split(64)
        ]
    )
    levels = ((decoded + 1) * 127.5).round().clamp(0, 255).byte()
    pictures = levels.permute(0, 2, 3, 1).numpy()
    return float(np.mean([shapes.check(t, p).strict for t, p in zip(texts, pictures, strict=True)]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--pictures", type=int, default=14000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(
        args.output, steps=args.steps, batch=args.batch, seed=args.seed, num_pictures=args.pictures
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
