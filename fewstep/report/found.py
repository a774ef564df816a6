"""What lies in a run folder, and in plain sentences what is missing of it or cannot be read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.report.measures import Json, is_number
from fewstep.train.rundir import RunDir

FORMATS = ("PNG",)
GRIDS = 24
"""the most grids of a training that a page holds"""


@dataclass(frozen=True)
class Pairs:
    """Pictures of several models from the same noise: for each of `names` one file for each text in `asked`."""

    names: tuple[str, ...]
    asked: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]


@dataclass(frozen=True)
class Found:
    """What lies in a run folder; everything but `root` may be missing, and `notes` says in sentences what is.

    Of a run of stages `configs` has one for each; `config_text` and `origin` are the last one's, and `before` counts
    the steps of the earlier ones. `samples` are at most GRIDS grids, evenly spread over the training.
    """

    root: Path
    before: int
    configs: list[Json]
    config_text: str
    origin: Json
    log: list[Json]
    evals: list[Json]
    table: Json | None
    samples: list[Path]
    pairs: Pairs | None
    comparison: Path | None
    notes: list[str]

    @property
    def config(self) -> Json:
        """The config that ran last."""
        return self.configs[-1] if self.configs else {}

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.root.resolve().name)

    def part(self, key: str) -> Json:
        """A group of the config, such as `model`; empty where there is none."""
        value = self.config.get(key)
        return value if isinstance(value, dict) else {}

    @property
    def teacher(self) -> str | None:
        given = self.part("model").get("teacher")
        return Path(str(given)).name if given else None

    @property
    def seconds(self) -> float:
        """Wall time; the clock of the log starts anew whenever a run is resumed."""
        clock = [float(row["seconds"]) for row in self.log if is_number(row.get("seconds"))]
        ends = [now for now, after in pairwise(clock) if after < now]
        return sum(ends) + (clock[-1] if clock else 0.0)


def read(folder: RunDir) -> Found:
    """Reads a run folder. A run of stages has no log of its own: those of its stages are put one after the other."""
    return _Reader(folder).found()


class _Reader:
    """Reads piece by piece and notes what fails."""

    def __init__(self, folder: RunDir):
        self.root, self.notes = folder.root, list[str]()
        stages = [RunDir(p) for p in sorted(folder.root.glob("stage_*"), key=lambda p: (len(p.name), p.name))]
        played = [stage for stage in stages if (stage.root / "log.jsonl").exists()]
        self.parts = played if played and not (folder.root / "log.jsonl").exists() else [folder]

    def found(self) -> Found:
        last = self.parts[-1].root
        configs = [self.config(part.root / "config.yaml") for part in self.parts]
        log, evals, before = self.joined()
        table = self.table(self.root / "table.json")
        samples = thin([path for part in self.parts for path in sorted(part.samples.glob("*.png"))], GRIDS)
        samples = [path for path in samples if self.opens(path)]
        pairs, whole = self.pairs(self.root / "comparison"), self.root / "comparison.png"
        comparison = whole if pairs is None and whole.is_file() and self.opens(whole) else None
        found = Found(
            root=self.root,
            before=before,
            configs=[config for _, config in configs if config],
            config_text=configs[-1][0],
            origin=self.json(last / "origin.json"),
            log=log,
            evals=evals,
            table=table,
            samples=samples,
            pairs=pairs,
            comparison=comparison,
            notes=self.notes,
        )
        self.notes += _missing(found)
        return found

    def broken(self, path: Path) -> None:
        self.notes.append(f"{path.relative_to(self.root)} is there but cannot be read; it is left out.")

    def json(self, path: Path) -> Json:
        if not path.exists():
            return {}
        try:
            return reading.fields(path, finite=False)
        except UserError:
            self.broken(path)
            return {}

    def table(self, path: Path) -> Json | None:
        table = self.json(path)
        if table and not _is_table(table):
            self.broken(path)
            return None
        return table if table and table["rows"] else None

    def config(self, path: Path) -> tuple[str, Json]:
        if not path.exists():
            return "", {}
        try:
            return reading.text(path), reading.settings(path)
        except UserError:
            self.broken(path)
            return "", {}

    def joined(self) -> tuple[list[Json], list[Json], int]:
        """Logs and evaluations of the stages, counted on from one to the next, and the steps before the last stage."""
        log: list[Json] = []
        evals: list[Json] = []
        step = 0
        for part in self.parts:
            ended = log[-1] if log else {}
            step, images = (ended[key] if is_number(ended.get(key)) else 0 for key in ("step", "images"))
            # Of a run that trains every evaluation then has its step in the log.
            for rows, name in ((evals, "evals.jsonl"), (log, "log.jsonl")):
                for row in self.rows(part, name):
                    counts = {
                        key: more for key, more in (("step", step), ("images", images)) if is_number(row.get(key))
                    }
                    rows.append(row | {key: row[key] + more for key, more in counts.items()})
        return log, evals, step

    def rows(self, part: RunDir, name: str) -> list[Json]:
        """The lines of a log that count steps; notes where it breaks off."""
        path = part.root / name
        try:
            rows, lines = part.rows_of(name)
        except UserError:
            self.broken(path)
            return []
        if lines and not rows:
            self.broken(path)
        elif len(rows) < lines:
            where = path.relative_to(self.root)
            self.notes.append(f"{where} breaks off: line {len(rows) + 1} of {lines} cannot be read; it ends there.")
        return [row for row in rows if isinstance(row, dict) and is_number(row.get("step"))]

    def pairs(self, folder: Path) -> Pairs | None:
        told = self.json(folder / "pairs.json")
        names, asked = told.get("names"), told.get("asked")
        if not (isinstance(names, dict) and isinstance(asked, list) and names):
            return None
        if not all(map(reading.is_name, names)):
            self.broken(folder / "pairs.json")
            return None
        files = [tuple(folder / f"{key}_{i:02d}.png" for i in range(len(asked))) for key in names]
        if all(path.is_file() and self.opens(path) for row in files for path in row):
            return Pairs(tuple(map(str, names.values())), tuple(map(str, asked)), tuple(files))
        self.notes.append(f"{folder.name}/ misses pictures that its pairs.json names; the pairs are left out.")
        return None

    def opens(self, path: Path) -> bool:
        try:
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise OSError("it lies outside of the run")
            drawn(path)
        except (OSError, UserError, RuntimeError):  # RuntimeError: a link to itself
            self.broken(path)
            return False
        return True


def drawn(path: Path) -> Image.Image:
    """A picture of a page, decoded. Raises OSError or UserError for anything else than a whole PNG."""
    content = reading.content(path, reading.PICTURE)
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)  # some of the other formats are programs
        reading.sized(picture.size, len(content))
        picture.load()
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise OSError(str(error)) from None
    return picture


def thin(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def _is_table(table: Json) -> bool:
    rows, columns = table.get("rows"), table.get("columns", [])
    named = isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows)
    return named and isinstance(columns, list) and all(isinstance(column, str) for column in columns)


def _missing(found: Found) -> list[str]:
    """A sentence for each piece that a whole run would have."""
    untaught = bool(found.config) and found.teacher is None
    pieces = {
        "There is no log of training steps in this folder.": not found.log,
        "Nothing was measured here: `fewstep eval` on this folder makes the table.": found.table is None,
        "There are no sample grids from the training.": not found.samples,
        "There is no picture of teacher and student from the same noise.": not (
            untaught or found.pairs or found.comparison
        ),
        "There is no config.yaml: what was asked for is not known.": not found.config,
    }
    return [sentence for sentence, missing in pieces.items() if missing]
