"""The folder of a run: where everything it leaves behind is put."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fewstep import reading
from fewstep.train import processes
from fewstep.train.checkpoint import tidy, write_text

_LOOKS = 5


class RunDir:
    """`root`/config.yaml, origin.json, log.jsonl, evals.jsonl, samples/, checkpoints/, export/, report.html.

    Of several processes the leader alone writes here.
    """

    def __init__(self, root: Path):
        self.root = root
        self.samples, self.checkpoints, self.export = root / "samples", root / "checkpoints", root / "export"

    def create(self) -> None:
        """Makes the folders, but not the one above: a run that was removed would go on in half of one.

        Raises OSError where that is not possible.
        """
        if not processes.leads():
            return
        for folder in (self.root, self.samples, self.checkpoints):
            folder.mkdir(exist_ok=True)
            tidy(folder)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Adds one JSON line to `name`."""
        if not processes.leads():
            return
        with (self.root / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def settle(self, *names: str) -> None:
        """Has the disk hold what was added to `names`, so that no checkpoint outlives the log before it."""
        for path in (self.root / name for name in names):
            if processes.leads() and path.exists():
                with path.open("a") as file:
                    os.fsync(file.fileno())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The JSON lines of `name`; a last line cut short by a crash is left out."""
        return self.rows_of(name)[0]

    def rows_of(self, name: str) -> tuple[list[dict[str, Any]], int]:
        """`rows`, and how many lines there are."""
        rows: list[dict[str, Any]] = []
        lines = self._lines(self.root / name)
        for line in lines:
            try:
                rows.append(reading.parsed(line, finite=False))  # a loss that is NaN is worth its line
            except ValueError:
                break
        return rows, len(lines)

    @staticmethod
    def _lines(path: Path) -> list[str]:
        """Raises UserError for what is no file that a log can be."""
        text = ""
        for _ in range(_LOOKS):
            text = reading.content(path, reading.LINES).decode(errors="replace") if path.exists() else ""
            if not text or text.endswith("\n"):
                break
            time.sleep(0.01)  # a run that trains may just be writing its last line
        return text.splitlines()

    def truncate(self, name: str, step: int) -> int:
        """Drops the lines of steps that a resumed run will play again; says how many, one cut short among them."""
        path = self.root / name
        if not processes.leads() or not path.exists():
            return 0
        before = reading.content(path, reading.LINES).decode(errors="replace")
        told = (row for row in self.rows(name) if isinstance(row, dict) and isinstance(row.get("step"), int))
        kept = [row for row in told if row["step"] <= step]
        after = "".join(json.dumps(row) + "\n" for row in kept)
        if after != before:
            write_text(path, after)
        return len(before.splitlines()) - len(kept)

    def note_protocols(self, protocols: Mapping[str, Any]) -> None:
        """Adds to protocols.json what the numbers of evals.jsonl are of."""
        file = self.root / "protocols.json"
        before = reading.fields(file) if file.is_file() else {}
        if processes.leads() and before != {**before, **protocols}:
            write_text(file, json.dumps({**before, **protocols}, indent=1))

    def write_origin(self, config: str, teacher: Mapping[str, Any], sampling: Mapping[str, Any]) -> None:
        """The resolved config; command, commit, versions, hardware and teacher: what a reader repeats the run from.

        `sampling` is how the student was walked in training, to be held beside how it is sampled.
        """
        if not processes.leads():
            return
        write_text(self.root / "config.yaml", config)
        packages = ("fewstep", "torch", "diffusers", "transformers", "safetensors", "omegaconf")
        origin = {
            "command": _command(),
            "commit": _commit(),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in packages},
            "hardware": _hardware(),
            "processes": processes.size(),
            "teacher": dict(teacher),
            "sampling": dict(sampling),
        }
        write_text(self.root / "origin.json", json.dumps(origin, indent=1))


def leads_out(root: Path) -> str | None:
    """Why a run must not write in `root`: a link in it, which leads elsewhere. A folder may come from anybody."""
    link = next((path for path in sorted(root.rglob("*")) if path.is_symlink()), None)
    if link is None:
        return None
    return f"{link} is a link: a run writes inside of its own folder alone; put there what it leads to, or remove it"


def _command() -> str:
    """What was typed, without where this program lies."""
    program = Path(sys.argv[0])
    return shlex.join(["fewstep" if program.name in ("cli.py", "fewstep") else program.name, *sys.argv[1:]])


def _commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "not a git checkout"


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads != 1 else ''}"


def new(root: Path, name: str) -> Path:
    """runs/<date>_<name>, with a number behind it when that folder is taken."""
    base = root / f"{date.today():%Y-%m-%d}_{name}"
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}_{number}")
    return path
