"""CogVideoX, with and without a rotary embedding."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import byte_tokenizer, t5


def cogvideox(rotary: bool = False) -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=rotary,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=2.6,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0 if rotary else 3.0
    )
    reader = t5(transformers.T5Config, transformers.T5EncoderModel, 16)
    return diffusers.CogVideoXPipeline(byte_tokenizer(), reader, vae, transformer, scheduler)


MAKERS = {"cogvideox": cogvideox, "cogvideox_5b": lambda: cogvideox(rotary=True)}
STANDS_FOR = {
    "zai-org/CogVideoX-2b": "cogvideox",
    "THUDM/CogVideoX-2b": "cogvideox",
    "zai-org/CogVideoX-5b": "cogvideox_5b",
    "THUDM/CogVideoX-5b": "cogvideox_5b",
}
