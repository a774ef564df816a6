"""FLUX.1: joint transformers on packed latents, most of them told their guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models import schedulers
from fewstep.models.codec import Codec
from fewstep.models.family import Family, image_stream, middle
from fewstep.models.packing import packed, places, unpacked


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    height, width = x.shape[2] // 2, x.shape[3] // 2
    texts = cond.inputs["encoder_hidden_states"]
    ids = {"img_ids": places(height, width, timestep), "txt_ids": timestep.new_zeros(texts.shape[1], 3)}
    said = net(packed(x), timestep=timestep / 1000, return_dict=False, **ids, **cond.inputs)[0]
    return unpacked(said, tuple(x.shape[1:]))


class Packed(Codec):
    """Latents go to the network in squares of two by two, whose number shifts the times."""

    UNUSED: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}
    EVEN_SIGMAS = True
    max_sequence_length = 512

    def packed(self, latents):
        return packed(latents)

    def unpacked(self, latents, shape):
        return unpacked(latents, shape)

    def time_shift(self, scheduler, shape):
        return schedulers.time_shift(scheduler, schedulers.mu_of(scheduler, shape[1] * shape[2] // 4))

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, 2)


class Flux(Packed):
    """A T5, and the pooled output of a CLIP."""

    NEEDS = ("vae", "text_encoder", "text_encoder_2")
    embedded_guidance: float | None = 3.5

    def __init__(self, pipeline):
        super().__init__(pipeline)
        if not pipeline.transformer.config.guidance_embeds:
            self.embedded_guidance = None

    def guided_by(self, scale):
        told = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return {**told, "true_cfg_scale": scale}

    def _embed(self, prompts):
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, self._device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _limits(self):
        # A CLIP gives one vector of as many tokens as it reads, and the pipeline cuts the others off.
        yield self.pipeline.tokenizer_2, self.max_sequence_length


ROWS = {
    "FluxTransformer2DModel": Family(
        call=_call,
        tap=middle("single_transformer_blocks"),
        time_embedding="time_text_embed.timestep_embedder",
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        processors=("FluxAttnProcessor",),
        feature=image_stream,
        reads="joint_attention_dim",
        channels=lambda net: net.config.in_channels // 4,
    )
}
CODECS = {"FluxPipeline": Flux}
