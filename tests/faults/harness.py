"""Drives the command line under fault: one server has the package loaded and forks a process for every command.

A command is what `fewstep` is given, run in a process of its own that can be killed; only the import is shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LONGEST = 300.0


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, negative for a signal, what it printed, and what its fault has counted."""

    code: int
    said: str
    errors: str
    counted: dict[str, Any]
    seconds: float

    @property
    def sentence(self) -> str:
        """The one sentence of a refused command."""
        lines = [line for line in self.errors.splitlines() if line.startswith("fewstep")]
        assert self.code == 2 and len(lines) == 1 and "Traceback" not in self.errors, (self.code, self.errors[-3000:])
        return lines[0]


class Command:
    """A command that runs."""

    def __init__(self, base: Path):
        self.base, self.began = base, time.monotonic()
        self.pid = int(self._wait("pid", 60))

    def _wait(self, ending: str, patience: float) -> str:
        file, deadline = self.base.with_suffix(f".{ending}"), time.monotonic() + patience
        while not file.exists():
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError, AttributeError):
                    self.send(signal.SIGKILL)
                raise AssertionError(f"no {ending} after {patience} s: {self.printed('err')[-2000:]}")
            time.sleep(0.005)
        return file.read_text()

    def printed(self, stream: str = "out") -> str:
        file = self.base.with_suffix(f".{stream}")
        return file.read_text(errors="replace") if file.exists() else ""

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        return not self.base.with_suffix(".status").exists()

    def done(self, patience: float = LONGEST) -> Done:
        """Waits for the end."""
        code = int(self._wait("status", patience))
        counted = self.base.with_suffix(".counted")
        found = json.loads(counted.read_text()) if counted.exists() else {}
        return Done(code, self.printed("out"), self.printed("err"), found, time.monotonic() - self.began)


class Server:
    """Forks commands; entered, it lives."""

    def __enter__(self) -> Server:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.count = 0
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env=settings,
            stdin=subprocess.PIPE,
            stderr=(self.folder / "server.err").open("w"),
            text=True,
        )
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def start(
        self,
        arguments: Sequence[str],
        fault: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        user: int | None = None,
    ) -> Command:
        """Starts `fewstep ARGUMENTS`, with one of the faults of `faults.py`, more of an environment, another user."""
        self.count += 1
        base = self.folder / f"{self.count:05d}"
        asked = {"base": str(base), "arguments": list(arguments), "fault": dict(fault or {}), "env": dict(env or {})}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**asked, "user": user}) + "\n")
        self.process.stdin.flush()
        return Command(base)

    def run(self, arguments: Sequence[str], fault: Mapping[str, Any] | None = None, **more: Any) -> Done:
        return self.start(arguments, fault, **more).done()

    def run_two(
        self, arguments: Sequence[str], fault: Mapping[str, Any] | None = None, kill_after: float = LONGEST
    ) -> Done:
        """The same on two processes, the fault in the first; when one is killed its launcher kills the other.

        Both are killed after so many seconds. Returns how the first one ended.
        """
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        both = [
            self.start(arguments, fault if rank == 0 else None, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in (0, 1)
        ]
        while running := [one for one in both if one.running]:
            killed = any(one.done().code < 0 for one in both if not one.running)
            if killed or time.monotonic() - both[0].began > kill_after:
                for one in running:
                    one.send(signal.SIGKILL)
            time.sleep(0.01)
        leader, other = (one.done() for one in both)
        # While the leader finishes, the other has ended already.
        assert other.code == leader.code or (leader.code < 0 and other.code == 0), (leader, other)
        return leader


def make_teacher(folder: Path) -> Path:
    """A random flow teacher for 16x16 scenes with attention, written once as a pipeline folder."""
    import diffusers

    from fewstep.models import schedulers

    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        net = diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=[8, 8],
            layers_per_block=1,
            down_block_types=["DownBlock2D", "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=4,
            norm_num_groups=4,
            num_class_embeds=13,
        )
        pipeline = diffusers.ConsistencyModelPipeline(unet=net, scheduler=schedulers.flow_scheduler())
        pipeline.save_pretrained(folder)
    return folder


def the_run(out: Path) -> Path | None:
    """The one run folder in `out`."""
    found = [path for path in out.iterdir() if path.is_dir()] if out.is_dir() else []
    assert len(found) < 2, found
    return found[0] if found else None


def leftovers(run: Path) -> list[str]:
    """Temporary files and folders below a run."""
    endings = (".partial", ".gone", ".old", ".tmp", ".npz.partial")
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.name.startswith(".") or p.name.endswith(endings))


# What says when and where a run was made, and so differs between two runs of one config.
_OF_THE_DAY = ("origin.json", "report.html", "table.json", "log.jsonl", "evals.jsonl")
_CLOCKS = ("seconds", "images_per_second")


def traces(run: Path) -> dict[str, Any]:
    """All that two equal runs have in common: the bytes of checkpoints, grids, pairs and export, and logged numbers."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(file.relative_to(run))
        if file.name not in _OF_THE_DAY and not file.name.startswith("README"):
            found[name] = file.read_bytes()
    for file in sorted([*run.rglob("log.jsonl"), *run.rglob("evals.jsonl")]):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if k not in _CLOCKS} for row in rows if "resumed" not in row]
        found[str(file.relative_to(run))] = kept
    for file in run.rglob("table.json"):
        rows = json.loads(file.read_text())["rows"]
        found[str(file.relative_to(run))] = [{k: v for k, v in row.items() if k not in _CLOCKS} for row in rows]
    return found


def different(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The names of what two runs do not have in common."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def resumable(run: Path) -> bool:
    """Whether `--resume` can take the folder up."""
    return any(path.is_dir() for path in (run / "checkpoints", *run.glob("stage_*/checkpoints")))
