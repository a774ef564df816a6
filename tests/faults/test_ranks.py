"""A process that is lost ends the others in time, each with one sentence that names it and says what has happened."""

from __future__ import annotations

from pathlib import Path

from tests.faults import ranks
from tests.faults.harness import Server

SHORT = 12.0
"""seconds of `timeout`: the run does what takes milliseconds in turn, on a machine that may be busy"""


def test_killed_stopped_or_hung_it_is_named_in_time(server: Server, tmp_path: Path) -> None:
    """Side by side, for most of it is waiting."""
    losses = ranks.kinds(ranks.STEP)
    groups = {
        (kind, faulty): ranks.start(server, tmp_path, f"{kind}_{faulty}", 2, faulty, losses[kind], SHORT)
        for kind, faulty in (("killed", 1), ("stopped", 0), ("hung", 1))
    }
    found = {case: ranks.judge(group, losses[case[0]])[0] for case, group in groups.items()}
    assert found == {case: [] for case in groups}
