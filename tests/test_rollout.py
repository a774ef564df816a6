from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, add_noise
from fewstep.models.backbone import Backbone, Composite
from fewstep.models.gaussian import GaussianModel
from fewstep.rollout import (
    GammaJump,
    Rollout,
    Step,
    Transition,
    TransitionName,
    cps,
    ode,
    renoise,
    reuse,
    transition,
)

MEAN, STD = 0.7, 0.5
COND = Condition()
TRANSITIONS: dict[str, Transition] = {
    "renoise": renoise,
    "ode": ode,
    "cps half": cps(0.5),
    "cps most": cps(0.8),
    "gamma third": GammaJump(0.3),
    "gamma most": GammaJump(0.9),
}


def even(count: int) -> list[Step]:
    return [Step(1 - i / count, 1 - i / count) for i in range(count)]


def draw(rows: int = 4) -> Draw:
    return Draw(3, 0, torch.arange(rows))


class FlowMap(GaussianModel):
    """The exact flow map of Gaussian data: its (x0, eps) jump to `to`, default 0, where the ODE ends."""

    def forward(self, x_t, t, cond, *, to=None, taps: Sequence[str] = (), stop=False):
        s = torch.zeros_like(t) if to is None else to
        c, there, end = self.schedule.at(t, x_t), self.schedule.at(s, x_t), self.flow_map(x_t, t, s)
        determinant = there.alpha * c.sigma - c.alpha * there.sigma
        x0 = (c.sigma * end - there.sigma * x_t) / determinant
        eps = (there.alpha * x_t - c.alpha * end) / determinant
        empty = Prediction(x_t, self.kind, x_t, t, self.schedule)
        return Prediction(empty.target(x0, eps), self.kind, x_t, t, self.schedule)


class Recorder(Composite):
    """Keeps what each pass was given and whether it was recorded for a gradient."""

    def __init__(self, inner: Backbone):
        super().__init__(inner)
        self.times: list[float] = []
        self.ends: list[float | None] = []
        self.inputs: list[Tensor] = []
        self.with_gradient: list[bool] = []

    def forward(self, x_t, t, cond, *, to=None, taps: Sequence[str] = (), stop=False):
        assert t.shape == (len(x_t),) and t.dtype == torch.float32 and (t == t[0]).all()
        self.times.append(t[0].item())
        self.ends.append(None if to is None else to[0].item())
        self.inputs.append(x_t)
        self.with_gradient.append(torch.is_grad_enabled())
        return self.inner(x_t, t, cond, to=to, taps=taps, stop=stop)


class Basis(Draw):
    """Noise as unit vectors: row 0 is zero, row 1 has the first noise, row 2 + i the fresh noise of step i.

    A rollout of an affine network is affine in its noises, so its law is read off the rows exactly.
    """

    def __init__(self, steps: int):
        super().__init__(0, 0, torch.arange(steps + 2))

    @property
    def noise(self) -> Tensor:
        return self.unit(1)

    def unit(self, row: int) -> Tensor:
        return (self.ids == row).float()[:, None]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        return self.unit(2 + int(purpose.rsplit(".", 1)[1]))


def law(x: Tensor) -> tuple[float, float]:
    """(mean, deviation) of what a rollout made of a Basis."""
    return x[0].item(), (x[1:] - x[0]).square().sum().sqrt().item()


@pytest.mark.parametrize("name", ["flow", "trig"])
def test_ode_steps_approach_the_flow_map_with_order_one(name: str, processes: dict[str, NoiseSchedule]) -> None:
    net = GaussianModel(MEAN, STD, processes[name], "v_prediction")
    noise = torch.randn(16, 2)
    exact = net.flow_map(noise, torch.ones(16), torch.zeros(16))
    errors = [
        (Rollout(even(count), ode)(net, noise, COND, draw(16)).x0 - exact).abs().max().item() for count in (32, 64, 128)
    ]
    slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert errors[2] < 0.02 and all(0.9 < slope < 1.1 for slope in slopes)


