"""Looking at generators: sample grids at fixed noise, and the table of fidelity, diversity and speed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewstep.build import Run
from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.evals.grid import save_grid
from fewstep.models.backbone import Backbone, Guided
from fewstep.rollout import Rollout

GRID_SEED = 20_000


def labels_of(run: Run, count: int) -> Tensor:
    """Labels 0, 1, .., K-1, 0, .. for `count` images; zeros for data without labels."""
    return torch.arange(count) % max(1, len(run.source.labels))


@torch.no_grad()
def generate(
    net: Backbone, rollout: Rollout, labels: Tensor, shape: tuple[int, ...], seed: int, batch: int = 250
) -> Tensor:
    """Images (N, *S), clamped to [-1, 1], one for each of `labels` (N,); image i depends on (seed, i) alone."""
    device = next(net.parameters()).device
    images = []
    for rows in torch.arange(len(labels)).split(batch):
        draw = Draw(seed, 0, rows.to(device))
        cond = Condition({"class_labels": labels[rows].to(device)})
        images.append(rollout(net, draw.normal("noise", shape), cond, draw).x0.clamp(-1, 1).cpu())
    return torch.cat(images)


def student(run: Run) -> tuple[Backbone, Rollout]:
    """The generator to look at and its rollout; one that `diffusion` trains is guided as a teacher is."""
    net = run.evaluated()
    if run.config.model.network is not None and run.config.model.guidance != 1:
        net = Guided(net, run.config.model.guidance)
    return net, run.rollout


def save_student_grid(run: Run, path: Path, count: int = 48) -> None:
    """A grid at fixed noise and labels, the same throughout the run."""
    net, rollout = student(run)
    images = generate(net, rollout, labels_of(run, count), run.shape, GRID_SEED)
    save_grid(images, path, columns=12)
