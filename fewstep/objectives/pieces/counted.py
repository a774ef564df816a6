"""A critic of samples of several numbers of steps, which it is told."""

from __future__ import annotations

from fewstep.models.backbone import Backbone, Composite
from fewstep.rollout import counted


class Counted(Composite):
    """`inner`, told by the dial `steps` of how many steps the walk is that made its input."""

    def __init__(self, inner: Backbone, count: int):
        super().__init__(inner)
        self.count = count

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        return self.inner(x_t, t, counted(cond, self.count, x_t), to=to, taps=taps, stop=stop)