@pytest.mark.parametrize("whole", [[renoise, cps(1.0), GammaJump(1.0)], [ode, cps(0.0), GammaJump(0.0)]])
def test_extreme_transitions_coincide(whole: list[Transition], schedule: NoiseSchedule) -> None:
    net, noise = GaussianModel(MEAN, STD, schedule, "v_prediction"), torch.randn(4, 3)
    first, *others = (Rollout(even(3), step)(net, noise, COND, draw()).x0 for step in whole)
    assert all(torch.allclose(other, first, rtol=1e-4, atol=1e-5) for other in others)
    halfway = [Rollout(even(3), step)(net, noise, COND, draw()).x0 for step in (cps(0.5), GammaJump(0.5))]
    assert all((other - first).abs().max() > 1e-3 for other in halfway)


@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_transition_lands_on_its_level(name: str, schedule: NoiseSchedule) -> None:
    """The signal has coefficient alpha_s and the noises, old and fresh, together the variance sigma_s^2."""
    t, s = torch.full((3,), 0.8), torch.full((3,), 0.35)
    x0, eps, fresh = torch.eye(3)[:, :, None].unbind(1)
    x_t = add_noise(schedule, x0, eps, t)
    empty = Prediction(x_t, "v_prediction", x_t, t, schedule)
    prediction = Prediction(empty.target(x0, eps), "v_prediction", x_t, t, schedule)
    mean, std = TRANSITIONS[name](prediction, s)
    assert (std is None) == (name == "ode")
    signal, old, new = (mean + fresh * (0 if std is None else std))[:, 0].tolist()
    c = schedule.at(s[:1], torch.zeros(1))
    assert signal == pytest.approx(c.alpha.item(), rel=1e-4, abs=1e-5)
    assert math.hypot(old, new) == pytest.approx(c.sigma.item(), rel=1e-4)
    assert (new == 0) == (name == "ode") and (abs(old) < 1e-5) == (name == "renoise")


