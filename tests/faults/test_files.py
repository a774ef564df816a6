"""Files that mean harm: nothing of them runs, memory stays bounded, and one sentence names the file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep import cli, reading, report, sampling
from fewstep.core.errors import UserError
from fewstep.data import shards
from fewstep.data.folder import FolderSource
from fewstep.evals.frechet import Statistics
from fewstep.evals.references import Reference
from fewstep.models import loading, lora_files, tiny
from fewstep.train.checkpoint import MANIFEST, seal, verify
from fewstep.train.rundir import RunDir
from tests.faults import files, readers
from tests.faults.bounds import bounded, ending

CHEAP = [reader for reader in readers.READERS if reader.cost < 20]
DEAR = [reader for reader in readers.READERS if reader.cost >= 20]


@pytest.mark.parametrize("reader", CHEAP, ids=lambda reader: reader.name)
def test_hostile_files_end_in_one_sentence(reader: readers.Reader, tmp_path: Path) -> None:
    problems = {}
    for i, kind in enumerate(files.KINDS):
        (tmp_path / str(i)).mkdir()
        problems[kind] = files.attempt(reader, kind, tmp_path / str(i))
    assert {kind: problem for kind, problem in problems.items() if problem} == {}


@pytest.mark.slow
@pytest.mark.parametrize("reader", DEAR, ids=lambda reader: reader.name)
def test_hostile_files_end_in_one_sentence_where_reading_takes_long(reader: readers.Reader, tmp_path: Path) -> None:
    test_hostile_files_end_in_one_sentence(reader, tmp_path)


@pytest.mark.parametrize("reader", readers.READERS, ids=lambda reader: reader.name)
def test_what_is_sound_is_read(reader: readers.Reader, tmp_path: Path) -> None:
    reader.make(tmp_path)
    with bounded():
        assert ending(lambda: reader.read(tmp_path)) is None


def test_the_harness_sees_code_that_runs_and_memory_that_grows(tmp_path: Path) -> None:
    trusting = readers.Reader("trusting", "a", lambda f: None, lambda f: torch.load(f / "a", weights_only=False))
    assert files.attempt(trusting, "a pickle of torch", _new(tmp_path / "1")) == "its code has run"
    greedy = dataclasses.replace(trusting, read=lambda f: bytes(2**32))
    assert "MemoryError" in str(files.attempt(greedy, "nothing", _new(tmp_path / "2")))
    writing = dataclasses.replace(trusting, read=lambda f: (f.parents[1] / "outside" / "x").write_text(""))
    assert files.attempt(writing, "nothing", _new(tmp_path / "3")) == "something was written outside"


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "..", "a/b", "a\0b"])
def test_a_manifest_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    readers.make_checkpoint(tmp_path)
    place = tmp_path / "0000004"
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["sha256"][name] = "0" * 64
    (place / MANIFEST).write_text(json.dumps({**manifest, "seal": seal(manifest)}))
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        verify(place)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/hostname", ""])
def test_an_index_of_weights_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    readers.make_model(tmp_path)
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(UserError, match="weight_map names no files beside it"):
        loading.weight_files(str(tmp_path))


@pytest.mark.parametrize(
    "key, value",
    [
        ("layers_per_block", 10**9),
        ("layers_per_block", -1),
        ("block_out_channels", [2**40]),
        ("block_out_channels", [4] * 200_000),
        ("sample_size", float("nan")),
    ],
)
def test_a_network_of_a_giant_or_negative_size_is_not_built(key: str, value: object, tmp_path: Path) -> None:
    readers.make_model(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with bounded(), pytest.raises(UserError, match="unet"):
        loading.load(str(tmp_path))


@pytest.mark.parametrize("part", ["scheduler", "pipeline", "unet"])
def test_code_beside_a_pipeline_is_not_run(part: str, tmp_path: Path) -> None:
    readers.make_model(tmp_path)
    mark = tmp_path / "mark"
    evil = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\n"
    index = json.loads((tmp_path / "model_index.json").read_text())
    for place in (tmp_path, tmp_path / "scheduler", tmp_path / "unet"):
        (place / "evil.py").write_text(evil)
    index["_class_name" if part == "pipeline" else part] = ["evil", "Evil"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    if part == "unet":
        config = json.loads((tmp_path / "unet" / "config.json").read_text())
        (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}))
    for read in (lambda: loading.load(str(tmp_path)), lambda: sampling.open_folder(tmp_path)):
        assert not isinstance(ending(read), BaseException)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"{}", readers.header_of([2**30, 2**30]), bytes(100)])
def test_a_lora_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(content)
    pipeline = tiny.make("sd15")
    with bounded(), pytest.raises(UserError, match=r"lora\.safetensors"):
        lora_files.fuse(pipeline, pipeline.unet, str(tmp_path / "lora.safetensors"))


def test_a_lora_that_is_a_pickle_is_not_opened(tmp_path: Path) -> None:
    files.torch_pickled(tmp_path / "lora.bin", tmp_path / "mark")
    with pytest.raises(UserError, match="can run code when they are opened"):
        lora_files.find(str(tmp_path / "lora.bin"))


@pytest.mark.parametrize("pattern", ["{000000000..999999999}.tar", "{1..99999999999999}.tar", "{a,b}" * 40 + ".tar"])
def test_patterns_of_shards_do_not_grow_without_end(pattern: str) -> None:
    with bounded(), pytest.raises(UserError, match="names more than 100000 shards"):
        shards.shards_of(pattern)


@pytest.mark.parametrize("kind", ["a giant picture", "a comment of a picture", "a program as a picture", "a pipe"])
def test_a_picture_that_lies_is_left_out_by_its_name(kind: str, tmp_path: Path) -> None:
    readers.make_folder(tmp_path)
    file = tmp_path / "a" / "0.png"
    file.unlink()
    files.KINDS[kind](file, tmp_path / "mark")
    with bounded(2**28):
        source = FolderSource(tmp_path, 4, 0)
    assert source.size == 1 and [file] in source.skipped.values()


def test_pictures_of_a_page_lie_in_the_run(tmp_path: Path) -> None:
    run = _new(tmp_path / "run")
    readers.make_run(run)
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "secret_00.png")
    plain = readers.look(run)
    told = {"names": {"../../secret": "teacher", "student": "student"}, "asked": ["a disc"]}
    (run / "comparison" / "pairs.json").write_text(json.dumps(told))
    assert "comparison/pairs.json is there but cannot be read" in readers.look(run)
    (run / "samples" / "0000002.png").unlink()
    (run / "samples" / "0000002.png").symlink_to(tmp_path / "secret_00.png")
    page = readers.look(run)
    assert "samples/0000002.png is there but cannot be read" in page
    assert page.count("data:image/png") == plain.count("data:image/png") - 3 == 0


NASTY = (
    '<script>alert("x")</script>',
    "</td></table>\"'`&amp;<!--",
    "\x1b[2J\x1b]0;owned\x07\x00\r\n",
    "\ud800\u202e\ufeff",
    "../../../../etc/passwd",
    "con.txt\\..\\..",
    "x" * 100_000,
    "word " * 20_000,
    "${jndi}{{7*7}}$\\frac{",
    "\N{SNOWMAN}" * 5_000,
)


def test_a_page_of_nasty_prompts_is_text(tmp_path: Path) -> None:
    readers.make_run(tmp_path)
    told = {"names": {"teacher": NASTY[0], "student": NASTY[2]}, "asked": list(NASTY)}
    (tmp_path / "comparison" / "pairs.json").write_text(json.dumps(told))
    for name, i in itertools.product(told["names"], range(len(NASTY))):
        (tmp_path / "comparison" / f"{name}_{i:02d}.png").write_bytes(readers.png())
    table = {**readers.TABLE, "protocol": NASTY[1], "rows": [{"name": text, "frechet": 1.0} for text in NASTY]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    (tmp_path / "origin.json").write_text(json.dumps({"command": "".join(NASTY), "hardware": NASTY[3]}))
    (tmp_path / "config.yaml").write_text(json.dumps({"name": NASTY[0], "steps": 4}))
    with bounded():
        page = report.write_report(RunDir(tmp_path)).read_text()
    assert "<script>alert" not in page and "</td></table>\"'" not in page and "&lt;script&gt;alert" in page
    assert not any(ord(mark) < 32 and mark not in "\n\t\r" for mark in page)


def test_names_of_files_are_made_of_words(tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.png"
    out.parent.mkdir()
    folder = sampling._save_individually(torch.zeros(len(NASTY), 3, 4, 4), NASTY, out)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == len(NASTY) and all(len(name.encode()) < 120 for name in names)
    assert all(re.fullmatch(r"[\w-]+\.png", name) for name in names)
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["out", "a", *names])


def test_a_picture_of_nasty_prompts_stays_small() -> None:
    with bounded():
        grid = sampling.labelled_grid(torch.zeros(len(NASTY), 3, 16, 16), NASTY, 4)
    assert grid.width < 400 and grid.height < 4000


def test_what_a_file_says_is_no_command_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({"name": "x", "objective": {"name": NASTY[2] + "y" * 100_000}}))
    assert cli.main(["config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fewstep: ") and said.count("\n") == 1 and len(said) < 5000
    assert said.rstrip("\n").isprintable()


@pytest.mark.parametrize("source", ["a\0b.txt", "x" * 100_000, "y" * 5_000 + ".tar", "\0"])
def test_paths_that_can_be_none_are_one_sentence(source: str) -> None:
    from fewstep.data.source import open_source

    for read in (lambda: open_source(source, 8, 0), lambda: loading.load(source)):
        with pytest.raises(UserError) as caught:
            read()
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "made",
    [
        lambda mean: mean * float("nan"),
        lambda mean: torch.cat([mean, mean]),
        lambda mean: mean[None],
    ],
)
def test_statistics_that_do_not_fit_are_refused(made: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    from fewstep.evals import references

    known = Statistics(torch.zeros(2).double(), torch.eye(2).double(), 4)
    protocol = {"weights": "0", "extractor": "reader"}
    Reference(dataclasses.replace(known, mean=made(known.mean)), torch.ones(4, 2), protocol).save(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"a\.npz is no reference"):
        references.read(tmp_path / "a.npz")


def test_what_may_be_read_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with file.open("wb") as opened:
        opened.truncate(reading.DESCRIPTION + 1)
    with bounded(2**26), pytest.raises(UserError, match=r"a\.json cannot be read: it has 16,777,217 bytes"):
        reading.fields(file)
    header = struct.pack("<Q", 2**40)
    (tmp_path / "b.safetensors").write_bytes(header + bytes(64))
    with bounded(2**26), pytest.raises(UserError, match=r"b\.safetensors cannot be read"):
        reading.tensors(tmp_path / "b.safetensors")
    shutil.rmtree(tmp_path)
