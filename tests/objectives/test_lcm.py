from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_maps import Perceptron
from oracle import LEAN, Leaning, play, walk

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.core.times import Grid
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import consistency
from fewstep.objectives.base import Triad
from fewstep.objectives.lcm import Config, Objective

LAW = (1.0, 0.7)


class Deaf(GaussianModel):
    """Learns, and does not hear what it is told."""


def labelled(rows: int, seed: int = 0, dims: int = 3) -> Batch:
    draw = Draw(seed, 0, torch.arange(rows))
    x0 = LAW[0] + LAW[1] * draw.normal("x0", (dims,))
    return Batch(
        draw.normal("noise", (dims,)), Condition({"class_labels": torch.zeros(rows, dtype=torch.long)}), draw, x0
    )


def of(net: Backbone, scale: float = 1.0, **changes: Any) -> Objective:
    teacher = Guided(Leaning(*LAW, Flow(), "flow_prediction"), scale)
    return Objective(Config(**{"target": "self", **changes}), Triad(net, teacher), walk((1.0,)))


def test_one_guidance_is_consistency_distillation() -> None:
    """low = high = w against a teacher of that guidance, whatever model.guidance says: the same loss and gradient."""
    for w in (1.0, 1.8):
        net = Deaf(0.2, 0.9, Flow(), "flow_prediction", learned=True)
        ours = of(net, 3.0, guidance_low=w, guidance_high=w, embed=False, grid=Grid(9))
        plain = consistency.Objective(
            consistency.Config(target="self", grid=Grid(9)),
            replace(ours.triad, real_score=Guided(ours.triad.real_score.inner, w)),  # type: ignore[union-attr]
            walk((1.0,)),
        )
        one, other = (play(objective, labelled(64))["generator"] for objective in (ours, plain))
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one["generator.mean"] == pytest.approx(other["generator.mean"], rel=1e-5)


def test_every_sample_has_a_guidance_that_both_ends_are_told() -> None:
    heard: list[torch.Tensor] = []

    class Ear(Deaf):
        def forward(self, x_t, t, cond, **more):
            heard.append(cond.dials["guidance"])
            return super().forward(x_t, t, cond, **more)

    objective = of(Ear(0.2, 0.9, Flow(), "flow_prediction", learned=True), guidance_low=1.0, guidance_high=3.0)
    batch = labelled(2000)
    list(objective.turns(batch, 0))
    assert torch.equal(*heard) and torch.equal(heard[0], objective.scales(batch))
    assert heard[0].min() >= 1 and heard[0].max() <= 3
    assert heard[0].mean().item() == pytest.approx(2.0, abs=4 * 2 / 12**0.5 / 2000**0.5)


def test_the_teacher_steps_with_that_guidance() -> None:
    """The Gaussian without a label leans by -.4, so guidance w moves the mean that a step leads to by .4 (w - 1)."""
    objective = of(Deaf(*LAW, Flow(), "flow_prediction"), guidance_low=1.0, guidance_high=3.0)
    batch = labelled(512, dims=1)
    t, m = torch.full((512,), 0.9), torch.zeros(512)
    x_t = batch.noise
    plain = objective.triad.real_score.inner(x_t, t, batch.cond)  # type: ignore[union-attr]
    led = objective.cleaner(x_t, batch.x0, batch.noise, t, m, batch)  # type: ignore[arg-type]
    null = objective.triad.real_score.inner(x_t, t, objective.triad.real_score.null(batch.cond))  # type: ignore[union-attr]
    w = objective.scales(batch)[:, None]
    assert torch.allclose(led, null.x0 + w * (plain.x0 - null.x0), atol=1e-5)
    assert ((led - plain.x0) / (w - 1)).median() == pytest.approx(
        (plain.x0 - null.x0).mean().item(), rel=1e-3
    ) and LEAN == 0.4


def test_an_adapter_without_embedding_is_told_nothing() -> None:
    assert Objective.tells(Config(embed=False, guidance=9.0)) == {} and Objective.tells(Config()) == {"guidance": 1.5}
    objective = of(Deaf(*LAW, Flow(), "flow_prediction"), embed=False)
    assert objective.told(labelled(4)).dials == {}


def test_one_network_learns_every_guidance() -> None:
    """One step of 10 Euler steps' worth: its mean rises with the guidance it is told as the guided teacher's does.

    The rms distance to the teacher's own walk of 6 steps.
    """
    torch.manual_seed(0)
    net = Perceptron(told=1)
    objective = of(net, distance="l2", grid=Grid(6), guidance_low=1.0, guidance_high=3.0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for step in range(1500):
        (turn,) = objective.turns(labelled(256, step, 1), step)
        optimizer.zero_grad()
        turn.loss.backward()
        optimizer.step()
        falling.step()
    batch = labelled(512, 99, 1)
    for w in (1.0, 2.0, 3.0):
        x, teacher = batch.noise, Guided(objective.triad.real_score.inner, w)  # type: ignore[union-attr]
        for i in range(6):
            t = torch.full((512,), 1 - i / 6)
            x = teacher(x, t, batch.cond).to(t - 1 / 6 if i < 5 else torch.zeros(512))
        with torch.no_grad():
            ours = net(batch.noise, torch.ones(512), Condition({}, {"guidance": torch.full((512,), w)})).x0
        assert (ours - x).square().mean().sqrt() < 0.08


@pytest.mark.parametrize(
    "wrong",
    [{"guidance_low": 3.0, "guidance_high": 2.0}, {"guidance": 9.0}, {"mode": "training"}, {"guidance_low": -1.0}],
)
def test_contradictions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_networks_that_hear_nothing_are_refused() -> None:
    objective = of(Deaf(*LAW, Flow(), "flow_prediction"))
    with pytest.raises(UserError, match="told nothing"):
        objective.attach(torch.zeros(2, 3), Condition())
