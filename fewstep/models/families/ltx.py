"""LTX-Video: videos in few latents, each of them a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models import schedulers
from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle

RATE = 25
"""frames a second, unasked"""


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    inputs = dict(cond.inputs)
    frames, height, width = x.shape[2:]
    scale = inputs.pop("rope_interpolation_scale")[0]
    grid = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}
    said = net(x.flatten(2).transpose(1, 2), timestep=timestep, return_dict=False, **grid, **inputs)[0]
    return said.transpose(1, 2).reshape(x.shape)


class LTX(Codec):
    """One T5, of padding too, with a mask; and how far apart in time and space latents are."""

    VIDEOS = True
    EVEN_SIGMAS = True
    MULTIPLE = 32
    max_sequence_length = 128

    @property
    def side(self):
        return 512

    def packed(self, latents):
        return latents.flatten(2).transpose(1, 2)

    def unpacked(self, latents, shape):
        return latents.transpose(1, 2).reshape(-1, *shape)

    def time_shift(self, scheduler, shape):
        return schedulers.time_shift(scheduler, schedulers.mu_of(scheduler, shape[1] * shape[2] * shape[3]))

    def _embed(self, prompts):
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self._device,
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def _sizes(self, rows, size):
        pixels, frames = self.pipeline.vae_spatial_compression_ratio, self.pipeline.vae_temporal_compression_ratio
        scale = torch.tensor([frames / RATE, pixels, pixels], device=self._device)
        return {"rope_interpolation_scale": scale.repeat(rows, 1)}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length

    def latent_shape(self, height, width, frames=None):
        count = self._latent_frames(frames, self.pipeline.vae_temporal_compression_ratio)
        grid = self._grid(height, width, self.pipeline.vae_spatial_compression_ratio, 1)
        return self.channels, count, *grid

    def _statistics(self, like):
        shape, vae = (1, -1, *[1] * (like.ndim - 2)), self.vae
        mean, std = (values.view(shape).to(like) for values in (vae.latents_mean, vae.latents_std))
        return mean, vae.config.scaling_factor / std

    def decode(self, latents):
        mean, scale = self._statistics(latents)
        # Later VAEs are told how noisy their input is; the pipeline says not at all.
        time = latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None
        return self.vae.decode((latents / scale + mean).to(self.vae.dtype), time, return_dict=False)[0].float()


ROWS = {
    "LTXVideoTransformer3DModel": Family(
        call=_call,
        tap=middle("transformer_blocks"),
        time_embedding="time_embed.emb.timestep_embedder",
        blocks=("LTXVideoTransformerBlock",),
        processors=("LTXVideoAttnProcessor",),
        reads="caption_channels",
    )
}
CODECS = {"LTXPipeline": LTX}
