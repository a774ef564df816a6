"""What a run holds in memory: bytes of live tensors by role and kind, at the peak of each turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn

from fewstep import build
from fewstep.build import Run
from fewstep.core.batch import Batch
from fewstep.models.offload import is_offloaded
from fewstep.models.passes import networks_of
from fewstep.train.live_bytes import GATHERED, REST, LiveBytes
from fewstep.train.loop import train
from fewstep.train.player import Player

KINDS = ("weights", "gradients", "moments", "followers", GATHERED, REST)


class Part(NamedTuple):
    """What bytes are counted as: whose they are, of which kind, and whether GPUs share them out (FSDP2)."""

    role: str
    kind: str
    sharded: bool = False


@dataclass
class Account:
    """Bytes by part at the peak of each turn, the most that each part ever had, and parameters by role.

    A turn is a player's, or that of making the batch: reading, and encoding images and prompts.
    """

    turns: dict[str, Counter[Part]] = field(default_factory=dict)
    most: Counter[Part] = field(default_factory=Counter)
    parameters: Counter[str] = field(default_factory=Counter)

    def note(self, turn: str, peak: Counter[Part]) -> None:
        self.turns[turn] = max(self.turns.get(turn, Counter()), peak, key=Counter.total)

    @property
    def turn(self) -> str:
        """The turn that has the peak of the step."""
        return max(self.turns, key=lambda name: self.turns[name].total())

    @property
    def peak(self) -> int:
        return self.turns[self.turn].total()

    def of_kind(self, kind: str, turn: str | None = None, role: str | None = None) -> int:
        """Bytes of a kind at the peak of `turn`, by default the peak of the step; of one role, the most it had."""
        sizes = self.most if role else self.turns[turn or self.turn]
        return sum(size for part, size in sizes.items() if part.kind == kind and role in (None, part.role))

    def scaled(self, divisor: Callable[[Part], int]) -> Account:
        """The account in which each part is smaller by its divisor."""

        def scale(sizes: Counter[Part]) -> Counter[Part]:
            return Counter({part: size // divisor(part) for part, size in sizes.items()})

        return Account({name: scale(peak) for name, peak in self.turns.items()}, scale(self.most), self.parameters)


def account(run: Run, steps: Iterable[int]) -> Account:
    """Plays `steps` of a run and counts what is alive meanwhile; its tensors may be fake."""
    result, live = Account(), LiveBytes(Part("", REST), Part("", GATHERED))
    owners = _owners(run)
    for tensor, part in owners.items():
        live.name(part, tensor)
        result.parameters[part.role] += tensor.numel() * (isinstance(tensor, nn.Parameter) and part.kind == "weights")
    for player in run.players.values():
        for parameter in player.parameters:
            live.name_gradient(owners[parameter]._replace(kind="gradients"), parameter)
        _name_moments(player, owners, live)
        _watch(player, owners, live, result)
    made = build.batches(run)

    def batches(step: int) -> list[Batch]:
        batch = made(step)
        result.note("batch", live.mark())
        return batch

    with live:
        for step in steps:
            train(run.objective, batches, run.players, range(step, step + 1), lambda step, logs: False)
    return result


def _owners(run: Run) -> dict[Tensor, Part]:
    """What each tensor is that a run has before its first step. An adapter is its player's, not the network's."""
    nets = [net for net in vars(run.triad).values() if net is not None]
    followers = [(name, f.module) for name, player in run.players.items() for f in player.followers.values()]
    inside = {p for net in networks_of(*nets, *(module for _, module in followers)) for p in net.parameters()}
    below = "real_score" if run.triad.real_score is not None else "teacher"
    owned: list[tuple[str, str, nn.Module]] = [(below, "weights", net) for net in networks_of(*nets)]
    owned += [(name, "weights", module) for name, player in run.players.items() for module in player.modules]
    owned += [(name, "followers", module) for name, module in followers]
    if run.teacher.codec is not None:
        owned.append(("codec", "weights", run.teacher.codec))
    held = ((role, kind, t) for role, kind, m in owned for t in chain(m.parameters(), m.buffers()))
    away = {t for net in networks_of(*nets) if is_offloaded(net) for t in chain(net.parameters(), net.buffers())}
    return {t: Part(role, kind, t in inside) for role, kind, t in held if t not in away}


def _name_moments(player: Player, owners: dict[Tensor, Part], live: LiveBytes) -> None:
    for parameter, state in player.optimizer.state.items():
        for moment in state.values():
            live.name(owners[parameter]._replace(kind="moments"), moment)


def _watch(player: Player, owners: dict[Tensor, Part], live: LiveBytes, result: Account) -> None:
    """Has `player` note the peak of its turn whenever it has moved."""
    move = player.move

    def moved(step: int) -> float:
        result.most |= live.now  # the gradients, before they are cleared
        norm = move(step)
        _name_moments(player, owners, live)
        result.most |= live.now
        result.note(player.name, live.mark())
        return norm

    player.move = moved  # type: ignore[method-assign]
