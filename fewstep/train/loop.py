"""The loop that plays an objective's turns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.objectives.base import Objective, Share, Turn
from fewstep.train.player import NonFinite, Player

Logs = dict[str, float]


def train_step(objective: Objective, micro_batches: Sequence[Batch], step: int, players: Mapping[str, Player]) -> Logs:
    """One call of `objective.turns` on every micro-batch, in lockstep.

    Each micro-batch's loss is differentiated as soon as it is yielded, so that only one graph is alive; when all
    have yielded a turn, its player moves. Raises NonFinite for a loss or gradient that is not finite.
    """
    count = len(micro_batches)
    turns = [objective.turns(batch, step) for batch in micro_batches]
    logs: dict[str, list[Tensor]] = defaultdict(list)
    result: Logs = {}
    answer: Tensor | None = None
    fresh: set[str] = set()
    while True:
        asked: list[Any] = []
        for turn in turns:
            try:
                played = turn.send(answer)
            except StopIteration:
                continue
            if isinstance(played, Turn):
                backward(played, count, step, players[played.player], fresh)
                for name, value in {**played.logs, f"{played.player}/loss": played.loss}.items():
                    logs[name].append(value.detach().float())
            asked.append(played)
            del played
        if not asked:
            break
        answer = torch.stack([share.value for share in asked]).mean(0) if isinstance(asked[0], Share) else None
        if isinstance(asked[0], Turn) and asked[0].move:
            player = players[asked[0].player]
            result[f"{player.name}/grad_norm"] = player.move(step)
            fresh.discard(player.name)
    return result | {name: torch.stack(values).mean().item() for name, values in logs.items()}


def backward(turn: Turn, count: int, step: int, player: Player, fresh: set[str]) -> None:
    """Adds the gradient of one micro-batch to `player`, after clearing what earlier turns left on it."""
    if not math.isfinite(turn.loss.item()):
        raise NonFinite(f"the loss of player {turn.player} is {turn.loss.item()} at step {step}: nothing was moved")
    if player.name not in fresh:
        player.clear()
        fresh.add(player.name)
    (turn.loss / count).backward()


def train(
    objective: Objective,
    batches: Callable[[int], Sequence[Batch]],
    players: Mapping[str, Player],
    steps: range,
    after: Callable[[int, Logs], bool],
) -> None:
    """Plays `steps`; `after(step, logs)` logs, evaluates and saves, and returns True to stop early."""
    for step in steps:
        logs = train_step(objective, batches(step), step, players)
        if after(step, logs):
            return
