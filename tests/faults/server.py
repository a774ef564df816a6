"""Loads the package once, then forks a process for every command it reads: a JSON object a line on its input.

Shards of pairs are of eight rows here, so that a small run has several.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import sys
import traceback
from pathlib import Path
from typing import Any

LOADED = (
    "fewstep.cli",
    "fewstep.runner",
    "fewstep.finish",
    "fewstep.report",
    "fewstep.doctor",
    "fewstep.evaluation",
    "fewstep.sampling",
    "fewstep.sharded",
    "fewstep.prepare",
    "torch.distributed.fsdp",
    "diffusers.models.unets.unet_2d",
    "diffusers.pipelines.consistency_models",
    "diffusers.schedulers",
    "matplotlib.figure",
    "tests.faults.faults",
)


def child(asked: dict[str, Any]) -> None:
    """Plays one command in a process of its own and never returns."""
    code = 70
    base = Path(asked["base"])
    try:
        os.setsid()
        for number, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(base.with_suffix(f".{ending}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(asked["env"])
        if asked["user"] is not None:
            os.setgid(asked["user"])
            os.setuid(asked["user"])
        from fewstep import cli, pairs
        from tests.faults import faults

        pairs.SHARD, pairs.BATCH = 8, 4

        sys.argv = ["fewstep", *asked["arguments"]]
        faults.install(asked["fault"], base.with_suffix(".counted"))
        code = cli.main(asked["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def put(path: Path, text: str) -> None:
    aside = path.with_suffix(".aside")
    aside.write_text(text)
    aside.rename(path)


def reap(bases: dict[int, Path], wait: bool = False) -> None:
    while bases:
        pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
        if not pid:
            return
        put(bases.pop(pid).with_suffix(".status"), str(os.waitstatus_to_exitcode(status)))


def main() -> None:
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()
    bases: dict[int, Path] = {}
    buffered = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01)
        reap(bases)
        if not ready:
            continue
        if not (read := os.read(0, 1 << 16)):
            break
        *lines, buffered = (buffered + read).split(b"\n")
        for line in lines:
            asked = json.loads(line)
            if not (pid := os.fork()):
                child(asked)
            bases[pid] = Path(asked["base"])
            put(bases[pid].with_suffix(".pid"), str(pid))
    reap(bases, wait=True)


if __name__ == "__main__":
    main()
