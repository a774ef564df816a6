"""A value that is not finite ends a run in a sentence that names it; what was saved stays, and goes on without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import numbers
from tests.faults.harness import Server
from tests.faults.kills import Scene, whole


@pytest.mark.parametrize(
    "scene, cases",
    [
        (numbers.ALONE, [("follower", "inf", 5)]),
        pytest.param(numbers.TOGETHER, [("moment", "nan", 5), ("teacher's output", "inf", 4)], marks=pytest.mark.slow),
    ],
    ids=["alone", "of two processes"],
)
def test_named_nothing_saved_and_resumed_to_the_bit(
    scene: Scene, cases: list[tuple[str, str, int]], server: Server, tmp_path: Path
) -> None:
    reference = whole(server, scene, tmp_path / "whole")
    found = {case: numbers.met(server, reference, *case, tmp_path / f"case_{i}") for i, case in enumerate(cases)}
    assert found == {case: [] for case in cases}
