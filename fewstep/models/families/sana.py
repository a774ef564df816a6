"""Sana: transformers of linear attention on flows, with a VAE that compresses 32 times."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    return net(x, timestep=timestep * net.config.timestep_scale, return_dict=False, **cond.inputs)[0]


class Sana(Codec):
    """The states of one Gemma behind an instruction, of padding too, and a mask of what is prompt."""

    MULTIPLE = 32
    max_sequence_length = 300

    def guided_by(self, scale):
        return {"guidance_scale": scale, "use_resolution_binning": False}

    def _embed(self, prompts):
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        return self._read(prompts, instruction)

    def _embed_negative(self, prompts):
        return self._read(prompts, None)

    def _read(self, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            False,
            device=self._device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def _limits(self):
        # The last token of the instruction has one of the places.
        yield self.pipeline.tokenizer, self.max_sequence_length - 1

    @torch.no_grad()
    def encode(self, images):
        return self.vae.encode(images.to(self.vae.dtype)).latent.float() * self.vae.config.scaling_factor

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, self.pipeline.transformer.config.patch_size)


ROWS = {
    "SanaTransformer2DModel": Family(
        call=_call,
        tap=middle("transformer_blocks"),
        time_embedding="time_embed.emb.timestep_embedder",
        blocks=("SanaTransformerBlock",),
        # Its linear attention is two products of matrices, whatever the kernel of the other.
        processors=("SanaAttnProcessor2_0",),
        linear=("SanaLinearAttnProcessor2_0",),
        reads="caption_channels",
    )
}
CODECS = {"SanaPipeline": Sana}
