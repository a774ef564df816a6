"""Property-based fuzzing of every reader: whatever stands in a file, it is read or refused in one sentence.

Cases are numbered: case i of a reader is a function of its name and of i alone, so that any of them can be had again.
A case is a sound file that was changed (bits, cuts, insertions, parts of itself or of other readers' files, other
numbers and words), or one that was made anew; for formats with checksums every other one is sealed again.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.bounds import bounded, ending
from tests.faults.readers import NAMED, READERS, Reader

CASES = int(os.environ.get("FUZZ_CASES", 1_000_000))
"""of the soak, over all readers"""
MEMORY = 2**30
SLOW = 2.0
"""seconds of the processor after which a case counts as one that does not end in time"""
_BATCH = 20_000

WORDS = (
    *(b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"-9223372036854775809"),
    *(b"[", b"]", b"{", b"}", b'"', b"'", b":", b": ", b",", b"\n", b"\n  ", b"- ", b"---\n", b"#", b"%", b"?", b"|"),
    *(b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system ['true']", b"!!binary ", b"${oc.env:HOME}", b"???"),
    *(b"\x00", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xef\xbb\xbf", "\u2028\u202e".encode(), b"\x1b[2J", b"\r"),
    *(b"../", b"/etc/passwd", b"<script>", b"</td>", b"a" * 3000, b"\\ud800", b"\\u0000", b"[" * 300, b'{"a":' * 300),
    *(b"PK\x03\x04", b"ustar", b"IHDR", b"IDAT", b"zTXt", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", b"cposix\nsystem\n"),
    *(b"step", b"count", b"shape", b"data_offsets", b"name", b"stages", b"base", b"objective", b"_class_name", b"F64"),
)


def changed(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to four changes of `content`."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        end = min(end, at + rng.choice((1, 2, 4, 16, 256, len(content))))
        match rng.randrange(9):
            case 0:
                flipped = bytearray(content)
                for _ in range(rng.choice((1, 1, 2, 8, 32)) if content else 0):
                    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
                content = bytes(flipped)
            case 1:
                content = content[:at]
            case 2:
                content = content[:at] + rng.choice(WORDS) + content[at:]
            case 3:
                content = content[:at] + content[end:]
            case 4:
                content = content[:end] + content[at:end] * rng.choice((1, 1, 2, 50)) + content[end:]
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                content = content[:at] + other[start : start + rng.choice((4, 40, 400, len(other)))] + content[end:]
            case 6:
                content = _replaced(content, rb"-?\d+(?:\.\d+)?", rng)
            case 7:
                content = _replaced(content, rb"[A-Za-z_]{3,}", rng)
            case 8:
                content = content[:at] + rng.randbytes(rng.choice((1, 4, 64))) + content[end:]
    return content[:200_000]


def _replaced(content: bytes, pattern: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(pattern, content))
    if not found:
        return content
    place = rng.choice(found)
    return content[: place.start()] + rng.choice((*WORDS, b"%d" % rng.getrandbits(40))) + content[place.end() :]


def tree(rng: random.Random, names: list[str], depth: int = 4) -> Any:
    """Plain data of any structure, with the names that a sound file has among its keys."""
    kind = rng.randrange(10 if depth else 7)
    if kind < 7:
        word = rng.choice(WORDS).decode(errors="replace")[:300]
        numbers = (rng.getrandbits(70) - 2**69, rng.random() * 10.0 ** rng.randrange(-300, 300), float("nan"), 10**400)
        return rng.choice((None, True, 0, 1, -1, 2**31, *numbers, word, rng.choice(names), rng.choice(names)))
    if kind == 7:
        return [tree(rng, names, depth - 1) for _ in range(rng.randrange(5))]
    return {rng.choice(names): tree(rng, names, depth - 1) for _ in range(rng.randrange(6))}


def made(content: bytes, rng: random.Random) -> bytes:
    """A file of generated structure: some lines of it, or the sound one with other values where that is JSON."""
    names = [word.decode() for word in re.findall(rb"[A-Za-z_]{3,30}", content)] or ["a"]
    try:
        whole = json.loads(content)
    except ValueError:
        lines = [json.dumps(tree(rng, names)) for _ in range(rng.randrange(1, 5))]
        return "\n".join([*content.decode(errors="replace").splitlines()[: rng.randrange(8)], *lines]).encode()
    if isinstance(whole, dict):
        for name in rng.sample(sorted(whole), min(len(whole), rng.randrange(1, 4))):
            node, key = whole, name
            while isinstance(node[key], dict) and node[key] and rng.random() < 0.6:
                node, key = node[key], rng.choice(sorted(node[key]))
            node[key] = tree(rng, names)
    return json.dumps(whole).encode()


def case(reader: Reader, number: int, sound: bytes, others: list[bytes]) -> bytes:
    """The bytes of a numbered case."""
    rng = random.Random(f"{reader.name}/{number}")
    structured = rng.random() < 0.25 and b"\0" not in sound
    content = made(sound, rng) if structured else changed(sound, others, rng)
    return reader.repair(content) if reader.repair and rng.random() < 0.5 else content


class Fuzzed:
    """A reader with its files in a folder of their own."""

    def __init__(self, reader: Reader, folder: Path):
        self.reader, self.folder = reader, Path(tempfile.mkdtemp(dir=folder))
        reader.make(self.folder)
        self.file = self.folder / reader.file
        self.sound = self.file.read_bytes()
        self.beside = self._beside()

    def _beside(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")} - {".", "checkpoints"}

    def run(self, numbers: range, others: list[bytes]) -> tuple[dict[str, int], list[str]]:
        """How cases end, counted, and what is wrong, each with its number."""
        ends, wrong = {"read": 0, "refused": 0}, []
        with bounded(MEMORY):
            for number in numbers:
                content = case(self.reader, number, self.sound, others)
                self.file.write_bytes(content)
                began = time.process_time()
                end = ending(lambda: self.reader.read(self.folder))
                seconds = time.process_time() - began
                ends["read" if end is None else "refused"] += 1
                if isinstance(end, BaseException):
                    wrong.append(f"{self.reader.name}, case {number}: {type(end).__name__}: {str(end)[:200]}")
                elif end is not None and "\n" in end:
                    wrong.append(f"{self.reader.name}, case {number}: two lines: {end[:200]!r}")
                elif seconds > SLOW:
                    wrong.append(f"{self.reader.name}, case {number}: {seconds:.1f} s")
        new = self._beside() - self.beside - {"checkpoints/0000004"}
        if any("partial" in name or ".." in name for name in new):
            wrong.append(f"{self.reader.name}: left {sorted(new)[:3]}")
        return ends, wrong


def shares(count: int) -> dict[str, int]:
    """How many of `count` cases each reader gets: far fewer for the slow ones."""
    weights = {reader.name: reader.cost**-1.3 for reader in READERS}
    whole = sum(weights.values())
    return {name: max(4, round(count * weight / whole)) for name, weight in weights.items()}


def fuzz(folder: Path, count: int, before: dict[str, int] | None = None) -> tuple[dict[str, dict[str, int]], list[str]]:
    """About `count` cases over all readers, each from the case on that `before` names."""
    open_ones = [Fuzzed(reader, folder) for reader in READERS]
    others = [one.sound for one in open_ones if one.sound]
    ends, wrong = {}, []
    logging.disable(logging.WARNING)  # model cards without a header are logged, thousands of times
    try:
        for one, (name, many) in zip(open_ones, shares(count).items(), strict=True):
            first = (before or {}).get(name, 0)
            ends[name], found = one.run(range(first, first + many), others)
            wrong += found
    finally:
        logging.disable(logging.NOTSET)
    return ends, wrong


def again(name: str, number: int, folder: Path) -> bytes:
    """The bytes of a case that has been reported."""
    sound = {reader.name: Fuzzed(reader, folder).sound for reader in READERS}
    return case(NAMED[name], number, sound[name], [content for content in sound.values() if content])


def soak(folder: Path) -> dict[str, Any]:
    """FUZZ_CASES cases, a million unless that is set; what has been done so far is kept beside, and gone on with."""
    kept = Path(os.environ.get("FUZZ_KEPT", tempfile.gettempdir())) / "fewstep-fuzz.json"
    done: dict[str, dict[str, int]] = json.loads(kept.read_text()) if kept.exists() else {}
    while (so_far := sum(sum(ends.values()) for ends in done.values())) < CASES:
        before = {name: sum(ends.values()) for name, ends in done.items()}
        ends, wrong = fuzz(folder, min(_BATCH, CASES - so_far), before)
        assert not wrong, "\n".join(wrong)
        for name, counted in ends.items():
            old = done.get(name, {"read": 0, "refused": 0})
            done[name] = {end: old[end] + many for end, many in counted.items()}
        kept.write_text(json.dumps(done))
        print(f"{so_far:,} of {CASES:,}", flush=True)
    kept.unlink(missing_ok=True)
    return {
        "cases": so_far,
        "anything but success or one sentence": 0,
        "memory bound in bytes": MEMORY,
        "readers": done,
    }
