"""The regression to a teacher's stored pairs, beside the score gap (DMD, arXiv:2311.18828, section 3.3)."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.models.backbone import Backbone
from fewstep.objectives.base import Features
from fewstep.objectives.pieces.distances import Distance, distance, perceived
from fewstep.rollout import Rollout, ode


def paired_loss(
    net: Backbone,
    rollout: Rollout,
    batch: Batch,
    exit: int,
    window: int,
    kind: Distance,
    features: Features | None = None,
) -> Tensor:
    """distance(G(z), y) at step `exit` of the rollout, on pairs (z, y) whose noise is independent of the batch's.

    With `features` it is theirs, whatever `kind` is.
    """
    pair = batch.pair
    assert pair is not None
    made = rollout(net, pair.noise, pair.cond, batch.draw, exit=exit, grad=window, purpose="paired").x0
    return distance(made, pair.x0, kind) if features is None else perceived(made, pair.x0, features)


def refuse_fresh_noise(
    rollout: Rollout, what: str = "objective.regression", off: str = "objective.regression=0"
) -> None:
    """Raises UserError for a rollout whose end is not decided by its noise; `off` does without `what`."""
    if len(rollout) > 1 and rollout.step is not ode:
        raise UserError(
            f"{what} pairs a noise with what becomes of it, which fresh noise between the steps would "
            f"break: set model.transition=ode, or {off}"
        )
