"""How fine the grid of consistency training is as training goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fewstep.core.errors import UserError


@dataclass
class Curriculum:
    """A number of intervals for each step."""

    law: Literal["constant", "root", "doubling"] = "constant"
    """constant: that of the grid | root: CT, like the root of the step | doubling: iCT, twice as many at even times"""
    start: int = 2
    """s0, intervals at first"""
    end: int = 150
    """s1, intervals at last"""
    over: int = 800
    """steps that it takes; afterwards the last number stays"""
    decay: float = 0.95
    """of the follower at first: it is this to the power of start / intervals"""

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.end or self.over < 1:
            raise UserError(
                "curriculum needs 1 <= start <= end and over at least 1, but start is "
                f"{self.start}, end {self.end} and over {self.over}"
            )
        if not 0 < self.decay < 1:
            raise UserError(f"curriculum.decay is between 0 and 1, but {self.decay} was given")

    def count(self, step: int, constant: int) -> int:
        """Intervals at `step`: (Song et al. 2023, appendix C) or (Song & Dhariwal 2023, arXiv:2310.14189, eq. 11)."""
        if self.law == "constant":
            return constant
        if self.law == "root":
            share = min(step / self.over, 1.0)
            root = math.sqrt(share * ((self.end + 1) ** 2 - self.start**2) + self.start**2)
            return max(1, math.ceil(root - 1))
        every = max(1, self.over // (int(math.log2(self.end // self.start)) + 1))
        return int(min(self.start * 2 ** min(step // every, 60), self.end))

    def follower(self, step: int) -> float:
        """The decay of the target network at `step`: mu = exp(s0 ln mu0 / intervals)."""
        return math.exp(self.start * math.log(self.decay) / self.count(step, self.start))
