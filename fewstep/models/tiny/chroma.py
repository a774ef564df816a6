"""Chroma, with a T5 for its only reader."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import byte_tokenizer, image_vae, t5


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=2,
    )
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(scaling_factor=1.5, shift_factor=0.1),
        text_encoder=t5(transformers.T5Config, transformers.T5EncoderModel, 16),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )


MAKERS = {"chroma": chroma}
STANDS_FOR = dict.fromkeys(("lodestones/Chroma1-HD", "lodestones/Chroma1-Base"), "chroma")
