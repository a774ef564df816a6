"""WebDataset shards: which members are one sample, what of a damaged shard is read, and how shards are named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from pictures import damaged, picture

from fewstep.core.errors import UserError
from fewstep.data import pictures
from fewstep.data.pictures import NO_CAPTION, NO_LABEL, UNREADABLE
from fewstep.data.shards import CUT, ShardSource, expanded
from fewstep.data.source import open_source


def shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def samples(first: int, count: int) -> dict[str, bytes]:
    """Key `a/i` with a picture of red 10 i, its text and a label."""
    found = {}
    for i in range(first, first + count):
        found |= {f"a/{i}.png": picture(10 * i), f"a/{i}.txt": f"disc {i}".encode(), f"a/{i}.cls": str(i % 3).encode()}
    return found


def reds(source: ShardSource, count: int) -> list[int]:
    return ((source.images(torch.arange(count))[:, 0, 4, 4] + 1) * 12.75).round().int().tolist()


@pytest.mark.parametrize("memory", [pictures.MEMORY, 0])
def test_members_of_a_key_are_one_sample(memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MEMORY", memory)
    shard(tmp_path / "00.tar", samples(0, 4))
    shard(tmp_path / "01.tar", samples(4, 5))
    source = open_source(str(tmp_path), 8, 1)
    assert isinstance(source, ShardSource) and source.size == 9 and source.skipped == {}
    seen = reds(source, 9)
    assert sorted(seen) == list(range(9)) != seen and source.labels == ("0", "1", "2")
    assert source.captions(torch.arange(9)) == [f"disc {i}" for i in seen]
    assert source.label_of(torch.arange(9)).tolist() == [i % 3 for i in seen]
    assert reds(open_source(str(tmp_path), 8, 1), 9) == seen != reds(open_source(str(tmp_path), 8, 2), 9)  # type: ignore[arg-type]


def test_captions_stand_in_text_or_json(tmp_path: Path) -> None:
    shard(
        tmp_path / "0.tar",
        {
            "1.png": picture(1),
            "1.json": b'{"text": "one"}',
            "2.png": picture(2),
            "2.json": b'{"caption": " two \\n discs "}',
            "3.png": picture(3),
            "3.json": b"{",
            "4.png": picture(4),
            "4.txt": b"\xff\xfe\x00",
            "5.png": picture(5),
            "note.txt": b"a text without a picture",
        },
    )
    source = ShardSource(str(tmp_path / "0.tar"), 8, 1)
    assert sorted(source.captions(torch.arange(5))) == ["", "", "", "one", "two discs"] and source.labels == ()
    assert source.skipped == {NO_CAPTION: [tmp_path / "0.tar" / "3.png", tmp_path / "0.tar" / "4.png"]}


def test_damaged_members_are_listed(tmp_path: Path) -> None:
    bad = {"8.jpg": damaged("truncated.jpg"), "8.cls": b"1", "9.png": damaged("text.png"), "9.cls": b"0"}
    unlabelled = {"7.png": picture(70), "7.cls": b"red", "6.png": picture(60), "5.png": picture(50), "5.cls": b"9" * 40}
    file = shard(tmp_path / "0.tar", {**samples(0, 4), **bad, **unlabelled})
    source = ShardSource(str(file), 8, 1)
    assert source.skipped == {
        UNREADABLE: [file / "8.jpg", file / "9.png"],
        NO_LABEL: [file / "7.png", file / "6.png", file / "5.png"],
    }
    assert sorted(reds(source, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["cut in a member", "cut between members", "header"])
def test_of_a_damaged_shard_the_whole_part_is_read(damage: str, tmp_path: Path) -> None:
    file = shard(tmp_path / "0.tar", samples(0, 4))
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        last = tar.getmember("a/3.png")
    if damage == "header":
        content[last.offset : last.offset + 100] = b"\x07" * 100
    else:
        del content[last.offset_data + 20 if damage == "cut in a member" else last.offset :]
    file.write_bytes(content)
    source = ShardSource(str(tmp_path), 8, 1)
    assert source.skipped.pop(CUT) == [file] and sorted(reds(source, 3)) == [0, 1, 2]
    assert source.size == 3 and set(source.skipped) <= {NO_LABEL}


def test_patterns(tmp_path: Path) -> None:
    for i in range(4):
        shard(tmp_path / f"s-{i:03d}.tar", samples(i, 1))
    for pattern, found in {"s-{000..002}.tar": [0, 1, 2], "s-*.tar": [0, 1, 2, 3], "s-00{1,3}.tar": [1, 3]}.items():
        source = open_source(str(tmp_path / pattern), 8, 1)
        assert (
            isinstance(source, ShardSource) and sorted(reds(source, len(found))) == found and source.size == len(found)
        )
    assert expanded("{a,b}{8..10}") == ["a8", "a9", "a10", "b8", "b9", "b10"]
    with pytest.raises(UserError, match=r"names no \.tar file that is there"):
        open_source(str(tmp_path / "t-{000..002}.tar"), 8, 1)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 99])
def test_a_shard_of_nothing_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"of no use: files {CUT} \(1\)$"):
        open_source(str(tmp_path / "0.tar"), 8, 1)
