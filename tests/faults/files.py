"""Files that mean harm, put in the place of every file that is read: none of them runs, fills memory or leads away."""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewstep.reading import MOST_PIXELS
from tests.faults.bounds import bounded, ending
from tests.faults.readers import READERS, Reader, header_of, png, sealed_png

Hostile = Callable[[Path, Path], None]
"""puts harm in the place of a file; the second path is a mark that code would leave"""


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def of_bytes(content: bytes) -> Hostile:
    return lambda file, mark: file.write_bytes(content) and None  # type: ignore[func-returns-value]


def pickled(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Evil(mark)))


def torch_pickled(file: Path, mark: Path) -> None:
    torch.save({"lin0.model.1.weight": Evil(mark)}, file)


def numpy_pickled(file: Path, mark: Path) -> None:
    held = np.array([Evil(mark)], dtype=object)
    content = io.BytesIO()
    np.savez(content, mu=held, sigma=held, n=held, features=held, protocol=held)
    file.write_bytes(content.getvalue())


def yaml_tag(file: Path, mark: Path) -> None:
    file.write_text(f"name: !!python/object/apply:os.system ['touch {mark}']\n")


@functools.cache
def _bomb() -> bytes:
    """A small archive: each part unpacks to 64 MiB, and says that it is 4 GiB."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("mu.npy", "sigma.npy", "n.npy", "features.npy", "protocol.npy", "archive/data.pkl"):
            packed.writestr(name, bytes(2**26))
    return content.getvalue().replace(struct.pack("<I", 2**26), struct.pack("<I", 2**32 - 2))


def zip_bomb(file: Path, mark: Path) -> None:
    file.write_bytes(_bomb())


def lying_array(file: Path, mark: Path) -> None:
    """An .npz whose arrays say that they have 2**50 rows."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1125899906842624, 2), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(file, "w") as packed:
        for name in ("mu", "sigma", "n", "features", "protocol"):
            packed.writestr(f"{name}.npy", array)


def folder_of_that_name(file: Path, mark: Path) -> None:
    file.mkdir()


def pipe(file: Path, mark: Path) -> None:
    os.mkfifo(file)


def endless(file: Path, mark: Path) -> None:
    file.symlink_to("/dev/zero")


def circle(file: Path, mark: Path) -> None:
    file.symlink_to(file.name)


def hole(file: Path, mark: Path) -> None:
    """A file of a terabyte that takes no room."""
    with file.open("wb") as opened:
        opened.truncate(2**40)


def absent(file: Path, mark: Path) -> None:
    pass


def aliases(names: int = 40) -> bytes:
    lines = ["a0: &a0 [x, x, x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, names))]
    return "\n".join(lines).encode()


def giant_picture() -> bytes:
    """A small PNG that says it has 60,000 x 60,000 pixels."""
    whole = png()
    return sealed_png(whole[:16] + struct.pack(">II", 60_000, 60_000) + whole[24:])


def commented_picture() -> bytes:
    """A PNG with a comment that unpacks to 16 MiB."""
    whole = png()
    body = b"zTXtComment\0\0" + zlib.compress(bytes(2**24), 9)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return whole[:33] + chunk + whole[33:]


@functools.cache
def largest_picture() -> bytes:
    """As many pixels as a picture may have, of the kind that takes most memory."""
    file, side = io.BytesIO(), math.isqrt(MOST_PIXELS)
    Image.new("RGBA", (side, side)).save(file, "PNG")
    return file.getvalue()


def program_picture() -> bytes:
    """PostScript: some readers of pictures would run it."""
    said = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/mark) (w) file closefile\n%%EOF\n"
    return said


def tar_of(*members: tuple[str, int, bytes, bytes]) -> bytes:
    """A tar file of members that say (name, size, content, type) of themselves."""
    out = b""
    for name, size, held, kind in members:
        member = tarfile.TarInfo(name)
        member.size, member.type = size, kind
        out += member.tobuf(tarfile.GNU_FORMAT) + held + bytes(-len(held) % 512)
    return out + bytes(1024)


def pax(comment: bytes) -> tuple[str, int, bytes, bytes]:
    line = b"%d " + comment + b"\n"
    size = len(line % 0)
    while len(line % size) != size:
        size += 1
    return ("pax", size, line % size, tarfile.XHDTYPE)


