"""SlimFlow, and RF++ beside it: what they change of reflow."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_maps import LAW, Perceptron, one_step_error, teacher_of
from oracle import play, walk
from torch import Tensor

from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import rectified_flow, rf_plus_plus, slimflow
from fewstep.objectives.base import Triad
from fewstep.rollout import ode


def paired(rows: int, seed: int = 0, dims: int = 1) -> Batch:
    """Pairs of the exact map, 1 + .7 z."""
    draw = Draw(seed, 0, torch.arange(rows))
    z = draw.normal("z", (dims,))
    return Batch(draw.normal("noise", (dims,)), Condition(), draw, pair=Pair(z, LAW[0] + LAW[1] * z, Condition()))


def of(net: Backbone, target: Backbone | None = None, **changes: Any) -> slimflow.Objective:
    triad = Triad(net, target_score=None if target is None else Guided(target))  # type: ignore[arg-type]
    return slimflow.Objective(slimflow.Config(**changes), triad, walk((1.0,), ode))


def test_noise_is_annealed_from_independent_to_paired_and_stays_unit() -> None:
    objective, batch = of(teacher_of(), anneal=100), paired(50_000)
    assert batch.pair is not None
    for step, kept in ((0, 0.0), (50, 0.75**0.5), (100, 1.0), (500, 1.0)):
        z = objective.annealed(batch, batch.pair, step)
        assert z.var().item() == pytest.approx(1, abs=4 * (2 / 50_000) ** 0.5)
        assert (z * batch.pair.noise).mean().item() == pytest.approx(kept, abs=4 / 50_000**0.5)
    assert torch.equal(objective.annealed(batch, batch.pair, 100), batch.pair.noise)


def test_after_the_annealing_it_is_reflow() -> None:
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    plain = rectified_flow.Objective(rectified_flow.Config(), Triad(copy.deepcopy(net)), walk((1.0,), ode))
    for ours, step in ((of(net, anneal=10), 10), (of(net, anneal=0), 0)):
        one, other = (play(objective, paired(128), step)["generator"] for objective in (ours, plain))
        assert one.loss == other.loss and one["generator.mean"] == other["generator.mean"]


def test_before_it_is_flow_matching() -> None:
    """b = 1: the best velocity at the middle is the teacher's own there, not the straight one of the pairs."""
    objective, batch = of(teacher_of(), anneal=100), paired(100_000)
    assert batch.pair is not None
    z, t = objective.annealed(batch, batch.pair, 0), torch.full((100_000,), 0.5)
    x_t = 0.5 * batch.pair.x0 + 0.5 * z
    off = (z - batch.pair.x0) - teacher_of()(x_t, t, Condition()).value
    for weight in (torch.ones_like(x_t), x_t):
        assert ((off * weight).mean().abs() < 4 * (off * weight).std() / 100_000**0.5).all()


def test_a_straight_flow_looked_at_again_says_the_same() -> None:
    """The one step of a straight reflowed network and its second look agree; a bent one's do not."""

    class Straight(GaussianModel):
        def forward(self, x_t, t, cond, **more):
            z = (x_t - (1 - t)[:, None] * LAW[0]) / ((1 - t) * LAW[1] + t)[:, None]
            return replace(super().forward(x_t, t, cond), value=z - (LAW[0] + LAW[1] * z))

    straight = Straight(*LAW, Flow(), "flow_prediction")
    batch = paired(256)
    for net, low, high in ((straight, 0.0, 1e-10), (teacher_of(), 1e-2, 10.0)):
        loss = of(net, straight, phase="distill", target_teacher="x").looked_again(batch)
        assert low <= loss < high


