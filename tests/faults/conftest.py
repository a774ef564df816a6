from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.harness import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Forks the commands of all tests under fault."""
    with Server() as server:
        yield server
