"""Sana, as its versions with normalised queries and a time from 0 to 1 are."""

from __future__ import annotations

from typing import Any

import diffusers

from fewstep.models.tiny.parts import byte_tokenizer, gemma


def _vae() -> Any:
    levels = {"block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"], "block_out_channels": [4, 4, 8]}
    depths = {"layers_per_block": [1, 1, 1], "qkv_multiscales": [[], [], [5]]}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (levels | depths).items()}
    return diffusers.AutoencoderDC(**sides, latent_channels=4, attention_head_dim=4, scaling_factor=0.7)


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=16,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(byte_tokenizer(), gemma(), _vae(), transformer, scheduler)


MAKERS = {"sana": sana}
STANDS_FOR = {
    "Efficient-Large-Model/Sana_600M_512px_diffusers": "sana",
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": "sana",
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": "sana",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana",
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "sana",
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": "sana",
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": "sana",
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers": "sana",
    "Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers": "sana",
}
