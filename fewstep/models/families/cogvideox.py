"""CogVideoX: videos by v-prediction, read by a T5."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    texts, frames_first = cond.inputs["encoder_hidden_states"], x.transpose(1, 2)
    said = net(frames_first, texts, timestep, image_rotary_emb=_places(net.config, x), return_dict=False)[0]
    return said.transpose(1, 2)


def _places(known: Any, x: Tensor) -> Any:
    """The rotary embedding of all but the smallest network: version 1 crops its grid, 1.5 slices it."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed as embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid as region

    if not known.use_rotary_positional_embeddings:
        return None
    patch, deep, width = known.patch_size, known.patch_size_t, known.attention_head_dim
    frames, *grid = x.shape[2], x.shape[3] // patch, x.shape[4] // patch
    largest = known.sample_height // patch, known.sample_width // patch
    if deep is None:
        return embed(width, region(tuple(grid), largest[1], largest[0]), grid, frames, device=x.device)
    return embed(width, None, grid, frames // deep, grid_type="slice", max_size=largest, device=x.device)


class CogVideoX(Codec):
    """One T5, of padding too, without a mask."""

    VIDEOS = True
    STARTS_PACKED = True
    max_sequence_length = 226

    @property
    def side(self):
        return self.pipeline.transformer.config.sample_height * self.pipeline.vae_scale_factor_spatial

    def packed(self, latents):
        return latents.transpose(1, 2)

    def unpacked(self, latents, shape):
        return latents.transpose(1, 2)

    def _embed(self, prompts):
        embeds, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self._device,
        )
        return {"encoder_hidden_states": embeds}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length

    def latent_shape(self, height, width, frames=None):
        known = self.pipeline.transformer.config
        count, together = self._latent_frames(frames, self.pipeline.vae_scale_factor_temporal), known.patch_size_t or 1
        if count % together:
            raise UserError(f"{frames} frames are {count} latents, but this model reads {together} at a time")
        grid = self._grid(height, width, self.pipeline.vae_scale_factor_spatial, known.patch_size)
        return self.channels, count, *grid


ROWS = {
    "CogVideoXTransformer3DModel": Family(
        call=_call,
        tap=middle("transformer_blocks"),
        time_embedding="time_embedding",
        blocks=("CogVideoXBlock",),
        processors=("CogVideoXAttnProcessor2_0",),
        reads="text_embed_dim",
    )
}
CODECS = {"CogVideoXPipeline": CogVideoX}
