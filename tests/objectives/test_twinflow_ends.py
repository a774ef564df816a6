from __future__ import annotations

from typing import Any

import pytest
import torch
from maps import LAW, Jump, data_batch, error, train, walked
from oracle import at, told_batch, walk, whitened
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow
from fewstep.core.times import Step
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.twinflow import Config, Objective
from fewstep.rollout import Rollout, ode

FOUR = Rollout([Step(t, t) for t in (1.0, 0.75, 0.5, 0.25)], ode, two_times=True)


def objective_of(net: Backbone, **changes: Any) -> Objective:
    return Objective(Config(**{"ends": "any", "clamp": 1e6, **changes}), Triad(net), FOUR)


def gradient(law: tuple[float, float], short_step: float, kind: int) -> Tensor:
    """In mean and log-deviation, of the residual at t = .6 on exact moments; kind 0 ends at 0, 2 at r = .3."""
    x, eps = whitened(2)
    net = GaussianModel(*law, Flow(), "flow_prediction", learned=True)
    objective = objective_of(Jump(net), short_step=short_step, flow_times=at(0.6))
    objective.jumped(told_batch(x, eps, exit=kind), LAW[0] + LAW[1] * x).backward()
    return torch.stack([net.mean.grad, net.log_std.grad])


@pytest.mark.parametrize("kind", [0, 2])
def test_the_residual_at_the_exact_map_halves_with_the_short_step(kind: int) -> None:
    """To whatever time the jump goes, in the expectation; a map of another law keeps its gradient."""
    coarse, fine = (gradient(LAW, d, kind) for d in (0.02, 0.01))
    assert coarse.norm() < 0.02 and coarse[1] / fine[1] == pytest.approx(2, abs=0.15)
    assert gradient((-0.5, 1.3), 0.01, kind).norm() > 0.05


def test_the_ends() -> None:
    """A third each at 0, in the last twentieth below t, and evenly below t."""
    objective, batch = objective_of(Jump(GaussianModel(*LAW, Flow(), "flow_prediction"))), data_batch(30_000, dims=1)
    t = torch.full((30_000,), 0.8)
    end = objective.end(batch, t)
    assert end is not None and (end <= t).all()
    assert (end == 0).float().mean() == pytest.approx(1 / 3, abs=0.01)
    near = end >= 0.95 * t
    assert near.float().mean() == pytest.approx(1 / 3 + 1 / 60, abs=0.01)
    between = end[~near & (end > 0)]
    assert between.mean() == pytest.approx(0.5 * 0.95 * 0.8, abs=0.01)
    assert objective_of(Jump(GaussianModel(*LAW, Flow(), "flow_prediction"))).config.ends == "any"


def test_ways_below_the_short_step_are_flow_matching() -> None:
    """Residual u - (eps - x0), whatever the network says where the way ends."""
    x, eps = whitened(2)
    net = GaussianModel(0.2, 0.5, Flow(), "flow_prediction", learned=True)
    objective = objective_of(net, short_step=0.4, flow_times=at(0.6))  # r = .3
    objective.jumped(told_batch(x, eps, exit=2), x).backward()
    found = net.mean.grad.clone()
    net.zero_grad()
    t = torch.full((len(x),), 0.6)
    (0.5 * (net(0.4 * x + 0.6 * eps, t, Condition()).velocity - (eps - x)).square().mean()).backward()
    assert torch.allclose(found, net.mean.grad, rtol=1e-5)


class Told(Backbone):
    """A velocity that records the ends it was told, and with which sign."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = Flow(), "flow_prediction"
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        self.seen: list[tuple[Tensor, Tensor, float]] = []

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        sign = cond.dials.get("sign", torch.zeros_like(t))
        self.seen.append((t, to, float(sign[0])))
        value = self.layers(torch.stack([x_t[:, 0], t, to, sign], 1))
        return Prediction(value, self.kind, x_t, t, self.schedule)


def test_velocities_end_where_they_begin() -> None:
    """Every signed question is of a step of no length; the others are of steps down."""
    net = Told()
    list(objective_of(net).turns(data_batch(64, dims=1), 0))
    signed = [(t, to) for t, to, sign in net.seen if sign]
    assert len(signed) == 4 and all(torch.equal(t, to) for t, to in signed)
    others = [t - to for t, to, sign in net.seen if not sign]
    assert len(others) >= 3 and all((way > -1e-6).all() and (way > 1e-3).float().mean() > 0.6 for way in others)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_exact_steps_ends_alike(count: int) -> None:
    noise = torch.randn(64, 3)
    net = Jump(GaussianModel(*LAW, Flow(), "flow_prediction"))
    assert torch.allclose(walked(net, count, noise), 1 + 0.7 * noise, atol=1e-5)


def test_it_learns_the_map_from_data() -> None:
    """From random weights toward N(1, .7^2), 1,500 steps: one and four steps. Seen: .087 and .038."""
    torch.manual_seed(0)
    net = Told()
    train(objective_of(net, clamp=10.0, rectify=0.1, short_step=0.05), 1500, 3e-3)
    assert error(net) < 0.15 and error(net, 4) < 0.08


def test_the_walk_has_to_tell() -> None:
    net = GaussianModel(*LAW, Flow(), "flow_prediction")
    with pytest.raises(UserError, match=r"set model\.transition=ode or gamma"):
        Objective(Config(ends="any"), Triad(net), walk((1.0,), ode))
    assert Objective.two_times(Config(ends="any")) and not Objective.two_times(Config())
