"""The plan of a run against the live bytes of the run itself, part by part, and what it says to people."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fewstep import build, cli, config, plan
from fewstep.build import Run
from fewstep.config import Config
from fewstep.core.errors import UserError
from fewstep.memory import KINDS, Account, Part, account
from fewstep.models import tiny
from fewstep.models.passes import networks_of
from fewstep.plan import Setting

PROMPTED = """
name: prompted
batch: 4
device: cpu
model: {steps: 1, guidance: 3.0}
objective: {name: dmd2, ratio: 1, gan_weight: 0.0}
players: {generator: {lr: 1.0e-3, ema: 0.9}, fake_score: {lr: 1.0e-3}}
data: {resolution: 32}
"""
OVERRIDES = {"sdxl": [], "wan": ["data.frames=9"]}


@pytest.fixture(scope="module")
def configs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """A config a family: the scenes' own with a small teacher, and two that read prompts."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "prompts.txt").write_text("\n".join(f"{n} rings" for n in range(8)))
    (folder / "one.yaml").write_text(PROMPTED)
    small = ["device=cpu", "batch=16", "objective.ratio=1", f"model.teacher={tiny_teacher}"]
    found = {"unet": config.load("configs/scenes/dmd2.yaml", small)[0]}
    for family, more in OVERRIDES.items():
        tiny.make(family).save_pretrained(folder / family)
        overrides = [f"model.teacher={folder / family}", f"data.source={folder / 'prompts.txt'}", *more]
        found[family] = config.load(folder / "one.yaml", overrides)[0]
    return found


def measured(setting: Setting) -> Account:
    """Two real steps: the optimizer has its moments in the second."""
    return account(build.build(setting.config), range(2))


@pytest.fixture(scope="module")
def full(configs: dict[str, Config]) -> tuple[Setting, Account, Run, Account]:
    """The scenes' config as it is: its setting, its plan, the fake run that was played, and what was measured."""
    setting = Setting(configs["unet"])
    return setting, *plan.foresee(setting), measured(setting)


def check(planned: Account, real: Account) -> None:
    """Weights, gradients, moments and followers to the byte; the rest to 5 %, activations also to 1 % of the peak."""
    assert planned.parameters == real.parameters
    for role in real.parameters:
        for kind in ("weights", "gradients", "moments", "followers"):
            assert planned.of_kind(kind, role=role) == real.of_kind(kind, role=role), (role, kind)
    for turn in ("batch", "generator", "fake_score"):
        found, expected = (one.of_kind("activations", turn) for one in (planned, real))
        assert found == pytest.approx(expected, rel=0.05, abs=0.01 * real.peak)
    assert planned.peak == pytest.approx(real.peak, rel=0.05)
    assert planned.of_kind("activations", "generator") > 0.3 * real.of_kind("weights")


def test_the_plan_is_what_the_run_then_holds(full: tuple[Setting, Account, Run, Account]) -> None:
    _, planned, run, real = full
    assert all(isinstance(p, FakeTensor) for net in networks_of(*vars(run.triad).values()) for p in net.parameters())
    check(planned, real)


@pytest.mark.parametrize(
    "family, checkpointing", [("unet", True), ("sdxl", False), ("sdxl", True), ("wan", False), ("wan", True)]
)
def test_other_plans_are_too(family: str, checkpointing: bool, configs: dict[str, Config]) -> None:
    model = replace(configs[family].model, checkpointing=checkpointing)
    setting = Setting(replace(configs[family], model=model))
    check(plan.foresee(setting)[0], measured(setting))


def test_a_lora_critic_saves_what_the_plan_says(full: tuple[Setting, Account, Run, Account]) -> None:
    setting, planned, run, real = full
    found = {switch.said: switch for switch in plan.switches(setting, run)}
    assert list(found) == [
        "model.checkpointing=true",
        "micro_batches=2",
        "model.roles.real_score.precision=bf16",
        "players.fake_score.lora={}",
        "players.generator.lora={}",
    ]
    for said in ("players.fake_score.lora={}", "model.roles.real_score.precision=bf16"):
        changed = found[said].change(setting)
        saved = planned.peak - plan.foresee(changed)[0].peak
        assert saved == pytest.approx(real.peak - measured(changed).peak, rel=0.05) and saved > 0.004 * real.peak


def test_gpus_share_networks_and_batch(full: tuple[Setting, Account, Run, Account]) -> None:
    """Of two GPUs each holds half of the networks and of what belongs to them, the heads whole, half the batch."""
    setting, alone, run, _ = full
    shared, _ = plan.foresee(replace(setting, gpus=2))
    heads = sum(p.nbytes for p in run.objective.parameters() if p not in {*run.triad.fake_score.parameters()})
    for kind, whole in {"weights": heads, "moments": 2 * heads, "followers": 0}.items():
        assert shared.of_kind(kind) == pytest.approx((alone.of_kind(kind) + whole) / 2, rel=0.01)
    halved = shared.of_kind("activations", "generator") / alone.of_kind("activations", "generator")
    assert 0.45 < halved < 0.55 and 0 < shared.of_kind("gathered") < alone.of_kind("weights")


def test_gradients_of_micro_batches_wait_whole(full: tuple[Setting, Account, Run, Account]) -> None:
    """Processes add them up once a move, and until then each keeps those of whole networks."""
    setting, alone, _, _ = full
    config = replace(setting.config, micro_batches=2)
    shared, _ = plan.foresee(Setting(config, gpus=2))
    for role in ("generator", "fake_score"):
        assert shared.of_kind("gradients", role=role) == alone.of_kind("gradients", role=role) > 0
        assert shared.of_kind("moments", role=role) < 0.6 * alone.of_kind("moments", role=role)


