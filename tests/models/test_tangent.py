"""The derivative of a network along a direction, against differences in float64, on every class of network."""

from __future__ import annotations

import pytest
import torch
from tiny_networks import CLASSES, T, ask
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models import attention
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.models.tangent import Direction, Tangent, Way, along, choose

STILL = torch.zeros(2)


def told_a_second_time(name: str):
    """Like `ask`, with a second time that is heard."""
    backbone, x, cond = ask(name)
    backbone.add_dial("to")
    torch.manual_seed(1)
    for weight in backbone.dials.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return backbone, x, cond


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def by_double_precision(backbone, x: Tensor, cond: Condition, toward: Direction, h: float) -> Tensor:
    """A central difference of the same network in float64. diffusers embeds times in float32, which is its floor."""
    backbone = backbone.double()
    cond = Condition({k: v.double() if v.is_floating_point() else v for k, v in cond.inputs.items()})

    def value(sign: int) -> Tensor:
        times = (t + sign * h * d for t, d in ((T, toward.dt), (T / 2, toward.dto)))
        t, to = times
        return backbone(x.double() + sign * h * toward.dx.double(), t, cond, to=to).value.double()

    with torch.no_grad():
        return (value(1) - value(-1)) / (2 * h)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("part, h, floor", [("x", 1e-4, 1e-3), ("times", 2e-5, 2e-2)])
def test_forward_mode_is_the_derivative(name: str, part: str, h: float, floor: float) -> None:
    backbone, x, cond = told_a_second_time(name)
    torch.manual_seed(2)
    dx = torch.randn_like(x) if part == "x" else torch.zeros_like(x)
    toward = Direction(dx, STILL, STILL) if part == "x" else Direction(dx, torch.tensor([0.7, -1.0]), STILL)
    ours = along(backbone, x, T, cond, toward, "exact", 1e-3, T / 2)
    assert relative(ours, by_double_precision(backbone, x, cond, toward, h)) < floor


@pytest.mark.parametrize("name", CLASSES)
def test_it_is_linear_in_the_direction_and_leaves_no_graph(name: str) -> None:
    backbone, x, cond = told_a_second_time(name)
    torch.manual_seed(2)
    parts = [Direction(torch.randn_like(x), torch.randn(2), torch.randn(2)) for _ in range(2)]
    whole = Direction(*(a + 2 * b for a, b in zip(*(vars(part).values() for part in parts), strict=True)))
    a, b, both = (along(backbone, x, T, cond, one, "exact", 1e-3, T / 2) for one in (*parts, whole))
    assert relative(a + 2 * b, both) < 1e-4
    assert not both.requires_grad and both.dtype == torch.float32


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_attention_is_what_it_was_afterwards(kernel: attention.Attention) -> None:
    backbone, x, cond = ask("sd3")
    attention.use(backbone.net, kernel)
    before = [module.processor for module in backbone.net.modules() if hasattr(module, "processor")]
    along(backbone, x, T, cond, Direction(x, STILL), "exact", 1e-3, None)
    after = [module.processor for module in backbone.net.modules() if hasattr(module, "processor")]
    assert all(a is b for a, b in zip(before, after, strict=True)) and before


@pytest.mark.parametrize("name", CLASSES)
def test_the_value_by_plain_products_is_that_of_torchs_choice(name: str) -> None:
    backbone, x, cond = ask(name)
    with torch.no_grad():
        chosen = backbone(x, T, cond).value
        with attention.exact(backbone.net):
            assert relative(backbone(x, T, cond).value, chosen) < 1e-5


@pytest.mark.parametrize("way, floor", [("exact", 1e-6), ("semi", 2e-3), ("difference", 2e-3)])
def test_every_way_gives_the_closed_form(way: Way, floor: float) -> None:
    """The velocity of N(1, .7^2) has the derivative that float64 differences of its formula have."""
    net, h = GaussianModel(1.0, 0.7, Flow(), "flow_prediction"), 1e-5
    torch.manual_seed(0)
    x, t = torch.randn(4, 3), torch.tensor([0.0, 0.2, 0.6, 1.0])
    toward = Direction(torch.randn(4, 3), torch.ones(4))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        a, variance = 1 - t, (1 - t) ** 2 * 0.49 + t**2
        return (t / variance - (a * 0.49 / variance)) * (x - a) - 1

    x64, t64 = x.double(), t.double()[:, None]
    truth = (velocity(x64 + h * toward.dx, t64 + h) - velocity(x64 - h * toward.dx, t64 - h)) / (2 * h)
    assert relative(along(net, x, t, Condition(), toward, way, 1e-3, None), truth) < floor


def test_the_way_is_chosen_with_a_reason() -> None:
    backbone, x, cond = ask("sd3")
    assert choose(backbone, x, cond, Tangent()) == ("exact", "forward mode passes through this network")
    assert choose(Guided(backbone), x, cond, Tangent(way="semi")) == ("semi", "as asked for")


class Closed(torch.autograd.Function):
    """An operation without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_network_that_forward_mode_cannot_enter_gets_differences() -> None:
    class Shut(GaussianModel):
        def forward(self, x_t, t, cond, **asked):
            return super().forward(Closed.apply(x_t), t, cond, **asked)

    net, x = Shut(1.0, 0.7, Flow(), "flow_prediction"), torch.randn(4, 3)
    way, reason = choose(net, x, Condition(), Tangent())
    assert way == "difference" and reason.startswith("forward mode does not pass through this network (")
    for asked in ("exact", "semi"):
        with pytest.raises(
            UserError, match=rf"tangent\.way={asked} was asked for, but .*: set it to auto or difference"
        ):
            choose(net, x, Condition(), Tangent(way=asked))  # type: ignore[arg-type]
    assert choose(net, x, Condition(), Tangent(way="difference")) == ("difference", "as asked for")


def test_a_step_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"above 0 and at most 0\.1"):
        Tangent(step=0.0)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("to", [0.0, 0.4])
def test_a_constant_second_time_folds_into_a_plain_network(name: str, to: float) -> None:
    backbone, x, cond = told_a_second_time(name)
    plain = backbone.folded("to", to)
    with torch.no_grad():
        told, said = backbone(x, T, cond, to=torch.full((2,), to)).value, plain(x, T, cond).value
        assert relative(said, told) < 1e-5 and relative(backbone.folded("to", 1 - to)(x, T, cond).value, told) > 1e-4
    assert not plain.dials and len(backbone.dials) == 1
