"""What the README shows exists and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fewstep import cli, config
from fewstep.objectives import base

README = Path("README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"(?:tools|configs|assets|fewstep|tests)/[\w./-]+\.(?:sh|py|yaml|png|json)", README))
    assert len(named) > 8
    missing = sorted(path for path in named if not Path(path).exists())
    assert missing == []


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "yaml"])
def test_every_config_shown_loads(block: str, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(block)
    assert config.load(tmp_path / "shown.yaml")[-1].objective.name == "dmd2"  # type: ignore[attr-defined]


def test_the_explained_config_is_the_quickstart(tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(next(text for kind, text in BLOCKS if kind == "yaml"))
    assert config.load(tmp_path / "shown.yaml") == config.load("configs/quickstart.yaml")


def test_every_command_shown_parses() -> None:
    shown = re.findall(r"`fewstep (plan|train|sample|eval|export|report|config|objectives)\b", README)
    known = cli.parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(shown) == set(known)


def test_every_objective_is_in_the_table() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert listed == set(base.names())
