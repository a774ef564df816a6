"""Any network read as a flow: x_t = (1 - t) x0 + t eps, and the output a velocity."""

from __future__ import annotations

from fewstep.core.schedule import Flow
from fewstep.models.backbone import Backbone, Remapped


def as_flow(net: Backbone) -> Backbone:
    """Itself, if it is one; else the flow that it stands for, at the time with the same sigma / alpha."""
    plain = isinstance(net.schedule, Flow) and net.kind == "flow_prediction"
    return net if plain else Remapped(net, Flow(), "flow_prediction")
