"""Ovis-Image: joint transformers on packed latents, read by a chat model that is told to describe the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.families.flux import Packed
from fewstep.models.family import Family, image_stream, middle
from fewstep.models.packing import packed, places, unpacked


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    height, width = x.shape[2] // 2, x.shape[3] // 2
    texts = cond.inputs["encoder_hidden_states"]
    # Words lie along the diagonal of the plane on which the image lies.
    along = torch.arange(texts.shape[1], device=x.device, dtype=timestep.dtype)
    ids = {
        "img_ids": places(height, width, timestep),
        "txt_ids": torch.stack([torch.zeros_like(along), along, along], dim=1),
    }
    said = net(packed(x), encoder_hidden_states=texts, timestep=timestep / 1000, return_dict=False, **ids)[0]
    return unpacked(said, tuple(x.shape[1:]))


class OvisImage(Packed):
    """The last states of a chat model, without those of what it is told first, and zeros behind the prompt."""

    max_sequence_length = 256

    def _written(self, prompt):
        return self.pipeline._get_messages(prompt)[0]

    def _embed(self, prompts):
        embeds, *_ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self._device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length + self.pipeline.user_prompt_begin_id


ROWS = {
    "OvisImageTransformer2DModel": Family(
        call=_call,
        tap=middle("single_transformer_blocks"),
        time_embedding="timestep_embedder",
        blocks=("OvisImageTransformerBlock", "OvisImageSingleTransformerBlock"),
        processors=("OvisImageAttnProcessor",),
        feature=image_stream,
        reads="joint_attention_dim",
        channels=lambda net: net.config.in_channels // 4,
    )
}
CODECS = {"OvisImagePipeline": OvisImage}
