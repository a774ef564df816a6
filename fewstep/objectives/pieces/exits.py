"""At which step of its rollout the generator is looked at, and how far back the gradient goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.rollout import Rollout


@dataclass
class Exits:
    """Where a rollout of several steps ends in training; with one step there is nothing to choose."""

    law: Literal["random", "last"] = "random"
    """random: any step, alike for the whole batch (DMD2's backward simulation) | last: always the whole rollout"""
    window: int = 1
    """steps before the exit, itself included, that carry a gradient; each costs a backward of its own"""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"exits.window is at least 1 step, but {self.window} was given")

    def at(self, rollout: Rollout, draw: Draw, purpose: str) -> int:
        """The index of the step, equal on all processes."""
        return draw.shared_integer(purpose, len(rollout)) if self.law == "random" else len(rollout) - 1
