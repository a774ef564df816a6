from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flow_maps import NAMES, PROCESSES, Ending, Perceptron, data, guided, teacher_of, train
from oracle import play, walk

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.core.times import Grid
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import consistency, pcm
from fewstep.objectives.base import Triad
from fewstep.rollout import ode, renoise

FOUR = (1.0, 0.75, 0.5, 0.25)


def of(net: Backbone, times: tuple[float, ...] = FOUR, teacher: GaussianModel | None = None, **changes: Any) -> Any:
    config = pcm.Config(**{"distance": "l2", "grid": Grid(24), **changes})
    return pcm.Objective(config, Triad(net, guided(teacher or teacher_of())), walk(times, ode))


def phased(objective: Any, teacher: GaussianModel) -> None:
    """Puts the exact map to the edge of each phase in the generator's place."""
    objective.triad = Triad(Ending(teacher, objective.floor), objective.triad.real_score)


@pytest.mark.parametrize("times", [FOUR, (1.0, 0.9, 0.6, 0.3)])
def test_jumps_end_at_the_edge_of_their_phase(times: tuple[float, ...]) -> None:
    objective, batch = of(teacher_of(), times), data(2000)
    t, m = objective.neighbours(batch, 0)
    s = objective.ends(batch, t, m)
    edges = torch.tensor([*times[1:], 0.0])
    below = torch.stack([edges[edges < when - 1e-6].max() for when in t])
    assert torch.allclose(s, below) and (m >= s).all() and (m < t).all()
    assert len(s.unique()) == len(times)


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_the_exact_map_to_the_edges_has_no_loss(
    schedule: NoiseSchedule, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(schedule, kind)
    objective = of(teacher, teacher=teacher)
    phased(objective, teacher)
    monkeypatch.setattr(objective, "cleaner", lambda x_t, x0, eps, t, m, batch: teacher.flow_map(x_t, t, m))
    (turn,) = objective.turns(data(1024), 0)
    assert turn.loss < 1e-8


def test_the_phases_together_are_the_whole_way() -> None:
    teacher, objective = teacher_of(), of(teacher_of())
    phased(objective, teacher)
    noise = torch.randn(64, 3)
    x = objective.rollout(objective.triad.generator, noise, Condition(), Draw(0, 0, torch.arange(64))).x0
    assert torch.allclose(x, 1 + 0.7 * noise, atol=1e-5)


def test_one_phase_is_consistency() -> None:
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    ours = of(net, (1.0,))
    plain = consistency.Objective(
        consistency.Config(distance="l2", grid=Grid(24), target="self"),
        Triad(copy.deepcopy(net), ours.triad.real_score),
        walk((1.0,), ode),
    )
    one, other = (play(objective, data(256))["generator"] for objective in (ours, plain))
    assert one.loss == other.loss and one["generator.mean"] == other["generator.mean"]


def test_a_phase_for_each_interval_is_the_teacher() -> None:
    """Every target is the teacher's own step: no loss for its copy, the squared gap of one step for others."""
    times = tuple(1 - i / 6 for i in range(6))
    same = of(GaussianModel(1.0, 0.7, Flow(), "flow_prediction", learned=True), times, grid=Grid(6))
    assert play(same, data(256))["generator"].loss < 1e-12
    other = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    objective, batch = of(other, times, grid=Grid(6)), data(256)
    loss = play(objective, batch)["generator"].loss
    t, m = objective.neighbours(batch, 0)
    eps = batch.draw.normal("consistency.eps", (3,))
    x_t = (1 - t[:, None]) * batch.x0 + t[:, None] * eps
    gap = other(x_t, t, Condition()).to(m) - teacher_of()(x_t, t, Condition()).to(m)
    assert loss == pytest.approx(gap.square().mean().item(), rel=1e-4)


def test_four_steps_learn_the_way() -> None:
    """From random weights, told the time alone; the teacher takes 24 Euler steps."""
    torch.manual_seed(0)
    net = Perceptron()
    objective = of(net)
    train(objective, 1500)
    noise = torch.randn(4096, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = objective.rollout(net, noise, Condition(), Draw(0, 0, torch.arange(4096))).x0
    assert (x - (1 + 0.7 * noise)).square().mean().sqrt() < 0.08


def test_fresh_noise_between_phases_is_refused() -> None:
    with pytest.raises(UserError, match=r"set model\.transition=ode, or one step"):
        pcm.Objective(pcm.Config(), Triad(teacher_of(), guided(teacher_of())), walk(FOUR, renoise))
