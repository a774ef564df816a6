"""PixArt-alpha and PixArt-Sigma: transformers that read a T5."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    inputs = dict(cond.inputs)
    sizes = {name: inputs.pop(name, None) for name in ("resolution", "aspect_ratio")}
    output = net(x, timestep=timestep, added_cond_kwargs=sizes, return_dict=False, **inputs)[0]
    # It has learned a variance too: the first half of the channels is the prediction.
    return output[:, : x.shape[1]]


class PixArtSigma(Codec):
    """The T5's states, of padding too, and a mask of what is prompt."""

    max_sequence_length = 300

    def guided_by(self, scale):
        return {"guidance_scale": scale, "use_resolution_binning": False, "clean_caption": False}

    def _embed(self, prompts):
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, False, device=self._device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, self.pipeline.transformer.config.patch_size)


class PixArtAlpha(PixArtSigma):
    """Its largest network, as the pipeline knows it, is told the size of the image."""

    max_sequence_length = 120

    def _sizes(self, rows, size):
        if self.pipeline.transformer.config.sample_size != 128:
            return {}
        height, width = size or (self.side, self.side)
        told = torch.tensor([height, width, height / width], device=self._device).repeat(rows, 1)
        return {"resolution": told[:, :2], "aspect_ratio": told[:, 2:]}


ROWS = {
    "PixArtTransformer2DModel": Family(
        call=_call,
        tap=middle("transformer_blocks"),
        time_embedding="adaln_single.emb.timestep_embedder",
        blocks=("BasicTransformerBlock",),
        processors=("AttnProcessor2_0",),
        reads="caption_channels",
    )
}
CODECS = {"PixArtAlphaPipeline": PixArtAlpha, "PixArtSigmaPipeline": PixArtSigma}