def test_only_the_one_step_learns_from_the_second_look() -> None:
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    target = GaussianModel(*LAW, Flow(), "flow_prediction", learned=True).requires_grad_(False)
    turn = play(of(net, target, phase="distill", target_teacher="x"), paired(64))["generator"]
    assert turn.touched() == {"generator"}
    assert slimflow.Objective.needs(slimflow.Config(phase="distill", guided=0.0)) == ("generator",)
    assert slimflow.Objective.needs(slimflow.Config(phase="distill", target_teacher="x")) == (
        "generator",
        "target_score",
    )


def learn(objective: Any, steps: int) -> None:
    optimizer = torch.optim.Adam(objective.triad.generator.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        (turn,) = objective.turns(paired(256, step), step)
        optimizer.zero_grad()
        turn.loss.backward()
        optimizer.step()
        falling.step()


def test_a_new_network_learns_the_map_in_two_phases() -> None:
    torch.manual_seed(0)
    net = Perceptron()
    learn(of(net, anneal=400), 800)
    target = copy.deepcopy(net).requires_grad_(False)
    learn(of(net, target, phase="distill", target_teacher="x"), 300)
    assert one_step_error(net) < 0.05


@pytest.mark.parametrize("wrong", [{"anneal": -1}, {"guided": -1.0}, {"phase": "distill"}])
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        slimflow.Config(**wrong)


def seen(x: Tensor) -> list[Tensor]:
    return [x, 2 * x.square()]


def plus(net: Backbone, **changes: Any) -> rf_plus_plus.Objective:
    found = rf_plus_plus.Objective(rf_plus_plus.Config(**changes), Triad(net), walk((1.0,), ode))
    found.perceive = seen
    return found


def test_times_are_u_shaped() -> None:
    """Density e^(4t) + e^(-4t), about the middle: symmetric, and cosh 2 = 3.8 times as dense at the ends as in it."""
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    t = rf_plus_plus.Config().times(u, Flow())
    counts = torch.histc(t, 10, 0, 1) / len(t)
    assert torch.allclose(counts, counts.flip(0), atol=4 * (0.2 / 200_000) ** 0.5)
    edges = torch.linspace(0, 1, 11)
    below = torch.sinh(2 * (2 * edges - 1)) / torch.sinh(torch.tensor(2.0))
    assert torch.allclose(counts, (below[1:] - below[:-1]) / 2, atol=4 * (0.2 / 200_000) ** 0.5)


def test_the_loss_by_hand() -> None:
    """(1 - t) Huber of the velocity over d, and the perceptual distance over t."""
    net, batch = GaussianModel(0.2, 0.9, Flow(), "flow_prediction"), paired(64, dims=3)
    objective, pair = plus(net, perceptual=0.7), paired(64, dims=3).pair
    assert pair is not None
    loss, x0 = objective.reflow(batch, pair)
    t = objective.config.times(batch.draw.uniform("reflow.t"), Flow())
    x_t = (1 - t)[:, None] * pair.x0 + t[:, None] * pair.noise
    off = net(x_t, t, Condition()).value - (pair.noise - pair.x0)
    c = 5.4e-4 * 3
    robust = ((off.square().sum(1) + c * c).sqrt() - c) / 3
    apart = (x0 - pair.x0).square().sum(1) + (2 * x0.square() - 2 * pair.x0.square()).square().sum(1)
    assert loss.item() == pytest.approx(((1 - t) * robust + 0.7 * apart / t).mean().item(), rel=1e-5)


def test_one_step_of_the_better_reflow_learns_the_map() -> None:
    torch.manual_seed(0)
    net = Perceptron()
    learn(plus(net, perceptual=0.1, times=Times(law="u_shape", std=2.0, low=0.05)), 900)
    assert one_step_error(net) < 0.06


def test_what_the_better_reflow_refuses() -> None:
    for wrong in ({"perceptual": -1.0}, {"distance": "l2"}, {"distance": "lpips"}):
        with pytest.raises(UserError):
            rf_plus_plus.Config(**wrong)  # type: ignore[arg-type]
    assert plus(teacher_of()).perception == "reader" and plus(teacher_of(), perceptual=0.0).perception is None
