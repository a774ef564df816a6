"""Where a step met what is not finite: the name of the first tensor. Sought only once something is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch
from fewstep.objectives.base import Objective, Share, Triad
from fewstep.train import parallel, processes
from fewstep.train.player import NonFinite, Player

Named = Iterable[tuple[str, Tensor]]


def begun(batches: Sequence[Batch], players: Mapping[str, Player]) -> Named:
    """What a step begins with beside the weights: its micro-batches, and the moments and followers of its players."""
    yield from given(batches)
    for label, player in players.items():
        yield from ((f"{label}: {name}", tensor) for name, tensor in player.carried())


def given(batches: Sequence[Batch]) -> Named:
    """The tensors of micro-batches."""
    for batch in batches:
        yield from _given(batch)


def _given(batch: Batch) -> Named:
    parts: dict[str, Tensor | None] = {"data: noise": batch.noise, "data: x0": batch.x0}
    parts |= {f"data: {name}": value for name, value in batch.cond.inputs.items()}
    if batch.pair is not None:
        parts |= {f"data: {name} of a pair": getattr(batch.pair, name) for name in ("noise", "x0", "path")}
    yield from ((name, value) for name, value in parts.items() if value is not None)


def kept(players: Mapping[str, Player]) -> Named:
    """What the players have learned so far, and go on from."""
    for label, player in players.items():
        yield from ((f"{label}: weight {name}", weight) for name, weight in player.learnt)
        yield from ((f"{label}: {name}", tensor) for name, tensor in player.carried())


def check(players: Mapping[str, Player], step: int) -> None:
    """Raises NonFinite, in all processes, where what the players have learned is not finite: it is not to be saved."""
    if wrong := sought(list(kept(players))):
        raise NonFinite(f"{wrong} is not finite after step {step}: it was not saved")


def gradients(player: Player) -> Named:
    """What a move of `player` would follow."""
    for name, weight in player.learnt:
        if weight.grad is not None:
            yield f"{player.name}: gradient of {name}", weight.grad


def sought(named: Sequence[tuple[str, Tensor]]) -> str | None:
    """`first_of`, but one by one only where all at once are not known to be finite."""
    zero = processes.mean(parallel.zero_of(tensor for _, tensor in named))
    return None if math.isfinite(zero.item()) else first_of(named)


def first_of(named: Named) -> str | None:
    """The name of the first tensor with a value that is not finite, in the first process that has one."""
    wrong = (name for name, tensor in named if not parallel.local(tensor.detach()).isfinite().all())
    return processes.first(next(wrong, None))


def first_output(objective: Objective, batches: Sequence[Batch], step: int) -> str | None:
    """The network of the triad, and its part, that is the first to give what is not finite when `step` is played."""
    heard: list[str] = []
    with _listening(objective.triad, heard), suppress(torch.OutOfMemoryError):
        turns, answer = [objective.turns(batch, step) for batch in batches], None
        while asked := [played for turn in turns if (played := _next(turn, answer)) is not None]:
            shares = isinstance(asked[0], Share)
            mean = processes.mean(torch.stack([one.value if shares else one.loss for one in asked]).mean(0))
            if not mean.isfinite().all():
                break
            answer = mean if shares else None
    return processes.first(heard[0] if heard else None)


def _next(turn: Iterator[Any], answer: Any) -> Any:
    """What a turn yields, without the graph of its loss."""
    try:
        played = turn.send(answer)  # type: ignore[attr-defined]
    except StopIteration:
        return None
    return played if isinstance(played, Share) else replace(played, loss=played.loss.detach())


@contextmanager
def _listening(triad: Triad, heard: list[str]) -> Iterator[None]:
    """Adds to `heard` whatever gives what is not finite meanwhile, in order."""

    def listen(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else [output]
            if any(isinstance(part, Tensor) and not part.detach().isfinite().all() for part in parts):
                heard.append(name)

        return hook

    roles = {role: net for role, net in vars(triad).items() if net is not None}
    handles = [
        part.register_forward_hook(listen(f"{role}: output of {name}" if name else f"{role}: output"))
        for role, net in roles.items()
        for name, part in net.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
