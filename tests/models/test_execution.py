"""Precision, gradient checkpointing, compilation and offloading: what they change, and all that they must not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tiny_networks import CLASSES, T, ask
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fewstep import build, cli, config, export, measure
from fewstep.models import execution, offload, schedulers
from fewstep.models.execution import Execution, execute
from fewstep.models.lora import LoraSpec
from fewstep.models.voices import Shared
from fewstep.train import checkpoint
from fewstep.train.player import Follower, constant_decay

CPU = torch.device("cpu")
BF16 = Execution(precision="bf16")
DMD2 = "configs/scenes/dmd2.yaml"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and guards are those of torch.compile; only the code generator, minutes on a CPU, is left out."""
    monkeypatch.setattr(execution, "COMPILER", "eager")
    counters.clear()


def made(family: str, how: Execution, frozen: bool = False) -> tuple[Any, Tensor, Any]:
    backbone, x, cond = ask(family)
    execute(backbone.net, how, frozen, CPU)
    return backbone, x, cond


def size(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.mark.parametrize("frozen", [False, True], ids=["learns", "frozen"])
@pytest.mark.parametrize("family", CLASSES)
def test_bfloat16_is_near_float32(family: str, frozen: bool) -> None:
    """Relative error of the output between 1e-4 (it was bfloat16) and 3e-2; float32 leaves the backbone."""
    plain, x, cond = ask(family)
    low, *_ = made(family, BF16, frozen)
    taps = (plain.tap,)
    with torch.no_grad():
        expected, found = plain(x, T, cond, taps=taps), low(x, T, cond, taps=taps)
    error = ((found.value - expected.value).norm() / expected.value.norm()).item()
    assert 1e-4 < error < 3e-2
    assert found.value.dtype == found.features[low.tap].dtype == torch.float32


@pytest.mark.parametrize("family", CLASSES)
def test_what_learns_keeps_float32_and_what_is_frozen_does_not(family: str) -> None:
    plain, learns, frozen = ask(family)[0], made(family, BF16)[0], made(family, BF16, frozen=True)[0]
    assert {p.dtype for p in learns.net.parameters()} == {torch.float32}
    learns(*ask(family)[1:2], T, ask(family)[2]).value.square().mean().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in learns.net.parameters())
    share = size(frozen.net) / size(plain.net)
    if family == "wan":  # its class keeps norms, modulation and the time embedding in float32
        assert share < 0.8 and frozen.net.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    else:
        assert share == 0.5 and {p.dtype for p in frozen.net.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("frozen", [False, True], ids=["learns", "frozen"])
@pytest.mark.parametrize("family", CLASSES)
def test_999_is_not_1000(family: str, frozen: bool) -> None:
    low, x, cond = made(family, BF16, frozen)
    with torch.no_grad():
        a, b = (low(x, torch.full((2,), t), cond).value for t in (0.999, 1.0))
    assert not torch.equal(a, b)


def test_followers_and_fused_voices_are_float32() -> None:
    """A voice over bfloat16 weights, fused in float32, says what it said; an adapter of 1e-3 is not rounded away."""
    backbone, x, cond = made("unet2d", BF16, frozen=True)
    shared = Shared(backbone, {"critic": LoraSpec(2, 2.0)})
    voice = shared.as_("critic")
    bare = voice.fused().net.state_dict()
    for p in voice.parameters():
        nn.init.normal_(p, std=0.02)
    fused = voice.fused()
    assert {p.dtype for p in (*fused.net.parameters(), *voice.parameters())} == {torch.float32}
    moved = [(w - bare[k]).abs().max() for k, w in fused.net.state_dict().items() if "to_q.weight" in k]
    assert moved and all(0 < m < 5e-3 for m in moved)
    delta = next(iter(shared.layers.items()))
    exact = bare[f"{delta[0]}.weight"] + delta[1].get_delta_weight("critic")
    assert torch.equal(fused.net.get_submodule(delta[0]).weight, exact)
    with torch.no_grad():
        said, alone = voice(x, T, cond).value, fused(x, T, cond).value
    assert (said - alone).norm() < 3e-2 * alone.norm()
    loss = voice(x, T, cond).value.square().mean()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in torch.autograd.grad(loss, voice.parameters()))
    learns = made("dit", BF16)[0]
    average = Follower(learns, constant_decay(0.5)).module
    assert {p.dtype for p in average.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        *((family, "fp32") for family in CLASSES),
        ("dit", "bf16"),
        *(pytest.param(family, "bf16", marks=pytest.mark.slow) for family in CLASSES if family != "dit"),
    ],
)
def test_checkpointed_and_compiled_gradients(family: str, precision: Any) -> None:
    """Those of the plain network: to 1e-5 of the largest in float32, to 5e-2 of the norm in bfloat16."""
    backbone, x, cond = ask(family)

    def gradient(net: Any) -> Tensor:
        net(x, T, cond).value.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    names = list(backbone.state_dict())
    expected = gradient(backbone)
    changed, *_ = made(family, Execution(precision=precision, checkpointing=True, compile=True))
    found = gradient(changed)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert list(changed.state_dict()) == names
    if precision == "fp32":
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    else:
        assert 1e-4 < (found - expected).norm() / expected.norm() < 5e-2


