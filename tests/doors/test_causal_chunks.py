"""Video made chunk by chunk: a backbone that remembers clean chunks, and an objective that rolls out one after another.

The truth is a chain x_k = A x_{k-1} + B n with unit normal n, whose law at every chunk is known.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective, Triad, Turn
from fewstep.rollout import Rollout, Sample, Step, ode

A, B, CHUNKS = 0.8, 0.5, 4
WALK = Rollout([Step(1 - i / 64, 1 - i / 64) for i in range(64)], ode)


class Causal(Backbone):
    """The exact denoiser of the next chunk given the last one in the cache; `learned` is the coefficient A."""

    def __init__(self, coefficient: float):
        super().__init__()
        self.learned = nn.Parameter(torch.tensor(coefficient))
        self.schedule, self.kind = Flow(), "flow_prediction"
        self.cache: list[Tensor] = []

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        """N(A x_{k-1}, B^2) is N(0, B^2) moved by m: so is its velocity at x_t - alpha m, less m."""
        mean = self.learned * self.cache[-1] if self.cache else torch.zeros(1)
        centred = GaussianModel(0.0, B if self.cache else 1.0, self.schedule, self.kind)
        value = centred(x_t - self.schedule.at(t, x_t).alpha * mean, t, cond).value - mean
        return Prediction(value, self.kind, x_t, t, self.schedule)


class Chunks(Objective):
    def roll(self, batch: Batch, grad: bool) -> list[Sample]:
        """Every chunk from its own noise, each added to the cache once it is clean."""
        net, made = self.triad.generator, []
        net.cache.clear()
        for k, noise in enumerate(batch.noise.unbind(1)):
            made.append(self.rollout(net, noise, batch.cond, batch.draw, grad=int(grad), purpose=f"chunk.{k}"))
            net.cache.append(made[-1].x0.detach())
        net.cache.clear()
        return made

    def turns(self, batch: Batch, step: int):
        made = torch.stack([one.x0 for one in self.roll(batch, grad=True)], 1)
        lag_one = (made[:, 1:] * made[:, :-1].detach()).mean()
        yield Turn("generator", (lag_one - A).square(), {"lag one": lag_one.detach()})


def videos(ids: Tensor, step: int) -> Batch:
    draw = Draw(1, step, ids)
    return Batch(draw.normal("noise", (CHUNKS, 1)), Condition(), draw)


def test_the_chain_has_its_law(stage: Any) -> None:
    """Deviation of every chunk and covariance with the one before, at 20,000 samples, to four standard errors."""
    made = stage(Chunks, Triad(Causal(A)), WALK).objective.roll(videos(torch.arange(20_000), 0), grad=False)
    variance = 1.0
    for before, after in pairwise(made):
        covariance = (before.x0 * after.x0).mean().item()
        assert covariance == pytest.approx(A * variance, abs=4 * 1.5 / 20_000**0.5)
        variance = A**2 * variance + B**2
        assert after.x0.var().item() == pytest.approx(variance, abs=4 * 1.5 * variance / 20_000**0.5 + 0.01)


def test_the_gradient_reaches_the_last_pass_of_every_chunk(stage: Any) -> None:
    """The coefficient is learned from the lag-one covariance that the cache carries."""
    one = stage(Chunks, Triad(Causal(0.2)), Rollout([Step(1.0, 1.0), Step(0.5, 0.5)], ode), lr=0.02)
    logs = one.play(videos, steps=60, rows=64)
    assert logs[0]["lag one"] < 0.4
    assert one.objective.triad.generator.learned.item() > 0.6
