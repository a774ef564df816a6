"""Class-conditional UNets on pixels."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.family import Family


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    return net(x, timestep, class_labels=cond.inputs.get("class_labels"), return_dict=False)[0]


ROWS = {
    "UNet2DModel": Family(
        call=_call,
        tap=lambda net: "mid_block",
        time_embedding="time_embedding",
        blocks=("ResnetBlock2D", "Attention"),
        processors=("AttnProcessor2_0",),
        classes=lambda net: net.config.num_class_embeds,
    )
}
