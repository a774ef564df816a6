"""For objectives whose Config has `tangent`: how the derivative of the generator is taken, which a run then says."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.models.backbone import Backbone
from fewstep.models.tangent import Way, choose


class Derivative:
    """To be mixed into an objective, whose `attach` calls `choose_way`."""

    config: Any
    said: list[str]
    way: Way

    def choose_way(self, net: Backbone, x: Tensor, cond: Condition, to: bool = False) -> None:
        """By inputs such as x (B, *S). Raises UserError for a way that was asked for and that `net` does not allow."""
        self.way, why = choose(net, x, cond, self.config.tangent, to)
        if not x.is_meta:
            self.said.append(f"derivative of the generator: {self.way}, {why}")
