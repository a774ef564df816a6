"""WebDataset shards: tar files in which members of the same key, before the first dot, are one sample."""

from __future__ import annotations

import functools
import glob
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.data.pictures import NO_CAPTION, NO_LABEL, SUFFIXES, Picture, Pictures, Skipped, one_line

CUT = "read only as far as they are whole tar files"
MOST_LABELS = 2**16
MOST_SHARDS = 100_000

Member = tuple[int, int]
"""where the content of a member begins in its shard, and how many bytes it has"""


class ShardSource(Pictures):
    """The pictures of one tar file, of all in a folder, or of those that a pattern with *, ? or {..} names.

    `key.jpg` (or .png, .webp, .bmp) is a picture, `key.txt` its caption or `key.json` an object with it as `text` or
    `caption`, `key.cls` the number of its label. The places of all members are noted once, so that any sample can be
    read at any time: shards must not be compressed. Raises UserError where there is no shard or no whole picture.
    """

    def __init__(self, source: str, resolution: int, seed: int):
        shards = shards_of(source)
        if not shards:
            raise UserError(f"data.source={source} names no .tar file that is there")
        skipped, found = Skipped(), []
        for shard in shards:
            for key, members in _samples(shard, skipped).items():
                if (picture := _picture(shard, key, members, skipped)) is not None:
                    found.append(picture)
        labelled = [picture for picture in found if picture.label >= 0]
        if labelled and len(labelled) < len(found):
            skipped[NO_LABEL] = [picture.name for picture in found if picture.label < 0]
        count = max((picture.label for picture in labelled), default=-1) + 1
        pictures = labelled or [Picture(p.name, p.read, 0, p.caption) for p in found]
        names = [str(label) for label in range(count)]
        super().__init__(f"data.source={source}", pictures, resolution, seed, names, skipped)


def holds_shards(source: str) -> bool:
    """Whether `source` is a tar file, a pattern of some, or a folder with some in it."""
    return source.endswith(".tar") or any(Path(source).glob("*.tar"))


def shards_of(source: str) -> list[Path]:
    """The tar files that `source` means, in sorted order."""
    if Path(source).is_dir():
        return sorted(Path(source).glob("*.tar"))
    patterns = [source] if Path(source).is_file() else expanded(source)
    return sorted({Path(name) for pattern in patterns for name in glob.glob(pattern)})


def expanded(pattern: str) -> list[str]:
    """The patterns without braces: {000..012} counts with as many digits, {a,b} names each."""
    if (braces := re.search(r"\{([^{}]*)\}", pattern)) is None:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = numbers.groups()
        if len(first) > 9 or len(last) > 9 or int(last) - int(first) >= MOST_SHARDS:
            raise UserError(f"data.source={reading.shown(pattern, 80)} names more than {MOST_SHARDS} shards")
        chosen = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        chosen = braces[1].split(",")
    before, behind = pattern[: braces.start()], pattern[braces.end() :]
    rest = expanded(behind)
    if len(chosen) * len(rest) > MOST_SHARDS:
        raise UserError(f"data.source={reading.shown(pattern, 80)} names more than {MOST_SHARDS} shards")
    return [f"{before}{choice}{more}" for choice in chosen for more in rest]


def _samples(shard: Path, skipped: Skipped) -> dict[str, dict[str, Member]]:
    """Key -> what stands behind the first dot -> where it lies."""
    samples: dict[str, dict[str, Member]] = {}
    for name, member in _members(shard, skipped):
        place, _, file = name.rpartition("/")
        key, dot, suffix = file.partition(".")
        if key and dot:
            samples.setdefault(f"{place}/{key}" if place else key, {})[suffix.lower()] = member
    return samples


def _members(shard: Path, skipped: Skipped) -> Iterator[tuple[str, Member]]:
    try:
        reading.plain(shard, 2**62)
        with tarfile.open(shard, "r:", tarinfo=_Header) as tar:
            read = 0
            for member in tar:
                if member.size < 0 or tar.offset <= read:  # such archives would never end
                    raise tarfile.ReadError("a member that goes back")
                read = tar.offset
                if member.isfile():
                    yield member.name, (member.offset_data, member.size)
            # At a header that it does not understand tarfile stops as if the archive ended there.
            end = _read(shard, tar.offset, tarfile.BLOCKSIZE)
            whole = len(end) == tarfile.BLOCKSIZE and not end.strip(b"\0")
    except Exception:  # damaged archives end in errors of many kinds
        whole = False
    if not whole:
        skipped.setdefault(CUT, []).append(shard)


class _Header(tarfile.TarInfo):
    """A header that is refused where it says that a long name or a comment of a giant size follows."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _NAMING and not 0 <= self.size <= reading.CAPTION:
            raise tarfile.ReadError("a name of such a length")
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]


_NAMING = (b"L", b"K", b"x", b"g", b"X")  # names and links of GNU, and the comments of pax and of Solaris


def _read(shard: Path, offset: int, size: int, most: int = reading.PICTURE) -> bytes:
    """Raises OSError for more bytes than such a member has."""
    if size > most:
        raise OSError(f"a member of {size:,} bytes")
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _picture(shard: Path, key: str, members: dict[str, Member], skipped: Skipped) -> Picture | None:
    """The picture of a sample, label -1 where it has none; None for a sample of something else."""
    suffix = next((suffix[1:] for suffix in SUFFIXES if suffix[1:] in members), None)
    if suffix is None:
        return None
    name = Path(f"{shard}/{key}.{suffix}")
    try:
        caption = _caption(shard, members)
    except (OSError, ValueError):
        skipped.setdefault(NO_CAPTION, []).append(name)
        caption = ""
    label = _label(shard, members["cls"]) if "cls" in members else b""
    number = int(label) if re.fullmatch(rb"\d{1,9}", label) else -1
    number = number if number < MOST_LABELS else -1
    return Picture(name, functools.partial(_read, shard, *members[suffix]), number, caption)


def _label(shard: Path, member: Member) -> bytes:
    offset, size = member
    return _read(shard, offset, min(size, 64)).strip()


def _caption(shard: Path, members: dict[str, Member]) -> str:
    """Raises ValueError for text that is no UTF-8, or no JSON."""
    if "txt" in members:
        return one_line(_read(shard, *members["txt"], reading.CAPTION))
    if "json" not in members:
        return ""
    told = reading.parsed(_read(shard, *members["json"], reading.CAPTION), finite=False)
    text = (told.get("text") or told.get("caption") or "") if isinstance(told, dict) else ""
    return " ".join(text.split()) if isinstance(text, str) else ""
