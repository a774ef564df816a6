"""Z-Image: one stream of image and text, read by a chat model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models import schedulers
from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle
from fewstep.models.padding import full, lengths, padded
from fewstep.models.shaped import is_unknown


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    turns = net.rope_embedder.freqs_cis
    if turns is not None and is_unknown(turns[0]):
        net.rope_embedder.freqs_cis = None  # it keeps them, also those of a call that was only shaped
    texts, mask = cond.inputs["encoder_hidden_states"], cond.inputs["mask"]
    # Positions of the image begin behind the text, so that padding would move it.
    read = [text[:length] for text, length in zip(texts, lengths(mask), strict=True)]
    said = net(list(x.unsqueeze(2)), (1000 - timestep) / 1000, read, return_dict=False)[0]
    return -torch.stack(said).squeeze(2)


class ZImage(Codec):
    """The last but one states of a chat model, which has been asked the prompt."""

    EVEN_SIGMAS = True
    max_sequence_length = 512

    def guided_by(self, scale):
        return {"guidance_scale": scale - 1.0}  # it adds what leads away from the negative prompt

    def time_shift(self, scheduler, shape):
        return schedulers.time_shift(scheduler, schedulers.mu_of(scheduler, shape[1] * shape[2] // 4))

    def _written(self, prompt):
        messages = [{"role": "user", "content": prompt}]
        template = self.pipeline.tokenizer.apply_chat_template
        return template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)

    def _embed(self, prompts):
        most = self.max_sequence_length
        rows = full(self.pipeline.text_encoder, len(prompts), most, layer=-2)
        if rows is None:
            rows, _ = self.pipeline.encode_prompt(list(prompts), self._device, False, max_sequence_length=most)
        texts, mask = padded(rows, most)
        return {"encoder_hidden_states": texts, "mask": mask}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, 2)

    @property
    def side(self):
        return 1024  # the pipeline does not say it otherwise


ROWS = {
    "ZImageTransformer2DModel": Family(
        call=_call,
        tap=middle("layers"),
        time_embedding="t_embedder",
        blocks=("ZImageTransformerBlock",),
        processors=("ZSingleStreamAttnProcessor",),
        reads="cap_feat_dim",
    )
}
CODECS = {"ZImagePipeline": ZImage}
