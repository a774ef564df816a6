"""Guidance in one pass: on data, and by adapters on the guided teacher's own way (AGD)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_maps import Perceptron
from oracle import Leaning, play, walk
from test_lcm import LAW, Deaf, labelled

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Backbone, Guided
from fewstep.objectives import agd, guidance_distillation
from fewstep.objectives.base import Triad
from fewstep.rollout import ode

BOTH = pytest.mark.parametrize("module", [guidance_distillation, agd], ids=["data", "adapters"])


class Told(Leaning):
    """The guided answer in one pass, exactly, for the guidance that it is told."""

    def forward(self, x_t, t, cond, **more):
        if "guidance" not in cond.dials:
            return super().forward(x_t, t, cond)
        plain = Leaning(*LAW, Flow(), "flow_prediction")
        return Guided(plain, cond.dials["guidance"])(x_t, t, Condition(cond.inputs))


def of(module: Any, net: Backbone, **changes: Any) -> Any:
    teacher = Guided(Leaning(*LAW, Flow(), "flow_prediction"), 7.0)
    return module.Objective(module.Config(**changes), Triad(net, teacher), walk((1.0, 0.5), ode))


@BOTH
def test_the_exact_answer_has_no_loss(module: Any) -> None:
    objective = of(module, Told(*LAW, Flow(), "flow_prediction", learned=True))
    (turn,) = objective.turns(labelled(128), 0)
    assert turn.loss < 1e-10


@BOTH
def test_without_guidance_the_teachers_copy_is_right(module: Any) -> None:
    """w = 1: the identity, loss and gradient zero; w = 3 is not."""
    losses = []
    for w in (1.0, 3.0):
        copy_of = Deaf(*LAW, Flow(), "flow_prediction", learned=True)
        played = play(of(module, copy_of, guidance_low=w, guidance=w, guidance_high=w), labelled(256))["generator"]
        losses.append((played.loss, abs(played["generator.mean"])))
    assert losses[0][0] < 1e-10 and losses[0][1] < 1e-5 and losses[1][0] > 1e-3 and losses[1][1] > 1e-3


def test_the_target_is_linear_in_the_guidance() -> None:
    objective, batch = of(guidance_distillation, Deaf(*LAW, Flow(), "flow_prediction")), labelled(64)
    x, t = batch.noise, torch.full((64,), 0.6)
    one, two, three = (objective.teacher(torch.full((64,), w))(x, t, batch.cond).value for w in (1.0, 2.0, 3.0))
    assert torch.allclose(three - two, two - one, atol=1e-5) and (two - one).abs().max() > 0.1


def test_states_of_adapters_are_the_guided_way() -> None:
    """No data; every state of the walk from noise at the row's own guidance."""
    objective, batch = of(agd, Deaf(*LAW, Flow(), "flow_prediction"), route=4), replace(labelled(32), x0=None)
    x_t, t, w = objective.states(batch)
    assert objective.reads == () and x_t.shape == (128, 3)
    assert t.reshape(4, 32)[:, 0].tolist() == [1.0, 0.75, 0.5, 0.25] and torch.equal(w[:32], w[96:])
    x = batch.noise
    for i in range(4):
        assert torch.allclose(x_t[32 * i : 32 * (i + 1)], x, atol=1e-5)
        x = objective.teacher(w[:32])(x, t[32 * i : 32 * (i + 1)], batch.cond).to(t[32 * i : 32 * (i + 1)] - 0.25)
    (turn,) = objective.turns(batch, 0)
    assert turn.loss.isfinite()


class Bent(Perceptron):
    """The teacher's own answer and what a small network adds to it, told the guidance."""

    def forward(self, x_t, t, cond, **more):
        plain = Leaning(*LAW, Flow(), "flow_prediction")(x_t, t, Condition(cond.inputs)).value
        added = super().forward(x_t, t, Condition({}, cond.dials)).value
        return Prediction(plain + added, self.kind, x_t, t, self.schedule)


@BOTH
def test_one_pass_learns_every_guidance(module: Any) -> None:
    """rms distance to the guided answer at the middle of time, for three guidances (seen: .11, untrained 1.07)."""
    torch.manual_seed(0)
    net = Bent(told=1)
    batch, t = labelled(512, 99, 1), torch.full((512,), 0.5)

    def far(w: float) -> float:
        truth = Guided(Leaning(*LAW, Flow(), "flow_prediction"), w)(batch.noise, t, batch.cond).value
        told = Condition(batch.cond.inputs, {"guidance": torch.full((512,), w)})
        with torch.no_grad():
            return float((net(batch.noise, t, told).value - truth).square().mean().sqrt())

    plain = Leaning(*LAW, Flow(), "flow_prediction")(batch.noise, t, batch.cond).value
    three = Guided(Leaning(*LAW, Flow(), "flow_prediction"), 3.0)(batch.noise, t, batch.cond).value
    untrained = float((plain - three).square().mean().sqrt())
    objective = of(module, net, guidance_low=1.0, guidance=2.0, guidance_high=4.0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for step in range(1000):
        (turn,) = objective.turns(labelled(128, step, 1), step)
        optimizer.zero_grad()
        turn.loss.backward()
        optimizer.step()
        falling.step()
    assert max(far(w) for w in (1.0, 2.0, 3.0)) < 0.16 * untrained


def test_what_it_is_told_and_what_it_refuses() -> None:
    assert guidance_distillation.Objective.tells(guidance_distillation.Config()) == {"guidance": 2.0}
    for wrong in ({"guidance_low": 3.0}, {"guidance": 9.0}):
        with pytest.raises(UserError, match="in this order"):
            guidance_distillation.Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="route"):
        agd.Config(route=0)
    with pytest.raises(UserError, match="told nothing"):
        of(agd, Deaf(*LAW, Flow(), "flow_prediction")).attach(torch.zeros(2, 3), Condition())
