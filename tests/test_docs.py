"""What the documents and the headers of the configs show exists, loads and parses."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
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


def commands() -> set[str]:
    """Every `fewstep ..` and `python tools/..` in the documents' code and in the headers of the configs."""
    documents = README + Path("CONTRIBUTING.md").read_text()
    spans = re.findall(r"```\w*\n(.*?)```", documents, re.DOTALL)
    spans += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", documents, flags=re.DOTALL))
    lines = [re.sub(r"\s+# .*", "", line) for span in spans for line in span.splitlines()]
    for file in Path("configs").rglob("*.yaml"):
        header = [line[1:] for line in file.read_text().splitlines() if line.startswith("#")]
        lines += [part for line in header for part in re.split(r"&&|, |[()]|then:|or:", line)]
    return {line.strip(" .") for line in lines if re.match(r"\s*(fewstep [a-z]|python tools/)", line)}


COMMANDS = sorted(commands())


def test_every_command_of_the_program_is_shown() -> None:
    known = cli.parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert {shlex.split(line)[1] for line in COMMANDS if line.startswith("fewstep")} == set(known)
    assert sum(line.startswith("python") for line in COMMANDS) >= 9


class Parsed(Exception):
    """Raised where a tool would begin its work."""


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_shown_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser of the program or the tool itself, which is stopped before it runs; configs that are named load."""
    program, *arguments = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", line))
    if program == "fewstep":
        args = cli._parse([text.replace("key=value", "seed=1") for text in arguments])
        if args.command in ("train", "config") and args.config not in ("CONFIG", "FILE"):
            assert config.load(args.config, args.overrides)
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        parse(parser, arguments[1:])
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend("tools")
    with pytest.raises(Parsed):
        runpy.run_path(arguments[0], run_name="__main__")


def test_the_pages_of_methods_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("tools")
    import method_pages

    wanted = {method_pages.PAGES / f"{name}.md": method_pages.page(name) for name in method_pages.methods()}
    assert len(wanted) >= 15
    old = [str(file) for file, text in wanted.items() if file.read_text() != text]
    assert not old, "run python tools/method_pages.py"


def test_every_objective_is_in_the_table() -> None:
    table = README.split("## Objectives")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert listed == set(base.names())
