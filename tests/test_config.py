"""Every YAML loads and takes two real steps with tiny weights; every mistake gets one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from fewstep import build, cli, config, measure
from fewstep.core.errors import UserError
from fewstep.data.folder import UNLABELLED
from fewstep.data.pictures import NO_CAPTION, UNREADABLE
from fewstep.data.source import open_source
from fewstep.models import schedulers
from fewstep.models import tiny as pipelines
from fewstep.train.loop import train_step

CONFIGS = sorted(p for p in Path("configs").rglob("*.yaml") if p.name != "base.yaml")
TRIED_HERE = [p for p in CONFIGS if "recipes" not in p.parts]  # the others are tried in test_recipes.py


@pytest.fixture(scope="session")
def tiny_prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline of each family that the text-to-image configs are made for."""
    root = tmp_path_factory.mktemp("prompted")
    pipelines.make("sd15").save_pretrained(root / "sd15")
    pipelines.make("sd3", long_prompts=False).save_pretrained(root / "sd3")
    return root


def tiny(file: Path, teacher: Path, sizes: dict[str, Any], prompted: Path) -> list[config.Config]:
    overrides = ["batch=4", "pairs.count=8", "pairs.steps=2"]
    if "t2i" in str(file):
        family = "sd3" if "sd3" in file.stem else "sd15"
        overrides += [f"model.teacher={prompted / family}", "data.resolution=16"]
        overrides += ["data.cache=8"] if "teachers" in file.parts else []
    elif "teachers" in file.parts:
        overrides += [f"model.network.{k}={v}" for k, v in sizes.items()]
    else:
        overrides.append(f"model.teacher={teacher}")
    if "uni_dad" in file.stem:
        overrides.append(f"objective.target_teacher={teacher}")
    return config.load(file, overrides)


@pytest.mark.parametrize("file", TRIED_HERE, ids=[p.stem for p in TRIED_HERE])
def test_every_config_takes_a_few_steps(
    file: Path, tiny_teacher: Path, tiny_sizes: dict, tiny_prompted: Path, tmp_path: Path
) -> None:
    for stage in tiny(file, tiny_teacher, tiny_sizes, tiny_prompted):
        stage.start, stage.pairs.of = {}, "teacher"
        if str(getattr(stage.objective, "target_teacher", "")).startswith("previous."):
            stage.objective.target_teacher = str(tiny_teacher)
        if hasattr(stage.objective, "record"):
            stage.objective.record = 1  # the generator rests until then
        run = build.build(stage)
        build.prepare(run, tmp_path)
        before = {name: [p.clone() for p in player.parameters] for name, player in run.players.items()}
        batches = build.batches(run)
        # Before its first move a critic that is a copy of the teacher leaves no score gap: a second turn is wanted.
        for step in range(6 if getattr(stage.objective, "ratio", 1) == 5 else 3):
            train_step(run.objective, batches(step), step, run.players)
        for name, player in run.players.items():
            assert player.moves >= 1
            assert any(not torch.equal(a, b) for a, b in zip(before[name], player.parameters, strict=True))


