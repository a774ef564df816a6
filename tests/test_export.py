"""Exported folders, opened and sampled where fewstep cannot be imported, against our own rollout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from fewstep import build, cli, config
from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.times import Step
from fewstep.export import SameNoise, export, load_run
from fewstep.models import loading
from fewstep.models.backbone import Routed
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.rollout import Rollout
from fewstep.train import checkpoint

LABELS, SEED = [3, 0, 7], 11

NETWORK = """
    class: UNet2DModel
    sample_size: 16
    in_channels: 3
    out_channels: 3
    block_out_channels: [8, 8]
    layers_per_block: 1
    down_block_types: [DownBlock2D, DownBlock2D]
    up_block_types: [UpBlock2D, UpBlock2D]
    attention_head_dim: 8
    norm_num_groups: 4
    num_class_embeds: 13
"""

CONFIG = f"""
name: tiny
steps: 2
batch: 4
device: cpu
model:
  network: {NETWORK.replace(chr(10), chr(10) + "  ")}
  process: {{name: flow}}
  prediction: flow_prediction
objective: {{name: diffusion}}
players: {{generator: {{lr: 1.0e-3, ema: 0.9}}}}
"""

STUDENT = """
name: student
steps: 2
batch: 4
device: cpu
model: {{teacher: {teacher}, steps: 2}}
data: {{resolution: 16}}
objective: {{name: tdm, counts: [1, 2]}}
players: {{generator: {{lr: 1.0e-4}}, fake_score: {{lr: 1.0e-4}}}}
"""

FLOW = ("model.process.name=flow", "model.prediction=flow_prediction")
V0 = ("model.process.name=vp", "model.process.zero_terminal_snr=true", "model.prediction=v_prediction")


def vp(kind: str) -> tuple[str, ...]:
    return ("model.process.name=vp", f"model.prediction={kind}")


# name -> overrides; the number of steps is the last part of the name
CASES: dict[str, tuple[str, ...]] = {
    f"{process}-{route}-{steps}": (*keys, f"model.transition={route}", f"model.steps={steps}")
    for process, keys, route, counts in [
        ("epsilon", vp("epsilon"), "renoise", (1, 2, 4, 8)),
        ("epsilon", vp("epsilon"), "ode", (1, 4)),
        ("v", vp("v_prediction"), "renoise", (1, 4)),
        ("v", vp("v_prediction"), "ode", (4,)),
        ("v_zero_snr", V0, "renoise", (1, 4)),
        ("v_zero_snr", V0, "ode", (4,)),
        ("x0", vp("sample"), "renoise", (4,)),
        ("flow", FLOW, "ode", (1, 2, 4, 8)),
        ("flow", FLOW, "renoise", (1,)),
        ("flow_shifted", (*FLOW, "model.shift=3"), "ode", (1, 4)),
        # Those with the scheduler that the folder carries.
        ("epsilon", vp("epsilon"), "gamma", (4,)),
        ("epsilon", vp("epsilon"), "cps", (2,)),
        ("v_zero_snr", V0, "gamma", (4,)),
        ("x0", vp("sample"), "reuse", (4,)),
        ("flow", FLOW, "renoise", (2, 4)),
        ("flow", FLOW, "cps", (4,)),
        ("flow", FLOW, "gamma", (4,)),
        ("flow_shifted", (*FLOW, "model.shift=3"), "reuse", (4,)),
    ]
    for steps in counts
}
# Teachers: many steps, saved as an ordinary folder.
CASES |= {
    "flow_teacher-ode-50": (*FLOW, "model.transition=ode", "model.steps=50"),
    "epsilon_teacher-ode-50": (*vp("epsilon"), "model.transition=ode", "model.steps=50"),
}

# What lies between diffusers' walk and ours, relative to the largest value of the unclamped sample: float32
# rounding alone. Measured 1e-7 to 2e-6, and up to 5e-6 in images, the many-step teachers included.
TOLERANCE = 1e-5


def tiny(place: Path, *overrides: str) -> build.Run:
    """A run of a random tiny network, its average set apart from its weights."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(CONFIG)
    (one,) = config.load(place / "config.yaml", overrides)
    run = build.build(one)
    with torch.no_grad():
        for weight in run.evaluated().parameters():
            weight.mul_(1.02)
    return run


