"""HunyuanVideo, with a Llama for a reader."""

from __future__ import annotations

from typing import Any

import diffusers
import tokenizers
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from fewstep.models.tiny.parts import BYTES, clip, clip_tokenizer

WORDS = 400
"""enough for the sentence before a prompt, of which the pipeline drops 95 tokens, to be little longer"""


def _tokenizer() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=WORDS,
        initial_alphabet=BYTES,
        special_tokens=["<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    backend.train_from_iterator([DEFAULT_PROMPT_TEMPLATE["template"]], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _reader() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.LlamaModel(config)


def _vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=2.6,
        mid_block_add_attention=False,
    )


def hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=_reader(),
        tokenizer=_tokenizer(),
        transformer=transformer,
        vae=_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(8),
        tokenizer_2=clip_tokenizer(),
    )


MAKERS = {"hunyuan_video": hunyuan_video}
STANDS_FOR = {"hunyuanvideo-community/HunyuanVideo": "hunyuan_video"}
