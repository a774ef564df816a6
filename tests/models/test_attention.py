"""Each kernel on each family says the same, is the one that really ran, reaches one network alone, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from tiny_networks import CLASSES, T, ask
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import build, cli, config
from fewstep.core.errors import UserError
from fewstep.models import attention, passes

OTHERS = [name for name in get_args(attention.Attention) if name != "sdpa"]
ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"  # what torch picks here unless it is told otherwise


class Operators(TorchDispatchMode):
    """The attention operators of torch that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func):
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def operators(act: Callable[[], Any]) -> list[str]:
    with Operators() as mode:
        act()
    return mode.seen


class Asked(TorchFunctionMode):
    """Counts what a network asks of torch's attention."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def say(family: str, kernel: attention.Attention | None = None) -> Tensor:
    backbone, x, cond = ask(family)
    if kernel is not None:
        attention.use(backbone.net, kernel)
    with torch.no_grad():
        return backbone(x, T, cond).value


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls of each kernel; those that need a GPU are stood in for where this machine's torch has none."""
    counts = dict.fromkeys(OTHERS, 0)

    def counting(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def count(*args: Tensor, **given: Any) -> Tensor:
            counts[name] += 1
            return kernel(*args, **given)

        return count

    for name in OTHERS:
        monkeypatch.setitem(attention.KERNELS, name, counting(name, attention.KERNELS[name]))
    import xformers.ops

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", by_hand)
    monkeypatch.setattr(attention, "_flex_attention", lambda: flex_attention)
    return counts


def by_hand(query: Tensor, key: Tensor, value: Tensor, p: float = 0.0, scale: float | None = None) -> Tensor:
    """xformers' function, whose tensors are (B, L, heads, D)."""
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) * (scale or query.shape[-1] ** -0.5)
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)


@pytest.mark.parametrize("kernel", OTHERS)
@pytest.mark.parametrize("family", CLASSES)
def test_every_attention_goes_to_the_kernel(family: str, kernel: Any, counted: dict[str, int]) -> None:
    """And says the same to 1e-5 of the largest value."""
    expected = say(family)
    with Asked() as asked:
        say(family)
    found = say(family, kernel)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert asked.count > 1 and counted == {**dict.fromkeys(OTHERS, 0), kernel: asked.count}


@pytest.mark.parametrize("family", CLASSES)
def test_torch_really_runs_it(family: str) -> None:
    default = operators(lambda: say(family))
    assert set(default) == {ON_CPU} and operators(lambda: say(family, "sdpa")) == default
    assert operators(lambda: say(family, "flash")) == default
    assert operators(lambda: say(family, "math")) == []  # plain products and a softmax


@pytest.mark.parametrize("family", CLASSES)
def test_math_has_forward_derivatives(family: str) -> None:
    """To 1e-2 of central differences in double precision; torch's choice has none."""
    backbone, x, cond = ask(family)
    backbone.double()
    cond = cond.with_inputs(**{k: v.double() for k, v in cond.inputs.items() if v.is_floating_point()})
    x, tangent = x.double(), torch.randn(x.shape, dtype=torch.float64)
    speak = lambda x: backbone(x, T, cond).value
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(speak, (x,), (tangent,))
    attention.use(backbone.net, "math")
    _, exact = torch.func.jvp(speak, (x,), (tangent,))
    with torch.no_grad():
        near = (speak(x + 1e-3 * tangent) - speak(x - 1e-3 * tangent)) / 2e-3
    assert near.norm() > 0 and (exact - near).norm() < 1e-2 * near.norm()


