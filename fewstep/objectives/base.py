"""What an objective is: a generator of turns over a triad of networks."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.errors import UserError, sentence
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.rollout import Rollout, Sample


@dataclass(frozen=True)
class Turn:
    """One loss for one player: the loop does backward on every micro-batch, then moves that player if `move`.

    Logged tensors are detached scalars.
    """

    player: str
    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    move: bool = True


@dataclass(frozen=True)
class Share:
    """Asks the loop for the mean of a detached tensor over all micro-batches and processes."""

    value: Tensor


@dataclass(frozen=True)
class Triad:
    """The networks of a run. A role that the objective does not name is None and was never built."""

    generator: Backbone
    real_score: Backbone = None  # type: ignore[assignment]
    fake_score: Backbone = None  # type: ignore[assignment]
    target_score: Backbone = None  # type: ignore[assignment]


FROZEN = ("real_score", "target_score")
"""the roles that never learn"""


Features = Callable[[Tensor], Sequence[Tensor]]
"""Samples (B, *S) -> feature maps (B, C, ..), differentiable in the samples."""
Turns = Generator[Turn | Share, Any, None]  # a Share is answered with its mean
Logs = dict[str, Tensor]


class Objective(nn.Module):
    """A method. Subclasses are called `Objective`, one a file, beside a dataclass called `Config`.

    `roles` are the networks it needs, `reads` the fields of Batch beyond noise and cond that it uses (x0, pair).
    `dials` are scalars beside the time that training alone tells the generator.
    `partial` objectives make samples that may end above level 0, and compare such states as they are.
    `group` samples next to each other stay in one micro-batch and, where `alike`, share a condition and an image.
    `perception` names the frozen network by which it compares samples, reader or lpips: it is lent as `perceive`.
    Own modules and buffers are saved with the run; `learns` says which player each joins.
    """

    roles: ClassVar[tuple[str, ...]] = ("generator",)
    reads: tuple[str, ...] = ()
    dials: ClassVar[tuple[str, ...]] = ()
    partial: bool = False
    group: int = 1
    alike: bool = True
    perception: str | None = None
    perceive: Features | None = None

    def __init__(self, config: Any, triad: Triad, rollout: Rollout):
        super().__init__()
        self.config, self.triad, self.rollout = config, triad, rollout
        self.said: list[str] = []
        """what a run tells its user of the choices this objective made"""
        self.refuse(rollout)
        self.targets: dict[str, Backbone] = {}

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        """The roles this objective uses under `config`."""
        return cls.roles

    @classmethod
    def wrapped(cls, config: Any, network: DiffusersBackbone, x: Tensor, cond: Condition) -> Backbone:
        """The generator that this objective makes of a copy of the teacher; x (B, *S) are inputs that it will see."""
        return network

    @classmethod
    def counts(cls, config: Any) -> bool:
        """Whether generator and critic are told of how many steps the walk is."""
        return False

    @classmethod
    def two_times(cls, config: Any) -> bool:
        """Whether the generator is told where its step ends, in training and whenever it is sampled."""
        return False

    @classmethod
    def tells(cls, config: Any) -> dict[str, float]:
        """Further dials of the generator, told in training and when it is sampled, and their values in the latter."""
        return {}

    @classmethod
    def by_derivative(cls, config: Any) -> bool:
        """Whether derivatives alone say where it leads, so that x0 at t = 0 has to be x by construction."""
        return False

    def refuse(self, rollout: Rollout) -> None:
        """Raises UserError for a rollout by which what this objective makes must not be sampled."""

    def attach(self, x: Tensor, cond: Condition) -> None:
        """Makes modules whose sizes depend on the features of inputs such as x (B, *S); called once."""

    def learns(self) -> dict[str, list[nn.Module]]:
        """Player -> modules of this objective that move with it, beside the network of that name."""
        return {}

    def followers(self) -> Mapping[str, float | Callable[[int], float]]:
        """Name -> decay of the target networks that trail the generator, or decay of moves made so far.

        They are found in `self.targets`.
        """
        return {}

    def drawn(self) -> dict[str, float]:
        """Role -> decay with which its network is drawn to the generator's after each move of the generator."""
        return {}

    def generates(self, step: int) -> bool:
        """Whether the generator moves at this step."""
        return True

    def criticises(self, step: int) -> bool:
        """Whether the critic moves at this step."""
        return "fake_score" in self.needs(self.config)

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        """What both turns of a step look at."""
        return self.rollout(self.triad.generator, batch.noise, batch.cond, batch.draw, grad=int(grad))

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        raise NotImplementedError

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        raise NotImplementedError

    def turns(self, batch: Batch, step: int) -> Turns:
        """Samples once; the generator's turn, then the critic's on the same sample, detached.

        An objective that overrides this cannot be a term of `sum`.
        """
        sample = self.sample(batch, step, grad=self.generates(step))
        if self.generates(step):
            loss, logs = self.generator_loss(batch, sample, step)
            yield Turn("generator", loss, {**logs, **sample_logs(sample.x0, batch)})
        if self.criticises(step):
            loss, logs = self.critic_loss(batch, sample.detach(), step)
            yield Turn("fake_score", loss, logs)

    def draw_time(
        self, batch: Batch, purpose: str, times: Times, above: Tensor | None = None, below: Tensor | None = None
    ) -> Tensor:
        """t (B,) of the generator's process."""
        return times(batch.draw.uniform(purpose), self.triad.generator.schedule, above, below)


