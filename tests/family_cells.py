"""The cells of the table of families: each asserts numbers and returns the one that says most."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import export, measure
from fewstep.build import Run
from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.models import attention, schedulers
from fewstep.models.codecs import codec_of
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.experts import TimeExperts, model_of
from fewstep.models.lora import LoraSpec
from fewstep.models.voices import Shared, Voice
from fewstep.rollout import Rollout, transition
from fewstep.routes import Pixels
from fewstep.train import checkpoint
from tests import families, family_runs
from tests.family_runs import DMD2, build_run, play

ROOT = Path(__file__).parents[1]
ROUNDING = 2e-5
"""Float32 sums in another order, over two or three steps of an optimizer, relative."""
IDLE = {
    "unet2d": r"attentions\.\d\.to_k\.bias$",  # softmax does not see a bias of all keys
    "qwen_image": r"transformer_blocks\.2\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)\.",  # as sd3
    "sd3": r"transformer_blocks\.2\.attn\.(add_q_proj|norm_added_q)\.",  # nobody reads the text of the last block
}
"""Family -> its weights without a gradient."""
T = families.T
LORA = {"lora": {"rank": 2, "targets": ["to_q", "to_v", "to_out.0"]}}


@dataclass
class Bench:
    """One family with a folder for what its cells leave; `ranks` is what two processes have left there."""

    family: str
    folder: Path

    def pipeline(self) -> Any:
        return family_runs.make(self.family)

    def run(self, objective: dict[str, Any], players: dict[str, dict] | None = None, **model: Any) -> Run:
        return build_run(self.family, self.folder, objective, players, **model)

    @property
    def idle(self) -> str:
        """What its weights without a gradient are called."""
        return IDLE.get(self.family, "(?!)")

    def asked(self) -> tuple[DiffusersBackbone, Tensor, Condition]:
        """The backbone of the plain pipeline and something to ask it."""
        pipeline = self.pipeline()
        if self.family != "unet2d":
            return families.asked(pipeline)
        schedule, kind = schedulers.read(pipeline.scheduler)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        backbone = DiffusersBackbone(pipeline.unet, schedule, kind, null_label=12)
        return backbone, x, Condition({"class_labels": torch.tensor([0, 3])})


Cell = Callable[[Bench], str]
REFUSED = "refused"


def figure(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def apart(a: Tensor, b: Tensor) -> float:
    """The distance of a from b, relative to b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)).item()


def state_of(run: Run) -> dict[str, Tensor]:
    state = checkpoint.collect(run.players, run.objective)
    return {name: value.detach().clone() for name, value in state.items() if "/optimizer/" not in name}


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest distance of two tensors, relative to the norm of the second, or to .1 where that is less."""
    assert one.keys() == other.keys()
    return max(((one[k] - b).double().norm() / b.double().norm().clamp(min=0.1)).item() for k, b in other.items())


def heard(run: Run) -> set[str]:
    """The weights that a gradient has reached."""
    return {
        f"{name}/network/{weight}"
        for name, player in run.players.items()
        for weight, p in player.modules[0].named_parameters()
        if player.optimizer.state[p] and player.optimizer.state[p]["exp_avg"].count_nonzero() > 0
    }


def late(backbone: DiffusersBackbone) -> str:
    """A block behind the usual tap: the last of its list."""
    blocks, _, index = backbone.tap.rpartition(".")
    return f"{blocks}.{len(model_of(backbone.net).get_submodule(blocks)) - 1}" if index.isdigit() else "up_blocks.0"


def learns(idle: str, run: Run, again: Run, steps: int = 2) -> str:
    """Every trained tensor moves, the teacher does not, and two micro-batches are one batch; the latter's distance."""
    steps *= 4 if isinstance(run.teacher.net, TimeExperts) else 1  # until each has been asked
    started, fixed = state_of(run), {k: v.clone() for k, v in base_weights(run).items()}
    curves = play(run, range(steps))
    assert all(torch.tensor(list(logs.values())).isfinite().all() for logs in curves)
    ended = state_of(run)
    trained = [f"{name}/network/{k}" for name, p in run.players.items() for k, _ in p.modules[0].named_parameters()]
    still = [name for name in trained if torch.equal(ended[name], started[name]) and not re.search(idle, name)]
    # A gradient of 1e-9 is one, though it is less than the last digit of the weight.
    still = [name for name in still if name not in heard(run)]
    assert not still, still
    assert all(torch.equal(value, fixed[name]) for name, value in base_weights(run).items())
    play(again, range(steps), parts=2)
    distance = furthest(state_of(again), ended)
    assert distance < ROUNDING, distance
    return figure(distance)


