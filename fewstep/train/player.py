"""A module that learns, with its optimizer, and the copies that trail it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models.lora import LoraSpec
from fewstep.train import parallel


@dataclass
class PlayerConfig:
    """How one player learns. Every count is in its own optimizer steps (moves)."""

    lr: float = 1e-4
    """learning rate"""
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    """AdamW moments"""
    eps: float = 1e-8
    """AdamW epsilon"""
    weight_decay: float = 0.0
    """AdamW decoupled weight decay"""
    clip: float = 10.0
    """largest norm of the gradient over all of the player's parameters"""
    warmup: int = 0
    """moves over which the rate rises from zero"""
    decay: int = 0
    """moves over which the rate falls to zero along a cosine; 0 = constant"""
    ema: float = 0.0
    """decay of the evaluation average; 0 = none. Keep 1 / (1 - ema) below a tenth of the planned moves"""
    lora: LoraSpec | None = None
    """learn an adapter on the teacher's own frozen weights instead of a copy of them; {} takes the defaults"""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"a learning rate is above 0, but {self.lr} was given")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is a decay in [0, 1), but {self.ema} was given")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"betas are two numbers in [0, 1), but {self.betas} was given")
        if not self.clip > 0:
            raise UserError(f"clip is a norm above 0, but {self.clip} was given")
        if not self.eps > 0 or not self.weight_decay >= 0:
            raise UserError(
                f"eps is above 0 and weight_decay at least 0, but {self.eps} and {self.weight_decay} were given"
            )
        if self.warmup < 0 or self.decay < 0:
            raise UserError(f"warmup and decay are numbers of moves, but {self.warmup} and {self.decay} were given")


class NonFinite(RuntimeError):
    """A value that is not finite: names the player, the step and, where one is known, the tensor."""


class Follower:
    """A float32 copy of `of` that trails it: shadow <- d shadow + (1 - d) weights, d = decay(moves)."""

    def __init__(self, of: nn.Module, decay: Callable[[int], float]):
        self.of, self.decay = of, decay
        self.module = copy.deepcopy(of).float().eval().requires_grad_(False)

    @torch.no_grad()
    def begin(self) -> None:
        """Is what `of` is, for one that was made before `of` had its weights."""
        pairs = zip(self._tensors(self.module), self._tensors(self.of), strict=True)
        for mine, theirs in pairs:
            parallel.local(mine).copy_(parallel.local(theirs))

    @staticmethod
    def _tensors(module: nn.Module) -> list[Tensor]:
        return [*module.parameters(), *module.buffers()]

    @torch.no_grad()
    def follow(self, moves: int) -> None:
        draw_near(self.module, self.of, 1.0 - self.decay(moves))
        for mine, theirs in zip(self.module.buffers(), self.of.buffers(), strict=True):
            mine.copy_(theirs)


class Pull:
    """Draws `module`, which learns by itself, toward `of`: weights <- d weights + (1 - d) those of `of`.

    Raises UserError for networks that are not of one shape.
    """

    def __init__(self, module: nn.Module, of: nn.Module, decay: float, what: str):
        self.module, self.of, self.decay = module, of, decay
        mine, theirs = ([p.shape for p in net.parameters()] for net in (module, of))
        if mine != theirs:
            raise UserError(
                f"{what} draws the weights of one network toward another's, but theirs differ in shape: make both "
                f"learn whole, or by adapters of one rank, or set {what}=1"
            )

    @torch.no_grad()
    def follow(self) -> None:
        draw_near(self.module, self.of, 1.0 - self.decay)


def draw_near(module: nn.Module, of: nn.Module, share: float) -> None:
    """Moves the weights of `module` by `share` of their way to those of `of`."""
    parallel.reshard([module])
    mine = [parallel.local(p) for p in module.parameters()]
    theirs = [parallel.local(p).float() for p in of.parameters()]
    torch._foreach_lerp_(mine, theirs, share)


def ema_decay(limit: float) -> Callable[[int], float]:
    """min(limit, (1 + n) / (10 + n)) after n moves, so that the average is of use from the start."""
    return lambda moves: min(limit, (1 + moves) / (10 + moves))


def constant_decay(value: float) -> Callable[[int], float]:
    """The same decay after every move: target networks."""
    return lambda moves: value


class Player:
    """Optimizer, clipping and learning-rate schedule of `modules`, by the player's own moves.

    `followers` trail the first module, the player's network; `pulls` draw other players' networks toward it.
    """

    def __init__(self, name: str, modules: Sequence[nn.Module], config: PlayerConfig):
        self.name, self.modules, self.config = name, list(modules), config
        self.moves = 0
        self.followers: dict[str, Follower] = {}
        self.pulls: list[Pull] = []
        self.enlist()

    def enlist(self) -> None:
        """Takes the trainable parameters that the modules have now, with a fresh optimizer; again once sharded."""
        # Sharded modules show other tensors while they are put together for a pass.
        self.learnt = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.learnt]
        if not self.parameters:
            raise UserError(f"the player {self.name} has no trainable parameter")
        # The fused step takes shards or whole tensors, but no mixture.
        kinds = [[p for p in self.parameters if parallel.is_sharded(p) == sharded] for sharded in (True, False)]
        self.optimizer = torch.optim.AdamW(
            [{"params": kind} for kind in kinds if kind],
            lr=self.config.lr,
            betas=tuple(self.config.betas),
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            fused=not any(p.is_meta for p in self.parameters),
        )

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for i, module in enumerate(self.modules):
            for name, parameter in module.named_parameters():
                yield f"{i}.{name}", parameter

    def carried(self) -> Iterator[tuple[str, Tensor]]:
        """What a move goes on from beside weights and gradients, with its names: moments, then followers."""
        for name, parameter in self.learnt:
            moments = self.optimizer.state.get(parameter, {})
            yield from ((f"{kind} of {name}", moments[kind]) for kind in ("exp_avg", "exp_avg_sq") if kind in moments)
        for label, follower in self.followers.items():
            yield from ((f"{name} of {label}", value) for name, value in follower.module.named_parameters())

    def learning_rate(self) -> float:
        """The rate of the next move."""
        c, n = self.config, self.moves
        rate = c.lr * min(1.0, (n + 1) / c.warmup) if c.warmup else c.lr
        if c.decay:
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, n / c.decay)))
        return rate

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def move(self, step: int) -> float:
        """Clips, steps and lets the followers follow. Returns the gradient norm before clipping.

        Raises NonFinite in every process, leaving weights, optimizer and followers untouched, when the norm is not
        finite.
        """
        parallel.average_gradients(self.parameters)
        norm = parallel.clip(self.parameters, self.config.clip)
        if not math.isfinite(norm):
            raise NonFinite(f"the gradient of player {self.name} is {norm} at step {step}: the move was refused")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        parallel.reshard(self.modules)
        self.optimizer.step()
        self.moves += 1
        for follower in self.followers.values():
            follower.follow(self.moves)
        for pull in self.pulls:
            pull.follow()
        self.clear()
        return norm
