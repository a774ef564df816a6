"""Wan 2.1 and 2.2: videos, the latter by two experts."""

from __future__ import annotations

from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle, named_inputs


class Wan(Codec):
    """Videos; one UMT5, with zeros after the prompt."""

    VIDEOS = True
    max_sequence_length = 512  # of the pipeline's call; its encode_prompt alone would take 226

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
        count = self._latent_frames(frames, self.pipeline.vae_scale_factor_temporal)
        _, patch, _ = self.pipeline.transformer.config.patch_size
        grid = self._grid(height, width, self.pipeline.vae_scale_factor_spatial, patch)
        return self.vae.config.z_dim, count, *grid


ROWS = {
    "WanTransformer3DModel": Family(
        call=named_inputs,
        tap=middle("blocks"),
        time_embedding="condition_embedder.time_embedder",
        blocks=("WanTransformerBlock",),
        processors=("WanAttnProcessor",),
        reads="text_dim",
    )
}
CODECS = {"WanPipeline": Wan}
