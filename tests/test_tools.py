"""The tools that nothing else runs: each says what it does, and the cost of a step can be measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOLS = sorted(path for path in Path("tools").glob("*.py") if "__main__" in path.read_text())


def play(tool: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(tool), *given])
    monkeypatch.syspath_prepend("tools")
    runpy.run_path(str(tool), run_name="__main__")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_says_what_it_does(
    tool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        play(tool, monkeypatch, "--help")
    assert ended.value.code in (0, None) and len(capsys.readouterr().out.split()) > 10


def test_the_cost_of_a_step_is_counted_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows a cycle of the quickstart at a batch of 4, with one generator move to two of the critic.

    Generator turn: G, the guided or plain teacher, F; critic turns: F on the sample and on data up to the tap.
    """
    play(Path("tools/bench_step.py"), monkeypatch, "--rounds", "1", "--batch", "4", "--out", str(tmp_path / "s.json"))
    told = json.loads((tmp_path / "s.json").read_text())
    assert (told["full_passes_a_cycle"], told["stopped_forwards_a_cycle"]) == (36, 8)
    assert told["naive_passes_a_cycle"] == 80 and told["ratio_without_optimizer"] > 0.5
