"""Qwen-Image, with a Qwen 2.5 VL for a reader."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import BYTES, byte_tokenizer


def _reader() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16}
    text = {
        **sizes,
        "vocab_size": len(BYTES) + 3,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    vision = {**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_image(shift_terminal: float | None = None) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.4, 0.6, 0.2, 0.3],
    )
    shifting = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    # That of the published one is .02, by which a single step is no number.
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shifting, shift_terminal=shift_terminal)
    return diffusers.QwenImagePipeline(scheduler, vae, _reader(), byte_tokenizer(), transformer)


MAKERS = {"qwen_image": qwen_image}
STANDS_FOR = {"Qwen/Qwen-Image": "qwen_image", "Qwen/Qwen-Image-2512": "qwen_image"}
