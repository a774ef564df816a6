"""FLUX.2: joint transformers on the squares of a VAE's latents, read by chat models; the large one is told guidance."""

from __future__ import annotations

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fewstep.core.batch import Condition
from fewstep.models import schedulers
from fewstep.models.codec import Codec
from fewstep.models.family import Family, image_stream, middle
from fewstep.models.packing import places

_STEPS = 50
"""Of the pipelines' own call; the times are shifted by their number too."""


def _row_by_row(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tokens.transpose(1, 2).reshape(-1, *shape)


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    length = cond.inputs["encoder_hidden_states"].shape[1]
    order = timestep.new_zeros(length, 4)
    order[:, 3] = torch.arange(length, device=order.device, dtype=order.dtype)
    ids = {"img_ids": places(x.shape[2], x.shape[3], timestep, axes=4), "txt_ids": order}
    tokens = x.flatten(2).transpose(1, 2)
    said = net(tokens, timestep=timestep / 1000, return_dict=False, **ids, **cond.inputs)[0]
    return _row_by_row(said, tuple(x.shape[1:]))


class _Squares(Codec):
    """Latents are squares of two by two of the VAE's, each channel as its batch norm has counted it."""

    EVEN_SIGMAS = True
    max_sequence_length = 512

    def unpacked(self, latents, shape):
        return _row_by_row(latents, shape)

    def scattered(self, noise):
        rows, channels, height, width = noise.shape
        return _row_by_row(noise.view(rows, height * width, channels), (channels, height, width))

    def time_shift(self, scheduler, shape):
        return self.time_shift_in(scheduler, shape, _STEPS)

    def time_shift_in(self, scheduler, shape, steps):
        return schedulers.time_shift(scheduler, compute_empirical_mu(shape[1] * shape[2], steps))

    @torch.no_grad()
    def encode(self, images):
        return self._squared(self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float())

    def decode(self, latents):
        mean, scale = self._statistics(latents)
        plain = pixel_shuffle(latents / scale + mean, 2)
        return self.vae.decode(plain.to(self.vae.dtype), return_dict=False)[0].float()

    @property
    def scaled(self):
        return True

    def latent_shape(self, height, width, frames=None):
        channels, height, width = super().latent_shape(height, width, frames)
        return 4 * channels, height // 2, width // 2

    def _squared(self, plain: Tensor) -> Tensor:
        mean, scale = self._statistics(plain)
        return (pixel_unshuffle(plain, 2) - mean) * scale

    def _statistics(self, like):
        norm, shape = self.vae.bn, (1, -1, 1, 1)
        deviation = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        return norm.running_mean.view(shape).to(like), (1 / deviation).view(shape).to(like)

    def _embed(self, prompts):
        embeds, _ = self.pipeline.encode_prompt(prompts, self._device, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": embeds}

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, 2)


class Flux2(_Squares):
    """States of three layers of a Mistral. Its pipeline never guides: the network is told how."""

    embedded_guidance: float | None = 4.0

    def __init__(self, pipeline):
        super().__init__(pipeline)
        if not pipeline.transformer.config.guidance_embeds:
            self.embedded_guidance = None

    def guided_by(self, scale):
        return {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}

    def _written(self, prompt):
        (messages,) = format_input([prompt], self.pipeline.system_message)
        return self.pipeline.tokenizer.apply_chat_template(messages, tokenize=False)

    def _limits(self):
        yield self.pipeline.tokenizer.tokenizer, self.max_sequence_length


class Flux2Klein(_Squares):
    """States of three layers of a Qwen 3. Its pipeline leads away from the empty prompt."""

    def unpacked(self, latents, shape):
        """What its call gives are the VAE's own latents."""
        return self._squared(latents) if latents.ndim == 4 else super().unpacked(latents, shape)

    def _written(self, prompt):
        template = self.pipeline.tokenizer.apply_chat_template
        messages = [{"role": "user", "content": prompt}]
        return template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length


ROWS = {
    "Flux2Transformer2DModel": Family(
        call=_call,
        tap=middle("single_transformer_blocks"),
        time_embedding="time_guidance_embed.timestep_embedder",
        blocks=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        processors=("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
        feature=image_stream,
        reads="joint_attention_dim",
    )
}
CODECS = {"Flux2Pipeline": Flux2, "Flux2KleinPipeline": Flux2Klein}
