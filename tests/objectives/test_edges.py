"""Where consistency meets the ends of its times: phases, late stages, rungs that a process does not have, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_maps import data, guided, teacher_of
from oracle import ConsistencyMap, walk

from fewstep.core.errors import UserError
from fewstep.core.schedule import EDM, Flow, NoiseSchedule, vp_from_betas
from fewstep.core.times import Grid
from fewstep.models import schedulers
from fewstep.objectives import base, boot, consistency, ctm, ect, pcm, tcd, tscd
from fewstep.objectives.base import Triad
from fewstep.rollout import Rollout, cps, ode, renoise

SD = vp_from_betas("scaled_linear", 0.00085, 0.012)


def triad(schedule: NoiseSchedule | None = None, kind: Any = "flow_prediction") -> Triad:
    teacher = teacher_of(schedule or Flow(), kind)
    return Triad(ConsistencyMap(teacher), guided(teacher))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 4])
def test_each_phase_begins_at_a_rung_that_leads_through_it(steps: int, shift: float) -> None:
    """A flow scheduler's levels lie just below the rungs of an even grid: .74925 and .75."""
    walked = schedulers.steps_of(schedulers.flow_scheduler(shift), steps)
    objective = pcm.Objective(pcm.Config(grid=Grid(24, shift)), triad(), Rollout(walked, ode))
    levels = torch.tensor([step.level for step in walked])
    rungs = Grid(24, shift).times(Flow())
    begins = torch.stack([rungs[(rungs - level).abs().argmin()] for level in levels])
    ends = torch.tensor([*levels[1:].tolist(), 0.0])
    assert torch.allclose(objective.floor(begins), ends) and torch.allclose(objective.floor(levels), ends)
    assert (objective.floor(rungs[1:]) < rungs[1:]).all()


@pytest.mark.parametrize(
    "step, config",
    [
        (renoise, ctm.Config(grid=Grid(8))),
        (cps(0.5), ctm.Config(grid=Grid(8))),
        (renoise, tcd.Config(second_time=True)),
        (renoise, tscd.Config(second_time=True)),
    ],
)
@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5)])
def test_a_network_that_is_told_where_it_jumps_is_walked_so(times: Any, step: Any, config: Any) -> None:
    with pytest.raises(UserError, match="told where it jumps"):
        base.find(config.name).Objective(config, triad(), walk(times, step))


@pytest.mark.parametrize("schedule", [Flow(), SD, EDM()], ids=["flow", "vp", "edm"])
@pytest.mark.parametrize("stage", [16, 24, 40])
def test_late_stages_keep_a_gap(stage: int, schedule: NoiseSchedule) -> None:
    objective = ect.Objective(ect.Config(), triad(schedule, "sample"), walk((1.0,)))
    t = schedule.snap(torch.linspace(0.01, 1, 500))
    m = objective.cleaner_time(t, stage)
    assert (m < t).all()
    (turn,) = objective.turns(data(64), stage * objective.config.stage_steps)
    assert turn.loss.isfinite()


@pytest.mark.parametrize(
    "grid", [Grid(18, law="karras"), Grid(1280), Grid(500, shift=3.0)], ids=["karras", "many", "shifted"]
)
def test_a_grid_has_no_rung_twice(grid: Grid) -> None:
    times = grid.times(SD)
    assert (times.diff() > 0).all() and times[0] == 0 and times[-1] == 1
    for t, s in (grid.pair(torch.linspace(0, 1 - 1e-6, 500), SD), grid.around(torch.linspace(0.001, 1, 500), SD)):
        assert (t > s).all()
    made = boot.Objective(boot.Config(grid=grid), triad(SD, "epsilon"), walk((1.0,), ode))
    (turn,) = made.turns(data(64), 0)
    assert turn.loss.isfinite()


def test_segments_want_a_grid_that_the_process_has() -> None:
    with pytest.raises(UserError, match="has 1200 intervals, but the process of this teacher has times for 1000"):
        tscd.Objective(tscd.Config(grid=Grid(1200)), triad(SD, "epsilon"), walk((1.0,)))


@pytest.mark.parametrize(
    "node, said",
    [
        ({"name": "ctm", "weight": "inverse_step"}, "leave objective.weight out"),
        ({"name": "rcm", "weight": "abs_mean"}, "weight"),
        ({"name": "rcm", "mode": "training", "gap": 0.0, "discrete": {}}, "objective.mode=distillation"),
        ({"name": "rcm", "data": "pairs", "discrete": {}}, "leave objective.data out"),
        ({"name": "align_your_flow", "guidance": [3.0, 5.0]}, "from 3.0 to 5.0, but 2.0"),
        ({"name": "ect", "grid": {"count": 7}}, "leave objective.grid out"),
        ({"name": "ect", "most_ratio": 1.0}, "between 0 and 1, but 1.0"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(node: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        base.typed(node)


@pytest.mark.parametrize("name", ["tscd", "pcm", "ctm", "rcm", "ect", "tcm"])
def test_defaults_are_allowed(name: str) -> None:
    assert base.typed({"name": name}).name == name
    assert consistency.Config().grid == Grid()
