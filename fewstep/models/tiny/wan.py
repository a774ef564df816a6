"""Wan 2.1 and 2.2, by one network or two experts."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import byte_tokenizer, t5


def _transformer() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
    )


def wan(scheduler: Any = None, experts: bool = False, token_times: bool = False) -> Any:
    """With `token_times`, the VAE and the times of the 5 B model, whose pipeline tells every token its own."""
    halved = [True, True] if token_times else [False, True, True]
    squares = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True} if token_times else {}
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1] * (len(halved) + 1),
        num_res_blocks=1,
        temperal_downsample=halved,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.4, 0.6, 0.2, 0.3],
        **squares,
    )
    return diffusers.WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(transformers.UMT5Config, transformers.UMT5EncoderModel, 16),
        vae=vae,
        transformer=_transformer(),
        transformer_2=_transformer() if experts else None,
        boundary_ratio=0.875 if experts else None,
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        expand_timesteps=token_times,
    )


MAKERS = {"wan": wan, "wan22": lambda: wan(experts=True), "wan22_5b": lambda: wan(token_times=True)}
STANDS_FOR = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan22",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan22_5b",
}
