"""Chroma: FLUX.1's transformer with a network in place of its modulations, read by a T5 alone and guided as usual."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.families.flux import Packed
from fewstep.models.family import Family, image_stream, middle
from fewstep.models.packing import packed, places, unpacked


@contextmanager
def _masked(net: Any, mask: Tensor) -> Iterator[None]:
    """Blocks that are recomputed are told the mask too: diffusers forgets it in the later half of them."""
    recomputed: Any = getattr(net, "_gradient_checkpointing_func", None)

    def told(block: nn.Module, *args: Any) -> Any:
        joint = len(args) > 3
        return recomputed(block, *args) if joint else recomputed(block, *args, mask)

    net._gradient_checkpointing_func = told
    try:
        yield
    finally:
        net._gradient_checkpointing_func = recomputed


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    height, width = x.shape[2] // 2, x.shape[3] // 2
    texts, said = cond.inputs["encoder_hidden_states"], cond.inputs["attention_mask"]
    # Ones and zeros are added to the scores, as the pipeline has it: they prefer what is said, and hide nothing.
    mask = torch.cat([said, said.new_ones(len(x), height * width)], 1).to(x.dtype)
    ids = {"img_ids": places(height, width, timestep), "txt_ids": timestep.new_zeros(texts.shape[1], 3)}
    inputs = {"encoder_hidden_states": texts, "attention_mask": mask, "timestep": timestep / 1000, **ids}
    with _masked(net, mask):
        return unpacked(net(packed(x), **inputs, return_dict=False)[0], tuple(x.shape[1:]))


class Chroma(Packed):
    """A T5 that does not see its padding; a mask says what is text, and one token more."""

    def _embed(self, prompts):
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "attention_mask": mask}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length


ROWS = {
    "ChromaTransformer2DModel": Family(
        call=_call,
        tap=middle("single_transformer_blocks"),
        time_embedding="distilled_guidance_layer.in_proj",
        blocks=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
        processors=("FluxAttnProcessor",),
        feature=image_stream,
        reads="joint_attention_dim",
        channels=lambda net: net.config.in_channels // 4,
    )
}
CODECS = {"ChromaPipeline": Chroma}
