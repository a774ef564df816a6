"""Latents that are encoded once: what is stored, in which order it is visited, and that runs go on as without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fewstep import build, cli, config, finish
from fewstep.data.source import CaptionedSource
from fewstep.latents import Latents
from fewstep.models import tiny
from fewstep.train import checkpoint

COUNT = 6
CONFIG = """
name: kept
steps: 4
batch: 2
model: {steps: 2}
objective: {name: diffusion, label_dropout: 0.0}
players: {generator: {lr: 1.0e-3}}
data: {resolution: 16}
evals: {every: 0, samples: 0}
save: {every: 2, export: false}
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A config with a tiny teacher that reads prompts, and six images of one shade each with captions that say it."""
    root = tmp_path_factory.mktemp("kept")
    (root / "one.yaml").write_text(CONFIG)
    tiny.make("sd15").save_pretrained(root / "teacher")
    (root / "images").mkdir()
    for i in range(COUNT):
        Image.new("RGB", (16, 16), (40 * i, 90, 30)).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(f"disc {i}")
    paths = [f"model.teacher={root / 'teacher'}", f"data.source={root / 'images'}"]
    return [str(root / "one.yaml"), *paths, f"data.cache={COUNT}"]


@pytest.fixture(autouse=True)
def unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures and the page at the end of a run take longer than the runs of this file."""
    monkeypatch.setattr(finish, "finish", lambda run, folder: None)


def play(given: list[str], out: Path, *more: str) -> Path:
    assert cli.main(["train", *given, *more, f"--out={out}"]) == 0
    return next(out.iterdir())


def prepared(given: list[str], place: Path, *more: str) -> build.Run:
    run = build.build(config.load(given[0], [*given[1:], *more])[0])
    build.prepare(run, place)
    return run