def saved(place: Path, *overrides: str) -> build.Run:
    """The same in a run folder with checkpoints of steps 1 and 2, the latter the run's."""
    run = tiny(place, *overrides)
    (place / "config.yaml").write_text(config.to_yaml(run.config))
    before = {name: value.clone() for name, value in run.triad.generator.state_dict().items()}
    run.triad.generator.load_state_dict({name: torch.zeros_like(value) for name, value in before.items()})
    checkpoint.save(place / "checkpoints", 1, run.players, run.objective)
    run.triad.generator.load_state_dict(before)
    run.players["generator"].moves = 2
    checkpoint.save(place / "checkpoints", 2, run.players, run.objective)
    return run


# Also runs the code of every model card.
STRANGER = """
import json, os, re, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "fewstep" or name.startswith("fewstep."):
            raise ImportError("fewstep is not here")

sys.meta_path.insert(0, Absent())
import torch
import diffusers
from safetensors.torch import save_file
diffusers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
root, labels, seed = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
for folder in sorted(p for p in root.iterdir() if (p / "model_index.json").exists()):
    carried = (folder / "scheduler" / "few_step_scheduler.py").exists()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=carried)
    pipeline.set_progress_bar_config(disable=True)
    states = []
    images = pipeline(
        batch_size=len(labels), class_labels=labels, num_inference_steps=int(folder.name.rsplit("-")[-1]),
        generator=torch.Generator().manual_seed(seed), output_type="pt",
        callback=lambda i, t, x: states.append(x),
    ).images
    save_file({"images": images, "sample": states[-1]}, root / f"{folder.name}.safetensors")
    code = re.search(r"```python\\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    os.chdir(folder)
    shown = {}
    exec(code, shown)
    assert len(shown["images"]) == 4 and shown["images"][0].size == (16, 16)
try:
    import fewstep
except ImportError:
    pass
else:
    raise SystemExit("fewstep could be imported")
"""


