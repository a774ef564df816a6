"""What a run will hold in memory, before it starts: its own steps on fake tensors, and what would make it fit."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep import build
from fewstep import config as configs
from fewstep.build import Run
from fewstep.config import Config, RoleConfig
from fewstep.core.errors import UserError
from fewstep.data.source import Source, open_source
from fewstep.latents import Latents
from fewstep.memory import KINDS, Account, Part, account
from fewstep.models.attention import Attention
from fewstep.models.codec import Codec
from fewstep.models.codecs import open_codec
from fewstep.models.fake import Fake, become_fake
from fewstep.models.lora import LoraSpec
from fewstep.models.passes import networks_of
from fewstep.objectives.pieces.derivative import Derivative
from fewstep.pairs import Pairs
from fewstep.perception import Perceived
from fewstep.train.live_bytes import GATHERED
from fewstep.train.parallel import blocks_of
from fewstep.train.player import Player

UNITS = {"MB": 2**20, "GB": 2**30, "TB": 2**40}
LEAST = 0.02  # of the peak, that a switch has to save to be worth it


class Unseen(Source):
    """The labels and the sizes of a source, nothing to see, and prompts that nobody has encoded yet."""

    def __init__(self, source: Source):
        self.resolution, self.labels, self.size = source.resolution, source.labels, source.size
        self.world = source.world
        self.prompts = map(str, itertools.count())

    def label_of(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def images(self, ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), 3, self.resolution, self.resolution)

    def captions(self, ids: Tensor) -> list[str]:
        return [next(self.prompts) for _ in range(len(ids))]


class UnseenLatents(Latents):
    def visited(self, ids: Tensor) -> Tensor:
        return ids


@dataclass(frozen=True)
class Setting:
    """A config, and what else decides how much of it one GPU holds."""

    config: Config
    gpus: int = 1


def shaped(setting: Setting, mode: Fake) -> Run:
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
    become_fake(_modules(run), mode, device)
    for part in run.objective.modules():
        if isinstance(part, Derivative):  # forward mode does not enter such tensors, and a pass with a graph holds more
            part.way = "difference"
    for player in run.players.values():
        player.enlist()
    # A thread would make real tensors: it does not know of the mode.
    data = replace(config.data, workers=0)
    run = replace(run, config=replace(config, batch=config.batch // setting.gpus, data=data), device=device)
    with mode:
        if "pair" in run.objective.reads:
            path = torch.zeros(2, len(run.rollout) - 1, *run.shape) if "path" in run.objective.reads else None
            run.pairs = Pairs(torch.zeros(2, *run.shape), run.conditions.of(torch.arange(2)), 0, path)
        if config.data.cache and "x0" in run.objective.reads:
            run.latents = UnseenLatents(torch.zeros(2, *run.shape).half(), 0)
    return run


def _device(config: Config) -> torch.device:
    """The one that is asked for where it is here; sizes hardly depend on it."""
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _modules(run: Run) -> list[nn.Module]:
    triad = [net for net in vars(run.triad).values() if net is not None]
    followers = [f.module for player in run.players.values() for f in player.followers.values()]
    seeing = [part.perceive.net for part in build.terms(run.objective) if isinstance(part.perceive, Perceived)]
    return [*networks_of(*triad), *triad, *followers, run.objective, *seeing]


def can_checkpoint(net: Any) -> bool:
    return getattr(net, "_supports_gradient_checkpointing", False) and not net.is_gradient_checkpointing


def foresee(setting: Setting) -> tuple[Account, Run]:
    """What one GPU will hold, by playing one step of each kind on fake tensors; and the fake run that was played."""
    mode = Fake()
    with warnings.catch_warnings():
        # Copies of fake tensors are meant: nothing reads their data.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        run = shaped(setting, mode)
    with mode:
        for player in run.players.values():
            _make_moments(player)
        result = account(run, _steps(run))
    if setting.gpus > 1:
        # Gradients that wait for the last micro-batch are those of whole networks: none is added up before.
        whole = "gradients" if setting.config.micro_batches > 1 else ""
        result = result.scaled(lambda part: setting.gpus if part.sharded and part.kind != whole else 1)
        together = {Part("", GATHERED): gathered(networks_of(*vars(run.triad).values()))}
        result.turns = {name: peak + Counter(together) for name, peak in result.turns.items()}
    return result, run


def gathered(nets: Iterable[nn.Module]) -> int:
    """Bytes that FSDP2 puts together on every GPU: what is in no block, and the largest block, with their gradients."""
    roots, blocks = 0, [0]
    for net in nets:
        taken: set[Tensor] = set()
        for module in (*blocks_of(net), net):
            own = set(module.parameters()) - taken
            taken |= own
            blocks.append(sum(p.nbytes * (1 + p.requires_grad) for p in own))
        roots += blocks.pop()
    return roots + max(blocks)


def _make_moments(player: Player) -> None:
    """As the first move of `player` would."""
    for parameter in player.parameters:
        parameter.grad = torch.zeros_like(parameter)
    player.optimizer.step()
    player.clear()


def _steps(run: Run) -> list[int]:
    """The first step in which the generator moves, and the first in which the critic does."""
    kinds = [run.objective.generates, run.objective.criticises]
    found = [next((step for step in range(1000) if kind(step)), None) for kind in kinds]
    return sorted({step for step in found if step is not None})


@dataclass(frozen=True)
class Switch:
    """Something that saves memory: how it is switched on, and what it does to a setting."""

    said: str
    change: Callable[[Setting], Setting]


def switches(setting: Setting, run: Run) -> Iterator[Switch]:
    """What can be switched on, the harmless first: time for memory, then precision, then what is learned."""
    config, nets = setting.config, networks_of(*vars(run.triad).values())
    if any(can_checkpoint(net) for net in nets):
        yield Switch("model.checkpointing=true", lambda s: _with_model(s, checkpointing=True))
    parts = 2 * config.micro_batches
    if config.batch % (parts * setting.gpus * run.objective.group) == 0:
        yield Switch(f"micro_batches={parts}", lambda s: replace(s, config=replace(s.config, micro_batches=parts)))
    frozen = {p.dtype for net in nets for p in net.parameters() if not p.requires_grad}
    if run.triad.real_score is not None and torch.float32 in frozen:
        yield Switch("model.roles.real_score.precision=bf16", _with_low_teacher)
    for role in ("fake_score", "generator"):
        if config.model.teacher is not None and role in run.players and config.players[role].lora is None:
            yield Switch(f"players.{role}.lora={{}}", lambda s, role=role: _with_lora(s, role))  # type: ignore[misc]


def _with_model(setting: Setting, **keys: Any) -> Setting:
    return replace(setting, config=replace(setting.config, model=replace(setting.config.model, **keys)))


def _with_low_teacher(setting: Setting) -> Setting:
    roles = setting.config.model.roles
    low = replace(roles.get("real_score", RoleConfig()), precision="bf16")
    return _with_model(setting, roles={**roles, "real_score": low})


def _with_lora(setting: Setting, role: str) -> Setting:
    config = setting.config
    player = replace(config.players[role], lora=LoraSpec())
    return replace(setting, config=replace(config, players={**config.players, role: player}))


def advice(setting: Setting, limit: int, found: Account, run: Run) -> list[str]:
    """What each switch alone would save, and which of them together bring the peak below `limit` bytes."""
    if found.peak <= limit:
        return [f"fits: {shown(limit - found.peak)} of {shown(limit)} to spare"]
    tried: dict[tuple[str, ...], tuple[Account, Run]] = {(): (found, run)}
    rows = [["to switch on", "peak", "saves"]]
    for switch in itertools.chain(switches(setting, run), more_gpus(setting, run)):
        tried[switch.said,] = other, _ = foresee(switch.change(setting))
        rows.append([switch.said, shown(other.peak), shown(found.peak - other.peak)])
        if switch.said.startswith("--gpus") and other.peak <= limit:
            break
    on = fitting(setting, limit, tried)
    last = tried[on][0].peak
    verdict = f"fits with {' and '.join(on)}" if last <= limit else "does not fit with all of these together"
    return [
        f"does not fit: {shown(limit)} is {shown(found.peak - limit)} short",
        *aligned(rows),
        f"{verdict}: {shown(last)}",
    ]


def more_gpus(setting: Setting, run: Run) -> Iterator[Switch]:
    """Twice, four times, .. as many GPUs, as long as they can share out the batch."""
    unit, count = setting.config.micro_batches * run.objective.group, 2 * setting.gpus
    while setting.config.batch % (unit * count) == 0:
        yield Switch(f"--gpus {count}", lambda s, count=count: replace(s, gpus=count))  # type: ignore[misc]
        count *= 2


def fitting(setting: Setting, limit: int, tried: dict[tuple[str, ...], tuple[Account, Run]]) -> tuple[str, ...]:
    """The switches, one added to the other, that bring the peak below `limit` bytes; all that help where none does."""
    on: tuple[str, ...] = ()
    refused: set[str] = set()
    while tried[on][0].peak > limit:
        switch = next((s for s in switches(setting, tried[on][1]) if s.said not in refused), None)
        if switch is None:
            break
        path, changed = (*on, switch.said), switch.change(setting)
        if path not in tried:
            tried[path] = foresee(changed)
        if tried[path][0].peak > (1 - LEAST) * tried[on][0].peak:
            refused.add(switch.said)
        else:
            on, setting = path, changed
    return on


def size(given: str) -> int:
    """Bytes of a size such as 24GB. Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]B)", given.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UserError(f"--memory is a size in {', '.join(UNITS)}, but '{given}' was given: write for example 24GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def shown(count: int) -> str:
    """Bytes as MB, or as GB from one GB."""
    unit = "GB" if count >= UNITS["GB"] else "MB"
    return f"{count / UNITS[unit]:,.1f} {unit}" if count else "-"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def table(found: Account) -> list[str]:
    """What each role holds, then what is alive at the peak of each turn."""
    held, alive = KINDS[:4], [kind for kind in KINDS if kind != GATHERED or found.of_kind(kind)]
    rows = [["role", "parameters", *held]]
    for role, count in found.parameters.items():
        rows.append([role, f"{count:,}", *(shown(found.of_kind(kind, role=role)) for kind in held)])
    peaks = [["turn of", *alive, "peak"]]
    for turn, sizes in found.turns.items():
        peaks.append([turn, *(shown(found.of_kind(kind, turn)) for kind in alive), shown(sizes.total())])
    return [*aligned(rows), "", *aligned(peaks)]


