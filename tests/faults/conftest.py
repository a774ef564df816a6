from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.faults.harness import Server
from tests.faults.kills import SCENES, Whole, whole


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Forks the commands of all tests under fault."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def gan(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Pairs, regression, and DMD2 with a GAN, left alone."""
    scene = SCENES["pairs_then_gan"]
    without_table = replace(scene, more=(*scene.more, "evals.samples=0"))
    return whole(server, without_table, tmp_path_factory.mktemp("whole"))
