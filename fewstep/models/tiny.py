"""Random pipelines of the text families, built from configurations alone: a few megabytes, no file, no network.

What matters of a family is kept: the classes, the kind of prediction, the schedule and what the denoiser is told. The
weights are drawn, so the images mean nothing, and the VAEs have the scales that make latents of a deviation near 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from torch import nn

from fewstep.core.errors import UserError

LENGTH = 77  # tokens that a CLIP reads, as the published ones do
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
START, END = "<|startoftext|>", "<|endoftext|>"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def clip_tokenizer() -> Any:
    words = [*BYTES, *(letter + "</w>" for letter in BYTES), START, END]
    vocabulary = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def byte_tokenizer() -> Any:
    """One token a byte, and </s> at the end, as T5 has it."""
    words = ["<pad>", "</s>", "<unk>", *BYTES]
    model = tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def clip(width: int, projection: int | None = None) -> nn.Module:
    sizes = {
        "vocab_size": 2 * len(BYTES) + 2,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 2 * len(BYTES),
        "eos_token_id": 2 * len(BYTES) + 1,
        "pad_token_id": 2 * len(BYTES) + 1,
    }
    if projection is None:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes, projection_dim=projection))


def t5(config: Any, model: Any, width: int) -> nn.Module:
    sizes = {"vocab_size": len(BYTES) + 3, "d_model": width, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    return model(config(**sizes, dropout_rate=0.1))


def image_vae(**changes: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
        sample_size=16,
        **{"latent_channels": 4, **changes},
    )


def unet(**changes: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        **{"attention_head_dim": 2, "cross_attention_dim": 8, **changes},
    )


def stable_diffusion(kind: str = "epsilon") -> Any:
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type=kind, timestep_spacing="trailing", clip_sample=False, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        vae=image_vae(scaling_factor=2.6),
        text_encoder=clip(8),
        tokenizer=clip_tokenizer(),
        unet=unet(use_linear_projection=kind == "v_prediction"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(zeros: bool = True) -> Any:
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "cross_attention_dim": 20}
    return diffusers.StableDiffusionXLPipeline(
        vae=image_vae(scaling_factor=2.6),
        text_encoder=clip(8),
        text_encoder_2=clip(12, projection=6),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(**sizes, projection_class_embeddings_input_dim=6 + 6 * 4, use_linear_projection=True),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def stable_diffusion_3(long_prompts: bool = True) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=8,
        pooled_projection_dim=6 + 10,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(8, projection=6),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(12, projection=10),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(transformers.T5Config, transformers.T5EncoderModel, 24) if long_prompts else None,
        tokenizer_3=byte_tokenizer() if long_prompts else None,
    )


def wan(scheduler: Any = None) -> Any:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.4, 0.6, 0.2, 0.3],
    )
    return diffusers.WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(transformers.UMT5Config, transformers.UMT5EncoderModel, 16),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


MAKERS: dict[str, Callable[..., Any]] = {
    "sd15": stable_diffusion,
    "sd21": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "wan": wan,
}


# The hub ids whose classes a family has; what a name stands for cannot be asked without a network.
STANDS_FOR: dict[str, str] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "stabilityai/stable-diffusion-3.5-large": "sd3",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan",
}


def family_of(source: str) -> str:
    """The family of a hub id. Raises UserError for an id that no tiny pipeline stands for."""
    if source not in STANDS_FOR:
        raise UserError(f"no tiny pipeline stands for '{source}': there is one for each of {', '.join(STANDS_FOR)}")
    return STANDS_FOR[source]


def make(family: str, **changes: Any) -> Any:
    """The pipeline of `family`, in evaluation mode, the same weights every time."""
    torch.manual_seed(0)
    pipeline = MAKERS[family](**changes)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline
