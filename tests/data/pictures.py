"""Pictures for the tests of what reads them: each of one shade, and damaged ones of every kind."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

DAMAGES = ("truncated.jpg", "short.png", "empty.png", "text.png", "archive.jpg", "folder.png", "flipped.png")


def picture(shade: int, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 30)).save(file, kind)
    return file.getvalue()


def damaged(name: str) -> bytes:
    whole = picture(200, (64, 64), "JPEG" if name.endswith("jpg") else "PNG")
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "short.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.png": b"a disc on a plain ground",
        "archive.jpg": b"PK\x03\x04" + bytes(60),
        "flipped.png": whole[:60] + bytes(b ^ 255 for b in whole[60:90]) + whole[90:],
    }[name]


def damage(folder: Path, names: tuple[str, ...] = DAMAGES) -> list[Path]:
    """Puts damaged files into a folder and returns them, sorted."""
    for name in names:
        if name == "folder.png":
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(damaged(name))
    return sorted(folder / name for name in names)