def test_gradients_are_those_of_torchs_choice() -> None:
    """Also where blocks are recomputed, long after the forward has left every mode."""

    def gradient(kernel: attention.Attention, checkpointed: bool) -> Tensor:
        backbone, x, cond = ask("unet2d")
        attention.use(backbone.net, kernel)
        if checkpointed:
            backbone.net.enable_gradient_checkpointing()
        seen = operators(lambda: backbone(x, T, cond).value.square().mean().backward())
        assert (ON_CPU in seen) == (kernel == "sdpa")
        return torch.cat([p.grad.flatten() for p in backbone.parameters()])

    gradients = [gradient("sdpa", False), gradient("math", False), gradient("math", True)]
    assert all((g - gradients[0]).abs().max() < 1e-5 * gradients[0].abs().max() for g in gradients[1:])


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = attention_dispatch._AttentionBackendRegistry
    before = backends.get_active_backend()
    say("wan", "math")

    def broken(*args: Tensor, **given: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(attention.KERNELS, "math", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        say("wan", "math")
    assert backends.get_active_backend() == before and _get_current_function_mode_stack() == []
    assert set(operators(lambda: say("wan"))) == {ON_CPU} == set(operators(lambda: say("unet2d")))


def test_a_default_of_the_process_does_not_reach_us() -> None:
    with attention_dispatch.attention_backend("_native_math"):
        assert operators(lambda: say("wan")) == []
        assert set(operators(lambda: say("wan", "sdpa"))) == {ON_CPU}
        assert set(operators(lambda: say("wan", "flash"))) == {ON_CPU}


def test_a_copy_keeps_the_kernel_and_sdpa_takes_it_back() -> None:
    backbone, x, cond = ask("sd3")
    attention.use(backbone.net, "math")
    twin = copy.deepcopy(backbone)
    attention.use(backbone.net, "sdpa")
    assert operators(lambda: twin(x, T, cond)) == []
    assert ON_CPU in operators(lambda: backbone(x, T, cond))
    said = [attention.describe(net, torch.float32) for net in (twin.net, backbone.net)]
    assert "math in" in said[0] and "sdpa (flash) in" in said[1]


DMD2 = "configs/scenes/dmd2.yaml"


def networks(run: build.Run) -> dict[str, nn.Module]:
    return {role: passes.networks_of(net)[0] for role, net in vars(run.triad).items() if net is not None}


def test_roles_differ(tiny_teacher: Path) -> None:
    given = [f"model.teacher={tiny_teacher}", "model.roles.generator.attention=math", "batch=2"]
    run = build.build(config.load(DMD2, given)[0])
    batch = build.batches(run)(0)[0]
    seen = {}
    for role in ("generator", "real_score", "fake_score"):
        with torch.no_grad():
            net = getattr(run.triad, role)
            seen[role] = set(operators(lambda: net(batch.noise, torch.ones(2), batch.cond)))  # noqa: B023
    assert seen == {"generator": set(), "real_score": {ON_CPU}, "fake_score": {ON_CPU}}
    assert {role: attention.describe(net, torch.float32) for role, net in networks(run).items()} == {
        "generator": "attention math in 4 modules",
        "real_score": "attention sdpa (flash) in 4 modules",
        "fake_score": "attention sdpa (flash) in 4 modules",
    }


def test_what_torch_picks_is_what_it_runs() -> None:
    """On the CPU its flash kernel, unless that is forbidden."""
    device = torch.device("cpu")
    assert attention.picked(8, device, torch.float32) == "flash"
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        assert attention.picked(8, device, torch.float32) == "math"


def test_a_kernel_that_does_not_run_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    net, device = ask("sd3")[0].net, torch.device("cpu")

    def broken(*tokens: torch.Tensor) -> torch.Tensor:
        raise ImportError("no operator found for this GPU\nand a page more")

    attention.try_out(net, "math", device, torch.float32, "model.attention=math")
    monkeypatch.setitem(attention.KERNELS, "xformers", broken)
    with pytest.raises(UserError, match=r"attention=xformers does not run here .*no operator found for this GPU\)"):
        attention.try_out(net, "xformers", device, torch.float32, "model.attention=xformers")


def test_a_gpu_without_bfloat16_is_named(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for a card that is not here: its answers are put into torch's mouth."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an old card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(build, "pick_device", lambda name: torch.device("cpu"))
    given = [f"model.teacher={tiny_teacher}", "model.precision=bf16", "device=cuda", "batch=2"]
    with pytest.raises(UserError, match="computes in bfloat16, which an old card does not: set it to fp32"):
        build.build(config.load(DMD2, given)[0])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.attention=flash", "model.attention=flash needs a GPU"),
        ("model.attention=xformers", "model.attention=xformers needs a GPU"),
        ("model.roles.fake_score.attention=flex", "model.roles.fake_score.attention=flex needs a GPU"),
        ("model.attention=sage", "sdpa"),
        ("model.roles.critic.attention=math", "model.roles has generator, real_score, fake_score"),
        ("model.roles.real_score.kernel=math", "kernel"),
    ],
)
@pytest.mark.parametrize("way", ["--dry-run", "--out=nowhere"])
def test_what_cannot_be_is_one_sentence(
    way: str, override: str, said: str, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", DMD2, f"model.teacher={tiny_teacher}", "device=cpu", override, way]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not Path("nowhere").exists()


def test_voices_of_one_network_cannot_differ(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"model.teacher={tiny_teacher}", "model.roles.generator.attention=math", "--dry-run"]
    assert cli.main(["train", "configs/scenes/dmd2_lora.yaml", *given]) == 2
    assert "fake_score and generator and real_score are one network" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", ["flash", "xformers", "flex"])
def test_heads_and_precisions_that_do_not_fit(kernel: Any) -> None:
    net = ask("unet2d")[0].net  # heads of 4 channels

    def refuse(size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        for module in attention._modules(net):
            module.inner_dim = size * module.heads
        attention.refuse(net, kernel, "cuda", dtype, f"model.attention={kernel}")

    refuse(64)
    with pytest.raises(UserError, match=f"^model.attention={kernel} cannot do heads of"):
        refuse({"flash": 512, "xformers": 12, "flex": 8}[kernel])
    if kernel == "flash":
        with pytest.raises(UserError, match="half precision alone: set precision=bf16"):
            refuse(64, torch.float32)


def test_a_processor_we_do_not_know_is_refused() -> None:
    net = ask("unet2d")[0].net
    attention._modules(net)[0].processor = object()
    with pytest.raises(UserError, match="does not reach the object of this UNet2DModel"):
        attention.refuse(net, "math", "cpu", torch.float32, "model.attention=math")


@pytest.mark.parametrize("kernel", ["flash", "xformers", "flex"])
def test_a_mask_is_refused(kernel: str) -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(UserError, match=f"attention {kernel} takes no mask"):
        attention.KERNELS[kernel](x, x, x, attn_mask=torch.ones(3, 3, dtype=torch.bool))
