"""One self-contained page about a run or about several, and the final table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.core.errors import UserError
from fewstep.report.found import Found, read
from fewstep.report.measures import as_text
from fewstep.report.page import page
from fewstep.report.versus import versus
from fewstep.train.checkpoint import write_text
from fewstep.train.rundir import RunDir

__all__ = ["Found", "as_text", "page", "read", "versus", "write_comparison", "write_report"]


def write_report(folder: RunDir, to: Path | None = None) -> Path:
    """Writes the page of a run from what lies in its folder, whole or not at all; returns its path.

    `to` is `report.html` in the folder by default. Nothing is required: the page says what is missing. Raises
    UserError when it cannot be written.
    """
    return _written(to or folder.root / "report.html", page(read(folder)))


def write_comparison(folders: Sequence[RunDir], to: Path) -> Path:
    """Writes one page over several runs; else as `write_report`."""
    return _written(to, versus([read(folder) for folder in folders]))


def _written(path: Path, text: str) -> Path:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return path