def test_what_is_gathered_is_the_root_and_the_largest_block() -> None:
    from torch import nn

    class Net(nn.Module):
        _no_split_modules = ("Linear",)

        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(3, 2, bias=False), nn.Linear(5, 2, bias=False)
            self.scale = nn.Parameter(torch.ones(7))

    net = Net()
    assert plan.gathered([net]) == 2 * 4 * (7 + 10)  # with gradients
    assert plan.gathered([net.requires_grad_(False)]) == 4 * (7 + 10)
    assert plan.gathered([net, Net().requires_grad_(False)]) == 4 * (7 + 7 + 10)


def test_switches_are_added_until_it_fits(configs: dict[str, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of 100 bytes: checkpointing takes 30, halved batches 10, a bfloat16 teacher 1, an adapter 20."""

    def peak(setting: Setting) -> int:
        adapters = sum(player.lora is not None for player in setting.config.players.values())
        saved = 30 * setting.config.model.checkpointing + len(setting.config.model.roles) + 20 * adapters
        return 100 - saved - 10 * (setting.config.micro_batches.bit_length() - 1)

    run: Any = plan.shaped(Setting(replace(configs["unet"], batch=2)), plan.Fake())

    def foreseen(setting: Setting) -> tuple[Account, Any]:
        return Account({"generator": Counter({Part("", "activations"): peak(setting) // setting.gpus})}), run

    monkeypatch.setattr(plan, "foresee", foreseen)
    monkeypatch.setattr(plan, "can_checkpoint", lambda net: True)
    setting = Setting(replace(configs["unet"], batch=2))
    found, _ = foreseen(setting)
    together = ["model.checkpointing=true", "micro_batches=2", "players.fake_score.lora={}"]
    assert list(plan.fitting(setting, 65, {(): foreseen(setting)})) == together[:2]
    assert list(plan.fitting(setting, 40, {(): foreseen(setting)})) == together
    said = "\n".join(plan.advice(setting, 40, found, run))
    assert f"fits with {' and '.join(together)}" in said and "--gpus 2" in said
    assert "does not fit with all of these together" in "\n".join(plan.advice(setting, 5, found, run))


def test_the_command_shows_every_stage(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "staged.yaml").write_text(
        f"""
name: staged
batch: 8
device: cpu
model: {{teacher: {tiny_teacher}}}
players: {{generator: {{lr: 1.0e-3, ema: 0.9}}}}
stages:
  - objective: {{name: rectified_flow, phase: distill}}
  - objective: {{name: dmd2, gan_weight: 0.0}}
    players: {{fake_score: {{lr: 1.0e-3}}}}
"""
    )
    assert cli.main(["plan", str(tmp_path / "staged.yaml"), "--memory", "1GB", "data.seed=3"]) == 0
    said = capsys.readouterr().out
    first, second = said.split("stage 2 of 2")
    assert "stage 1 of 2" in first and "fake_score" not in first and "fake_score" in second
    assert said.count("fits: ") == 2 and all(kind in first for kind in KINDS if kind != "gathered")
    table = [line for line in second.splitlines() if line.startswith(("role", "generator", "real_score", "fake_score"))]
    assert len({len(line) for line in table[:4]}) == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["configs/quickstart.yaml", "--memory", "24XB"], "--memory is a size in MB, GB, TB, but '24XB' was given"),
        (["configs/quickstart.yaml", "--memory", "0GB"], "write for example 24GB"),
        (["configs/quickstart.yaml", "--gpus", "0"], "--gpus is a number of GPUs from 1, but 0 was given"),
        (["configs/quickstart.yaml", "--gpus", "7"], "a batch of 64 cannot be shared out to 7 GPUs"),
        (["configs/absent.yaml"], "there is no config file configs/absent.yaml"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_sizes_are_read() -> None:
    assert plan.size("24GB") == 24 * 2**30 and plan.size("1.5 mb") == 3 * 2**19
    assert plan.shown(3 * 2**19) == "1.5 MB" and plan.shown(24 * 2**30) == "24.0 GB" and plan.shown(0) == "-"
    with pytest.raises(UserError):
        plan.size("-1GB")


def test_kernels_are_planned_as_torchs_own(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the GPU that they need is not at hand."""
    given = ["plan", "configs/scenes/dmd2.yaml", f"model.teacher={tiny_teacher}", "batch=2"]
    assert cli.main(given) == 0
    plain = capsys.readouterr().out.splitlines()
    assert cli.main([*given, "model.attention=flash", "model.roles.generator.attention=xformers"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "attention is planned as sdpa" in said[1] and [said[0], *said[2:]] == plain


def test_an_offloaded_teacher_is_not_counted(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its visits; that a GPU is needed for it is passed over here."""
    monkeypatch.setattr(build, "_refuse_execution", lambda *given: None)
    given = [f"model.teacher={tiny_teacher}", "batch=2"]
    plain, away = (
        plan.foresee(plan.Setting(config.load("configs/scenes/dmd2.yaml", [*given, *more])[0]))[0]
        for more in ([], ["model.roles.real_score.offload=true"])
    )
    assert plain.of_kind("weights", role="real_score") > 0 == away.of_kind("weights", role="real_score")
    assert plain.of_kind("weights", role="generator") == away.of_kind("weights", role="generator")


SCENES = [file for file in sorted(Path("configs/scenes").glob("*.yaml")) if file.stem != "base"]
SCENES = [file for file in SCENES if not file.stem.endswith("_four_steps")]


@pytest.mark.slow
@pytest.mark.parametrize("file", SCENES, ids=[file.stem for file in SCENES])
def test_every_config_has_a_plan(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan.show(file, [], 1, None)
    assert capsys.readouterr().out.count("peak of a step: ") == len(config.load(file))
