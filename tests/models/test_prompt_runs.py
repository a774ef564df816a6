"""Networks that read prompts, from a config to plain diffusers: trained, sampled, exported as their own pipeline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fewstep import build, cli, config, export, measure
from fewstep.core.errors import UserError
from fewstep.data.captioned import attributes_of
from fewstep.data.source import CaptionedSource
from fewstep.models import tiny
from fewstep.models.codecs import codec_of
from fewstep.models.tiny import parts
from fewstep.rollout import Rollout

CONFIG = """
name: prompted
steps: 2
batch: 2
model: {steps: 2, guidance: 3.0}
objective: {name: dmd2, ratio: 1, gan_weight: 0.0}
players: {generator: {lr: 1.0e-3}, fake_score: {lr: 1.0e-3}}
data: {resolution: 16}
evals: {every: 2, samples: 0}
save: {every: 2}
"""
SIZES = {"sd15": [], "sd21": [], "sdxl": [], "sd3": [], "wan": ["data.frames=5"]}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a disc\n\n two rings\na red one\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "one.yaml").write_text(CONFIG)
    return tmp_path / "one.yaml"


def teacher(family: str, where: Path) -> Path:
    tiny.make(family).save_pretrained(where / family)
    return where / family


def play(file: Path, out: Path, *overrides: str) -> Path:
    assert cli.main(["train", str(file), *overrides, f"--out={out}"]) == 0
    return next(out.iterdir())


@pytest.mark.parametrize("family", SIZES)
def test_a_run_ends_in_the_familys_own_pipeline(family: str, file: Path, prompts: Path, tmp_path: Path) -> None:
    """Latents of the exported folder, asked by plain diffusers, equal our sampler's to 1e-4 of the largest."""
    overrides = [f"model.teacher={teacher(family, tmp_path)}", f"data.source={prompts}", *SIZES[family]]
    folder = play(file, tmp_path / "runs", *overrides)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "export")
    pipeline.set_progress_bar_config(disable=True)
    run = export.load_run(folder)
    size = {"height": 16, "width": 16, **({"num_frames": 5} if family == "wan" else {})}
    noise = torch.Generator().manual_seed(3)
    theirs = pipeline(
        "a disc",
        **size,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=noise,
        output_type="latent",
        return_dict=False,
    )[0]
    start = torch.randn(1, *run.shape, generator=torch.Generator().manual_seed(3))
    told = codec_of(pipeline).encode_prompts(["a disc"], size=(16, 16))
    net, rollout = measure.student(run)
    with torch.no_grad():
        ours = rollout(net, start, told, None).x0  # type: ignore[arg-type]
    assert isinstance(rollout, Rollout) and (theirs - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)


