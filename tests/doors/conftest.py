"""Doors: small methods the house does not have yet, told with what it has. Each opens if its file passes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import build
from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.objectives.base import Objective, Triad
from fewstep.rollout import Rollout
from fewstep.train.loop import train_step
from fewstep.train.player import Player, PlayerConfig


class Stage:
    """An objective with the players that the house makes for it."""

    def __init__(self, kind: type[Objective], triad: Triad, rollout: Rollout, config: Any = None, lr: float = 0.01):
        self.objective = kind(config, triad, rollout)
        roles = ["generator"] + (["fake_score"] if triad.fake_score is not None else [])
        settings = {name: PlayerConfig(lr=lr, clip=1e9) for name in roles}
        self.players: dict[str, Player] = build.build_players(
            SimpleNamespace(players=settings),  # type: ignore[arg-type]
            triad,
            self.objective,
        )

    def play(self, batch: Callable[[Tensor, int], Batch], steps: int = 1, rows: int = 4, parts: int = 2) -> list[Any]:
        logs = []
        for step in range(steps):
            ids = torch.arange(step * rows, (step + 1) * rows)
            logs.append(train_step(self.objective, [batch(p, step) for p in ids.chunk(parts)], step, self.players))
        return logs


@pytest.fixture
def stage() -> type[Stage]:
    return Stage


@pytest.fixture
def images() -> Callable[[Tensor, int], Batch]:
    """Batches of 3x8x8 pixels with a label in 0..3 and smooth data that depends on it."""

    def make(ids: Tensor, step: int) -> Batch:
        draw, labels = Draw(1, step, ids), ids % 4
        x0 = (labels - 1.5)[:, None, None, None] / 2 + 0.1 * draw.normal("data", (3, 8, 8))
        return Batch(draw.normal("noise", (3, 8, 8)), Condition({"class_labels": labels}), draw, x0)

    return make


@pytest.fixture
def points() -> Callable[[Tensor, int], Batch]:
    """Batches of single numbers, for the Gaussian networks."""

    def make(ids: Tensor, step: int) -> Batch:
        draw = Draw(1, step, ids)
        return Batch(draw.normal("noise", (1,)), Condition(), draw)

    return make


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.fixture(name="weights")
def _weights() -> Callable[[nn.Module], Tensor]:
    """All parameters of a module as one vector."""
    return weights