def test_taps_do_not_compile_again_and_copies_are_their_own() -> None:
    backbone, x, cond = made("dit", Execution(compile=True))
    plain = ask("dit")[0]
    with torch.no_grad():
        for stop in (False, True, True, False):
            found, expected = (net(x, T, cond, taps=(net.tap,), stop=stop) for net in (backbone, plain))
            assert torch.allclose(found.features[plain.tap], expected.features[plain.tap], atol=1e-6)
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(3):
            backbone(x, T, cond, taps=(backbone.tap,))
        twin = copy.deepcopy(backbone)
        twin(x, T, cond)
        assert counters["stats"]["unique_graphs"] == graphs > 0
        for p in twin.parameters():
            p.zero_()
        assert torch.allclose(backbone(x, T, cond).value, plain(x, T, cond).value, atol=1e-6)
    assert "2 blocks compiled" in execution.describe(twin.net)  # of three: the first holds the time embedding


def test_voices_speak_through_compiled_blocks() -> None:
    said = []
    for how in (Execution(), Execution(compile=True, checkpointing=True)):
        backbone, x, cond = made("dit", how)
        shared = Shared(backbone, {name: LoraSpec(2, 2.0) for name in ("generator", "critic")})
        if how.checkpointing:
            shared.enable_gradient_checkpointing()
        torch.manual_seed(1)
        for p in shared.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
        loss = shared.as_("critic")(x, T, cond).value.square().mean()
        other = shared.as_("generator")(x, T, cond).value
        said.append([other, *torch.autograd.grad(loss, shared.as_("critic").parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*said, strict=True))


def play(teacher: Path, out: Path, *more: str) -> Path:
    quick = ["steps=2", "batch=4", "save.every=1", "evals.every=0", "evals.samples=0", "objective.ratio=1"]
    assert cli.main(["train", DMD2, *quick, f"model.teacher={teacher}", f"--out={out}", *more]) == 0
    return next(out.iterdir())


def curves(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def shallow_teacher(tiny_sizes: dict[str, Any], tmp_path: Path) -> Path:
    """One level, so that few shapes are compiled."""
    one = {name: tiny_sizes[name][-1:] for name in ("block_out_channels", "down_block_types")}
    net = diffusers.UNet2DModel(**{**tiny_sizes, **one, "up_block_types": tiny_sizes["up_block_types"][:1]})
    pipeline = diffusers.ConsistencyModelPipeline(unet=net, scheduler=schedulers.flow_scheduler())
    pipeline.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize(
    "compiled", ["model.roles.generator.compile=true", pytest.param("model.compile=true", marks=pytest.mark.slow)]
)
def test_a_whole_run(compiled: str, shallow_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DMD2 with its GAN in bfloat16, checkpointed and compiled: near float32, resumed to the bit, exported as ever."""
    all_of_it = ["model.precision=bf16", "model.checkpointing=true", compiled]
    folder = play(shallow_teacher, tmp_path / "low", *all_of_it)
    said = capsys.readouterr().out
    kernel = "attention sdpa (flash) in 4 modules"
    assert f"generator: {kernel}, computes in bfloat16 with float32 weights, checkpointing," in said
    assert f"real_score: {kernel}, computes in bfloat16 with bfloat16 weights" in said
    plain = curves(play(shallow_teacher, tmp_path / "plain"))
    for low, full in zip(curves(folder), plain, strict=True):
        for key in ("generator/loss", "fake_score/loss", "fake_score/grad_norm", "x0/std"):
            assert abs(low[key] - full[key]) < 5e-2 * abs(full[key]) + 1e-3, key
    final = folder / "checkpoints" / "0000002" / checkpoint.STATE
    state, before = load_file(final), checkpoint.sha256(final)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    theirs = load_file(next((tmp_path / "plain").iterdir()) / "checkpoints" / "0000002" / checkpoint.STATE)
    assert state.keys() == theirs.keys()
    half = str(folder / "checkpoints" / "0000001")
    play(shallow_teacher, tmp_path / "low", *all_of_it, "--resume", half)
    assert checkpoint.sha256(final) == before
    unet = diffusers.UNet2DModel.from_pretrained(folder / "export" / "unet")
    run = export.load_run(folder)
    assert all(torch.equal(v, run.evaluated().net.state_dict()[k]) for k, v in unet.state_dict().items())  # type: ignore[union-attr]
    assert "compiled" not in execution.describe(run.evaluated().net)  # type: ignore[union-attr,arg-type]


def test_the_teacher_alone_may_be_low(tiny_teacher: Path) -> None:
    given = [f"model.teacher={tiny_teacher}", "model.roles.real_score.precision=bf16", "batch=2"]
    run = build.build(config.load(DMD2, given)[0])
    assert {p.dtype for p in run.teacher.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.triad.generator.parameters()} == {torch.float32}
    images = measure.made(run, *measure.teacher(run, 2), 2, seed=0)
    assert images.dtype == torch.float32 and images.isfinite().all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model.roles.real_score.offload=true"], "this run is on the CPU: remove it"),
        (["model.roles.generator.offload=true"], "only real_score, which is frozen"),
        (["model.roles.fake_score.precision=fp16"], "precision"),
        (["objective.name=diffusion", "model.roles.fake_score.compile=true"], "only the networks generator"),
    ],
)
def test_mistakes_are_one_sentence(
    given: list[str], said: str, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", DMD2, f"model.teacher={tiny_teacher}", "device=cpu", *given, "--dry-run"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_dry_run_says_how_and_counts_the_half(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model.precision=bf16", "model.compile=true", "model.roles.generator.attention=math"]
    assert cli.main(["train", DMD2, f"model.teacher={tiny_teacher}", *given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    whole = size(diffusers.UNet2DModel.from_pretrained(tiny_teacher / "unet"))
    assert f"frozen, {whole / 2 / 2**20:.1f} MB" in said
    assert "\ngenerator: attention math in 4 modules, computes in bfloat16 with float32 weights, 1" in said


class Guests:
    """Stands in for the way to a GPU: counts the weights that are there at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.alive: list[Tensor] = []
        monkeypatch.setattr(offload, "_copied", self.copied)

    def copied(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.alive.append(tensor.detach().clone())
        return self.alive[-1]


@pytest.mark.parametrize("family", CLASSES)
def test_weights_visit_and_go_home(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is the same to the bit, the input's gradient too; every weight ran as a copy and came back."""
    plain, x, cond = ask(family)
    away, *_ = ask(family)
    for net in (plain, away):
        net.requires_grad_(False)
    guests = Guests(monkeypatch)
    offload.offload(away.net, execution.repeated_blocks(away.net), CPU)
    home = {name: p for name, p in away.net.named_parameters()}

    def answered(net: Any) -> tuple[Tensor, Tensor]:
        start = x.clone().requires_grad_()
        value = net(start, T, cond).value
        return value, torch.autograd.grad(value.square().mean(), start)[0]

    assert all(torch.equal(a, b) for a, b in zip(answered(plain), answered(away), strict=True))
    assert sum(t.numel() for t in guests.alive) >= sum(p.numel() for p in home.values())
    assert all(p is home[name] for name, p in away.net.named_parameters())


def test_only_what_runs_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without memory: while a block runs its weights are there, all others here; also when it fails."""
    backbone, _, _ = ask("dit")
    net = backbone.net.requires_grad_(False)
    offload.offload(net, execution.repeated_blocks(net), torch.device("meta"))
    seen = {}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.update({name: p.device.type for name, p in net.named_parameters()})
        raise RuntimeError("seen enough")

    net.transformer_blocks[1].attn1.register_forward_hook(look)
    x = torch.randn(1, 3, 8, 8, device="meta")
    with pytest.raises(RuntimeError, match="seen enough"):
        net(x, timestep=torch.ones(1, device="meta"), class_labels=torch.ones(1, dtype=torch.int64, device="meta"))
    there = {name for name, device in seen.items() if device == "meta"}
    assert there == {name for name in seen if name.startswith("transformer_blocks.1.")}
    assert {p.device.type for p in net.parameters()} == {"cpu"}
    offload.place(backbone, torch.device("meta"))
    assert {p.device.type for p in net.parameters()} == {"cpu"}


def test_low_compiled_and_away_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a big teacher wants: bfloat16 weights in host memory, compiled blocks, and math attention."""
    how = Execution("math", "bf16", compile=True, offload=True)
    Guests(monkeypatch)
    low, x, cond = made("dit", Execution("math", "bf16"), frozen=True)
    away, *_ = made("dit", how, frozen=True)
    with torch.no_grad():
        assert torch.equal(low(x, T, cond).value, away(x, T, cond).value)
    said = execution.describe(away.net)
    assert said == (
        "attention math in 3 modules, computes in bfloat16 with bfloat16 weights, 2 blocks compiled, "
        "weights in host memory"
    )
