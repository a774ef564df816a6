"""Ovis-Image, with a Qwen 3 for a reader."""

from __future__ import annotations

from typing import Any

import diffusers

from fewstep.models.tiny.parts import chat_tokenizer, image_vae, qwen3


def ovis_image() -> Any:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4),
    )
    shifting = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    return diffusers.OvisImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shifting),
        vae=image_vae(scaling_factor=1.5, shift_factor=0.1),
        text_encoder=qwen3(),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


MAKERS = {"ovis_image": ovis_image}
STANDS_FOR = {"AIDC-AI/Ovis-Image-7B": "ovis_image"}
