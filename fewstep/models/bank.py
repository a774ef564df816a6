"""Several students, each for its own part of the conditions, behind the face of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.models.backbone import Backbone, Experts


@dataclass(frozen=True)
class Partition:
    """Consecutive blocks of `labels` class labels, `parts` of them, equal but for one label; further labels are last.

    One part has every condition, whatever it is.
    """

    parts: int = 1
    labels: int = 1

    def of(self, cond: Condition, rows: int) -> Tensor:
        """The part (B,), from 0, of each of `rows` conditions. Raises ValueError for several parts without labels."""
        if self.parts == 1:
            return torch.zeros(rows, dtype=torch.int64)
        if "class_labels" not in cond.inputs:
            raise ValueError("conditions are parted by their class labels, and these have none")
        return (cond.inputs["class_labels"] * self.parts // self.labels).clamp(max=self.parts - 1)

    def share(self, part: int) -> float:
        """The share of the labels in a part."""
        return sum(label * self.parts // self.labels == part for label in range(self.labels)) / self.labels


class Bank(Experts):
    """One student for each part of the conditions; a batch costs one pass a sample, whoever answers."""

    def __init__(self, students: Sequence[Backbone], partition: Partition):
        super().__init__(students)
        if len(students) != partition.parts:
            raise ValueError(f"{partition.parts} parts need as many students, got {len(students)}")
        self.partition = partition

    def choose(self, t: Tensor, cond: Condition) -> Tensor:
        return self.partition.of(cond, len(t))
