"""What can be measured: the student or the teacher of a run, a pipeline folder, a folder of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import measure
from fewstep.build import Run
from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.data.source import FolderSource
from fewstep.models.backbone import Backbone
from fewstep.relay import Relay
from fewstep.rollout import Rollout
from fewstep.sampling import Sampler


@dataclass(frozen=True)
class Generated:
    """A generator with its rollout; image i is a function of (seed, i) and of what is asked for.

    `told(asked)` is what the network is told in the places `asked` (B,), and `said(asked)` the same in words.
    """

    name: str
    net: Backbone
    rollout: Rollout
    told: Callable[[Tensor], Condition]
    said: Callable[[Tensor], list[str]]
    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]
    device: torch.device
    seed: int
    source: Mapping[str, Any]
    count: int | None = None

    @property
    def passes(self) -> float:
        return self.rollout.passes(self.net)

    @torch.no_grad()
    def make(self, rows: Tensor, asked: Tensor) -> Tensor:
        draw = Draw(self.seed, 0, rows.to(self.device))
        noise = draw.normal("noise", self.shape)
        return self.decode(self.rollout(self.net, noise, self.told(asked.to(self.device)), draw).x0).cpu()

    def captions(self, asked: Tensor) -> list[str]:
        return self.said(asked)


def of_run(name: str, run: Run, net: Backbone, rollout: Rollout, seed: int = measure.SAMPLE_SEED) -> Generated:
    """A network of a run, asked for what the run asks for when it is looked at."""
    asked = "unseen captions" if run.teacher.prompted else "labels in turn"
    source = {"seed": seed, "asked": asked, "steps": len(rollout)}
    if isinstance(rollout, Relay):
        source["base_first"] = rollout.first
    told, said = run.conditions.asked, run.conditions.names
    return Generated(name, net, rollout, told, said, run.shape, run.decode, run.device, seed, source)


def of_sampler(name: str, sampler: Sampler, prompts: Callable[[Tensor], list[str]], seed: int) -> Generated:
    """A sampler, asked for `prompts(asked)`, or for its labels in turn where it reads none."""
    device = next(sampler.net.parameters()).device

    def told(asked: Tensor) -> Condition:
        if sampler.encode is not None:
            return sampler.encode(prompts(asked.cpu())).to(device)
        return Condition({"class_labels": asked % sampler.classes}) if sampler.classes else Condition()

    def said(asked: Tensor) -> list[str]:
        if sampler.encode is not None or not sampler.classes:
            return prompts(asked)
        return [sampler.name(label) for label in (asked % sampler.classes).tolist()]

    source = {"seed": seed, "asked": "prompts" if sampler.encode else "labels in turn", "steps": len(sampler.rollout)}
    return Generated(
        name, sampler.net, sampler.rollout, told, said, sampler.shape, sampler.decode, device, seed, source
    )


class Pictures:
    """A folder of images, each once in its order; they are what they are, so nothing can be asked of them."""

    passes = None

    def __init__(self, folder: Path, resolution: int):
        self.name, self.pictures = str(folder), FolderSource(folder, resolution, 0)
        self.count = self.pictures.size
        self.source = {"folder": str(folder), "resolution": resolution, "checksum": self.pictures.checksum()}

    def make(self, rows: Tensor, asked: Tensor) -> Tensor:
        if not torch.equal(rows, asked):
            raise UserError(f"{self.name} is a folder of images: several of one prompt cannot be asked of it")
        assert self.count is not None
        return self.pictures.images(rows % self.count)

    def captions(self, asked: Tensor) -> list[str]:
        assert self.count is not None
        return self.pictures.captions(asked % self.count)
