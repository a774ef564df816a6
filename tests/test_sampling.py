"""Sampling from run folders and pipeline folders: the right labels, steps and files, and errors that help."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import build, config, measure, sampling
from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.data.scenes import LABELS
from fewstep.export import export
from fewstep.train import checkpoint

CONFIG = """
name: tiny
device: cpu
model:
  network:
    class: UNet2DModel
    sample_size: 16
    block_out_channels: [8, 8]
    layers_per_block: 1
    down_block_types: [DownBlock2D, DownBlock2D]
    up_block_types: [UpBlock2D, UpBlock2D]
    norm_num_groups: 4
    num_class_embeds: 13
  process: {name: flow}
  prediction: flow_prediction
  steps: 2
objective: {name: diffusion}
players: {generator: {lr: 1.0e-3}}
"""


def make_run(place: Path, *overrides: str) -> build.Run:
    """A run folder of a random tiny network with one checkpoint."""
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(CONFIG)
    (one,) = config.load(place / "config.yaml", overrides)
    (place / "config.yaml").write_text(config.to_yaml(one))
    run = build.build(one)
    checkpoint.save(place / "checkpoints", 3, run.players, run.objective)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("runs") / "tiny"
    export(make_run(place), place / "export")
    return place


def sample(where: Path, out: Path, *options: str) -> np.ndarray:
    """The pixels of the picture that the arguments ask for."""
    parser = argparse.ArgumentParser()
    sampling.add_arguments(parser)
    sampling.main(parser.parse_args([str(where), "--out", str(out), *options]))
    return np.asarray(Image.open(out))


def labels_drawn(monkeypatch: pytest.MonkeyPatch, where: Path, out: Path, *options: str) -> list[int] | None:
    """The labels that reach the generator."""
    seen: list[torch.Tensor | None] = []

    def generate(net, rollout, asked, count, shape, seed, **more):
        seen.append(asked(torch.arange(count)).inputs.get("class_labels"))
        return torch.zeros(count, *shape)

    monkeypatch.setattr(measure, "generate", generate)
    sample(where, out, *options)
    return None if seen[0] is None else seen[0].tolist()


def test_labels_take_turns(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, lines = tmp_path / "x.png", tmp_path / "labels.txt"
    lines.write_text("blue ring\n\n  Red Disc \nblue ring\n")
    drawn = [
        labels_drawn(monkeypatch, run, out, *options)
        for options in (
            ["--labels", "red disc, BLUE RING", "--count", "5"],
            ["--label-ids", "0,5", "--count", "3"],
            ["--prompts-file", str(lines)],
            [],
        )
    ]
    assert drawn == [[0, 11, 0, 11, 0], [0, 5, 0], [11, 0, 11], list(range(12)) * 4]


def test_the_picture_is_the_rollout(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--label-ids", "3,7", "--count", "4", "--seed", "5")
    pixels = sample(run, tmp_path / "deep" / "x.png", *options, "--individual")
    said = capsys.readouterr().out
    assert re.search(r"4 images, 2 steps: [\d.]+ images/s", said) and str(tmp_path / "deep" / "x.png") in said
    sampler = sampling.open_folder(run)
    labels = torch.tensor([3, 7, 3, 7])
    asked = lambda rows: Condition({"class_labels": labels[rows]})
    images = measure.generate(sampler.net, sampler.rollout, asked, 4, (3, 16, 16), 5)
    assert torch.equal(images, sampler.draw([3, 7], 4, 5))
    files = sorted((tmp_path / "deep" / "x").iterdir())
    assert [file.name for file in files] == [f"{i:05d}_{LABELS[(3, 7)[i % 2]].replace(' ', '-')}.png" for i in range(4)]
    for file, image in zip(files, images, strict=True):
        stored = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
        assert (stored / 127.5 - 1 - image).abs().max() <= 1 / 255 + 1e-6
    small = np.asarray(Image.open(files[3]))
    assert (pixels[-64 - 4 : -4 : 4, -64 - 4 : -4 : 4] == small).all()


def test_a_pipeline_folder_is_sampled_like_its_run(run: Path, tmp_path: Path) -> None:
    ours, theirs = sampling.open_folder(run), sampling.open_folder(run / "export")
    assert theirs.names == LABELS and theirs.rollout.steps == ours.rollout.steps
    assert (ours.draw([1, 4], 4, 0) - theirs.draw([1, 4], 4, 0)).abs().max() < 1e-5
    assert len(sampling.open_folder(run / "export", steps=5).rollout) == 5
    guided = [sampling.open_folder(where, guidance=2.0).draw([1], 2, 0) for where in (run, run / "export")]
    assert (guided[0] - guided[1]).abs().max() < 1e-5 < (guided[0] - ours.draw([1], 2, 0)).abs().max()


def test_other_steps_walk_the_runs_own_way(tmp_path: Path) -> None:
    keys = ("model.process.name=vp", "model.prediction=v_prediction", "model.transition=renoise")
    for name, more in {"vp": keys, "no_route": ("model.transition=renoise", "model.shift=2")}.items():
        made = make_run(tmp_path / name, *more, "model.steps=8")
        other = sampling.open_folder(tmp_path / name, steps=4).rollout
        assert len(other) == 4 and other.step is made.rollout.step
        again = make_run(tmp_path / f"{name}_4", *more, "model.steps=4")
        assert other.steps == again.rollout.steps


def test_a_students_folder_renoises_as_saved(tmp_path: Path) -> None:
    keys = ("model.process.name=vp", "model.prediction=v_prediction", "model.transition=renoise", "model.steps=4")
    made = make_run(tmp_path / "vp", *keys)
    folder = export(made, tmp_path / "folder")
    (folder / "README.md").unlink()
    sampler = sampling.open_folder(folder)
    assert sampler.rollout.steps == made.rollout.steps and sampler.rollout.step is made.rollout.step
    assert sampler.names == () and sampler.classes == 13
    assert (sampler.draw([2], 3, 1) - sampling.open_folder(tmp_path / "vp").draw([2], 3, 1)).abs().max() < 1e-5
    (tmp_path / "ids.txt").write_text("3\n12\n")
    assert sample(folder, tmp_path / "ids.png", "--prompts-file", str(tmp_path / "ids.txt")).shape[1] == 2 * 68 + 4
    with pytest.raises(UserError, match="no label names: use --label-ids from 0 to 12"):
        sample(folder, tmp_path / "x.png", "--labels", "red disc")
    with pytest.raises(UserError, match='class that means "no class"'):
        sample(folder, tmp_path / "x.png", "--guidance", "2")


def test_without_labels(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "one.png")
    source = f"data.source={tmp_path / 'images'}"
    export(make_run(tmp_path / "run", "model.network.num_class_embeds=null", source), tmp_path / "folder")
    for where in (tmp_path / "run", tmp_path / "folder"):
        assert sample(where, tmp_path / "x.png").shape == (4 * 68 + 4, 4 * 68 + 4, 3)
        with pytest.raises(UserError, match="takes no labels"):
            sample(where, tmp_path / "x.png", "--label-ids", "0")


def test_a_foreign_pipeline_walks_trailing_times(tmp_path: Path, run: Path) -> None:
    unet = diffusers.UNet2DModel.from_pretrained(run / "export" / "unet")
    pipeline = diffusers.ConsistencyModelPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "folder")
    sampler = sampling.open_folder(tmp_path / "folder")
    assert len(sampler.rollout) == sampling.MANY_STEPS and sampler.rollout.steps[0].told == 1.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--label-ids", "0,12"], "from 0 to 11, but '12'"),
        (["--label-ids", "-1"], "from 0 to 11, but '-1'"),
        (["--label-ids", "two"], "from 0 to 11, but 'two'"),
        (["--labels", "red disk"], "no label 'red disk': did you mean 'red disc'"),
        (["--labels", "zebra"], "no label 'zebra': use any of red disc, green disc"),
        (["--labels", " , "], "with commas between"),
        (["--count", "0"], "--count is at least 1"),
        (["--steps", "1001"], "--steps is from 1 to the 1000"),
        (["--steps", "0"], "--steps is from 1 to the 1000"),
        (["--checkpoint", "7"], "no checkpoint of step 7: it has 3"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, options: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        sample(run, tmp_path / "x.png", *options)
    assert not (tmp_path / "x.png").exists()


def test_odd_prompts_files(run: Path, tmp_path: Path) -> None:
    lines = tmp_path / "labels.txt"
    lines.write_text("red disc\n\nblue rings\n")
    with pytest.raises(
        UserError, match=r"labels\.txt, line 3: there is no label 'blue rings': did you mean 'blue ring'"
    ):
        sample(run, tmp_path / "x.png", "--prompts-file", str(lines))
    lines.write_text("\n \n")
    with pytest.raises(UserError, match="names no label"):
        sample(run, tmp_path / "x.png", "--prompts-file", str(lines))
    lines.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8 text"):
        sample(run, tmp_path / "x.png", "--prompts-file", str(lines))
    with pytest.raises(UserError, match="No such file"):
        sample(run, tmp_path / "x.png", "--prompts-file", str(tmp_path / "absent.txt"))


def test_places_that_are_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        sample(tmp_path / "absent", tmp_path / "x.png")
    with pytest.raises(UserError, match="has no checkpoints"):
        sample(run / "export", tmp_path / "x.png", "--checkpoint", "3")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        sample(run, tmp_path / "file" / "x.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        sample(run, tmp_path / "folder.png")


def test_captions_stand_above_their_images() -> None:
    images = torch.ones(5, 3, 16, 16)
    same = sampling.labelled_grid(images, ["a", "b", "a", "b", "a"], 2)
    each = sampling.labelled_grid(images, ["a", "b", "c", "d", "striped triangle"], 2)
    none = sampling.labelled_grid(images, [""] * 5, 2)
    assert none.size == (2 * 68 + 4, 3 * 68 + 4)
    assert same.size == (none.width, none.height + 13) and each.size == (none.width, none.height + (1 + 1 + 2) * 13)
    assert np.asarray(none).min() == 255 and (np.asarray(same)[:15] < 128).any()
    assert (np.asarray(same)[17:] == 255).all()


def test_the_script(run: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "tools" / "sample.py"
    command = [sys.executable, str(script), str(run), "--labels", "red dsc", "--out", "x.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("sample.py: there is no label 'red dsc'")
    helped = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--prompts-file" in helped.stdout