@dataclass
class Exported:
    root: Path
    runs: dict[str, build.Run]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every case exported, then all of them sampled in one process without fewstep."""
    root, work = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("work")
    runs = {name: tiny(work, *overrides) for name, overrides in CASES.items()}
    for name, run in runs.items():
        export(run, root / name)
    command = [sys.executable, "-I", "-c", STRANGER, str(root), json.dumps(LABELS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=_offline(), check=False)
    assert done.returncode == 0, done.stderr
    return Exported(root, runs)


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@torch.no_grad()
def rolled_out(run: build.Run, net: DiffusersBackbone | None = None) -> torch.Tensor:
    noise = SameNoise(SEED, len(LABELS))
    cond = Condition({"class_labels": torch.tensor(LABELS)})
    return run.rollout(net or run.evaluated(), noise.normal("first", run.shape), cond, noise).x0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_plain_diffusers_makes_the_same_images(exported: Exported, name: str) -> None:
    theirs, ours = load_file(exported.root / f"{name}.safetensors"), rolled_out(exported.runs[name])
    assert theirs["sample"].std() > 0.05
    apart = (theirs["sample"] - ours).abs().max() / ours.abs().max()
    assert apart < TOLERANCE
    images = (ours / 2 + 0.5).clamp(0, 1)
    assert (theirs["images"] - images).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["flow_teacher-ode-50", "epsilon_teacher-ode-50", "v-renoise-4"])
def test_loaded_again_it_gives_the_same_outputs(exported: Exported, name: str) -> None:
    run = exported.runs[name]
    again = loading.load(str(exported.root / name))
    schedule, kind = build.schedulers.read(again.scheduler)
    assert kind == run.teacher.kind and type(schedule) is type(run.teacher.schedule)
    meant = run.evaluated().state_dict()
    assert all(torch.equal(value, meant[f"net.{name}"]) for name, value in again.net.state_dict().items())
    # The same weights elsewhere in memory: the convolutions round differently.
    ours, theirs = rolled_out(run), rolled_out(run, DiffusersBackbone(again.net.eval(), schedule, kind))
    assert (theirs - ours).abs().max() < TOLERANCE * ours.abs().max()


def test_a_student_starts_from_an_exported_teacher(exported: Exported, tmp_path: Path) -> None:
    (one,) = config.load(
        _write(
            tmp_path / "again.yaml", "name: again\nobjective: {name: diffusion}\nplayers: {generator: {lr: 1.0e-4}}"
        ),
        [f"model.teacher={exported.root / 'epsilon_teacher-ode-50'}", "model.steps=4", "model.transition=renoise"],
    )
    folder = export(build.build(one), tmp_path / "student")
    header = ModelCard.load(folder / "README.md").data
    assert header.base_model == "epsilon_teacher-ode-50" and header.license == "unknown"
    assert str(exported.root) not in (folder / "README.md").read_text()


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_half_precision_is_half_the_size_and_close(exported: Exported, tmp_path: Path) -> None:
    run, weights = exported.runs["flow-ode-4"], Path("unet/diffusion_pytorch_model.safetensors")
    folder = export(run, tmp_path / "half", torch.float16)
    assert all(w.dtype == torch.float16 for w in load_file(folder / weights).values())
    full = (exported.root / "flow-ode-4" / weights).stat().st_size
    assert (folder / weights).stat().st_size < 0.6 * full
    net = DiffusersBackbone(loading.load(str(folder)).net, run.teacher.schedule, run.teacher.kind)
    assert 0 < (rolled_out(run, net) - rolled_out(run)).abs().max() < 0.02
    huge = tiny(tmp_path, *CASES["flow-ode-4"])
    next(huge.evaluated().parameters()).data.fill_(1e6)
    with pytest.raises(UserError, match=r"not finite in torch\.float16"):
        export(huge, tmp_path / "huge", torch.float16)


def test_the_card_says_how(exported: Exported) -> None:
    folder = exported.root / "v-renoise-4"
    text = (folder / "README.md").read_text()
    header = ModelCard(text).data
    assert header.library_name == "diffusers" and "fewstep" in header.tags and header.num_inference_steps == 4
    assert header.id2label[3] == "red square" and header.null_label == 12
    for said in ("`renoise`", "num_inference_steps=4", "at random", "class 12"):
        assert said in text
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model_index.json", "scheduler", "unet"]


def test_a_licence_is_carried_over(exported: Exported, tmp_path: Path) -> None:
    teacher = shutil.copytree(exported.root / "flow_teacher-ode-50", tmp_path / "teacher")
    card = (teacher / "README.md").read_text()
    (teacher / "README.md").write_text(card.replace("license: unknown", "license: cc-by-4.0"))
    run = exported.runs["flow-ode-1"]
    run.config.model.teacher = str(teacher)
    try:
        assert ModelCard.load(export(run, tmp_path / "kept") / "README.md").data.license == "cc-by-4.0"
        assert ModelCard.load(export(run, tmp_path / "said", licence="mit") / "README.md").data.license == "mit"
    finally:
        run.config.model.teacher = None


def test_a_carried_scheduler_says_so(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its folder the card tells whom to trust; unasked diffusers does not run it, nor walk it in other steps."""
    folder = exported.root / "epsilon-gamma-4"
    code, card = folder / "scheduler" / "few_step_scheduler.py", (folder / "README.md").read_text()
    assert "fewstep" not in code.read_text() and len(code.read_text().splitlines()) < 80
    assert "no scheduler of its own for the transition `gamma`" in card and "trust_remote_code=True" in card
    assert "global generator" not in card
    assert "trust" not in (exported.root / "flow-ode-4" / "README.md").read_text()
    assert not (exported.root / "flow-ode-4" / "scheduler" / code.name).exists()
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"trained for 4 steps, but 2 was given: set num_inference_steps=4"):
        pipeline(num_inference_steps=2)
    assert cli.main(["sample", str(folder), f"--out={tmp_path / 'x.png'}"]) == 2
    assert "carries the scheduler of its own few steps: sample its run folder" in capsys.readouterr().err


def test_what_training_alone_tells_a_network_needs_no_input(tmp_path: Path) -> None:
    run = tiny(tmp_path, "objective={name: twinflow}", "players={generator: {lr: 1.0e-4}}")
    assert list(run.triad.generator.dials) == ["sign"]
    assert (export(run, tmp_path / "out") / "model_index.json").is_file()