def base_weights(run: Run) -> dict[str, Tensor]:
    return {k: v for k, v in run.teacher.net.state_dict().items() if ".lora_" not in k}


def step(bench: Bench) -> str:
    """One denoising step by our backbone is the pipeline's own."""
    pipeline = bench.pipeline()
    if bench.family == "unet2d":
        theirs, noise = Pixels().walk(pipeline, 1), export.SameNoise(0, 1)
        backbone, _, _ = bench.asked()
        rollout = Rollout(schedulers.steps_of(pipeline.scheduler, 1), transition("ode"))
        with torch.no_grad():
            told = Pixels().told(pipeline)
            ours = rollout(backbone, noise.normal("", (3, 16, 16)), told, noise).x0  # type: ignore[arg-type]
    else:
        theirs, ours = families.their_walk(pipeline, 1, None)[0], families.our_walk(pipeline, 1, None)[0]
    distance = apart(ours, theirs)
    assert distance < 1e-5, distance
    return figure(distance)


def codec(bench: Bench) -> str:
    """What latents look like is what the pipeline shows, and what the VAE loses of an image is all that is lost."""
    pipeline = bench.pipeline()
    if bench.family == "unet2d":
        theirs = Pixels().walk(pipeline, 1)
        shown = pipeline(class_labels=[0], generator=torch.Generator().manual_seed(0), output_type="np").images
        distance = apart((theirs / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.as_tensor(shown))
        assert distance < 1e-5, distance
        return figure(distance)
    own, latents = codec_of(pipeline), families.noise_for(pipeline)
    made = families.their_walk(pipeline, 1, None, guidance=1.0)[0]
    given = {**families.starting(pipeline), "num_inference_steps": 1, **own.guided_by(1.0)}
    shown = torch.as_tensor(pipeline(**given, output_type="pt" if own.PROMPTED else "np")[0])
    mine = (own.decode(made) / 2 + 0.5).clamp(0, 1)
    if not own.PROMPTED:
        mine = mine.permute(0, 2, 3, 1)
    distance = apart(mine.transpose(1, 2) if own.VIDEOS else mine, shown)
    assert distance < 1e-5, distance
    again = own.decode(latents)
    told = own.decode(own.encode(again.clamp(-1, 1)))
    assert again.shape == told.shape and told.isfinite().all()
    return figure(distance)


def dmd2(bench: Bench) -> str:
    """Two steps with a discriminator: all trained weights move, the teacher stays, two micro-batches are one batch."""
    return learns(bench.idle, *(bench.run(DMD2) for _ in range(2)))


def phased(bench: Bench) -> str:
    """The same of two steps of Phased DMD."""
    return learns(bench.idle, *(bench.run({"name": "phased_dmd", "ratio": 1}) for _ in range(2)))


def consistency(bench: Bench) -> str:
    """The same of a step of consistency distillation."""
    node = {"name": "consistency", "distance": "l2"}
    return learns(bench.idle, *(bench.run(node, {"generator": {}}, transition="renoise") for _ in range(2)), steps=1)


def reflow(bench: Bench) -> str:
    """The same of a step on pairs."""
    return learns(bench.idle, *(bench.run({"name": "rectified_flow"}, {"generator": {}}) for _ in range(2)), steps=1)


def lora_generator(bench: Bench) -> str:
    """It learns, and whatever it has learnt, fused it says the same."""
    # A moves from the second move on: at the first its B is zero.
    runs = [bench.run({**DMD2, "ratio": 1}, {"generator": LORA, "fake_score": {}}) for _ in range(2)]
    learns(bench.idle, *runs)
    voice, (_, x, cond) = runs[0].triad.generator, bench.asked()
    assert isinstance(voice, Voice)
    for weight in voice.parameters():
        nn.init.normal_(weight, std=0.3)
    with torch.no_grad():
        said, fused, bare = (net(x, T, cond).value for net in (voice, voice.fused(), voice.shared.as_(None)))
    assert apart(fused, said) < 1e-5 < 1e-3 < apart(bare, said)
    return figure(apart(fused, said))


def lora_critic(bench: Bench) -> str:
    """Beside a whole generator; the bare network below it stays the teacher."""
    return learns(bench.idle, *(bench.run(DMD2, {"generator": {}, "fake_score": LORA}) for _ in range(2)))


def stopped(bench: Bench) -> str:
    """A forward that stops behind two tapped blocks has the features of a whole one, to the bit."""
    backbone, x, cond = bench.asked()
    names = list(dict.fromkeys([backbone.tap, late(backbone)]))
    whole, part = backbone(x, T, cond, taps=names), backbone(x, T, cond, taps=names, stop=True)
    assert part.value.numel() == 0 and torch.equal(whole.value, backbone(x, T, cond).value)
    assert list(whole.features) == list(part.features) == names
    assert all(torch.equal(whole.features[name], part.features[name]) for name in names)
    return "0"


def jvp(bench: Bench) -> str:
    """Forward derivatives along x and along t, under math attention, beside central differences in float64."""
    backbone, x, cond = bench.asked()
    backbone.double()
    cond = Condition({k: v.double() if v.is_floating_point() else v for k, v in cond.inputs.items()})
    x, t, dx, dt = x.double(), T.double(), torch.randn_like(x).double(), torch.tensor([0.5, -1.0]).double()
    speak, worst = lambda x, t: backbone(x, t, cond).value, 0.0
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for tangents, h in (((dx, torch.zeros_like(dt)), 1e-3), ((torch.zeros_like(dx), dt), 1e-4)):
            _, exact = torch.func.jvp(speak, (x, t), tangents)
            forth, back = (speak(x + s * tangents[0], t + s * tangents[1]) for s in (h, -h))
            assert exact.abs().max() > 0
            worst = max(worst, apart((forth - back) / (2 * h), exact))
    assert worst < 5e-3, worst
    return figure(worst)


def checkpointing(bench: Bench) -> str:
    """Gradients with recomputed blocks are those without, of a whole network and of a voice."""
    backbone, x, cond = bench.asked()
    shared = Shared(copy.deepcopy(backbone), {"critic": LoraSpec(2, 4.0, ["to_q", "to_out.0"])})
    voice = shared.as_("critic")
    for weight in voice.parameters():
        nn.init.normal_(weight, std=0.3)

    def gradients(net: DiffusersBackbone) -> list[Tensor]:
        loss = net(x, T, cond).value.square().mean()
        found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    plain = [gradients(net) for net in (backbone, voice)]
    backbone.net.enable_gradient_checkpointing()
    shared.enable_gradient_checkpointing()
    again = [gradients(net) for net in (backbone, voice)]
    assert [len(found) for found in plain] == [len(found) for found in again]
    distance = max(
        apart(torch.cat([*map(Tensor.flatten, b)]), torch.cat([*map(Tensor.flatten, a)]))
        for a, b in zip(plain, again, strict=True)
    )
    assert distance < 1e-6, distance
    return figure(distance)


def attending(kernel: attention.Attention) -> Cell:
    """The column of a kernel: value and gradient beside the default's, or why it is refused here."""

    def cell(bench: Bench) -> str:
        backbone, x, cond = bench.asked()

        def asked() -> Tensor:
            given = x.clone().requires_grad_()
            value = backbone(given, T, cond).value
            return torch.cat([value.detach().flatten(), torch.autograd.grad(value.square().mean(), given)[0].flatten()])

        expected, net = asked(), backbone.net
        try:
            attention.refuse(net, kernel, x.device.type, x.dtype, f"model.attention={kernel}")
        except UserError as reason:
            return f"{REFUSED}: {reason}"
        attention.use(net, kernel)
        assert f"attention {kernel} " in attention.describe(net, torch.float32)
        distance = apart(asked(), expected)
        assert distance < 1e-5, distance
        return figure(distance)

    return cell


def two_processes(folder: Path, named: list[str]) -> None:
    """Lets two processes play the families `named`; see `family_runs.sharded`."""
    for family in named:
        family_runs.teacher(family, folder)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, str(ROOT / "tests" / "family_runs.py"), str(folder), *named],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def fsdp2(bench: Bench) -> str:
    """Two processes, each with half of every batch, leave what one leaves."""
    run = bench.run(DMD2)
    play(run, range(3))
    found = load_file(bench.folder / f"{bench.family}_by_two" / "0000003" / checkpoint.STATE)
    distance = furthest({k: v for k, v in found.items() if "/optimizer/" not in k}, state_of(run))
    assert distance < ROUNDING, distance
    return figure(distance)


