"""Which walks a jump to the clean end allows."""

from __future__ import annotations

from fewstep.core.errors import UserError
from fewstep.rollout import Rollout, renoise


def refuse_old_noise(rollout: Rollout) -> None:
    """Raises UserError for several steps that keep noise: what is read off the x0 of a jump is no part of x_t."""
    if len(rollout) > 1 and rollout.step is not renoise:
        raise UserError(
            f"a consistency function is no denoiser: {len(rollout)} steps of it need fresh noise in between and "
            "none of the old, so train it with model.transition=renoise, or use one step"
        )
