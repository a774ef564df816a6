"""A small training loop that continues where it was stopped, for the tools that make the assets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import trange

LossOf = Callable[[int], Tensor]
Parts = Mapping[str, nn.Module | torch.optim.Optimizer]
_SAVE_EVERY = 100
_WARM_UP = 0.05
_CLIP = 1.0


def fit(networks: Mapping[str, nn.Module], loss_of: LossOf, steps: int, rate: float, state: Path) -> None:
    """Minimise `loss_of(step)` over all weights with AdamW and a rate that warms up and then falls to zero.

    `loss_of` must draw its numbers from the step alone: then a run continued from the file `state` equals one that was
    never stopped. The weights are changed in place; `state` stays for as long as somebody may want to continue.
    """
    modules = nn.ModuleDict(dict(networks))
    optimiser = torch.optim.AdamW(modules.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-3)
    parts: Parts = {"networks": modules, "optimiser": optimiser}
    start = _restore(parts, state)
    bar = trange(start, steps, initial=start, total=steps, desc=state.stem, unit="step", dynamic_ncols=True)
    for step in bar:
        optimiser.param_groups[0]["lr"] = rate * _share(step / steps)
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), _CLIP)
        optimiser.step()
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            _save(parts, step + 1, state)
            bar.set_postfix(loss=f"{loss.item():.4f}")


def _share(done: float) -> float:
    """The share of the full rate when `done` of the steps are: a straight rise, then half a cosine."""
    return min(1.0, done / _WARM_UP + 1e-3) * 0.5 * (1 + math.cos(math.pi * done))


def _restore(parts: Parts, state: Path) -> int:
    """The number of steps done, 0 without a file."""
    if not state.is_file():
        return 0
    saved = torch.load(state, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def _save(parts: Parts, step: int, state: Path) -> None:
    """Written aside and renamed, so that a kill leaves a whole file."""
    state.parent.mkdir(parents=True, exist_ok=True)
    aside = state.with_suffix(".partial")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, aside)
    aside.rename(state)
