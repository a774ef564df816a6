"""ArcFlow: the policy's closed form, and the objective that trains it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_maps import LAW, VP, teacher_of
from oracle import walk
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.models.policy import Policy, PolicyNet, grown
from fewstep.objectives.arcflow import Config, Objective
from fewstep.objectives.base import Triad
from fewstep.rollout import ode, renoise


def policy(modes: int = 3, double: bool = True) -> Policy:
    kind = torch.float64 if double else torch.float32
    torch.manual_seed(0)
    x, t = torch.randn(4, 2, dtype=kind), torch.tensor([1.0, 0.9, 0.7, 0.5], dtype=kind)
    said, rates = torch.randn(4, modes, 2, dtype=kind), torch.linspace(-2, 2, modes, dtype=kind)
    return Policy(x, "flow_prediction", x, t, Flow(), modes=said, rates=rates)


def test_the_closed_form_is_the_integral() -> None:
    """Against 20,000 midpoints in float64, rates from -2 to 2, one of them 0: 1e-8."""
    one = policy()
    s = one.t * 0.3
    count = 20_000
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    past = (one.t - s)[:, None] * middle
    speed = (one.modes[:, None] * torch.exp(one.rates * past[:, :, None])[..., None]).sum(2)
    moved = speed.mean(1) * (one.t - s)[:, None]
    x_s = one.x_t.float() - moved
    assert (one.to(s) - x_s).abs().max() < 1e-6
    exact = (one.modes * ((one.t - s)[:, None] * grown(one.rates * (one.t - s)[:, None]))[..., None]).sum(1)
    assert (exact - moved).abs().max() < 1e-8


def test_walks_of_parts_are_the_whole() -> None:
    """x(t - d) by way of any time between, the mean velocities weighted by their lengths."""
    one = policy()
    m, s = one.t * 0.6, one.t * 0.2
    whole = one.between(one.t, s) * (one.t - s)[:, None]
    parts = one.between(one.t, m) * (one.t - m)[:, None] + one.between(m, s) * (m - s)[:, None]
    assert torch.allclose(whole, parts, atol=1e-12)


def test_one_mode_without_momentum_is_an_euler_step() -> None:
    one = policy(1)
    still = Policy(
        one.x_t, "flow_prediction", one.x_t, one.t, Flow(), modes=one.modes, rates=torch.zeros(1, dtype=torch.float64)
    )
    euler = Prediction(one.modes[:, 0], "flow_prediction", one.x_t, one.t, Flow())
    for s in (0.0, 0.3, 0.5):
        at = torch.full((4,), s, dtype=torch.float64)
        assert torch.allclose(still.to(at).float(), euler.to(at), atol=1e-6)
    assert torch.allclose(still.velocity.float(), euler.velocity, atol=1e-6)


def test_x0_and_eps_are_those_of_the_line_to_the_end() -> None:
    one = policy(double=False)
    line = (1 - one.t)[:, None] * one.x0 + one.t[:, None] * one.eps
    assert torch.allclose(line, one.x_t, atol=1e-5) and torch.allclose(one.x0, one.to(torch.zeros(4)), atol=1e-6)


def test_the_quotient_is_smooth_at_zero() -> None:
    x = torch.tensor([-1e-3, -1e-4, -1e-5, 0.0, 1e-5, 1e-4, 1e-3], dtype=torch.float64)
    assert (grown(x) - (1 + x / 2 + x * x / 6)).abs().max() < 1e-10
    y = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(grown(y).sum(), y)
    assert slope.item() == pytest.approx(0.5)


def of(net: Backbone, **changes: Any) -> Objective:
    config = Config(**{"modes": 4, "mixing": 0, **changes})
    return Objective(config, Triad(net, Guided(teacher_of())), walk((1.0, 0.5), ode))


def noise(rows: int, seed: int = 0) -> Batch:
    draw = Draw(seed, seed, torch.arange(rows))
    return Batch(draw.normal("noise", (1,)), Condition(), draw)


def test_at_the_start_it_is_the_network() -> None:
    """A layer of zeros: every mode is the network's velocity. The rates make the way .4 % longer, 0 not at all."""
    x, t = torch.randn(8, 1), torch.ones(8)
    plain = teacher_of()(x, t, Condition())
    for modes in (4, 16):
        net = PolicyNet(teacher_of(), modes, 8, torch.zeros(2, 1))  # type: ignore[arg-type]
        way = (net(x, t, Condition()).x0 - x) / (plain.x0 - x)
        assert way.min() > 1.002 and way.max() < 1.006
        nn.init.zeros_(net.rates)
        assert torch.allclose(net(x, t, Condition()).to(0.5 * t), plain.to(0.5 * t), atol=1e-5)


def test_states_come_from_the_policy_without_data_and_gradient() -> None:
    net = PolicyNet(GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True), 4, 8, torch.zeros(2, 1))  # type: ignore[arg-type]
    objective = of(net)
    assert objective.reads == ()
    for seed in range(4):
        start, said = objective.asked(noise(16, seed), seed % 2)
        assert not start.requires_grad and said.modes.requires_grad
        expected = noise(16, seed).noise if seed % 2 == 0 else start
        assert torch.equal(start, expected) and (said.t == (1.0 if seed % 2 == 0 else 0.5)).all()


def test_the_share_of_the_teachers_states_falls() -> None:
    objective, batch = of(PolicyNet(teacher_of(), 2, 8, torch.zeros(2, 1)), mixing=100), noise(4000)  # type: ignore[arg-type]
    shares = [objective.taught(batch, step, batch.noise).float().mean().item() for step in (0, 50, 100, 300)]
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=0.04)


class Wide(Backbone):
    """A policy of x and t by a small network, all of its modes free."""

    def __init__(self, modes: int = 4):
        super().__init__()
        self.schedule, self.kind, self.modes = Flow(), "flow_prediction", modes
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, modes))
        self.rates = nn.Parameter(torch.linspace(-1, 1, modes))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition, *, to=None, taps=(), stop=False) -> Policy:
        said = self.layers(torch.cat([x_t, t[:, None]], 1))[:, :, None]
        return Policy(x_t, "flow_prediction", x_t, t, Flow(), modes=said, rates=self.rates)


def test_two_segments_learn_a_bent_way() -> None:
    """Without data, to 1 + .7 z: nearer than the two Euler steps of the teacher, by far."""
    torch.manual_seed(0)
    net = Wide()
    objective = of(net, mixing=200)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for step in range(1000):
        (turn,) = objective.turns(noise(256, step), step)
        optimizer.zero_grad()
        turn.loss.backward()
        optimizer.step()
        falling.step()
    z = torch.randn(2048, 1, generator=torch.Generator().manual_seed(1))
    draw = Draw(0, 0, torch.arange(2048))
    with torch.no_grad():
        ours, euler = (objective.rollout(one, z, Condition(), draw).x0 for one in (net, teacher_of()))
    far = [(x - (LAW[0] + LAW[1] * z)).square().mean().sqrt() for x in (ours, euler)]
    assert far[0] < 0.08 < 0.15 < far[1]


def test_refusals() -> None:
    with pytest.raises(UserError, match="take a flow teacher"):
        PolicyNet(teacher_of(VP, "epsilon"), 4, 8, torch.zeros(2, 1))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.transition=ode"):
        Objective(Config(), Triad(Wide(), Guided(teacher_of())), walk((1.0, 0.5), renoise))
    for wrong in ({"modes": 0}, {"window": 0.0}, {"mixing": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Config(**wrong)  # type: ignore[arg-type]