KINDS: dict[str, Hostile] = {
    "nothing": of_bytes(b""),
    "zeros": of_bytes(bytes(4096)),
    "no text": of_bytes(b"\xff\xfe\x00\xd8" * 40),
    "deep brackets": of_bytes(b"[" * 200_000),
    "deep braces": of_bytes(b'{"a":' * 200_000),
    "deep closed brackets": of_bytes(b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}"),
    "a list": of_bytes(b'[{"step": 1}]'),
    "a word": of_bytes(b'"step"'),
    "null": of_bytes(b"null"),
    "NaN": of_bytes(b'{"step": NaN, "count": Infinity, "recipe": -Infinity, "format": NaN}'),
    "beyond floats": of_bytes(b'{"step": 1e999, "count": 1e999}'),
    "beyond integers": of_bytes(b'{"step": ' + b"9" * 5_000 + b"}"),
    "names cut short": of_bytes(b'{"step": "\\ud800'),
    "lone surrogates": of_bytes(b'{"step": "\\ud800", "\\udfff": 1, "name": "\\u0000"}'),
    "aliases": of_bytes(aliases()),
    "an alias of itself": of_bytes(b"a: &a [*a]"),
    "a tag of YAML": yaml_tag,
    "an interpolation": of_bytes(b"name: ${oc.env:HOME}\n"),
    "a merge": of_bytes(b"<<: {a: &a [*a]}\n? [1, 2]\n: 3"),
    "a pickle": pickled,
    "a pickle of torch": torch_pickled,
    "a pickle of numpy": numpy_pickled,
    "a zip bomb": zip_bomb,
    "an array of 2**50 rows": lying_array,
    "a header of 2**60 bytes": of_bytes(struct.pack("<Q", 2**60) + b"{}"),
    "a header that is not JSON": of_bytes(struct.pack("<Q", 8) + b"{{{{{{{{"),
    "a tensor of 2**60 numbers": of_bytes(header_of([2**30, 2**30])),
    "a tensor of negative size": of_bytes(header_of([-2, -3])),
    "a tensor beyond the file": of_bytes(header_of([2**20, 3], end=12 * 2**20)),
    "a tensor of no rows, many": of_bytes(header_of([2**62, 0], end=0)),
    "a tensor of an unknown type": of_bytes(header_of([2, 3], "F31")),
    "a giant picture": of_bytes(giant_picture()),
    "the largest picture": lambda file, mark: of_bytes(largest_picture())(file, mark),  # made when it is asked for
    "a comment of a picture": of_bytes(commented_picture()),
    "a program as a picture": of_bytes(program_picture()),
    "a tar that goes back": of_bytes(tar_of(pax(b"size=-9999999"), ("a.png", 0, b"", tarfile.REGTYPE))),
    "a tar of a long name": of_bytes(tar_of(("x", 2**40, b"", tarfile.GNUTYPE_LONGNAME))),
    "a tar of a long comment": of_bytes(tar_of(("x", 2**40, b"", tarfile.XHDTYPE))),
    "a tar of a giant member": of_bytes(tar_of(("a.png", 2**40, png(), tarfile.REGTYPE))),
    "a tar that leads away": of_bytes(
        tar_of(("../../a.txt", 4, b"away", tarfile.REGTYPE), ("/etc/x.png", 9, b"not a png", tarfile.REGTYPE))
    ),
    "a link in a tar": of_bytes(tar_of(("a.png", 0, b"", tarfile.SYMTYPE), ("a.txt", 0, b"", tarfile.LNKTYPE))),
    "a folder": folder_of_that_name,
    "a pipe": pipe,
    "an endless device": endless,
    "a link to itself": circle,
    "a hole": hole,
}


def cases(readers: tuple[Reader, ...] = READERS) -> Iterator[tuple[Reader, str]]:
    yield from ((reader, kind) for reader in readers for kind in KINDS)


def attempt(reader: Reader, kind: str, folder: Path) -> str | None:
    """What is wrong with how a reader meets a hostile file; None where nothing is.

    It must end with one sentence that names the file or, where the reader can do without, go on; no code may have run,
    and no file may have been written anywhere else.
    """
    mark, outside = folder / "mark", folder / "outside"
    place = folder / "place" / "inner"
    place.mkdir(parents=True)
    outside.mkdir()
    reader.make(place)
    file = place / reader.file
    file.unlink(missing_ok=True)
    KINDS[kind](file, mark)
    with bounded():
        end = ending(lambda: reader.read(place))
    shutil.rmtree(folder / "place" / "inner")
    if mark.exists():
        return "its code has run"
    if sorted(path.name for path in folder.rglob("*")) != ["outside", "place"]:
        return "something was written outside"
    if isinstance(end, BaseException):
        return f"it ends with {type(end).__name__}: {str(end)[:300]}"
    # A config whose YAML is sound is spoken of by its keys, and what has several files by their folder.
    named = end is None or str(place) in end or (reader.name == "config" and kind in _PLAIN)
    if end is not None and ("\n" in end or not named or len(end) > 6000):
        return f"it says {end!r}"
    if end is None and not reader.tolerant and kind not in READABLE.get(reader.name, ()):
        return "it was read as if it were sound"
    return None


# What is no harm to a reader: it is what it reads, or is passed over like a file that is not there.
_PLAIN = ("nothing", "a word", "null", "NaN", "beyond floats")
_PASSED_OVER = ("a folder", "a pipe", "an endless device", "a link to itself")
READABLE: dict[str, tuple[str, ...]] = {
    "protocols": ("lone surrogates", *_PASSED_OVER),
    "run's config": _PLAIN,
    "resumed config": _PASSED_OVER,
}


def soak(folder: Path) -> dict[str, Any]:
    """Every hostile file in the place of every file that is read."""
    tried, wrong = 0, []
    for i, (reader, kind) in enumerate(cases()):
        place = folder / str(i)
        place.mkdir()
        if (problem := attempt(reader, kind, place)) is not None:
            wrong.append(f"{reader.name}, {kind}: {problem}")
        tried += 1
        shutil.rmtree(place, ignore_errors=True)
    assert not wrong, "\n".join(wrong)
    return {
        "readers": len(READERS),
        "kinds of hostile files": len(KINDS),
        "tried": tried,
        "ended otherwise than promised": 0,
    }
