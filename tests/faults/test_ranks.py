"""A process that is lost ends the others in time, each with one sentence that names it and says what has happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults import ranks
from tests.faults.harness import Server

SHORT = 10.0
"""seconds of `timeout`, on a machine that may be busy"""


def test_killed_stopped_or_hung_it_is_named_in_time(server: Server, tmp_path: Path) -> None:
    """Side by side, for most of it is waiting."""
    losses = ranks.kinds(ranks.STEP)
    groups = {
        (kind, faulty): ranks.start(server, tmp_path, f"{kind}_{faulty}", 2, faulty, losses[kind], SHORT)
        for kind, faulty in (("killed", 1), ("stopped", 0), ("hung", 1))
    }
    found = {case: ranks.judge(group, losses[case[0]])[0] for case, group in groups.items()}
    assert found == {case: [] for case in groups}


def test_with_another_config_or_source_or_away_it_is_refused(server: Server, tmp_path: Path) -> None:
    groups = ranks.unlike(server, tmp_path, SHORT)
    found = {what: ranks.refused(group, ranks.UNLIKE[what]) for what, group in groups.items()}
    assert found == {what: [] for what in groups}


def test_what_stops_the_leader_alone_is_said_by_all(server: Server, tmp_path: Path) -> None:
    assert ranks.full_disk(server, tmp_path, SHORT) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["SIGKILL", "SIGSTOP"])
def test_torchrun_leaves_no_process_behind(number: signal.Signals, tmp_path: Path) -> None:
    assert ranks.by_torchrun(tmp_path, number, 1, SHORT)[0] == []
