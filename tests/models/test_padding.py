"""Texts of several lengths: padded, shortened again, and as long as may be where nothing is known of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep import build, config, plan
from fewstep.memory import account
from fewstep.models import padding
from tests import family_runs


def test_what_was_padded_is_shortened_to_the_longest() -> None:
    rows = [torch.ones(2, 3), torch.ones(4, 3)]
    texts, mask = padding.padded(rows, 6)
    assert texts.shape == (2, 6, 3) and mask.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert padding.lengths(mask) == [2, 4] and padding.lengths(mask.to("meta")) == [6, 6]
    texts, mask = padding.shortened(texts, mask)
    assert mask.shape == (2, 4) and torch.equal(texts[1], rows[1]) and texts[0].sum() == rows[0].sum()


@pytest.mark.parametrize("family, most", [("qwen_image", 512), ("z_image", 512), ("lumina2", 256)])
def test_a_plan_takes_texts_as_long_as_they_may_be(family: str, most: int, tmp_path: Path) -> None:
    (one,) = config.load(family_runs.write(family, tmp_path, {"name": "dmd2", "gan_weight": 0.0}, None))
    foreseen, run = plan.foresee(plan.Setting(one))
    assert run.conditions.of(torch.arange(2)).inputs["encoder_hidden_states"].shape[:2] == (2, most)
    assert foreseen.peak > account(build.build(one), range(2)).peak
