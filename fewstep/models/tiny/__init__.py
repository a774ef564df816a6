"""Random pipelines of the text families, built from configurations alone: a few megabytes, no file, no network.

What matters of a family is kept: the classes, the kind of prediction, the schedule and what the denoiser is told. The
weights are drawn, so the images mean nothing, and the VAEs have the scales that make latents of a deviation near 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fewstep.core.errors import UserError
from fewstep.models.tiny import (
    aura_flow,
    chroma,
    cogvideox,
    dit,
    flux,
    flux2,
    hunyuan_video,
    ltx,
    lumina2,
    ovis_image,
    pixart,
    qwen_image,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    wan,
    z_image,
)

_FILES: tuple[Any, ...] = (
    dit,
    stable_diffusion,
    stable_diffusion_3,
    pixart,
    sana,
    aura_flow,
    lumina2,
    flux,
    chroma,
    flux2,
    qwen_image,
    z_image,
    wan,
    cogvideox,
    ltx,
    hunyuan_video,
    ovis_image,
)

MAKERS: dict[str, Callable[..., Any]] = {name: maker for file in _FILES for name, maker in file.MAKERS.items()}

LABELLED = frozenset(dit.MAKERS)
"""Families whose networks read labels; all others read prompts."""

STANDS_FOR: dict[str, str] = {hub: name for file in _FILES for hub, name in file.STANDS_FOR.items()}
"""The hub ids whose classes a family has; what a name stands for cannot be asked without a network."""


def family_of(source: str) -> str:
    """The family of a hub id. Raises UserError for an id that no tiny pipeline stands for."""
    if source not in STANDS_FOR:
        raise UserError(f"no tiny pipeline stands for '{source}': there is one for each of {', '.join(STANDS_FOR)}")
    return STANDS_FOR[source]


def make(family: str, **changes: Any) -> Any:
    """The pipeline of `family`, in evaluation mode, the same weights every time."""
    torch.manual_seed(0)
    pipeline = MAKERS[family](**changes)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline
