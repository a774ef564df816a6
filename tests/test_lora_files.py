"""LoRA as files: a teacher that wears one, and a student that leaves one, beside plain diffusers."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep import adapter, build, card, cli, config, export, runner
from fewstep.core.errors import UserError
from fewstep.models.loading import part_of
from fewstep.train import checkpoint
from fewstep.train.loop import train_step
from tests.families import denoiser, their_walk, tiny, walk

SCALE = 0.7
CONFIG = """
name: lora
steps: 2
batch: 2
model: {steps: 2}
objective: {name: dmd2, ratio: 1, gan_weight: 0.0}
players:
  generator: {lr: 2.0e-2, ema: 0.5, lora: {rank: 3, alpha: 6.0}}
  fake_score: {lr: 1.0e-3}
data: {resolution: 16}
evals: {every: 0, samples: 0}
save: {every: 1}
"""
FRAMES = {"wan": ["data.frames=5"]}
Given = Callable[..., list[str]]


def encoders(pipeline: Any) -> list[str]:
    """The text encoders that the pipeline's own loader has a LoRA for."""
    return [name for name in ("text_encoder", "text_encoder_2") if name in pipeline._lora_loadable_modules]


def user_lora(family: str, folder: Path, text: bool = True, **changes: Any) -> Path:
    """A random LoRA on denoiser and text encoders, its alpha not its rank, as diffusers writes it."""
    pipeline, given = tiny.make(family), {}
    torch.manual_seed(5)
    for part in [part_of(pipeline), *(encoders(pipeline) if text else [])]:
        targets = ["q_proj", "v_proj"] if part in encoders(pipeline) else ["to_q", "to_out.0"]
        spec = LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False, **changes)
        net = getattr(pipeline, part)
        net.add_adapter(spec)
        given[f"{part}_lora_layers"] = get_peft_model_state_dict(net, adapter_name="default")
        given[f"{part}_lora_adapter_metadata"] = spec.to_dict()
    pipeline.save_lora_weights(folder, **given)
    return folder


def kohya_lora(file: Path) -> Path:
    """A LoRA on the attention of Stable Diffusion's UNet in the format of kohya's scripts."""
    torch.manual_seed(6)
    state = {}
    for name, layer in tiny.make("sd15").unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            key = "lora_unet_" + name.replace(".", "_")
            state[f"{key}.lora_down.weight"] = torch.randn(4, layer.in_features)
            state[f"{key}.lora_up.weight"] = 0.2 * torch.randn(layer.out_features, 4)
            state[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """family -> the folder of its pipeline and that of a user's LoRA."""
    root, known = tmp_path_factory.mktemp("families"), set()

    def of(family: str) -> tuple[Path, Path]:
        if family not in known:
            known.add(family)
            tiny.make(family).save_pretrained(root / family)
            user_lora(family, root / f"{family}_lora")
        return root / family, root / f"{family}_lora"

    return of


@pytest.fixture
def given(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Given:
    """The arguments of a run of a family."""
    (tmp_path / "prompts.txt").write_text("a disc\ntwo rings\n")
    (tmp_path / "one.yaml").write_text(CONFIG)

    def of(family: str, *more: str) -> list[str]:
        where = [f"model.teacher={made(family)[0]}", f"data.source={tmp_path / 'prompts.txt'}"]
        return [str(tmp_path / "one.yaml"), *where, *FRAMES.get(family, []), *more]

    return of


def wearing(made: Callable[[str], tuple[Path, Path]], family: str) -> list[str]:
    return [f"model.lora={made(family)[1]}", f"model.lora_scale={SCALE}"]


def trained(arguments: list[str]) -> build.Run:
    """A run after two steps."""
    file, *overrides = arguments
    run = build.build(config.load(file, overrides)[0])
    batches = build.batches(run)
    for step in range(2):
        train_step(run.objective, batches(step), step, run.players)
    return run


def opened(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any) -> Tensor:
    """The latents of two steps without guidance."""
    return their_walk(pipeline, 2, None, guidance=1.0)[-1]


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "wan", "kohya"])
def test_a_teacher_wears_what_diffusers_shows(family: str, made: Any, given: Given, tmp_path: Path) -> None:
    """A guided step, of which the prompts are encoded by the encoders that the LoRA changed."""
    base, lora = made("sd15" if family == "kohya" else family)
    if family == "kohya":
        family, lora = "sd15", kohya_lora(tmp_path / "kohya.safetensors")
    file, *overrides = given(family, f"model.lora={lora}", f"model.lora_scale={SCALE}", "model.guidance=5")
    pipeline = opened(base)
    bare = their_walk(pipeline, 1, None)[0]
    pipeline.load_lora_weights(lora, adapter_name="user")
    pipeline.set_adapters("user", SCALE)
    theirs = their_walk(pipeline, 1, None)[0]
    teacher = build.build_teacher(config.load(file, overrides)[0], 0)
    assert teacher.codec is not None
    ours = walk(teacher.backbone(), teacher.codec, teacher.scheduler, 1)[0]
    assert apart(ours, theirs) < 1e-5 and apart(bare, theirs) > 1e-2
    assert teacher.net.state_dict().keys() == denoiser(opened(base)).state_dict().keys()


def as_bin(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    torch.save(state, folder / "pytorch_lora_weights.bin")
    return folder


MISTAKES = {
    "absent": "there is no LoRA at",
    "pickle": "is no .safetensors file",
    "folder of a pickle": "has no .safetensors file",
    "broken": "cannot be put on this StableDiffusionPipeline",
    "sdxl": "cannot be put on this StableDiffusionPipeline",
    "sd3": "(it is for text_encoder, text_encoder_2, transformer and fits text_encoder)",
    "wan": "cannot be put on this StableDiffusion3Pipeline",
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_lora_that_cannot_be_worn_is_one_sentence(what: str, made: Any, given: Given, tmp_path: Path) -> None:
    where = {
        "absent": lambda: tmp_path / "nowhere.safetensors",
        "pickle": lambda: as_bin(tmp_path / "a", {"unet.lora_A.weight": torch.ones(1)}) / "pytorch_lora_weights.bin",
        "folder of a pickle": lambda: as_bin(tmp_path / "b", {"unet.lora_A.weight": torch.ones(1)}),
        "broken": lambda: (
            as_bin(tmp_path / "c", {}).joinpath("pytorch_lora_weights.bin").rename(tmp_path / "x.safetensors")
        ),
    }
    lora = where[what]() if what in where else made(what)[1]
    file, *overrides = given("sd3" if what == "wan" else "sd15", f"model.lora={lora}")
    with pytest.raises(UserError) as error:
        build.build(config.load(file, overrides)[0])
    assert MISTAKES[what] in str(error.value) and "\n" not in str(error.value)


def test_a_network_without_prompts_wears_none(tiny_teacher: Path, given: Given, made: Any, tmp_path: Path) -> None:
    lora = f"model.lora={made('sd15')[1]}"
    with pytest.raises(UserError, match=r"model\.lora goes onto the pipeline of a network that reads prompts"):
        build.build(config.load("configs/scenes/dmd2_lora.yaml", [f"model.teacher={tiny_teacher}", lora])[0])
    with pytest.raises(UserError, match=r"model\.lora_scale is the strength of model\.lora"):
        config.load("configs/scenes/dmd2_lora.yaml", ["model.lora_scale=0.5"])


def test_a_dry_run_looks_for_the_lora(made: Any, given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *given("sd15", *wearing(made, "sd15")), "--dry-run"]) == 0
    assert cli.main(["train", *given("sd15", "model.lora=not/here.safetensors"), "--dry-run"]) == 2
    assert "there is no LoRA at not/here.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "wan"])
@pytest.mark.parametrize("worn", [False, True])
def test_the_file_on_the_base_is_the_fused_export(
    worn: bool, family: str, made: Any, given: Given, tmp_path: Path
) -> None:
    """Of the average, with the exported scheduler; under a teacher's LoRA both files do, each on its own base."""
    base, user = made(family)
    folder = export.export(trained(given(family, *(wearing(made, family) if worn else []))), tmp_path / "export")
    fused = drawn(opened(folder))
    pipeline = opened(base)
    pipeline.scheduler = opened(folder).scheduler
    assert apart(drawn(pipeline), fused) > 1e-2
    pipeline.load_lora_weights(folder)
    assert apart(drawn(pipeline), fused) < 1e-4
    assert (folder / adapter.ALONE).exists() == worn
    if worn:
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(user, adapter_name="user")
        pipeline.load_lora_weights(folder, weight_name=adapter.ALONE, adapter_name="distillation")
        pipeline.set_adapters(["user", "distillation"], [SCALE, 1.0])
        assert apart(drawn(pipeline), fused) < 1e-4


def run_card(folder: Path, base: Path, user: Path) -> Any:
    """The pipeline that the card's LoRA code makes, with the places that only its reader knows."""
    code = (folder / "README.md").read_text().split("## As a LoRA")[1].split("```python\n")[1].split("```")[0]
    for name, place in ((f'"{base.name}"', base), (f'"{user.name}"', user), ('"."', folder)):
        code = code.replace(name, f'"{place}"')
    scope: dict[str, Any] = {}
    exec(code, scope)
    scope["pipeline"].set_progress_bar_config(disable=True)
    return scope["pipeline"]


def test_the_code_of_the_card_makes_the_fused_export(made: Any, given: Given, tmp_path: Path) -> None:
    base, user = made("sd15")
    folder = export.export(trained(given("sd15", *wearing(made, "sd15"))), tmp_path / "export")
    said = (folder / "README.md").read_text()
    assert f"`{base.name}` with the LoRA `{user.name}` at a scale of {SCALE}" in said and str(user) not in said
    assert apart(drawn(run_card(folder, base, user)), drawn(opened(folder))) < 1e-4


def test_a_prompt_in_the_card_stays_a_prompt(given: Given, tmp_path: Path) -> None:
    """The card's first prompt is one that a file brought, in code that its reader is told to run."""
    prompt = 'a disc"); raise SystemExit("run"); print("\\'
    arguments = given("sd15")
    (tmp_path / "prompts.txt").write_text(f"{prompt}\n")
    run = build.build(config.load(arguments[0], arguments[1:])[0])
    code = card.card(run, torch.float32).split("```python\n")[1].split("```")[0]
    *_, call = ast.parse(code).body
    assert isinstance(call, ast.Assign) and isinstance(call.value, ast.Call) and len(ast.parse(code).body) == 4
    assert ast.literal_eval(call.value.args[0]) == prompt


def test_a_worn_lora_that_is_more_than_products_stays_a_file_of_its_own(
    made: Any, given: Given, tmp_path: Path
) -> None:
    base, user = made("sd15")[0], user_lora("sd15", tmp_path / "dora", text=False, use_dora=True)
    folder = export.export(trained(given("sd15", f"model.lora={user}")), tmp_path / "export")
    assert (folder / adapter.ALONE).is_file() and not (folder / adapter.BOTH).exists()
    assert "One file of both cannot be made" in (folder / "README.md").read_text()
    assert apart(drawn(run_card(folder, base, user)), drawn(opened(folder))) < 1e-4


def test_a_pixel_network_has_no_file_and_says_so(tiny_teacher: Path, tmp_path: Path) -> None:
    small = ["batch=4", "players.generator.lora.rank=2", f"model.teacher={tiny_teacher}"]
    folder = export.export(trained(["configs/scenes/dmd2_lora.yaml", *small]), tmp_path / "export")
    assert not list(folder.glob("*.safetensors"))
    assert "diffusers loads none into a UNet2DModel" in (folder / "README.md").read_text()


def test_a_run_under_a_lora_resumes_samples_and_exports(made: Any, given: Given, tmp_path: Path) -> None:
    file, *overrides = given("sd15", *wearing(made, "sd15"))
    run, none = tmp_path / "run", lambda run, folder: None
    runner.play(config.load(file, overrides), run, None, none)
    assert json.loads((run / "origin.json").read_text())["teacher"]["lora"] == str(made("sd15")[1])
    final = run / "checkpoints" / "0000002" / checkpoint.STATE
    before, first = checkpoint.sha256(final), run / "checkpoints" / "0000001"
    runner.play(config.load(file, overrides), run, first, none)
    assert checkpoint.sha256(final) == before
    assert cli.main(["sample", str(run), "--prompt", "a disc", "--count", "1", f"--out={tmp_path / 'x.png'}"]) == 0
    halves = export.export(export.load_run(run), tmp_path / "halves", torch.float16)
    stored = load_file(halves / adapter.BOTH)
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert {name.split(".")[0] for name in stored} == {"unet", "text_encoder"}


def test_pairs_are_made_again_under_another_lora(made: Any, given: Given) -> None:
    """Its text encoders too decide what the pairs are."""
    recipes = []
    for more in ([], wearing(made, "sd15"), [*wearing(made, "sd15"), "model.lora_scale=0.2"]):
        file, *overrides = given("sd15", *more)
        recipes.append(build.pairs_recipe(build.build(config.load(file, overrides)[0])))
    assert len(set(recipes)) == 3 and "encoders" in recipes[1]