def test_one_step_that_knows_its_end_is_a_plain_network(tmp_path: Path) -> None:
    """The second time's embedding is in the exported weights: diffusers makes what our rollout makes."""
    run = tiny(tmp_path, *FLOW, "objective={name: meanflow, mode: training}", "players={generator: {lr: 1.0e-4}}")
    generator = run.evaluated()
    assert isinstance(generator, DiffusersBackbone) and list(generator.dials) == ["second_time"]
    torch.nn.init.normal_(generator.dials["second_time"].layers[-1].weight, std=0.1)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(export(run, tmp_path / "out"))
    noise, cond = torch.randn(2, 3, 16, 16), Condition({"class_labels": torch.tensor([1, 4])})
    only, labels = run.rollout.steps[0], cond.inputs["class_labels"]
    with torch.no_grad():
        ours = run.rollout(generator, noise, cond, SameNoise(0, 2)).x0  # type: ignore[arg-type]
        theirs = noise - only.level * pipeline.unet(noise, torch.full((2,), 1000 * only.told), labels).sample
    assert (ours - theirs).abs().max() < TOLERANCE * ours.abs().max()


def test_a_student_of_several_numbers_of_steps_exports_the_one_of_the_run(tmp_path: Path) -> None:
    """What it is told at two steps is in the weights; another number of steps tells it something else."""
    teacher = export(tiny(tmp_path / "teacher", *CASES["flow_teacher-ode-50"]), tmp_path / "folder")
    (tmp_path / "student.yaml").write_text(STUDENT.format(teacher=teacher))
    (one,) = config.load(tmp_path / "student.yaml")
    run = build.build(one)
    generator = run.evaluated()
    assert isinstance(generator, DiffusersBackbone) and list(generator.dials) == ["steps"]
    torch.nn.init.normal_(generator.dials["steps"].layers[-1].weight, std=0.1)
    assert (export(run, tmp_path / "out") / "model_index.json").is_file()  # which compares it with the run's own walk
    noise, cond = torch.randn(2, 3, 16, 16), Condition({"class_labels": torch.tensor([1, 4])})
    with torch.no_grad():
        whole, short = (
            walk(generator, noise, cond, SameNoise(0, 2), exit=0).x0  # type: ignore[arg-type]
            for walk in (run.rollout, run.rollout.every(2))
        )
    assert (whole - short).abs().max() > 1e-3


