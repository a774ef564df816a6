"""Qwen-Image: joint transformers on packed latents, which read a vision-language model."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models import schedulers
from fewstep.models.codec import Codec
from fewstep.models.family import Family, image_stream, linearly, middle
from fewstep.models.packing import packed, unpacked
from fewstep.models.padding import full, lengths, padded, shortened


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    texts, mask = shortened(cond.inputs["encoder_hidden_states"], cond.inputs["encoder_hidden_states_mask"])
    places = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
    read = {"encoder_hidden_states": texts, "encoder_hidden_states_mask": mask.bool()}
    said = net(packed(x), timestep=timestep / 1000, img_shapes=places, return_dict=False, **read)[0]
    return unpacked(said, tuple(x.shape[1:]))


def _kept_to_norm(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """Every token of the guided output as long as without guidance."""
    guided, plain = packed(linearly(unconditional, conditional, scale)), packed(conditional)
    kept = guided * (plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return unpacked(kept, tuple(conditional.shape[1:]))


class QwenImage(Codec):
    """The last states of a vision-language model that is told to describe the image, without what tells it so."""

    EVEN_SIGMAS = True
    max_sequence_length = 512

    def guided_by(self, scale):
        return {"true_cfg_scale": scale}

    def packed(self, latents):
        return packed(latents)

    def unpacked(self, latents, shape):
        return unpacked(latents, shape)

    def time_shift(self, scheduler, shape):
        return schedulers.time_shift(scheduler, schedulers.mu_of(scheduler, shape[1] * shape[2] // 4))

    def encode(self, images):
        return super().encode(images.unsqueeze(2)).squeeze(2)

    def decode(self, latents):
        return super().decode(latents.unsqueeze(2)).squeeze(2)

    @property
    def channels(self):
        return self.vae.config.z_dim

    def _written(self, prompt):
        return self.pipeline.prompt_template_encode.format(prompt)

    def _embed(self, prompts):
        most, template = self.max_sequence_length, self.pipeline.prompt_template_encode_start_idx
        rows = full(self.pipeline.text_encoder, len(prompts), template + most, layer=-1)
        texts, mask = padded(self._read(prompts) if rows is None else rows[:, template:], most)
        return {"encoder_hidden_states": texts, "encoder_hidden_states_mask": mask}

    def _read(self, prompts):
        embeds, mask = self.pipeline.encode_prompt(prompts, self._device, max_sequence_length=self.max_sequence_length)
        read = [embeds.shape[1]] * len(embeds) if mask is None else lengths(mask)
        return [row[:length] for row, length in zip(embeds, read, strict=True)]

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length + self.pipeline.prompt_template_encode_start_idx

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, 2)


ROWS = {
    "QwenImageTransformer2DModel": Family(
        call=_call,
        tap=middle("transformer_blocks"),
        time_embedding="time_text_embed.timestep_embedder",
        blocks=("QwenImageTransformerBlock",),
        processors=("QwenDoubleStreamAttnProcessor2_0",),
        feature=image_stream,
        reads="joint_attention_dim",
        channels=lambda net: net.config.in_channels // 4,
        guide=_kept_to_norm,
    )
}
CODECS = {"QwenImagePipeline": QwenImage}
