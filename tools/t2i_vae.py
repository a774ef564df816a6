"""Train the autoencoder of the text-to-image teacher on captioned scenes: about a quarter of an hour on one core.

python tools/t2i_vae.py [--steps 2600] [--out runs/t2i/vae]

A run that was stopped continues; see tools/t2i_parts.py for what its result is used for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from resumable import fit
from torch import Tensor

from fewstep.core.draw import Draw
from fewstep.data.captioned import CaptionedScenes
from fewstep.evals.grid import save_grid

RESOLUTION, CROP = 64, 32
BATCH, WHOLE_BATCH = 16, 8
WHOLE = 0.8
RATE = 1.5e-3
KL = 5e-4
TRAINING_SEED, HELD_OUT_SEED = 11, 90_011
HELD_OUT = 512


def new_vae(seed: int) -> AutoencoderKL:
    """1.4 million weights, 64x64x3 to 16x16x4, without attention, so that crops are as good as whole images."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )


def training_images(seed: int, step: int, whole: bool) -> Tensor:
    """Fresh scenes (16,3,32,32), each cut out at its own place, or a few whole ones (8,3,64,64)."""
    ids = torch.arange(step * BATCH, step * BATCH + (WHOLE_BATCH if whole else BATCH))
    images = CaptionedScenes(RESOLUTION, seed).images(ids)
    if whole:
        return images
    corners = Draw(seed, step, ids).integers("vae.corner", RESOLUTION - CROP + 1, (2,)).tolist()
    return torch.stack([image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(images, corners, strict=True)])


def loss_of(vae: AutoencoderKL, images: Tensor, draw: Draw) -> Tensor:
    """Mean absolute error and a little of the divergence (both a mean over elements) from a standard normal."""
    latents = vae.encode(images).latent_dist
    noise = draw.normal("vae.noise", latents.mean.shape[1:])
    rebuilt = vae.decode(latents.mean + latents.std * noise).sample
    kl = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
    return F.l1_loss(rebuilt, images) + KL * kl


def train(seed: int, steps: int, state: Path) -> AutoencoderKL:
    vae = new_vae(seed).to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        images = training_images(seed, step, whole=step >= WHOLE * steps)
        return loss_of(vae, images, Draw(seed, step, torch.arange(len(images))))

    fit({"vae": vae}, loss, steps, RATE, state)
    return vae.eval().requires_grad_(False)


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Means (N,4,16,16) of the latents of images (N,3,64,64), not scaled."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (N,3,64,64) in [-1,1] from latents (N,4,16,16), not scaled."""
    return torch.cat([vae.decode(chunk).sample for chunk in latents.split(64)]).clamp(-1, 1)


def standardise(vae: AutoencoderKL, images: Tensor) -> None:
    """Move the mean and scale of each latent channel into the 1x1 convolutions next to it; the images stay the same.

    A single scaling factor would leave some channels far louder than others.
    """
    latents = encode(vae, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inner, outer, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= std[None, :, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / std
    inner.weight[:channels] /= std[:, None, None, None]
    inner.bias[channels:] -= 2 * std.log()


def psnr(images: Tensor, rebuilt: Tensor) -> float:
    """The mean over images (N,3,H,W) in [-1,1], in decibels."""
    return (10 * torch.log10(4 / (images - rebuilt).square().mean((1, 2, 3)))).mean().item()


def write(vae: AutoencoderKL, folder: Path, steps: int) -> None:
    """Bring the latents to unit scale, store half-precision weights and measure what was stored."""
    images = CaptionedScenes(RESOLUTION, HELD_OUT_SEED).images(torch.arange(HELD_OUT))
    seen = CaptionedScenes(RESOLUTION, TRAINING_SEED).images(torch.arange(HELD_OUT))
    with torch.no_grad():
        standardise(vae, seen)
        vae.register_to_config(scaling_factor=round(1 / encode(vae, seen).std().item(), 4))
    vae.to(memory_format=torch.contiguous_format).half().save_pretrained(folder)
    stored = AutoencoderKL.from_pretrained(folder).eval()
    with torch.no_grad():
        latents = encode(stored, images)
        rebuilt = decode(stored, latents)
    channels = {"mean": latents.mean((0, 2, 3)).tolist(), "std": latents.std((0, 2, 3)).tolist()}
    protocol = {
        "steps": steps,
        "seed": TRAINING_SEED,
        "held_out": {"seed": HELD_OUT_SEED, "count": HELD_OUT},
        "psnr": psnr(images, rebuilt),
        "latents": channels,
        "scaling_factor": stored.config.scaling_factor,
    }
    (folder / "measured.json").write_text(json.dumps(protocol, indent=2) + "\n")
    save_grid(torch.stack([images[:32], rebuilt[:32]], 1).flatten(0, 1), folder / "rebuilt.png", 8, 3)
    print(json.dumps(protocol, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--out", type=Path, default=Path("runs/t2i/vae"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(train(TRAINING_SEED, options.steps, options.out.with_suffix(".state")), options.out, options.steps)


if __name__ == "__main__":
    main()
