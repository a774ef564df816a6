"""The scheduler of an export: a stock one or, where diffusers has none for these steps, one that is carried."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.build import Run
from fewstep.core.prediction import Prediction
from fewstep.models import few_step_scheduler
from fewstep.models.diffusers import network_time
from fewstep.models.few_step_scheduler import FewStepScheduler
from fewstep.rollout import Move, reuse


def scheduler_of(run: Run) -> Any:
    """The scheduler whose steps are those of the run."""
    return _table(run) if run.scheduler is None else run.scheduler


def is_carried(scheduler: Any) -> bool:
    """Whether the export holds the scheduler's code, which diffusers runs only when it is told to trust it.

    The class of one that was opened from a folder is another class of the same name.
    """
    return type(scheduler).__name__ == FewStepScheduler.__name__


def trusted(scheduler: Any) -> dict[str, bool]:
    """What `from_pretrained` has to be told to open a folder with `scheduler`."""
    return {"trust_remote_code": True} if is_carried(scheduler) else {}


def carry(folder: Path) -> None:
    """Puts the code of the scheduler into the pipeline in `folder`, and its name into the index."""
    code, index = Path(few_step_scheduler.__file__), folder / "model_index.json"
    shutil.copy(code, folder / "scheduler")
    said = {**json.loads(index.read_text()), "scheduler": [code.stem, FewStepScheduler.__name__]}
    index.write_text(json.dumps(said, indent=2) + "\n")


@torch.no_grad()
def _table(run: Run) -> FewStepScheduler:
    walk, schedule, kind = run.rollout, run.teacher.schedule, run.teacher.kind
    one, table = torch.ones(1), []
    for i, here in enumerate(walk.steps):
        after = walk.level_after(i) * one

        def moved(value: Tensor, x_t: Tensor, level: Tensor = here.level * one, after: Tensor = after) -> Move:
            prediction = Prediction(value, kind, x_t, level, schedule)
            return walk.step(prediction, after) if after > 0 else (prediction.x0, None)

        # A step is linear in what the network says, in the state and in the noise: units tell its coefficients.
        (of_value, fresh), (of_state, _) = moved(one, 0 * one), moved(0 * one, one)
        told = network_time(schedule, here.told * one)
        table.append([float(x) for x in (told, of_value, of_state, 0.0 if fresh is None else fresh)])
    return FewStepScheduler(table, again=walk.step is reuse, use_flow_sigmas=kind == "flow_prediction")
