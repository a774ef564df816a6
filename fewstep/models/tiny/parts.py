"""Tokenizers, text encoders and VAEs of a few kilobytes, which several of the tiny pipelines have."""

from __future__ import annotations

from typing import Any

import diffusers
import tokenizers
import transformers
from torch import nn

LENGTH = 77  # tokens that a CLIP reads, as the published ones do
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
START, END = "<|startoftext|>", "<|endoftext|>"


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


def chat_tokenizer() -> Any:
    """The same, with a template for what is asked and what is to be answered."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}answer:"
    return tokenizer


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


_CHAT = {
    "vocab_size": len(BYTES) + 3,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def gemma() -> Any:
    return transformers.Gemma2Model(transformers.Gemma2Config(**_CHAT, query_pre_attn_scalar=8))


def qwen3() -> Any:
    return transformers.Qwen3Model(transformers.Qwen3Config(**_CHAT))


def image_vae(levels: int = 2, **changes: Any) -> nn.Module:
    """Of a side 2^(levels - 1) times as long as that of its latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=[4] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=2,
        sample_size=16,
        **{"latent_channels": 4, **changes},
    )
