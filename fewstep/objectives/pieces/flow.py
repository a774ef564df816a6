"""Any network read as another process with a velocity: linear, x_t = (1 - t) x0 + t eps, or of angles."""

from __future__ import annotations

from fewstep.core.schedule import Flow, Trig
from fewstep.models.backbone import Backbone, Remapped


def as_flow(net: Backbone) -> Backbone:
    """Itself, if it is one; else the flow that it stands for, at the time with the same sigma / alpha."""
    plain = isinstance(net.schedule, Flow) and net.kind == "flow_prediction"
    return net if plain else Remapped(net, Flow(), "flow_prediction")


def as_angles(net: Backbone) -> Backbone:
    """The same for x = cos(a) x0 + sin(a) eps, at t = a / (pi / 2); the output is dx/da = cos(a) eps - sin(a) x0."""
    plain = isinstance(net.schedule, Trig) and net.kind == "v_prediction"
    return net if plain else Remapped(net, Trig(), "v_prediction")
