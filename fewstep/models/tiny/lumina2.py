"""Lumina 2, with a Gemma 2 for a reader."""

from __future__ import annotations

from typing import Any

import diffusers

from fewstep.models.tiny.parts import byte_tokenizer, gemma, image_vae


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=2,  # its pipeline takes the VAE for one of eight times, whatever it is
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=6.0)
    vae = image_vae(levels=4, scaling_factor=1.5, shift_factor=0.1)
    return diffusers.Lumina2Pipeline(transformer, scheduler, vae, gemma(), byte_tokenizer())


MAKERS = {"lumina2": lumina2}
STANDS_FOR = {"Alpha-VLLM/Lumina-Image-2.0": "lumina2"}
