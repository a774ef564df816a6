"""Two-time objectives on a flow that is not linear in the state: the map of a mixture of two Gaussians has no loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from maps import Jump
from oracle import walk

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.schedule import Flow
from fewstep.core.times import Times
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import MixtureModel
from fewstep.models.tangent import Tangent
from fewstep.objectives import align_your_flow, meanflow
from fewstep.objectives.base import Triad
from fewstep.rollout import ode

TANGENT, TIMES = Tangent("difference", 0.01), Times(low=0.02, high=0.98)
CASES: dict[str, Callable[[Triad], Any]] = {
    "meanflow": lambda triad: meanflow.Objective(
        meanflow.Config(tangent=TANGENT, times=TIMES, equal=0.2), triad, walk((1.0,), ode)
    ),
    **{
        form: lambda triad, form=form: align_your_flow.Objective(
            align_your_flow.Config(tangent=TANGENT, times=TIMES, equal=0.2, form=form), triad, walk((1.0,), ode)
        )
        for form in ("eulerian", "lagrangian")
    },
}


def mixture(shift: float = 0.0) -> MixtureModel:
    means = torch.tensor([[-1.5, 0.5], [1.0, -1.0]]) + shift
    return MixtureModel(means, 0.4, torch.tensor([0.3, 0.7]), Flow(), "flow_prediction")


def residual(name: str, net: MixtureModel, teacher: MixtureModel) -> float:
    objective = CASES[name](Triad(Jump(net), Guided(teacher)))  # type: ignore[arg-type]
    objective.attach(torch.zeros(2, 2), Condition())
    draw = Draw(0, 0, torch.arange(256))
    means = torch.where(draw.uniform("share")[:, None] < 0.3, *teacher.means)
    x0 = means + teacher.std * draw.normal("x0", (2,))
    (turn,) = objective.turns(Batch(draw.normal("noise", (2,)), Condition(), draw, x0), 10_000)
    return float(turn.logs["residual"])


@pytest.mark.parametrize("name", CASES)
def test_the_map_of_a_mixture_has_no_loss(name: str) -> None:
    """To the square of the step of the difference; that of a mixture which lies elsewhere has one."""
    assert residual(name, mixture(), mixture()) < 1e-4
    assert residual(name, mixture(0.5), mixture()) > 1e-2
