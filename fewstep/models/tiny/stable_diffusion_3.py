"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import byte_tokenizer, clip, clip_tokenizer, image_vae, t5


def stable_diffusion_3(long_prompts: bool = True) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=8,
        pooled_projection_dim=6 + 10,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(8, projection=6),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(12, projection=10),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(transformers.T5Config, transformers.T5EncoderModel, 24) if long_prompts else None,
        tokenizer_3=byte_tokenizer() if long_prompts else None,
    )


MAKERS = {"sd3": stable_diffusion_3}
STANDS_FOR = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "stabilityai/stable-diffusion-3.5-large": "sd3",
}
