"""Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from fewstep.models.tiny.parts import clip, clip_tokenizer, image_vae

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def unet(**changes: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        **{"attention_head_dim": 2, "cross_attention_dim": 8, **changes},
    )


def stable_diffusion(kind: str = "epsilon") -> Any:
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type=kind, timestep_spacing="trailing", clip_sample=False, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        vae=image_vae(scaling_factor=2.6),
        text_encoder=clip(8),
        tokenizer=clip_tokenizer(),
        unet=unet(use_linear_projection=kind == "v_prediction"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(zeros: bool = True) -> Any:
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "cross_attention_dim": 20}
    return diffusers.StableDiffusionXLPipeline(
        vae=image_vae(scaling_factor=2.6),
        text_encoder=clip(8),
        text_encoder_2=clip(12, projection=6),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(**sizes, projection_class_embeddings_input_dim=6 + 6 * 4, use_linear_projection=True),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


MAKERS = {
    "sd15": stable_diffusion,
    "sd21": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
}
STANDS_FOR = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
