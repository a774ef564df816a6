"""What a run leaves when it ends: the table, the export and the report."""

from __future__ import annotations

from fewstep.build import Run
from fewstep.train.rundir import RunDir


def finish(run: Run, folder: RunDir) -> None:
    print(f"done: {folder.root}")
