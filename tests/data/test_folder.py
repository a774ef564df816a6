"""Image folders: what is read, how it is cropped, whose caption is whose, and what is left out for which reason."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from pictures import DAMAGES, damage, picture
from PIL import Image
from torch import Tensor

from fewstep import cli
from fewstep.core.errors import UserError
from fewstep.data import pictures
from fewstep.data.folder import NO_PICTURE, ODD_LINE, FolderSource
from fewstep.data.pictures import NO_CAPTION, UNREADABLE


def folder(root: Path, count: int) -> Path:
    """Pictures with 2, 4, 6, .. of red."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (root / f"{i:03d}.png").write_bytes(picture(2 * i + 2))
    return root


def reds(images: Tensor) -> list[int]:
    return ((images[:, 0, 4, 4] + 1) * 127.5).round().int().tolist()


def test_damaged_files_of_every_kind_are_listed_and_the_rest_is_read(tmp_path: Path) -> None:
    folder(tmp_path, 9)
    lost = damage(tmp_path)
    source = FolderSource(tmp_path, 8, seed=1)
    assert source.skipped == {UNREADABLE: lost} and len(lost) == len(DAMAGES) == 7
    assert source.size == 9 and sorted(reds(source.images(torch.arange(9)))) == list(range(2, 20, 2))


def test_a_folder_of_nothing_but_damage_is_refused(tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(UserError, match=rf"of no use: files {UNREADABLE} \(7\)$"):
        FolderSource(tmp_path, 8, seed=1)


def test_a_jpeg_that_is_named_png_is_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(100, kind="JPEG"))
    source = FolderSource(tmp_path, 8, seed=1)
    assert source.skipped == {} and abs(reds(source.images(torch.arange(1)))[0] - 100) <= 3


@pytest.mark.parametrize("wide", [True, False])
def test_the_square_in_the_middle_is_kept(wide: bool, tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 8) if wide else (8, 24), (255, 255, 255))
    image.paste((10, 20, 30), (8, 0, 16, 8) if wide else (0, 8, 8, 16))
    image.save(tmp_path / "a.png")
    made = FolderSource(tmp_path, 4, seed=1).images(torch.arange(1))
    expected = torch.tensor([10.0, 20, 30]).view(1, 3, 1, 1).expand(1, 3, 4, 4) / 127.5 - 1
    assert torch.allclose(made, expected, atol=1e-6)


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # white above, and the note that it lies upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "a.png", exif=exif)
    made = FolderSource(tmp_path, 8, seed=1).images(torch.arange(1))
    assert made[0, 0, 0, 0] == -1 and made[0, 0, 7, 0] == 1


def test_a_jpeg_of_many_pixels_is_decoded_smaller_and_looks_the_same() -> None:
    """Of waves of 64 pixels: at most 2 of 255 levels from the average over each 8 x 8."""
    waves = (torch.arange(256) * torch.pi / 32).sin() * 100 + 128
    image = waves[:, None].expand(256, 256).clone()
    file = io.BytesIO()
    Image.fromarray(image.byte().numpy()).save(file, "JPEG", quality=100)
    made = pictures.pixels_of(file.getvalue(), 32).float()
    expected = torch.nn.functional.interpolate(image[None, None], size=(32, 32), mode="bilinear", antialias=True)
    assert (made - expected[0]).abs().max() < 2


@pytest.mark.parametrize("memory", [pictures.MEMORY, 0])
def test_pictures_are_the_same_in_memory_and_from_disk(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit each is decoded when it is asked for; one that has gone since is named in one sentence."""
    folder(tmp_path, 5)
    expected = FolderSource(tmp_path, 8, seed=1).images(torch.arange(12))
    monkeypatch.setattr(pictures, "MEMORY", memory)
    source = FolderSource(tmp_path, 8, seed=1)
    assert torch.equal(source.images(torch.arange(12)), expected)
    for file in tmp_path.iterdir():
        file.unlink()
    if memory:
        assert torch.equal(source.images(torch.arange(12)), expected)
        return
    with pytest.raises(UserError, match=r"00\d\.png was whole when the run started and cannot be read any more"):
        source.images(torch.arange(1))


def test_captions_from_json_lines(tmp_path: Path) -> None:
    """Odd lines are named by their number; a text file beside the image goes first, the label's name last."""
    folder(tmp_path / "cats", 3)
    folder(tmp_path / "dogs", 3)
    (tmp_path / "cats" / "000.txt").write_text("from the text file")
    (tmp_path / "cats" / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": "from the line"}\n{"file_name": "001.png", "text": " a  cat "}\n'
    )
    (tmp_path / "captions.jsonl").write_text(
        '{"file_name": "dogs/000.png", "text": "a dog", "more": 1}\n\n[1]\n{"file_name": "dogs/000.png"}\n{"fi\n'
        '{"file_name": "dogs/gone.png", "text": "x"}\n{"file_name": "../x.png", "text": "x"}\n'
        '{"file_name": 3, "text": "x"}\n'
    )
    (tmp_path / "dogs" / "captions.jsonl").write_bytes(b"\xff\xfe\x00")
    source = FolderSource(tmp_path, 8, seed=1)
    assert sorted(source.captions(torch.arange(6))) == ["a cat", "a dog", "cats", "dogs", "dogs", "from the text file"]
    lines = tmp_path / "captions.jsonl"
    assert source.skipped == {
        ODD_LINE: [Path(f"{lines}:{number}") for number in (3, 4, 5, 8)],
        NO_PICTURE: [Path(f"{lines}:{number}") for number in (6, 7)],
        NO_CAPTION: [tmp_path / "dogs" / "captions.jsonl"],
    }


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    folder(tmp_path / "a", 1)
    folder(tmp_path / ".cache", 2)
    source = FolderSource(tmp_path, 8, seed=1)
    assert source.labels == ("a",) and source.size == 1 and source.skipped == {}


def test_another_file_is_another_checksum(tmp_path: Path) -> None:
    before = FolderSource(folder(tmp_path, 3), 8, seed=1).checksum()
    assert FolderSource(tmp_path, 8, seed=2).checksum() == before
    (tmp_path / "001.txt").write_text("told")
    told = FolderSource(tmp_path, 8, seed=1).checksum()
    (tmp_path / "002.png").write_bytes(picture(77))
    assert len({before, told, FolderSource(tmp_path, 8, seed=1).checksum()}) == 3


def test_five_percent_of_damage_train_and_are_listed(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All by name in the run folder, the first five where the run starts."""
    images = folder(tmp_path / "images" / "a", 133).parent
    lost = damage(images / "a")
    given = [f"model.teacher={tiny_teacher}", f"data.source={images}", "batch=4", "steps=2", "evals.every=0"]
    given += ["evals.samples=0", "save.export=false", "data.workers=2", f"--out={tmp_path / 'runs'}"]
    assert cli.main(["train", "configs/scenes/dmd2.yaml", *given]) == 0
    run = next((tmp_path / "runs").iterdir())
    assert (run / "skipped.txt").read_text() == "".join(f"{file}: {UNREADABLE}\n" for file in lost)
    said = f"files {UNREADABLE} (7): {', '.join(map(str, lost[:5]))} and 2 more, see {run / 'skipped.txt'}"
    assert said in capsys.readouterr().out.splitlines()
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