@torch.no_grad()
def sample_logs(x0: Tensor, beside: Batch | Pair) -> dict[str, Tensor]:
    """How a sample (B, *S) looks, under `x0/`, and how true images or the pairs beside it do, under `data/`.

    `mean`, `std` and `saturated` (share of values beyond 1 in size) are over all values; `spread` is the rms deviation
    of images from each other, and `label` how much of it their class label explains (see `label_share`).
    """
    real = beside.pair if isinstance(beside, Batch) and beside.x0 is None else beside
    looked_at = [("x0", x0, beside.cond)]
    if real is not None and real.x0 is not None:
        looked_at.append(("data", real.x0, real.cond))
    logs: Logs = {}
    for name, images, cond in looked_at:
        images, labels = images.float(), cond.inputs.get("class_labels")
        logs |= {f"{name}/mean": images.mean(), f"{name}/std": images.std()}
        logs[f"{name}/saturated"] = (images.abs() > 1).float().mean()
        if len(images) > 1:
            logs[f"{name}/spread"] = images.var(0).mean().sqrt()
            logs |= {} if labels is None else {f"{name}/label": label_share(images, labels)}
    return logs


def label_share(images: Tensor, labels: Tensor) -> Tensor:
    """1 - (mean squared distance within a label) / (that of any two), a scalar, for images (B, *S), labels (B,).

    0 in the mean for images that know nothing of their labels, 0 where no two labels are alike, at most 1.
    """
    apart = torch.cdist(images.flatten(1), images.flatten(1)).square()
    alike = (labels[:, None] == labels).float().fill_diagonal_(0)
    any_two = apart.sum() / (len(images) * (len(images) - 1))
    within = (apart * alike).sum() / alike.sum().clamp(min=1)
    return torch.where(alike.sum() > 0, 1 - within / any_two.clamp(min=1e-12), torch.zeros_like(within))


def names() -> list[str]:
    """Every objective, by file name."""
    import fewstep.objectives as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("base", "pieces"))


def find(name: str) -> ModuleType:
    """The module of the objective `name`, with its `Config` and `Objective`. Raises UserError for another name."""
    if name not in names():
        raise UserError(f"there is no objective '{name}': use one of {', '.join(names())}")
    return importlib.import_module(f"fewstep.objectives.{name}")


def typed(node: Mapping[Any, Any]) -> Any:
    """The Config of a node like `objective:`. Raises UserError with one sentence for what its schema does not allow."""
    schema = find(node["name"]).Config
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except OmegaConfBaseException as error:
        hint = f"`fewstep objectives {node['name']}` shows its keys"
        raise UserError(f"{sentence(error)}: {hint}") from None
    except TypeError:  # what omegaconf says of it names no key
        raise UserError(
            f"a key of {node['name']} has a list where keys and values belong, or the other way round: `fewstep "
            f"objectives {node['name']}` shows them"
        ) from None