def resharding(bench: Bench) -> str:
    """What two processes have saved one takes up, to the bit, and goes on as they do; the distance of the curves."""
    path = bench.folder / f"{bench.family}_by_two" / "0000002"
    run = bench.run(DMD2)
    assert family_runs.load(run, path) == 2
    stored, restored = load_file(path / checkpoint.STATE), checkpoint.collect(run.players, run.objective)
    assert all(torch.equal(stored[k], restored[k]) for k in stored) and stored.keys() == restored.keys()
    theirs = json.loads((bench.folder / f"{bench.family}_by_two.json").read_text())[2]
    (ours,) = play(run, range(2, 3))
    assert ours.keys() == theirs.keys()
    distance = max(abs(ours[k] - theirs[k]) / max(abs(ours[k]), 1e-3) for k in ours)
    assert distance < ROUNDING, distance
    return figure(distance)


def exported(bench: Bench) -> str:
    """The folder, opened by plain diffusers, makes the latents of our own rollout."""
    run = bench.run(DMD2)
    play(run, range(1))
    folder = export.export(run, bench.folder / f"{bench.family}_export")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    net, rollout = measure.student(run)
    if bench.family == "unet2d":
        theirs, told, start = Pixels().walk(pipeline, 2), Pixels().told(pipeline), export.SameNoise(0, 1)
        noise = start.normal("", run.shape)
    else:
        noise = families.noise_for(pipeline)
        theirs = families.their_walk(pipeline, 2, None, guidance=1.0)[-1]
        told = families.told(codec_of(pipeline))
    with torch.no_grad():
        distance = apart(rollout(net, noise, told, None).x0, theirs)  # type: ignore[arg-type]
    assert distance < 1e-4, distance
    return figure(distance)


CELLS: dict[str, Cell] = {
    "one step": step,
    "codec": codec,
    "DMD2 + GAN": dmd2,
    "phased": phased,
    "consistency": consistency,
    "reflow": reflow,
    "LoRA generator": lora_generator,
    "LoRA critic": lora_critic,
    "stopped forward": stopped,
    "JVP": jvp,
    "checkpointing": checkpointing,
    **{f"attention {kernel}": attending(kernel) for kernel in get_args(attention.Attention)},
    "export": exported,
}
SHARDED: dict[str, Cell] = {"FSDP2": fsdp2, "2 to 1": resharding}
"""After `two_processes`."""
