"""Batches made ahead: the same bytes in the same order for any number of threads and processes, and fast enough."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image
from torch import Tensor

from fewstep import build, config
from fewstep.core.errors import UserError
from fewstep.data import pictures
from fewstep.data.folder import FolderSource
from fewstep.data.loader import Loader
from fewstep.train import processes

STEPS, BATCH = 5, 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirteen pictures that no memory keeps: a batch does not end with an epoch."""
    monkeypatch.setattr(pictures, "MEMORY", 0)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(13):
        (tmp_path / "images" / "a" / f"{i:02d}.png").write_bytes(picture(10 * i))
    return tmp_path / "images"


def batches(folder: Path | str, teacher: Path, *more: str, steps: range = range(STEPS)) -> list[Tensor]:
    """The images of each step, as `fewstep train` reads them."""
    given = [f"model.teacher={teacher}", f"data.source={folder}", f"batch={BATCH}", f"steps={STEPS}", *more]
    at = build.batches(build.build(config.load("configs/scenes/dmd2.yaml", given)[0]))
    return [torch.cat([batch.x0 for batch in at(step)]) for step in steps]  # type: ignore[misc]


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_bytes_in_the_same_order(
    workers: int, folder: Path, tiny_teacher: Path
) -> None:
    expected = batches(folder, tiny_teacher)
    for parts in (1, 2):
        made = batches(folder, tiny_teacher, f"data.workers={workers}", f"micro_batches={parts}")
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    resumed = batches(folder, tiny_teacher, f"data.workers={workers}", steps=range(3, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected[3:], strict=True))
    reds = torch.cat(expected)[:, 0, 8, 8].mul(127.5).add(127.5).round().int().tolist()
    assert sorted(reds[:13]) == sorted(reds[13:26]) == list(range(0, 130, 10)) and reds[:13] != reds[13:26]


def test_a_world_is_the_same_in_threads(tiny_teacher: Path) -> None:
    made = batches("scenes", tiny_teacher, "data.workers=3")
    assert all(torch.equal(a, b) for a, b in zip(made, batches("scenes", tiny_teacher), strict=True))


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_reads_the_same_batch(
    count: int, folder: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each its share, in the order of the ranks."""
    expected = batches(folder, tiny_teacher)
    shares = []
    for rank in range(count):
        with monkeypatch.context() as alone:
            alone.setattr(processes, "size", lambda: count)
            alone.setattr(processes, "dist", SimpleNamespace(get_rank=lambda rank=rank: rank))
            share = processes.share
            alone.setattr(build, "processes", SimpleNamespace(share=share, size=lambda: 1))
            shares.append(batches(folder, tiny_teacher, "data.workers=2"))
    for step in range(STEPS):
        assert torch.equal(torch.cat([share[step] for share in shares]), expected[step])


def test_batches_are_made_before_they_are_asked_for_and_once() -> None:
    made: list[int] = []
    enough = threading.Semaphore(0)

    def make(number: int) -> int:
        made.append(number)
        enough.release()
        return number * number

    loader = Loader(make, workers=2, count=5)
    assert loader(0) == 0
    assert [enough.acquire(timeout=60) for _ in range(3)] == [True] * 3
    assert sorted(made) == [0, 1, 2]
    assert [loader(number) for number in range(1, 5)] == [1, 4, 9, 16] and sorted(made) == [0, 1, 2, 3, 4]


def test_an_error_comes_where_its_batch_is_asked_for() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise UserError("gone")
        return number

    loader = Loader(make, workers=3, count=4)
    assert [loader(0), loader(1)] == [0, 1]
    with pytest.raises(UserError, match="gone"):
        loader(2)


def test_a_negative_number_of_workers_is_refused(tiny_teacher: Path) -> None:
    with pytest.raises(UserError, match=r"data\.workers is a number of threads, 0 for none, but -1"):
        config.load("configs/scenes/dmd2.yaml", ["data.workers=-1"])


def photographs(root: Path, count: int, side: int) -> list[Path]:
    """JPEG files with waves of many lengths, of the size of photographs."""
    root.mkdir()
    y, x = np.mgrid[:side, :side]
    for i in range(count):
        waves = [np.sin(x / (3 + i + c) + y / (7 + c)) + np.sin(x * y / (400.0 + 90 * i)) for c in range(3)]
        Image.fromarray((np.stack(waves, -1) * 60 + 128).astype(np.uint8)).save(root / f"{i:03d}.jpg", quality=92)
    return sorted(root.iterdir())


def fastest(*works: Callable[[], object], rounds: int = 7) -> list[float]:
    """The least processor seconds of each, all of them once a round: what else the machine does plays no part."""
    seconds = []
    for _ in range(rounds):
        began = [time.process_time()]
        for work in works:
            work()
            began.append(time.process_time())
        seconds.append([after - before for before, after in itertools.pairwise(began)])
    return [min(times) for times in zip(*seconds, strict=True)]


def bare(content: bytes) -> object:
    return Image.open(io.BytesIO(content)).convert("RGB").size


def ready(content: bytes) -> object:
    return pictures.scaled(pictures.pixels_of(content, 256))


@pytest.mark.slow
@pytest.mark.parametrize(("decode", "side"), [(bare, 1024), (ready, 512)])
def test_loading_keeps_up_with_bare_decoding(
    decode: Callable[[bytes], object], side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 256 pixels, at least 0.9 of what as many threads decode that know no order and make no batches.

    In seconds that they work, for they never wait: see the test of what is made ahead. Of pictures of four times the
    resolution even without crop and resize, for the loader decodes them smaller.
    """
    monkeypatch.setattr(pictures, "MEMORY", 0)
    files = photographs(tmp_path / "images", 48, side)
    source = FolderSource(tmp_path / "images", 256, seed=1)

    def decoded() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda file: decode(file.read_bytes()), files))

    def loaded() -> None:
        loader = Loader(lambda number: source.images(torch.arange(4) + 4 * number), workers=2, count=12)
        for number in range(12):
            loader(number)

    alone, whole = fastest(decoded, loaded)
    assert alone / whole >= 0.9, f"decoding alone takes {alone:.3f} s, loading {whole:.3f} s"
