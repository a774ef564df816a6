"""Diversity distillation (Gandikota & Bau 2025, arXiv:2503.10637): the base model decides the layout, the student ends.

Nothing is trained: the first steps of a student, which decide what an image is of, are walked by the many-step base
model instead. Its walk is cut where its levels come nearest to the student's and its last step lands exactly on the
student's level, so the latent that is handed over has the noise that the student expects.
"""

from __future__ import annotations

from fewstep.core.errors import UserError
from fewstep.models.backbone import Backbone, passes
from fewstep.rollout import Rollout, Sample


class Relay(Rollout):
    """`walk` by `base` in place of the first `first` steps of `own`, then the rest of `own` by the network called.

    first = 0 is the student alone, first = len(own) the base model alone. Raises UserError for other numbers.
    """

    def __init__(self, base: Backbone, walk: Rollout, own: Rollout, first: int):
        if not 0 <= first <= len(own):
            raise UserError(f"--base-first is from 0 to the {len(own)} steps of the student, but {first} was given")
        super().__init__(own.steps, own.step, own.two_times, own.count, own.tells)
        self.base, self.base_walk, self.first = base, walk, first
        rest = own.steps[first:]
        self.rest = Rollout(rest, own.step, own.two_times, own.count, own.tells) if rest else None
        self.handover = own.level_after(first - 1) if first else 1.0
        self.base_steps = self._cut() if first else 0

    def __len__(self) -> int:
        return self.base_steps + (len(self.steps) - self.first)

    def _cut(self) -> int:
        """How many steps the base model takes: up to its level nearest to the handover, and at least one."""
        reached = [self.base_walk.level_after(i) for i in range(len(self.base_walk))]
        nearest = min(range(len(reached)), key=lambda i: abs(reached[i] - self.handover))
        return nearest + 1

    def passes(self, net: Backbone) -> float:
        return self.base_steps * passes(self.base) + (len(self.steps) - self.first) * passes(net)

    def __call__(self, net, noise, cond, draw, *, exit=None, stop=0.0, grad=0, purpose="rollout") -> Sample:
        if exit is not None or stop or grad:
            raise ValueError("a relay is walked from noise to the clean sample, without a gradient")
        if self.first:
            taken = self.base_walk(self.base, noise, cond, draw, exit=self.base_steps - 1, stop=self.handover)
            if self.rest is None:
                return taken
            noise = taken.x / net.schedule.prior_std  # a rollout scales its first state by this
        assert self.rest is not None
        return self.rest(net, noise, cond, draw, purpose=purpose)
