"""A folder of images with class sub-folders, and captions in text files or JSON lines beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.data.pictures import NO_CAPTION, SUFFIXES, Picture, Pictures, Skipped, one_line

UNLABELLED = "left out because they lie beside the class folders and so have no label"
ODD_LINE = "not used as captions because they are no JSON objects with the texts file_name and text"
NO_PICTURE = "not used as captions because the file_name they give is not there"
LINES = ("captions.jsonl", "metadata.jsonl")


class FolderSource(Pictures):
    """A folder of images of any size; its sub-folders, in sorted order, are the labels.

    A text file beside an image, of the same name, is its caption; else a line {"file_name": .., "text": ..} of a
    captions.jsonl or metadata.jsonl, which names files from its own folder on; else the name of the label.
    """

    def __init__(self, folder: str | Path, resolution: int, seed: int):
        root, skipped = Path(folder), Skipped()
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not _passed_over(p.name))
        files = sorted(_files(root))
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        if beside := [file for file in images if classes and file.parent == root]:
            skipped[UNLABELLED] = beside
        lines = _lines([file for file in files if file.name in LINES], set(images), skipped)
        texts = {file for file in files if file.suffix == ".txt"}
        found = []
        for file in images:
            if classes and file.parent == root:
                continue
            text = file.with_suffix(".txt")
            caption = (_text(text, skipped) if text in texts else "") or lines.get(file, "")
            label = classes.index(file.relative_to(root).parts[0]) if classes else 0
            found.append(Picture(file, partial(reading.content, file, reading.PICTURE), label, caption))
        nothing = f"no {', '.join(SUFFIXES)} file there"
        labels = [reading.shown(name, 300) for name in classes]
        super().__init__(f"the image folder {folder}", found, resolution, seed, labels, skipped, nothing)


def _passed_over(name: str) -> bool:
    """Whether a folder is none of the data: a hidden one, or one that pretends to be an image."""
    return name.startswith(".") or Path(name).suffix.lower() in SUFFIXES


def _files(root: Path) -> Iterator[Path]:
    """Everything below a folder that has the name of a file, also folders that have the name of an image."""
    for place, folders, names in os.walk(root):
        pretenders = [name for name in folders if _passed_over(name) and not name.startswith(".")]
        yield from (Path(place, name) for name in [*names, *pretenders])
        folders[:] = [name for name in folders if not _passed_over(name)]


def _text(file: Path, skipped: Skipped) -> str:
    """The words of a text file, "" where it is no UTF-8."""
    try:
        return one_line(reading.content(file, reading.CAPTION))
    except (UserError, UnicodeDecodeError):
        skipped.setdefault(NO_CAPTION, []).append(file)
        return ""


def _lines(files: list[Path], images: set[Path], skipped: Skipped) -> dict[Path, str]:
    """Image -> caption, of the files of JSON lines; what a line says wrong is named by its number."""
    captions = {}
    for file in files:
        try:
            lines = reading.content(file, reading.LINES).decode("utf-8-sig").split("\n")
        except (UserError, UnicodeDecodeError):
            skipped.setdefault(NO_CAPTION, []).append(file)
            continue
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            told = _line(line)
            image = file.parent / told[0] if told else None
            if told is None or image is None or image not in images:
                reason = ODD_LINE if told is None else NO_PICTURE
                skipped.setdefault(reason, []).append(file.with_name(f"{file.name}:{number}"))
            else:
                captions[image] = told[1]
    return captions


def _line(line: str) -> tuple[str, str] | None:
    """The file name and the caption of a JSON line, None for an odd one."""
    try:
        row = reading.parsed(line, finite=False)
    except ValueError:
        return None
    name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
    return (name, " ".join(text.split())) if isinstance(name, str) and isinstance(text, str) else None
