"""LTX-Video, with a T5 for a reader."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import byte_tokenizer, t5


def _vae() -> Any:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("conv",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        encoder_causal=True,
        decoder_causal=False,
        timestep_conditioning=False,
        patch_size=4,
        patch_size_t=1,
    )


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=3,
        caption_channels=16,
    )
    # The published one also has a shift_terminal of .1, by which a single step is no number.
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024
    )
    reader = t5(transformers.T5Config, transformers.T5EncoderModel, 16)
    return diffusers.LTXPipeline(scheduler, _vae(), reader, byte_tokenizer(), transformer)


MAKERS = {"ltx": ltx}
STANDS_FOR = {"Lightricks/LTX-Video": "ltx", "Lightricks/LTX-Video-0.9.1": "ltx"}
