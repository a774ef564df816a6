"""DiT on the latents of a VAE, told labels."""

from __future__ import annotations

from typing import Any

import diffusers

from fewstep.models.tiny.parts import image_vae


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # its pipeline means none by 1000
    )
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", clip_sample=False)
    return diffusers.DiTPipeline(transformer, image_vae(scaling_factor=2.6), scheduler)


MAKERS = {"dit": dit}
STANDS_FOR = {"facebook/DiT-XL-2-256": "dit", "facebook/DiT-XL-2-512": "dit"}
