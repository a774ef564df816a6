"""A local folder of the `datasets` library, as its `save_to_disk` leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.data.pictures import NO_LABEL, Picture, Pictures, Skipped

TEXTS = ("text", "caption", "prompt")


class TableSource(Pictures):
    """The first column of images; captions from a column named text, caption or prompt, labels from class labels.

    A folder of several splits is read as its `train`. Raises UserError without the library, the split or the images.
    """

    def __init__(self, folder: str, resolution: int, seed: int):
        with _refused(folder):
            found, names, skipped = _pictures(folder)
        super().__init__(f"data.source={folder}", found, resolution, seed, names, skipped)


def _pictures(folder: str) -> tuple[list[Picture], tuple[str, ...], Skipped]:
    """The pictures of a table's rows with a label, the names of the labels, and the rows without one."""
    table, datasets = _opened(folder), _library(folder)
    columns = table.features
    image = next((name for name, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise UserError(f"data.source={folder} has no column of images, but {', '.join(columns) or 'nothing'}")
    label = next((name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)), None)
    text = next((name for name in TEXTS if getattr(columns.get(name), "dtype", None) == "string"), None)
    files = table.cast_column(image, datasets.Image(decode=False)).select_columns([image])
    captions = list(table[text]) if text else [""] * len(table)
    labels = list(table[label]) if label else [0] * len(table)
    names = tuple(map(str, columns[label].names)) if label else ()
    skipped, found = Skipped(), []
    for row, (caption, number) in enumerate(zip(captions, labels, strict=True)):
        name = Path(folder, f"row {row}")
        if number is None or number < 0:
            skipped.setdefault(NO_LABEL, []).append(name)
            continue
        if label and number >= len(names):
            raise UserError(f"data.source={folder}: row {row} has the label {number}, and {len(names)} have names")
        found.append(Picture(name, _Cell(files, row, image), number, " ".join((caption or "").split())))
    return found, names, skipped


class _Cell:
    """The bytes of one image of a table. Raises OSError for an empty cell."""

    __slots__ = ("column", "row", "table")

    def __init__(self, table: Any, row: int, column: str):
        self.table, self.row, self.column = table, row, column

    def __call__(self) -> bytes:
        cell = self.table[self.row][self.column] or {}
        if cell.get("bytes"):
            return cell["bytes"]
        if not cell.get("path"):
            raise OSError("the cell is empty")
        return reading.content(Path(cell["path"]), reading.PICTURE)


def holds_table(source: str) -> bool:
    """Whether a folder is what `save_to_disk` leaves of a table, or of several splits."""
    return any(Path(source, name).is_file() for name in ("dataset_dict.json", "state.json"))


def _library(folder: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data.source={folder} is a folder of the datasets library, which is not here: "
            "pip install 'fewstep[datasets]'"
        ) from None
    return datasets


def _opened(folder: str) -> Any:
    """The table of a folder, of several splits the one for training."""
    library = _library(folder)
    for file in (*Path(folder).rglob("*.json"), *Path(folder).rglob("*.arrow")):
        reading.plain(file, reading.ARCHIVE if file.suffix == ".json" else 2**62)  # a pipe would never end
    opened = library.load_from_disk(folder)
    if isinstance(opened, library.DatasetDict):
        if "train" not in opened:
            splits = ", ".join(f"{folder}/{name}" for name in opened) or "none"
            raise UserError(f"data.source={folder} has no split named train: name one of its folders, {splits}")
        opened = opened["train"]
    opened.data.validate(full=True)  # pyarrow trusts a file's own offsets, wherever they lead
    return opened.with_format(None)  # a folder may ask for rows in another library's types


@contextmanager
def _refused(folder: str) -> Iterator[None]:
    """Says in one sentence whatever a damaged folder leads pyarrow and json to."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"data.source={folder} cannot be opened by the datasets library: {said}") from None
