"""What a run will hold in memory, before it starts: its own step played on fake tensors, and what would make it fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep import build
from fewstep.build import Run
from fewstep.config import Config
from fewstep.core.errors import UserError
from fewstep.data.source import Source, open_source
from fewstep.latents import Latents
from fewstep.models.codec import Codec, open_codec
from fewstep.models.fake import Answers, become_fake
from fewstep.models.lora import LoraSpec
from fewstep.models.passes import networks_of
from fewstep.pairs import Pairs
from fewstep.train.live_bytes import REST, LiveBytes
from fewstep.train.loop import train
from fewstep.train.parallel import blocks_of
from fewstep.train.player import Player

KINDS = ("weights", "gradients", "moments", "followers", "gathered", REST)


class Part(NamedTuple):
    """What bytes are counted as: whose they are, of which kind, and whether GPUs share them out (FSDP2)."""

    role: str
    kind: str
    sharded: bool = False


@dataclass
class Account:
    """Bytes by part at the peak of each player's turn, the most that each part ever had, parameters by role."""

    turns: dict[str, Counter[Part]] = field(default_factory=dict)
    most: Counter[Part] = field(default_factory=Counter)
    parameters: Counter[str] = field(default_factory=Counter)

    @property
    def turn(self) -> str:
        """The player whose turn has the peak of the step."""
        return max(self.turns, key=lambda name: self.turns[name].total())

    @property
    def peak(self) -> int:
        return self.turns[self.turn].total()

    def of_kind(self, kind: str, turn: str | None = None, role: str | None = None) -> int:
        """Bytes of a kind at the peak of `turn`, by default the peak of the step; of one role, the most it had."""
        sizes = self.most if role else self.turns[turn or self.turn]
        return sum(size for part, size in sizes.items() if part.kind == kind and role in (None, part.role))


def account(run: Run, steps: Iterable[int]) -> Account:
    """Plays `steps` of a run and counts what is alive meanwhile; its tensors may be fake."""
    result, live = Account(), LiveBytes(Part("", REST))
    owners = _owners(run)
    for tensor, part in owners.items():
        live.name(part, tensor)
        result.parameters[part.role] += tensor.numel() * (isinstance(tensor, nn.Parameter) and part.kind == "weights")
    for name, player in run.players.items():
        for parameter in player.parameters:
            live.name_gradient(owners[parameter]._replace(kind="gradients"), parameter)
        _name_moments(player, owners, live)
        _watch(name, player, owners, live, result)
    batches = build.batches(run)
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
    return {t: Part(role, kind, t in inside) for role, kind, m in owned for t in chain(m.parameters(), m.buffers())}


def _name_moments(player: Player, owners: dict[Tensor, Part], live: LiveBytes) -> None:
    for parameter, state in player.optimizer.state.items():
        for moment in state.values():
            live.name(owners[parameter]._replace(kind="moments"), moment)


def _watch(name: str, player: Player, owners: dict[Tensor, Part], live: LiveBytes, result: Account) -> None:
    """Has `player` note the peak of its turn whenever it has moved."""
    move = player.move

    def moved(step: int) -> float:
        norm = move(step)
        _name_moments(player, owners, live)
        peak = live.mark()
        result.turns[name] = max(result.turns.get(name, Counter()), peak, key=Counter.total)
        result.most |= peak | live.now
        return norm

    player.move = moved  # type: ignore[method-assign]


class Unseen(Source):
    """The labels and the sizes of a source, and nothing to see."""

    def __init__(self, source: Source):
        self.resolution, self.labels, self.size = source.resolution, source.labels, source.size

    def label_of(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def images(self, ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), 3, self.resolution, self.resolution)

    def captions(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


class UnseenLatents(Latents):
    def visited(self, ids: Tensor) -> Tensor:
        return ids


@dataclass(frozen=True)
class Setting:
    """A config, and what else decides how much of it one GPU holds."""

    config: Config
    gpus: int = 1
    checkpointing: bool = False
    low_teacher: bool = False


def shaped(setting: Setting, mode: FakeTensorMode) -> Run:
    """The run of a config with fake tensors in place of its weights, its data and its texts.

    Raises UserError for everything that a config can get wrong, and for a batch that the GPUs cannot share out.
    """
    config, device = setting.config, _device(setting.config)

    def codecs(source: str, revision: str | None) -> Codec:
        codec = open_codec(source, revision, weights=False)
        become_fake([codec], mode, device)
        return codec

    source = Unseen(open_source(config.data.source, config.data.resolution, config.data.seed))
    teacher = build.build_teacher(config, len(source.labels), weights=False, codecs=codecs)
    run = build.assemble(config, torch.device("meta"), source, teacher, None)
    unit = setting.gpus * config.micro_batches * run.objective.group
    if config.batch % unit:
        raise UserError(
            f"a batch of {config.batch} cannot be shared out to {setting.gpus} GPUs in {config.micro_batches} "
            f"micro-batches: make batch a multiple of {unit}"
        )
    if setting.checkpointing:
        checkpoint(run)
    become_fake(_modules(run), mode, device)
    for player in run.players.values():
        player.enlist()
    run = replace(run, config=replace(config, batch=config.batch // setting.gpus), device=device)
    with mode:
        cond = run.conditions.of(torch.arange(2, device=device))
        run.pairs = Pairs(torch.zeros(2, *run.shape), cond, 0) if "pair" in run.objective.reads else None
        cached = config.data.cache and "x0" in run.objective.reads
        run.latents = UnseenLatents(torch.zeros(2, *run.shape).half(), 0) if cached else None
    return run


def _device(config: Config) -> torch.device:
    """The one that is asked for where it is here; sizes hardly depend on it."""
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _modules(run: Run) -> list[nn.Module]:
    triad = [net for net in vars(run.triad).values() if net is not None]
    followers = [f.module for player in run.players.values() for f in player.followers.values()]
    return [*networks_of(*triad), *triad, *followers, run.objective]


def checkpoint(run: Run) -> None:
    """Has every network that can recompute its blocks in the backward instead of keeping what they made."""
    for net in vars(run.triad).values():
        for part in net.modules() if net is not None else ():
            shared = getattr(part, "shared", None) or getattr(part, "net", None)
            if isinstance(shared, nn.Module) and can_checkpoint(getattr(part, "net", None)):
                shared.enable_gradient_checkpointing()  # type: ignore[operator]


def can_checkpoint(net: Any) -> bool:
    return getattr(net, "_supports_gradient_checkpointing", False) and not net.is_gradient_checkpointing


def foresee(setting: Setting) -> Account:
    """What one GPU will hold, by playing one step of each kind on fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    run = shaped(setting, mode)
    with mode, Answers():
        for player in run.players.values():
            _move_once(player)
        result = account(run, _steps(run))
    return result


def _move_once(player: Player) -> None:
    """The optimizer makes its moments at its first step."""
    for parameter in player.parameters:
        parameter.grad = torch.zeros_like(parameter)
    player.move(0)


def _steps(run: Run) -> list[int]:
    """The first step in which the generator moves, and the first in which the critic does."""
    kinds = [run.objective.generates, run.objective.criticises]
    found = [next((step for step in range(1000) if kind(step)), None) for kind in kinds]
    return sorted({step for step in found if step is not None})
