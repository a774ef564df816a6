"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import byte_tokenizer, image_vae, t5

BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def _parts(**changes: Any) -> dict[str, Any]:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        num_layers=3,
        cross_attention_dim=12,
        caption_channels=16,
        interpolation_scale=1,
        **changes,
    )
    return {
        "tokenizer": byte_tokenizer(),
        "text_encoder": t5(transformers.T5Config, transformers.T5EncoderModel, 16),
        "vae": image_vae(scaling_factor=2.6),
        "transformer": transformer,
    }


def pixart_alpha(sample_size: int = 128) -> Any:
    """Told the size of the image, unless it is made for smaller ones.

    The call of this pipeline takes one step only of a scheduler that also tells the clean sample, as DDIM does.
    """
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False)
    return diffusers.PixArtAlphaPipeline(**_parts(sample_size=sample_size), scheduler=scheduler)


def pixart_sigma() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
    return diffusers.PixArtSigmaPipeline(**_parts(sample_size=8, use_additional_conditions=False), scheduler=scheduler)


MAKERS = {"pixart_alpha": pixart_alpha, "pixart_sigma": pixart_sigma}
STANDS_FOR = {
    "PixArt-alpha/PixArt-XL-2-512x512": "pixart_alpha",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "pixart_alpha",
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "pixart_sigma",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart_sigma",
    "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS": "pixart_sigma",
}
