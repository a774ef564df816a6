"""HunyuanVideo: videos, told their guidance, read by a Llama and a CLIP."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    inputs = dict(cond.inputs)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].long()
    guidance = inputs.pop("guidance", None)
    told = None if guidance is None else 1000 * guidance
    return net(x, timestep=timestep, guidance=told, return_dict=False, **inputs)[0]


class HunyuanVideo(Codec):
    """An early layer of a Llama that is told to describe the video, and the pooled output of a CLIP."""

    NEEDS = ("vae", "text_encoder", "text_encoder_2")
    VIDEOS = True
    EVEN_SIGMAS = True
    max_sequence_length = 256
    embedded_guidance: float | None = 6.0

    def __init__(self, pipeline):
        super().__init__(pipeline)
        if not pipeline.transformer.config.guidance_embeds:
            self.embedded_guidance = None

    @property
    def side(self):
        return 720

    def guided_by(self, scale):
        told = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return {**told, "true_cfg_scale": scale}

    def _embed(self, prompts):
        embeds, pooled, mask = self.pipeline.encode_prompt(
            prompts, device=self._device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "pooled_projections": pooled}

    def _limits(self):
        # A CLIP gives one vector of as many tokens as it reads, and the pipeline cuts the others off.
        yield self.pipeline.tokenizer, self.max_sequence_length

    def latent_shape(self, height, width, frames=None):
        count = self._latent_frames(frames, self.pipeline.vae_scale_factor_temporal)
        patch = self.pipeline.transformer.config.patch_size
        return self.channels, count, *self._grid(height, width, self.pipeline.vae_scale_factor_spatial, patch)


ROWS = {
    "HunyuanVideoTransformer3DModel": Family(
        call=_call,
        tap=middle("single_transformer_blocks"),
        time_embedding="time_text_embed.timestep_embedder",
        blocks=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
        processors=("HunyuanVideoAttnProcessor2_0",),
        reads="text_embed_dim",
    )
}
CODECS = {"HunyuanVideoPipeline": HunyuanVideo}