@pytest.mark.parametrize("file", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_resolved_config_loads_to_the_same(file: Path, tmp_path: Path) -> None:
    stage = config.load(file)[-1]
    (tmp_path / "resolved.yaml").write_text(config.to_yaml(stage))
    assert config.load(tmp_path / "resolved.yaml") == [stage]


MISTAKES = {
    "model.stepz=4": "Did you mean: 'steps'",
    "objective.ratoi=4": "Did you mean: 'ratio'",
    "objective.ratio=abc": "could not be converted to Integer",
    "objective.name=dmd3": "there is no objective 'dmd3'",
    "objective.times.low=0.99": "0 <= low < high <= 1",
    "model.steps=0": "from 1 to 1000",
    "model.transition=foo": "expected one of",
    "batch=30 micro_batches=4": "cannot be split",
    "players.generator.lr=-1": "a learning rate is above 0",
    "players.generator.ema=1.0": "decay in [0, 1)",
    "objective.ratio=1 objective.critic_on_generator_step=false": "critic never moved",
    "steps": "not an override",
    "objective=dmd": "write objective.name=dmd",
    "model=5": "model has keys of its own",
    "name=../x": "letters, digits",
    "pairs.count=0": "pairs.count and pairs.steps are at least 1",
    "evals.samples=3": "0 for no table, or at least 24",
    "evals.every=-1": "0 for never",
    "model.guidance=nan": "a number from 0",
    "model.guidance=-3": "a number from 0",
    "players.generator.eps=-1": "eps is above 0",
    "players.generator.warmup=-1": "numbers of moves",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes_in_values(given: str) -> None:
    with pytest.raises(UserError, match=r"\w") as caught:
        config.load("configs/scenes/dmd2.yaml", given.split())
    assert MISTAKES[given] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_every_stage_or_one() -> None:
    first, second = config.load("configs/quickstart.yaml", ["batch=8", "stage_2.steps=5", "stage_1.batch=16"])
    assert (first.batch, second.batch) == (16, 8)
    assert first.steps == config.load("configs/quickstart.yaml")[0].steps and second.steps == 5
    (only,) = config.load("configs/quickstart.yaml", ["stages=[]", "objective.name=diffusion", "steps=3"])
    assert only.steps == 3 and only.start == {}


STAGE_MISTAKES = {
    "stage_3.steps=5": "the config has 2 stage(s), but stage_3 was given",
    "stage_0.steps=5": "the config has 2 stage(s), but stage_0 was given",
    "objective.ratio=3": "stage 1 of 2: Key 'ratio' not in 'Config' at ratio: `fewstep objectives rectified",
    "stage_2.objective.ratoi=3": "stage 2 of 2: ",
}


@pytest.mark.parametrize("given", STAGE_MISTAKES)
def test_mistakes_in_stages(given: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load("configs/quickstart.yaml", [given])
    assert STAGE_MISTAKES[given] in str(caught.value)
    assert "\n" not in str(caught.value)


BUILD_MISTAKES = {
    "model.teacher=/nowhere/at/all": "there is no teacher at",
    "model.network.class=UNet2DModel": "not both",
    "players.critic.lr=1": "only the players generator, fake_score",
    "data.source=/nowhere": "no folder",
    "data.resolution=32": "makes 16x16 images",
    "model.process.name=vp": "brings its own scheduler",
    "start.real_score=teacher": "use generator or fake_score",
    "start.generator=previous.generator": "there is no earlier stage",
    "device=tpu": "device is auto, cpu or cuda",
    "model.null_label=40": "from 0 to 12",
    "model.experts=3": "number of phases",
    "objective.name=consistency": "players.fake_score",
    "objective.gan_taps=[nope]": "objective.gan_taps: ",
    "objective.gan_taps=[time_embedding]": "time_embedding does not look at the image",
}


@pytest.mark.parametrize("given", BUILD_MISTAKES)
def test_mistakes_in_building(given: str, tiny_teacher: Path) -> None:
    overrides = [f"model.teacher={tiny_teacher}", given]
    with pytest.raises(UserError) as caught:
        build.build(config.load("configs/scenes/dmd2.yaml", overrides)[0])
    assert BUILD_MISTAKES[given] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_guidance_needs_a_null_class(tiny_sizes: dict, tmp_path: Path) -> None:
    net = diffusers.UNet2DModel(**{**tiny_sizes, "num_class_embeds": 12})
    diffusers.ConsistencyModelPipeline(unet=net, scheduler=schedulers.flow_scheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no null class"):
        build.build(config.load("configs/scenes/dmd2.yaml", [f"model.teacher={tmp_path}", "model.guidance=2"])[0])


def test_bare_model_folder_and_image_folder_are_one_yaml(tiny_sizes: dict, tmp_path: Path) -> None:
    """Somebody's class-conditional flow network on their own images."""
    from PIL import Image

    diffusers.UNet2DModel(**{**tiny_sizes, "num_class_embeds": 3}).save_pretrained(tmp_path / "unet")
    for i, name in enumerate(("cats", "dogs")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for j in range(3):
            Image.new("RGB", (20, 24), (40 * i, 50 * j, 90)).save(tmp_path / "images" / name / f"{j}.png")
    (tmp_path / "images" / "cats" / "broken.png").write_bytes(b"not an image")
    (tmp_path / "images" / "cats" / "1.txt").write_bytes(b"\xff\xfe\xff")
    Image.new("RGB", (20, 24)).save(tmp_path / "images" / "stray.png")
    (tmp_path / "mine.yaml").write_text(
        f"""
name: mine
batch: 4
model: {{teacher: {tmp_path}/unet, process: {{name: flow}}, prediction: flow_prediction}}
objective: {{name: dmd2}}
players: {{generator: {{lr: 1.0e-4}}, fake_score: {{lr: 1.0e-4}}}}
data: {{source: {tmp_path}/images, resolution: 16}}
"""
    )
    run = build.build(config.load(tmp_path / "mine.yaml")[0])
    assert run.source.labels == ("cats", "dogs")
    skipped = {why: [p.name for p in files] for why, files in run.source.skipped.items()}  # type: ignore[attr-defined]
    assert skipped == {UNREADABLE: ["broken.png"], UNLABELLED: ["stray.png"], NO_CAPTION: ["1.txt"]}
    assert run.source.size == 6 and run.source.captions(torch.arange(6)).count("cats") == 3
    assert run.teacher.null_label == 2
    batch = build.batches(run)(0)
    logs = train_step(run.objective, batch, 0, run.players)
    assert logs["fake_score/loss"] > 0
    assert batch[0].x0 is not None and batch[0].x0.shape == (4, 3, 16, 16)


def test_what_is_left_out_is_said_with_its_reason(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a run starts, one line a reason; and where nothing is left, in the one sentence of the mistake."""
    images = folder_of_images(tmp_path / "images", "a/1.png", "b/1.png", "stray.png", "other.png")
    (images / "a" / "broken.png").write_bytes(b"no image")
    given = [f"model.teacher={tiny_teacher}", f"data.source={images}", "batch=2", "steps=1", "evals.every=0"]
    given += ["evals.samples=0", "save.export=false", "objective.ratio=1", f"--out={tmp_path / 'runs'}"]
    assert cli.main(["train", "configs/scenes/dmd2.yaml", *given]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("files ")] == [
        f"files {UNREADABLE} (1): {images / 'a' / 'broken.png'}",
        f"files {UNLABELLED} (2): {images / 'other.png'}, {images / 'stray.png'}",
    ]
    for lost in ("a/1.png", "b/1.png"):
        (images / lost).unlink()
    with pytest.raises(UserError, match=rf"of no use: files {UNREADABLE} \(1\), files {UNLABELLED} \(2\)$"):
        open_source(str(images), 16, 0)
    with pytest.raises(UserError, match=r"of no use: no \.png, .* file there$"):
        open_source(str(images / "b"), 16, 0)


def test_an_epoch_visits_every_image_once(tmp_path: Path) -> None:
    from PIL import Image

    from fewstep.data.source import FolderSource

    for i in range(7):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    source = FolderSource(tmp_path, 8, seed=3)
    first, second = (source.images(torch.arange(7) + 7 * epoch)[:, 0, 0, 0] for epoch in range(2))
    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)


def folder_of_images(root: Path, *names: str) -> Path:
    from PIL import Image

    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (len(name) * 9 % 256, 90, 30)).save(root / name)
    return root


@pytest.mark.parametrize("objective", ["dmd2", "diffusion"])
def test_a_network_without_labels_is_told_none(objective: str, tiny_sizes: dict, tmp_path: Path) -> None:
    """An unconditional network on data with labels takes its steps."""
    net = diffusers.UNet2DModel(**{**tiny_sizes, "num_class_embeds": None})
    diffusers.ConsistencyModelPipeline(unet=net, scheduler=schedulers.flow_scheduler()).save_pretrained(tmp_path)
    given = [f"model.teacher={tmp_path}", f"objective.name={objective}", "batch=2", "model.steps=1"]
    file = tmp_path / "one.yaml"
    players = "generator: {lr: 1.0e-4}" + (", fake_score: {lr: 1.0e-4}" if objective == "dmd2" else "")
    file.write_text(f"name: one\nobjective: {{name: {objective}}}\nplayers: {{{players}}}\n")
    run = build.build(config.load(file, given)[0])
    assert run.conditions.of(torch.arange(3)).inputs == {}
    train_step(run.objective, build.batches(run)(0), 0, run.players)


def test_a_network_that_wants_labels_needs_them(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path, "a.png", "b.png")
    given = [f"model.teacher={tiny_teacher}", f"data.source={folder}"]
    with pytest.raises(UserError, match="put the images in sub-folders"):
        build.build(config.load("configs/scenes/dmd2.yaml", given)[0])


def test_dropping_labels_needs_a_class_for_none(tiny_sizes: dict, tmp_path: Path) -> None:
    net = diffusers.UNet2DModel(**{**tiny_sizes, "num_class_embeds": 12})
    diffusers.ConsistencyModelPipeline(unet=net, scheduler=schedulers.flow_scheduler()).save_pretrained(tmp_path / "t")
    (tmp_path / "one.yaml").write_text("name: one\nobjective: {name: diffusion}\nplayers: {generator: {lr: 1.0e-4}}\n")
    with pytest.raises(UserError, match=r"label_dropout=0"):
        build.build(config.load(tmp_path / "one.yaml", [f"model.teacher={tmp_path / 't'}"])[0])


def test_a_folder_of_images_is_measured_once_each(tmp_path: Path) -> None:
    source = open_source(str(folder_of_images(tmp_path, *(f"x/{i}.png" for i in range(30)))), 16, 0)
    truth = measure.truth_of(source)
    assert truth.features.shape[0] == 30 and truth.protocol == "30 images of the training set"