def planned(config: Config) -> Config:
    """The config with attention by torch's own choice, unless it is math, which writes its scores down."""
    model = config.model
    roles = {role: replace(own, attention=own.attention and _held(own.attention)) for role, own in model.roles.items()}
    return replace(config, model=replace(model, attention=_held(model.attention), roles=roles))


def _held(kernel: Attention) -> Attention:
    return kernel if kernel == "math" else "sdpa"


def lines(config: Config, gpus: int, limit: int | None) -> Iterator[str]:
    """The plan of one stage."""
    setting = Setting(planned(config), gpus)
    if setting.config != config:
        yield "attention is planned as sdpa: kernels hold as much as torch's own, and need a GPU that may not be here"
    found, run = foresee(setting)
    where = "one GPU" if gpus == 1 else f"each of {gpus} GPUs"
    yield f"objective {config.objective.name}, batch {config.batch} in {config.micro_batches} part(s), on {where}"  # type: ignore[attr-defined]
    yield from table(found)
    yield f"peak of a step: {shown(found.peak)}, in the turn of {found.turn}"
    if limit is not None:
        yield from advice(setting, limit, found, run)


def show(config: Path, overrides: Sequence[str], gpus: int, memory: str | None) -> None:
    """Prints the plan of every stage of a config file. Raises UserError for a bad number or size."""
    limit = size(memory) if memory is not None else None
    if gpus < 1:
        raise UserError(f"--gpus is a number of GPUs from 1, but {gpus} was given")
    stages = configs.load(config, overrides)
    for i, stage in enumerate(stages, 1):
        print(f"stage {i} of {len(stages)}: {stage.name}, {stage.steps} steps")
        for line in lines(stage, gpus, limit):
            print(line, flush=True)
