"""The loop that plays an objective's turns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.objectives.base import Objective, Share, Turn
from fewstep.train import parallel, processes, soundness
from fewstep.train.player import NonFinite, Player

Logs = dict[str, float]


def train_step(objective: Objective, micro_batches: Sequence[Batch], step: int, players: Mapping[str, Player]) -> Logs:
    """One call of `objective.turns` on every micro-batch, in lockstep.

    Each micro-batch's loss is differentiated as soon as it is yielded, so that only one graph is alive; when all
    have yielded a turn, its player moves. Over several processes a batch, its means and its moves are those of all.
    Raises NonFinite where data or what a move goes on from is not finite, before any player of the step has moved, and
    where a loss or a gradient is not finite, before its player moves.
    """
    count = len(micro_batches)
    sound = parallel.zero_of(tensor for _, tensor in soundness.begun(micro_batches, players))
    turns = [objective.turns(batch, step) for batch in micro_batches]
    logs: dict[str, list[Tensor]] = defaultdict(list)
    result: Logs = {}
    answer: Tensor | None = None
    fresh: set[str] = set()
    while True:
        asked: list[Any] = []
        for i, turn in enumerate(turns):
            try:
                played = turn.send(answer)
            except StopIteration:
                continue
            if isinstance(played, Turn):
                player = players[played.player]
                parallel.synchronise(player.modules, played.move and i == count - 1)
                refuse(played, sound, objective, micro_batches, step, players)
                backward(played, count, player, fresh)
                for name, value in {**played.logs, f"{played.player}/loss": played.loss}.items():
                    logs[name].append(value.detach().float())
            asked.append(played)
            del played
        if not asked:
            break
        answer = shared([share.value for share in asked]) if isinstance(asked[0], Share) else None
        if isinstance(asked[0], Turn) and asked[0].move:
            player = players[asked[0].player]
            result[f"{player.name}/grad_norm"] = moved(player, step)
            fresh.discard(player.name)
    return result | averaged(logs)


def shared(values: Sequence[Tensor]) -> Tensor:
    """The mean of one value (*S) a micro-batch, over those of all processes."""
    return processes.mean(torch.stack(list(values)).mean(0))


def averaged(logs: Mapping[str, Sequence[Tensor]]) -> Logs:
    """The mean of each log over the micro-batches of all processes."""
    means = [torch.stack(list(values)).double().mean() for values in logs.values()]
    everywhere = processes.mean(torch.stack(means).cpu())
    return dict(zip(logs, everywhere.tolist(), strict=True))


def refuse(
    turn: Turn, sound: Tensor, objective: Objective, batches: Sequence[Batch], step: int, players: Mapping[str, Player]
) -> None:
    """Raises NonFinite, in all processes, where the loss is not finite or what the step begins with not `sound`."""
    both = torch.stack([turn.loss.detach().float(), sound.to(turn.loss.device)])
    loss, begun = processes.mean(both).tolist()
    if not math.isfinite(begun) and (
        wrong := soundness.first_of(chain(soundness.given(batches), soundness.kept(players)))
    ):
        raise NonFinite(f"{wrong} is not finite at step {step}: nothing was moved")
    if not math.isfinite(loss):
        wrong = soundness.first_of(soundness.kept(players)) or soundness.first_output(objective, batches, step)
        raise NonFinite(
            f"the loss of player {turn.player} is {loss} at step {step}: it was not moved; the first that is not "
            f"finite is {wrong or 'the loss itself'}"
        )


def backward(turn: Turn, count: int, player: Player, fresh: set[str]) -> None:
    """Adds the gradient of one micro-batch to `player`, after clearing what earlier turns left on it."""
    if player.name not in fresh:
        player.clear()
        fresh.add(player.name)
    (turn.loss / count).backward()


def moved(player: Player, step: int) -> float:
    """Moves `player`. Returns its gradient's norm; raises NonFinite, naming the tensor, where that is not finite."""
    try:
        return player.move(step)
    except NonFinite as error:
        wrong = soundness.first_of(soundness.gradients(player))
        raise NonFinite(f"{error}; the first that is not finite is {wrong or 'the norm itself'}") from None


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
