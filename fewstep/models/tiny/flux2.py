"""FLUX.2, the large one and Klein."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from fewstep.models.tiny.parts import BYTES, byte_tokenizer, chat_tokenizer

_TOLD = "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{{ c['text'] }}{% endfor %};{% endfor %}"


def _sizes(layers: int) -> dict[str, Any]:
    """Of a reader with as many layers as the deepest one that is listened to."""
    return {
        "vocab_size": len(BYTES) + 3,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }


def _mistral() -> Any:
    sight = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**_sizes(30)),
        vision_config=transformers.PixtralVisionConfig(**sight, image_size=16, patch_size=8),
        spatial_merge_size=1,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _parts(told: bool) -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=told,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
        latent_channels=4,
    )
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.1, 0.2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae, "transformer": transformer}


def flux2() -> Any:
    reader = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(), tokenizer=byte_tokenizer(), chat_template=_TOLD
    )
    return diffusers.Flux2Pipeline(text_encoder=_mistral(), tokenizer=reader, **_parts(told=True))


def flux2_klein() -> Any:
    reader = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_sizes(27)))
    return diffusers.Flux2KleinPipeline(text_encoder=reader, tokenizer=chat_tokenizer(), **_parts(told=False))


MAKERS = {"flux2": flux2, "flux2_klein": flux2_klein}
STANDS_FOR = {
    "black-forest-labs/FLUX.2-dev": "flux2",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2_klein",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2_klein",
    "black-forest-labs/FLUX.2-klein-4B": "flux2_klein",
    "black-forest-labs/FLUX.2-klein-9B": "flux2_klein",
}
