"""AuraFlow, with a UMT5 for a reader."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import byte_tokenizer, image_vae, t5


def aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(transformers.UMT5Config, transformers.UMT5EncoderModel, 16),
        vae=image_vae(scaling_factor=2.6),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


MAKERS = {"aura_flow": aura_flow}
STANDS_FOR = {
    "fal/AuraFlow": "aura_flow",
    "fal/AuraFlow-v0.2": "aura_flow",
    "fal/AuraFlow-v0.3": "aura_flow",
}
