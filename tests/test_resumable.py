from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.draw import Draw
from tools.resumable import fit

STEPS = 230


def fitted(state: Path, stop_before: int | None = None) -> nn.Module:
    """A line through points of slope two, fitted in STEPS steps or until `stop_before`."""
    torch.manual_seed(0)
    line = nn.Linear(1, 1)

    def loss_of(step: int) -> Tensor:
        if step == stop_before:
            raise KeyboardInterrupt
        x = Draw(1, step, torch.arange(8)).normal("x", (1,))
        return (line(x) - 2 * x).square().mean()

    fit({"line": line}, loss_of, STEPS, 3e-2, state)
    return line


def test_a_stopped_fit_continues_to_the_same_weights(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole.state")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "stopped.state", stop_before=150)
    again = fitted(tmp_path / "stopped.state")
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)
    assert abs(whole.weight.item() - 2) < 0.02


def test_a_finished_fit_only_gives_its_weights_back(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "line.state")
    again = fitted(tmp_path / "line.state", stop_before=0)
    assert torch.equal(whole.weight, again.weight)