def test_no_stock_route_for_a_network(tmp_path: Path, exported: Exported) -> None:
    run = tiny(tmp_path, *CASES["flow-ode-1"])
    plain = run.evaluated()
    assert isinstance(plain, DiffusersBackbone)
    run.players["generator"].followers.clear()
    generator = run.triad.generator
    generator.add_dial("guidance")
    with pytest.raises(UserError, match=r"told more than the time \(guidance\)"):
        export(run, tmp_path / "out")
    generator.dials.clear()
    run.rollout = Rollout([Step(1.0, 1.0), Step(0.5, 0.5)], run.rollout.step, two_times=True)
    with pytest.raises(UserError, match="told where each of its 2 steps ends"):
        export(run, tmp_path / "out")
    object.__setattr__(run.triad, "generator", Routed([generator, generator], [0.5]))
    with pytest.raises(UserError, match="2 experts"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


def test_no_stock_route_for_a_pixel_transformer(tmp_path: Path) -> None:
    network = (
        "model.network={class: DiTTransformer2DModel, sample_size: 16, in_channels: 3, num_layers: 1, "
        "num_attention_heads: 2, attention_head_dim: 8, num_embeds_ada_norm: 12, norm_num_groups: 4}"
    )
    text = re.sub(
        r"\n  network:.*?(?=\n  process)",
        "\n" + network.replace("model.", "  ").replace("=", ": ", 1),
        CONFIG,
        flags=re.S,
    )
    (one,) = config.load(_write(tmp_path / "dit.yaml", text))
    with pytest.raises(UserError, match="DiTTransformer2DModel on pixels"):
        export(build.build(one), tmp_path / "out")


def test_a_folder_is_whole_or_absent(tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = exported.runs["flow-ode-1"], tmp_path / "out"
    export(run, folder)
    (folder / "mine.txt").write_text("of the export that was there")
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.export.card", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            export(run, folder)
    assert (folder / "mine.txt").exists() and list(tmp_path.iterdir()) == [folder]
    export(run, folder)
    assert not (folder / "mine.txt").exists() and list(tmp_path.iterdir()) == [folder]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no earlier export"):
        export(run, tmp_path / "other")
    with pytest.raises(OSError, match="exists"):
        export(run, tmp_path / "other" / "thesis.txt" / "out")


def test_an_export_that_fails_between_two_names_leaves_the_earlier_one(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = exported.runs["flow-ode-1"], tmp_path / "out"
    export(run, folder)
    (folder / "mine.txt").write_text("of the export that was there")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="No space left"):
            export(run, folder)
    assert (folder / "mine.txt").exists() and list(tmp_path.iterdir()) == [folder]


def test_an_export_follows_no_link(tmp_path: Path, exported: Exported) -> None:
    """The export of a run folder that came from elsewhere may be a link to what must stay."""
    run, precious, link = exported.runs["flow-ode-1"], tmp_path / "precious", tmp_path / "export"
    export(run, precious)
    (precious / "mine.txt").write_text("mine")
    link.symlink_to(precious)
    with pytest.raises(UserError, match="export is a link, and an export replaces what is there"):
        export(run, link)
    link.unlink()
    (tmp_path / ".export.old").symlink_to(precious)
    (tmp_path / ".export.partial").symlink_to(precious)
    export(run, link)
    assert (precious / "mine.txt").exists() and set(tmp_path.iterdir()) == {precious, link} and not link.is_symlink()


def test_an_export_killed_between_two_names_is_put_right(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier export gets its name back, even where the next one fails; half of a new one goes."""
    run, folder = exported.runs["flow-ode-1"], tmp_path / "out"
    export(run, folder)
    (folder / "mine.txt").write_text("of the export that was there")
    folder.rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.export.card", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            export(run, folder)
    assert (folder / "mine.txt").exists() and list(tmp_path.iterdir()) == [folder]


def test_two_exports_into_one_place_take_turns(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder, inside, most = exported.runs["flow-ode-1"], tmp_path / "out", [0], [0]

    def card(*args: object) -> str:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.3)
        inside[0] -= 1
        return "---\n---\n"

    monkeypatch.setattr("fewstep.export.card", card)
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda _: export(run, folder), range(3)))
    assert made == [folder] * 3 and most == [1] and list(tmp_path.iterdir()) == [folder]


def test_a_scheduler_that_walks_otherwise_is_refused(tmp_path: Path) -> None:
    run = tiny(tmp_path, *CASES["epsilon-renoise-4"])
    run.scheduler.register_to_config(original_inference_steps=50)
    with pytest.raises(UserError, match="LCMScheduler does not walk these 4 steps"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_folder_becomes_a_run_again(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", *CASES["v-renoise-4"])
    again = load_run(tmp_path / "run")
    assert torch.equal(rolled_out(again), rolled_out(run))
    assert again.rollout.steps == run.rollout.steps and again.players["generator"].moves == 2
    generator, before = again.triad.generator.state_dict(), run.triad.generator.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in generator.items())
    earlier = load_run(tmp_path / "run", step=1)
    assert not any(value.any() for value in earlier.triad.generator.state_dict().values())
    assert torch.equal(rolled_out(earlier), rolled_out(run))
    assert export(again, tmp_path / "run" / "export").is_dir()


def test_the_last_stage_with_a_checkpoint_counts(tmp_path: Path) -> None:
    for stage, steps in ((1, 8), (2, 4), (10, 2)):
        saved(tmp_path / "run" / f"stage_{stage}", *FLOW, f"model.steps={steps}")
    assert len(load_run(tmp_path / "run").rollout) == 2
    shutil.rmtree(tmp_path / "run" / "stage_10" / "checkpoints")
    text = (tmp_path / "run" / "stage_2" / "config.yaml").read_text()
    (tmp_path / "run" / "stage_2" / "config.yaml").write_text(
        text.replace("start: {}", "start: {generator: previous.generator}")
    )
    assert len(load_run(tmp_path / "run").rollout) == 4


def test_run_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        load_run(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        load_run(tmp_path)
    _write(tmp_path / "config.yaml", CONFIG)
    with pytest.raises(UserError, match="has no checkpoint"):
        load_run(tmp_path)
    saved(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of step 3: it has 1, 2"):
        load_run(tmp_path, step=3)
    state = tmp_path / "checkpoints" / "0000002" / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    with pytest.raises(checkpoint.Damaged, match="not what was written"):
        load_run(tmp_path)
    _write(tmp_path / "config.yaml", CONFIG.replace("[8, 8]", "[16, 16]"))
    with pytest.raises(UserError, match="not those of this network"):
        load_run(tmp_path, step=1)
