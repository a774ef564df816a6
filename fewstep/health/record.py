"""What a run has left behind so far, stage by stage, as plain numbers: torch is not needed to read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.health.signs import MOVES, Row, moved
from fewstep.train.rundir import RunDir


@dataclass(frozen=True)
class Stage:
    """One stage of a run: `rows` of its log, its config and origin as plain dicts, and what lies beside them.

    `table` and `export` belong to the run as a whole: they are None for all stages but the last.
    """

    name: str
    rows: list[Row]
    config: dict[str, Any]
    origin: dict[str, Any]
    evals: list[Row]
    table: dict[str, Any] | None = None
    export: Path | None = None

    def asked(self, path: str, default: Any = None) -> Any:
        """The value of a config key such as `model.guidance`."""
        node: Any = self.config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node

    @property
    def moves(self) -> list[Row]:
        """The rows at which the generator moved."""
        return moved(self.rows)

    @property
    def recent(self) -> list[Row]:
        """The second half of the generator's moves, or none of them while that is too few to judge by."""
        moves = self.moves
        half = moves[len(moves) // 2 :]
        return half if len(half) >= MOVES else moves[-MOVES:] if len(moves) >= MOVES else []


def read(root: Path) -> list[Stage]:
    """The stages of the run in `root` that have begun. Raises UserError for a folder that is no run, or has no log."""
    if not root.is_dir():
        raise UserError(f"there is no run folder {root}: give one that `fewstep train` has made")
    stages = sorted(root.glob("stage_*/config.yaml"), key=lambda p: (len(p.parent.name), p.parent.name))
    folders = [path.parent for path in stages] or [root]
    logged = [folder for folder in folders if RunDir(folder).rows("log.jsonl")]
    if not logged:
        raise UserError(
            f"{root} has no log.jsonl with a step in it: give a run folder of `fewstep train`, once it trains"
        )
    last = logged[-1]
    return [_stage(folder, root if folder == last == folders[-1] else None, len(folders) > 1) for folder in logged]


def _stage(folder: Path, run: Path | None, several: bool) -> Stage:
    export = None if run is None else run / "export"
    return Stage(
        folder.name if several else "",
        [row for row in RunDir(folder).rows("log.jsonl") if isinstance(row, dict)],
        _config(folder / "config.yaml"),
        _json(folder / "origin.json"),
        [row for row in RunDir(folder).rows("evals.jsonl") if isinstance(row, dict)],
        _table(run / "table.json") if run is not None else None,
        export if export is not None and (export / "scheduler").is_dir() else None,
    )


def _table(path: Path) -> dict[str, Any] | None:
    """The table of a run; None when there is none, or none that is whole."""
    table = _json(path)
    rows = table.get("rows")
    return table if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) else None


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing when it is absent or cut short."""
    try:
        return reading.fields(path, finite=False)
    except UserError:
        return {}


def _config(path: Path) -> dict[str, Any]:
    try:
        return reading.settings(path)
    except UserError as error:
        raise UserError(f"{error}: the run folder is not whole") from None
