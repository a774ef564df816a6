"""AuraFlow: joint and single transformer blocks that read a UMT5."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.codec import Codec
from fewstep.models.family import Family, middle, named_inputs


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    return named_inputs(net, x, timestep / 1000, cond)


class AuraFlow(Codec):
    """One UMT5, with zeros after the prompt and no mask."""

    max_sequence_length = 256

    def _embed(self, prompts):
        embeds, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self._device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, self.pipeline.transformer.config.patch_size)


ROWS = {
    "AuraFlowTransformer2DModel": Family(
        call=_call,
        tap=middle("single_transformer_blocks"),
        time_embedding="time_step_proj",
        blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
        processors=("AuraFlowAttnProcessor2_0",),
        reads="joint_attention_dim",
    )
}
CODECS = {"AuraFlowPipeline": AuraFlow}
