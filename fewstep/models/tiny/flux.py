"""FLUX.1, dev and schnell."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import byte_tokenizer, clip, clip_tokenizer, image_vae, t5


def flux(told: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=told,
        axes_dims_rope=(4, 4, 4),
    )
    shifting = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shifting if told else {"shift": 1.0}),
        vae=image_vae(scaling_factor=1.5, shift_factor=0.1),
        text_encoder=clip(8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(transformers.T5Config, transformers.T5EncoderModel, 16),
        tokenizer_2=byte_tokenizer(),
        transformer=transformer,
    )


MAKERS = {"flux": flux, "flux_schnell": lambda: flux(told=False)}
STANDS_FOR = {
    "black-forest-labs/FLUX.1-dev": "flux",
    "black-forest-labs/FLUX.1-Krea-dev": "flux",
    "black-forest-labs/FLUX.1-schnell": "flux_schnell",
}
