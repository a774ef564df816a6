"""Stable Diffusion 3 and 3.5: joint transformers on flows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fewstep.models.codec import Codec
from fewstep.models.family import Family, image_stream, middle, named_inputs
from fewstep.models.taps import first


def _feature(block: nn.Module, output: Any) -> Any:
    # A sharded block is of a class made from its own.
    joint = any(kind.__name__ == "JointTransformerBlock" for kind in type(block).__mro__)
    return image_stream(block, output) if joint else first(block, output)


class StableDiffusion3(Codec):
    """Two CLIPs side by side, then a T5; without it the pipeline gives zeros in its place. Pooled are the CLIPs."""

    NEEDS = ("vae", "text_encoder", "text_encoder_2")
    MAY_LACK = ("text_encoder_3", "tokenizer_3")
    UNUSED: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}
    max_sequence_length = 256

    def _embed(self, prompts):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _limits(self):
        for tokenizer in (self.pipeline.tokenizer, self.pipeline.tokenizer_2):
            yield tokenizer, self.pipeline.tokenizer_max_length
        if self.pipeline.text_encoder_3 is not None:
            yield self.pipeline.tokenizer_3, self.max_sequence_length

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, self.pipeline.patch_size)


ROWS = {
    "SD3Transformer2DModel": Family(
        call=named_inputs,
        tap=middle("transformer_blocks"),
        time_embedding="time_text_embed.timestep_embedder",
        blocks=("JointTransformerBlock",),
        processors=("JointAttnProcessor2_0",),
        feature=_feature,
        reads="joint_attention_dim",
    )
}
CODECS = {"StableDiffusion3Pipeline": StableDiffusion3}
