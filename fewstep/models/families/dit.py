"""DiT: class-conditional transformers."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.family import Family, middle


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    output = net(x, timestep=timestep, class_labels=cond.inputs["class_labels"], return_dict=False)[0]
    # DiT may learn its variance: the first half of the channels is the prediction.
    return output[:, : x.shape[1]]


ROWS = {
    "DiTTransformer2DModel": Family(
        call=_call,
        tap=middle("transformer_blocks"),
        time_embedding="transformer_blocks.0.norm1.emb",
        blocks=("BasicTransformerBlock",),
        processors=("AttnProcessor2_0",),
        classes=lambda net: net.config.num_embeds_ada_norm + 1,
    )
}