@pytest.mark.parametrize("name", ["flow", "trig", "vp_zero_snr"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_renoising_an_exact_consistency_function_keeps_the_marginals(
    name: str, count: int, processes: dict[str, NoiseSchedule]
) -> None:
    net, basis = FlowMap(MEAN, STD, processes[name], "v_prediction"), Basis(count)
    rollout = Rollout(even(count), renoise)
    assert law(rollout(net, basis.noise, COND, basis).x0) == pytest.approx((MEAN, STD), rel=1e-5)
    for exit in range(count - 1):
        stop = rollout.level_after(exit)
        sample = rollout(net, basis.noise, COND, basis, exit=exit, stop=stop)
        c = processes[name].at(torch.tensor([stop]), torch.zeros(1))
        level = (c.alpha.item() * MEAN, math.hypot(c.alpha.item() * STD, c.sigma.item()))
        assert law(sample.x) == pytest.approx(level, rel=1e-5)
        assert law(sample.x0) == pytest.approx((MEAN, STD), rel=1e-5)


@pytest.mark.parametrize("name", ["flow", "trig", "vp_zero_snr"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_jumps_of_an_exact_flow_map_follow_the_ode(name: str, count: int, processes: dict[str, NoiseSchedule]) -> None:
    """Told where each step ends, the network lands on the trajectory; where it stops early, on its clean end."""
    net = FlowMap(MEAN, STD, processes[name], "v_prediction")
    rollout, noise = Rollout(even(count), ode, two_times=True), torch.randn(5, 3)
    exact = net.flow_map(noise, torch.ones(5), torch.zeros(5))
    for exit in range(count):
        early = rollout(net, noise, COND, draw(5), exit=exit)
        assert torch.allclose(early.x0, exact, rtol=1e-4, atol=1e-4) and torch.equal(early.x, early.x0)
    middle = rollout(net, noise, COND, draw(5), exit=count - 1, stop=0.1)
    there = net.flow_map(noise, torch.ones(5), torch.full((5,), 0.1))
    assert torch.allclose(middle.x, there, rtol=1e-4, atol=1e-4)


def test_two_times_tell_where_each_step_ends() -> None:
    net = Recorder(FlowMap(MEAN, STD, Flow(), "flow_prediction"))
    Rollout(even(4), ode, two_times=True)(net, torch.randn(2, 3), COND, draw(2), exit=2, stop=0.3)
    assert net.times == pytest.approx([1, 0.75, 0.5]) and net.ends == pytest.approx([0.75, 0.5, 0.3])
    net = Recorder(FlowMap(MEAN, STD, Flow(), "flow_prediction"))
    Rollout(even(2), ode)(net, torch.randn(2, 3), COND, draw(2))
    assert net.ends == [None, None]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_jumps_of_an_exact_flow_map_keep_the_law_whatever_is_renoised(gamma: float) -> None:
    """Told (1 - gamma) of where each step ends: mean and deviation after three steps, to four standard errors."""
    net, noise = Recorder(FlowMap(MEAN, STD, Flow(), "flow_prediction")), torch.randn(40_000, 1)
    made = Rollout(even(3), GammaJump(gamma), two_times=True)(net, noise, COND, draw(40_000)).x0
    assert net.ends == pytest.approx([(1 - gamma) * 2 / 3, (1 - gamma) / 3, 0.0])
    assert made.mean().item() == pytest.approx(MEAN, abs=4 * STD / 200)
    assert made.std().item() == pytest.approx(STD, abs=4 * STD / 200 / 2**0.5)


def test_the_first_noise_can_be_used_again() -> None:
    """RF++: exact for straight paths, where x_s = (1 - s) x0 + s z; the same noise at every step."""
    net, noise = Recorder(GaussianModel(MEAN, STD, Flow(), "flow_prediction")), torch.randn(5, 3)
    *_, before, last = Rollout(even(3), reuse).walk(net, noise, COND, draw(5))
    assert torch.allclose(before.x, (2 / 3) * before.x0 + (1 / 3) * noise, atol=1e-6)
    assert torch.equal(last.x_t, before.x) and transition("reuse") is reuse


def test_dials_of_one_value_are_told_at_every_step() -> None:
    net = Recorder(GaussianModel(MEAN, STD, Flow(), "flow_prediction"))
    rollout = Rollout(even(2), ode, tells={"guidance": 3.5})
    told = rollout.told(net, COND, draw(2), "x", torch.zeros(2, 3))
    assert told.dials["guidance"].tolist() == [3.5, 3.5] and rollout.over(even(4)).tells == {"guidance": 3.5}


@pytest.mark.parametrize("name", [name for name in TRANSITIONS if name != "ode" and "gamma" not in name])
def test_two_times_go_with_jumps_alone(name: str) -> None:
    """The other transitions read a jump to another level than the one told, which is not where the ODE goes."""
    with pytest.raises(ValueError, match="goes with the transitions ode and gamma alone"):
        Rollout(even(2), TRANSITIONS[name], two_times=True)
    assert Rollout(even(2), transition("ode"), two_times=True).two_times


def test_the_network_is_told_one_time_and_read_at_another() -> None:
    net = Recorder(GaussianModel(MEAN, STD, Flow(), "flow_prediction"))
    noise = torch.randn(2, 3)
    sample = Rollout([Step(0.999, 0.8), Step(0.499, 0.4)], ode)(net, noise, COND, draw(2))
    assert net.times == pytest.approx([0.999, 0.499])
    first = net.inner(noise, torch.full((2,), 0.999), COND).value
    middle = noise - 0.4 * first
    second = net.inner(middle, torch.full((2,), 0.499), COND).value
    assert torch.allclose(sample.x0, middle - 0.4 * second, rtol=0, atol=1e-6)
    assert sample.t.tolist() == pytest.approx([0.4, 0.4]) and sample.index == 1


def test_the_first_input_has_the_scale_of_the_process(schedule: NoiseSchedule) -> None:
    net, noise = Recorder(GaussianModel(MEAN, STD, schedule, "v_prediction")), torch.randn(2, 3)
    Rollout(even(1))(net, noise, COND, draw(2))
    assert torch.equal(net.inputs[0], noise * schedule.prior_std)


@pytest.mark.parametrize("name", TRANSITIONS)
def test_an_early_exit_is_the_beginning_of_the_whole(name: str) -> None:
    net, noise = GaussianModel(MEAN, STD, Flow(), "flow_prediction"), torch.randn(4, 3)
    rollout = Rollout(even(4), TRANSITIONS[name])
    recorder = Recorder(net)
    whole = rollout(recorder, noise, COND, draw())
    for exit in range(4):
        clean = rollout(net, noise, COND, draw(), exit=exit)
        assert torch.equal(clean.x_t, recorder.inputs[exit]) and clean.index == exit
        assert clean.t.tolist() == pytest.approx([1 - exit / 4] * 4)
        assert torch.equal(clean.x, clean.x0) and clean.s.tolist() == [0] * 4
        assert torch.equal(clean.x0, net(clean.x_t, clean.t, COND).x0)
        if exit < 3:
            level = rollout.level_after(exit)
            handed = rollout(net, noise, COND, draw(), exit=exit, stop=level)
            assert torch.equal(handed.x, recorder.inputs[exit + 1]) and handed.s.tolist() == pytest.approx([level] * 4)
            assert torch.equal(handed.x0, clean.x0)
    assert torch.equal(whole.x0, clean.x0) and whole.index == 3


def test_levels_after_each_step() -> None:
    rollout = Rollout(even(4))
    assert len(rollout) == 4 and [rollout.level_after(i) for i in range(4)] == [0.75, 0.5, 0.25, 0]
    with pytest.raises(ValueError, match="at least one step"):
        Rollout([])


@pytest.mark.parametrize("exit", [0, 2, None])
@pytest.mark.parametrize("grad", [0, 1, 2, 4])
def test_only_the_last_passes_carry_a_gradient(exit: int | None, grad: int) -> None:
    net = Recorder(GaussianModel(MEAN, STD, Flow(), "flow_prediction", learned=True))
    sample = Rollout(even(4))(net, torch.randn(4, 3), COND, draw(), exit=exit, grad=grad)
    passes = 4 if exit is None else exit + 1
    assert net.with_gradient == [i >= passes - grad for i in range(passes)]
    assert sample.x0.requires_grad == sample.x.requires_grad == (grad > 0)
    assert sample.x_t.requires_grad == (grad > 1 and passes > 1)
    assert not sample.detach().x.requires_grad and not sample.detach().x0.requires_grad


@pytest.mark.parametrize("stop", [0.0, 0.15])
@pytest.mark.parametrize("grad", [1, 2, 3])
def test_the_gradient_is_that_of_the_window(grad: int, stop: float) -> None:
    """Against the same steps by hand, cut where the window begins."""
    net, noise = GaussianModel(MEAN, STD, Flow(), "flow_prediction", learned=True), torch.randn(4, 3)
    sample = Rollout(even(3), ode)(net, noise, COND, draw(), stop=stop, grad=grad)
    mine = torch.autograd.grad(sample.x.square().mean(), list(net.parameters()))
    x = noise
    for i, (t, s) in enumerate([(1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, stop)]):
        if i == 3 - grad:
            x = x.detach()
        x = x + (s - t) * net(x, torch.full((4,), t), COND).value
    theirs = torch.autograd.grad(x.square().mean(), list(net.parameters()))
    assert torch.allclose(torch.stack(mine), torch.stack(theirs), rtol=1e-5, atol=1e-7)


def test_fresh_noise_differs_by_step_and_purpose_and_not_by_batch() -> None:
    net, noise, rollout = GaussianModel(MEAN, STD, Flow(), "flow_prediction"), torch.randn(6, 3), Rollout(even(3))
    whole = rollout(net, noise, COND, draw(6)).x0
    parts = [rollout(net, noise[ids], COND, Draw(3, 0, ids)).x0 for ids in torch.arange(6).chunk(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert (rollout(net, noise, COND, draw(6), purpose="other").x0 - whole).abs().max() > 0.01
    asked: list[str] = []

    class Listener(Draw):
        def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
            asked.append(purpose)
            return super().normal(purpose, shape)

    rollout(net, noise, COND, Listener(3, 0, torch.arange(6)))
    assert len(asked) == len(set(asked)) == 2
    asked.clear()
    Rollout(even(3), ode)(net, noise, COND, Listener(3, 0, torch.arange(6)))
    assert asked == []


@pytest.mark.parametrize("name", get_args(TransitionName))
def test_every_name_is_a_transition(name: TransitionName) -> None:
    net, noise = GaussianModel(MEAN, STD, Flow(), "flow_prediction"), torch.randn(4, 3)
    own = {"renoise": renoise, "cps": cps(0.3), "gamma": GammaJump(0.3), "reuse": reuse}.get(name, ode)
    named, direct = (Rollout(even(3), step)(net, noise, COND, draw()).x0 for step in (transition(name, 0.3), own))
    assert torch.equal(named, direct)
