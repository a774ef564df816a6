"""Lumina 2: one stream of text and image, whose time runs the other way."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models import schedulers
from fewstep.models.codec import Codec
from fewstep.models.family import Family, linearly, middle
from fewstep.models.shaped import is_unknown


class _Lengths(list[int]):
    tolist = list.copy


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    texts, mask = cond.inputs["encoder_hidden_states"], cond.inputs["encoder_attention_mask"].long()
    if is_unknown(mask):
        # The network asks how long each text is, which a mask that is only shaped does not know: all of it.
        mask.sum = lambda dim: _Lengths([mask.shape[dim]] * len(mask))  # type: ignore[method-assign, assignment]
    return -net(x, 1 - timestep / 1000, texts, mask, return_dict=False)[0]


def _kept_to_norm(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """Every row of pixels as long as without guidance."""
    guided = linearly(unconditional, conditional, scale)
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class Lumina2(Codec):
    """The last but one states of a Gemma, which reads a sentence about its task before a prompt, not a negative one."""

    EVEN_SIGMAS = True
    max_sequence_length = 256

    def time_shift(self, scheduler, shape):
        # Its pipeline takes the number of channels for that of tokens.
        return schedulers.time_shift(scheduler, schedulers.mu_of(scheduler, shape[0]))

    def _written(self, prompt):
        return f"{self.pipeline.system_prompt} <Prompt Start> {prompt}"

    def _read(self, texts):
        return self.pipeline._get_gemma_prompt_embeds(texts, self._device, self.max_sequence_length)

    def _embed(self, prompts):
        embeds, mask = self._read([self._written(prompt) for prompt in prompts])
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def _embed_negative(self, prompts):
        embeds, mask = self._read(prompts)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, self.pipeline.transformer.config.patch_size)


ROWS = {
    "Lumina2Transformer2DModel": Family(
        call=_call,
        tap=middle("layers"),
        time_embedding="time_caption_embed.timestep_embedder",
        blocks=("Lumina2TransformerBlock",),
        processors=("Lumina2AttnProcessor2_0",),
        reads="cap_feat_dim",
        guide=_kept_to_norm,
    )
}
CODECS = {"Lumina2Pipeline": Lumina2}