def test_every_epoch_visits_every_row_once_in_its_own_order() -> None:
    kept = Latents(torch.zeros(7, 1), seed=3)
    epochs = kept.visited(torch.arange(4 * 7)).reshape(4, 7)
    assert torch.equal(epochs.sort(1).values, torch.arange(7).expand(4, 7))
    assert len({tuple(order) for order in epochs.tolist()}) == 4
    assert torch.equal(kept.visited(torch.arange(5, 16)), epochs.flatten()[5:16])  # however the ids are split
    assert not torch.equal(Latents(kept.x0, seed=4).visited(torch.arange(28)), epochs.flatten())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_holds_the_latents_in_halves_and_the_captions_of_the_same_rows(
    parts: int, given: list[str], tmp_path: Path
) -> None:
    run = prepared(given, tmp_path, f"micro_batches={parts}")
    codec, kept = run.teacher.codec, run.latents
    assert codec is not None and kept is not None
    exact = codec.encode(run.source.images(torch.arange(COUNT)))
    shade = ((run.source.images(torch.arange(COUNT))[:, 0, 0, 0] + 1) * 127.5 / 40).round().long().tolist()
    assert kept.x0.dtype == torch.float16 and (exact.half().float() - exact).abs().max() > 0
    said: list[str] = []
    for step in range(2 * COUNT // 2):
        rows = kept.visited(torch.arange(2 * step, 2 * step + 2))
        given_now = build.batches(run)(step)
        assert len(given_now) == parts
        x0 = torch.cat([batch.x0 for batch in given_now if batch.x0 is not None])
        # They are encoded in other batches, whose rounding may cross that of halves.
        assert x0.dtype == torch.float32 and torch.allclose(x0, exact[rows], rtol=2**-10, atol=1e-6)
        captions = [f"disc {shade[row]}" for row in rows.tolist()]
        states = torch.cat([batch.cond.inputs["encoder_hidden_states"] for batch in given_now])
        told = codec.encode_prompts(captions).inputs["encoder_hidden_states"]
        assert torch.allclose(states, told, atol=1e-5) and not torch.allclose(told[0], told[1], atol=1e-3)
        said += captions
    assert sorted(said[:COUNT]) == sorted(said[COUNT:]) == [f"disc {i}" for i in range(COUNT)]
    assert said[:COUNT] != said[COUNT:]


def test_each_image_is_encoded_once(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never again in the same folder; without the cache at every step, and eight to look at their scale."""
    seen: list[int] = []
    encode = build.Run.encode
    monkeypatch.setattr(build.Run, "encode", lambda run, images: seen.append(len(images)) or encode(run, images))
    for more, total in (([], COUNT), ([], COUNT), (["data.cache=0"], COUNT + 8 + 2 * 5)):
        run = prepared(given, tmp_path, *more)
        for step in range(5):
            build.batches(run)(step)
        assert sum(seen) == total


def test_a_world_without_end_is_cut_at_the_cache(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first `data.cache` scenes come again and again."""
    monkeypatch.setattr(CaptionedSource, "captions", lambda source, ids: [f"scene {i}" for i in ids.tolist()])
    run = prepared(given, tmp_path, "data.source=captioned", "data.cache=5")
    assert run.latents is not None and run.latents.x0.shape == (5, *run.shape)
    first = {tuple(row.flatten().tolist()) for row in run.encode(run.source.images(torch.arange(5))).half().float()}
    batches = [build.batches(run)(step)[0] for step in range(5)]
    assert {tuple(row.flatten().tolist()) for batch in batches for row in batch.x0} == first  # type: ignore[union-attr]


@pytest.mark.parametrize("how", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("count", "said"),
    [(-1, "data.cache is a number of images, 0 for none, but -1"), (4, "images has, 6, but 4 was given"), (7, "but 7")],
)
def test_wrong_counts_end_with_one_sentence(
    count: int, said: str, how: list[str], given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *given, f"data.cache={count}", *how, f"--out={tmp_path}"]) == 2
    sentences = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(sentences) == 1 and said in sentences[0]


def test_pixels_are_not_kept(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["configs/scenes/dmd2.yaml", f"model.teacher={tiny_teacher}", "data.cache=8", f"--out={tmp_path}"]
    assert cli.main(["train", *given]) == 2
    assert "data.cache=8 keeps latents, but this network works on pixels: set data.cache=0" in capsys.readouterr().err


def test_a_later_stage_reads_the_file_of_the_one_before(given: list[str], tmp_path: Path) -> None:
    """Unless what decides the latents is another: then it has its own."""
    stages = "stages=[{},{start: {generator: previous.generator}}]"
    same = play(given, tmp_path / "same", stages, "steps=1")
    assert [file.parents[1].name for file in same.rglob("latents_*/*.safetensors")] == ["stage_1"]
    other = play(given, tmp_path / "other", stages, "steps=1", "stage_2.data.seed=5")
    files = sorted(other.rglob("latents_*/*.safetensors"))
    assert [file.parents[1].name for file in files] == ["stage_1", "stage_2"]
    first, second = (load_file(file)["x0"] for file in files)
    assert not torch.equal(first, second)  # another seed of the folder's order
    assert torch.equal(*(kept.flatten(1).sort(0).values for kept in (first, second)))


@pytest.mark.parametrize("lost", [False, True])
def test_resumed_in_the_second_epoch_is_bit_exact(lost: bool, given: list[str], tmp_path: Path) -> None:
    """Also where the file of the latents is gone and made again; another count is refused."""
    run = play(given, tmp_path / "runs", "steps=6")
    end = run / "checkpoints" / "0000006"
    expected = checkpoint.sha256(end / "state.safetensors")
    end.rename(tmp_path / "gone")
    if lost:
        (run / f"latents_{COUNT}_seed1" / "shard-00000.safetensors").unlink()
    assert cli.main(["train", *given, "steps=6", "data.cache=0", "--resume", str(run)]) == 2
    assert cli.main(["train", *given, "steps=6", "--resume", str(run)]) == 0
    assert checkpoint.sha256(end / "state.safetensors") == expected


def test_another_image_under_the_same_name_is_encoded_again(given: list[str], tmp_path: Path) -> None:
    before = build.latents_recipe(build.build(config.load(given[0], given[1:])[0]))
    images = tmp_path / "images"
    shutil.copytree(given[2].removeprefix("data.source="), images)
    here = [*given[1:], f"data.source={images}"]
    assert json.loads(before)["data"]["checksum"] == checksum(given[0], here)
    Image.new("RGB", (16, 16), (40, 91, 30)).save(images / "1.png")
    assert json.loads(before)["data"]["checksum"] != checksum(given[0], here)


def checksum(file: str, overrides: list[str]) -> str:
    return json.loads(build.latents_recipe(build.build(config.load(file, overrides)[0])))["data"]["checksum"]