def test_prompts_are_sampled_from_the_run_and_from_its_export(file: Path, prompts: Path, tmp_path: Path) -> None:
    folder = play(file, tmp_path / "runs", f"model.teacher={teacher('sd15', tmp_path)}", f"data.source={prompts}")
    pictures = []
    for where in (folder, folder / "export"):
        out = tmp_path / "x.png"
        given = ["sample", str(where), "--prompt", "a disc", "--prompt", "two rings", "--count", "4", f"--out={out}"]
        assert cli.main([*given, "--steps", "2"]) == 0
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give --prompt"),
        (["--labels", "red disc"], "reads prompts"),
        (["--prompt", "a very long sentence about a disc " * 3], "tokens, but this model reads"),
        (["--prompts-file", "/nowhere.txt"], "cannot be read"),
    ],
)
def test_what_a_prompted_model_cannot_be_asked(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = teacher("sd15", tmp_path)
    assert cli.main(["sample", str(folder), *more, f"--out={tmp_path / 'x.png'}"]) == 2
    assert said in capsys.readouterr().err


def test_gan_and_lora_on_captioned_images(file: Path, tmp_path: Path) -> None:
    """Images with text files beside them; the roles are adapters, and the discriminator reads latents' features."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 16), (60 * i, 90, 30)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"disc {i}")
    given = [f"model.teacher={teacher('sd15', tmp_path)}", f"data.source={images}", "objective.gan_weight=0.01"]
    lora = [f"players.{role}.lora.rank=2" for role in ("generator", "fake_score")]
    folder = play(file, tmp_path / "runs", *given, *lora)
    run = build.build(config.load(file, given)[0])
    assert run.source.captions(torch.arange(4)) != [""] * 4
    x0 = run.encode(run.source.images(torch.arange(2)))
    assert x0.shape == (2, *run.shape) == (2, 4, 8, 8) and run.decode(x0).shape == (2, 3, 16, 16)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "export" / "unet")
    assert not any("lora" in name for name in unet.state_dict())


def test_prompts_alone_are_no_images(file: Path, prompts: Path, tmp_path: Path) -> None:
    given = [f"model.teacher={teacher('sd15', tmp_path)}", f"data.source={prompts}", "objective.gan_weight=0.01"]
    with pytest.raises(UserError, match=r"dmd2 learns from images, but data\.source=.*prompts\.txt has none"):
        build.build(config.load(file, given)[0])


def test_each_prompt_is_encoded_once_and_each_epoch_has_all(file: Path, prompts: Path, tmp_path: Path) -> None:
    given = [f"model.teacher={teacher('sd15', tmp_path)}", f"data.source={prompts}"]
    run = build.build(config.load(file, given)[0])
    seen = run.source.captions(torch.arange(9))
    assert all(sorted(seen[i : i + 3]) == ["a disc", "a red one", "two rings"] for i in (0, 3, 6))
    asked: list[str] = []
    codec = run.teacher.codec
    assert codec is not None
    encode = codec.encode_prompts
    codec.encode_prompts = lambda new, **more: asked.extend(new) or encode(new, **more)  # type: ignore[method-assign]
    first, again = (run.conditions.of(torch.arange(9)).inputs for _ in range(2))
    assert len(asked) <= 3 and all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["encoder_hidden_states"][0], encode([seen[0]]).inputs["encoder_hidden_states"][0])


def test_a_denoiser_without_its_pipeline_is_refused(file: Path, tmp_path: Path) -> None:
    folder = teacher("sd15", tmp_path) / "unet"
    given = [f"model.teacher={folder}", "model.process.name=vp", "model.prediction=epsilon"]
    with pytest.raises(UserError, match="pipeline"):
        build.build(config.load(file, given)[0])


@pytest.mark.parametrize("family", SIZES)
def test_half_precision_is_half_the_size_and_opens_unasked(
    family: str, file: Path, prompts: Path, tmp_path: Path
) -> None:
    """Every part is stored in halves, and a plain `from_pretrained` draws from them in float32."""
    overrides = [f"model.teacher={teacher(family, tmp_path)}", f"data.source={prompts}", *SIZES[family]]
    folder = play(file, tmp_path / "runs", *overrides, "save.export=false")
    halves = export.export(export.load_run(folder), tmp_path / "halves", torch.float16)
    for stored in halves.glob("*/*.safetensors"):
        kinds = {tensor.dtype for tensor in load_file(stored).values() if tensor.is_floating_point()}
        assert kinds == {torch.float16}, stored.parent.name
    pipeline = diffusers.DiffusionPipeline.from_pretrained(halves)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, **({"num_frames": 5} if family == "wan" else {})}
    made = pipeline(
        "a disc", **size, num_inference_steps=2, guidance_scale=1.0, output_type="latent", return_dict=False
    )
    assert made[0].dtype == torch.float32 and made[0].isfinite().all()


def test_a_perfect_painter_is_as_diverse_as_truth_and_a_copier_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same-prompt diversity where true scenes stand in for what is generated, and where each prompt has one image."""
    source = CaptionedSource(64, 5)
    conditions = SimpleNamespace(names=source.held_out().captions)
    run = SimpleNamespace(conditions=conditions, shape=(), decode=None, at_once=1, device=None)
    prompts = torch.arange(measure.PROMPTS).repeat_interleave(measure.EACH)
    said = torch.tensor([attributes_of(caption) for caption in conditions.names(prompts)])
    ids = torch.arange(len(prompts))
    true = source.scenes.of_attributes(ids, source.scenes.given(ids, said))
    for images, diversity in ((true, 1), (true[prompts * measure.EACH], 0)):
        monkeypatch.setattr(measure, "generate", lambda *args, images=images, **kwargs: images)
        found = measure.prompt_diversity(run, None, None, source)  # type: ignore[arg-type]
        assert found == pytest.approx(diversity, abs=0.05)


def test_without_its_third_encoder_stable_diffusion_3_is_exported_too(
    file: Path, prompts: Path, tmp_path: Path
) -> None:
    """diffusers then has to be told that it is left out, as the card says."""
    tiny.make("sd3", long_prompts=False).save_pretrained(tmp_path / "sd3")
    folder = play(file, tmp_path / "runs", f"model.teacher={tmp_path / 'sd3'}", f"data.source={prompts}") / "export"
    said = 'from_pretrained(".", text_encoder_3=None, tokenizer_3=None)'
    assert said in (folder / "README.md").read_text()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    assert pipeline.text_encoder_3 is None and pipeline.text_encoder is not None


def test_a_prompt_that_is_too_long_is_found_before_training(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it is the last of a hundred, and the first batch has two."""
    (tmp_path / "prompts.txt").write_text("a disc\n" * 99 + "a disc and " * 40)
    given = [f"model.teacher={teacher('sd15', tmp_path)}", f"data.source={tmp_path / 'prompts.txt'}"]
    assert cli.main(["train", str(file), *given, f"--out={tmp_path / 'runs'}"]) == 2
    assert "tokens, but this model reads" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/log.jsonl"))


def test_a_student_of_few_tokens_says_so_in_its_export(file: Path, prompts: Path, tmp_path: Path) -> None:
    """The exported folder is sampled with the tokens of the training, and its page tells plain diffusers of them."""
    where = [f"model.teacher={teacher('sd3', tmp_path)}", f"data.source={prompts}"]
    folder = play(file, tmp_path / "runs", *where, "model.max_sequence_length=20")
    page = (folder / "export" / "README.md").read_text()
    assert "    max_sequence_length=20," in page
    pictures = []
    for place in (folder, folder / "export"):
        out = tmp_path / "x.png"
        assert (
            cli.main(["sample", str(place), "--prompt", "a disc", "--count", "2", "--steps", "2", f"--out={out}"]) == 0
        )
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1
    shorter = page.replace("max_sequence_length: 20", "max_sequence_length: 9")
    (folder / "export" / "README.md").write_text(shorter)
    assert cli.main(["sample", str(folder / "export"), "--prompt", "a long disc", f"--out={tmp_path / 'y.png'}"]) == 2


UNMATCHED = {
    "channels": ({"vae": lambda: parts.image_vae(scaling_factor=2.6, latent_channels=8)}, "latents of 8 channels"),
    "texts": ({"text_encoder": lambda: parts.clip(12)}, "give 12 features a token"),
    "no scale": ({"vae": lambda: parts.image_vae(scaling_factor=None)}, "does not say its scale"),
    "scale": ({"vae": lambda: parts.image_vae(scaling_factor=0.05)}, "have a deviation of 0.0"),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_parts_of_different_models_end_with_one_sentence(
    case: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, said = UNMATCHED[case]
    pipeline = tiny.make("sd15")
    pipeline.register_modules(**{name: make() for name, make in parts.items()})
    pipeline.save_pretrained(tmp_path / "mixed")
    given = [f"model.teacher={tmp_path / 'mixed'}", "data.source=captioned", "objective.gan_weight=0.1"]
    assert cli.main(["train", str(file), *given, f"--out={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
