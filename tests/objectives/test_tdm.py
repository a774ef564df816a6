from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Law,
    Line,
    Renamed,
    Student,
    adam,
    at,
    exact_law,
    gaussian_triad,
    keep_critic_exact,
    learn,
    one_step,
    play,
    players_for,
    told_batch,
    walk,
    whitened,
)
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.core.times import Step, Times
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import dmd, phased_dmd
from fewstep.objectives.base import Triad
from fewstep.objectives.tdm import Config, Objective, importance
from fewstep.rollout import Rollout, ode, renoise

FOUR = (1.0, 0.75, 0.5, 0.25)
EXACT_SLOPE = 0.022092  # of x0 in x_.7 behind one DDIM step .9 -> .4 of the exact N(.7, .5^2): the step's own score
REGRESSION_SLOPE = 0.011696  # of the step's prediction in the same x_.7
DATA: Law = (0.7, 0.5)


def objective_of(path: tuple[float, ...] = FOUR, schedule: NoiseSchedule | None = None, **changes: Any) -> Objective:
    schedule = schedule or Flow()
    base = gaussian_triad(schedule, "sample", critic=(0.2, 0.9))
    triad = Triad(Student(schedule, [STUDENT] * len(path), path), base.real_score, base.fake_score)
    return Objective(Config(**changes), triad, walk(path, ode))


def drawn(step: int, rows: int = 16, kind: type[Draw] = Renamed) -> Batch:
    draw = kind(0, step, torch.arange(rows))
    return Batch(draw.normal("noise", (32,)), Condition(), draw)


def same(one: Objective, other: Any, step: int, players: tuple[str, ...] = ("generator", "fake_score")) -> None:
    """Losses and every gradient to 1e-5, from the same draws."""
    first, second = (play(objective, drawn(step), step) for objective in (one, other))
    for player in players:
        assert first[player].loss == pytest.approx(second[player].loss, rel=1e-5)
        for name, gradient in second[player].gradients.items():
            assert gradient.abs().max() > 1e-6
            assert torch.allclose(first[player].gradients[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("target", ["clean", "bridge"])
def test_one_step_is_dmd(target: str, vp: NoiseSchedule) -> None:
    for schedule in (Flow(), vp):
        ours = objective_of((1.0,), schedule, critic_target=target, huber=0.0)
        theirs = dmd.Objective(dmd.Config(regression=0, critic_times=Times(low=0.02)), ours.triad, one_step())
        for step in range(3):
            same(ours, theirs, step)


def test_with_one_step_the_papers_critic_is_dmds_weighted_by_snr() -> None:
    """x makes x_t itself, so the importance is 1: min(SNR, 5) |F - x|^2 is left."""
    noise, eps = whitened(2)
    for t in (0.2, 0.6):
        ours = objective_of((1.0,), critic_times=at(t))
        theirs = dmd.Objective(dmd.Config(regression=0, critic_times=at(t)), ours.triad, one_step())
        one, other = (play(o, told_batch(noise, eps))["fake_score"] for o in (ours, theirs))
        assert one.loss == pytest.approx(min(((1 - t) / t) ** 2, 5.0) * other.loss, rel=1e-4)


def test_up_to_one_with_the_bridge_it_is_phased_dmd_with_a_phase_for_every_step() -> None:
    """Where the exits of both say the same step: ours are drawn, those of the phases take turns."""
    ours = objective_of(own_interval=False, critic_target="bridge", huber=0.0)
    theirs = phased_dmd.Objective(phased_dmd.Config(phases=4, ratio=1), ours.triad, ours.rollout)
    met = 0
    for step in range(20):
        if ours.sample(drawn(step), step, False).index == step % 4:
            same(ours, theirs, step)
            met += 1
    assert met >= 3


def test_the_pseudo_huber_bounds_the_gradient() -> None:
    """d / sqrt(d^2 + c^2) in place of d = F - R, over the same mean |x - R|."""
    noise, eps = whitened(2)
    batch, found = told_batch(noise, eps), {}
    for c in (0.0, 0.5, 5.0):
        objective = objective_of((1.0,), huber=c, times=at(0.6))
        sample = objective.sample(batch, 0, grad=True)
        (found[c],) = torch.autograd.grad(objective.generator_loss(batch, sample, 0)[0], sample.x0)
    x, rows = sample.x0.detach(), torch.full((64,), 0.6)
    with torch.no_grad():
        real, fake = (
            net(0.4 * x + 0.6 * eps, rows, Condition()).x0
            for net in (objective.triad.real_score, objective.triad.fake_score)
        )
    gap = fake - real
    for c in (0.5, 5.0):
        assert torch.allclose(found[c], found[0.0] / (gap.square() + c * c).sqrt(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("own", [True, False])
def test_every_step_is_matched_on_its_own_interval(own: bool, vp: NoiseSchedule) -> None:
    for schedule in (Flow(), vp):
        objective = objective_of(FOUR, schedule, own_interval=own)
        seen = set()
        for step in range(30):
            batch = drawn(step, 256, Draw)
            sample = objective.sample(batch, step, grad=True)
            high, low = FOUR[sample.index], (*FOUR[1:], 0.0)[sample.index]
            assert sample.t.unique().tolist() == [high] and sample.s.unique().tolist() == [low]
            mean = objective.triad.generator.mean
            assert torch.autograd.grad(sample.x.sum(), mean)[0].nonzero().flatten().tolist() == [sample.index]
            for times in (objective.config.times, objective.config.critic_times):
                t, top = objective.time(batch, sample, "tdm.t", times), high if own else 1.0
                assert (t > low).all() and (t <= top).all()
                assert t.mean().item() == pytest.approx((low + top) / 2, abs=0.08 * (top - low))
            seen.add(sample.index)
        assert seen == {0, 1, 2, 3}


class Affine(Backbone):
    """x0 = shift + slope x_t at every time."""

    def __init__(self, shift: float, slope: float):
        super().__init__()
        self.schedule, self.kind = Flow(), "sample"
        self.shift, self.slope = (nn.Parameter(torch.tensor(value)) for value in (shift, slope))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        return Prediction(self.shift + self.slope * x_t, self.kind, x_t, t, self.schedule)


def ddim_step() -> tuple[float, float, float, float]:
    """One DDIM step .9 -> .4 of the exact N(.7, .5^2): x0 = m + k z and x_.4 = .6 m + j z with z ~ N(0, 1).

    (k, j), and Cov(x0, x_.7) / Var(x_.7) for x_.7 = x_.4 / 2 + b eps, and for x_.7 = .3 x0 + .7 eps.
    """
    std = DATA[1]
    law = (0.1 * std) ** 2 + 0.9**2
    k = 0.1 * std**2 / law**0.5
    j = 0.6 * k + 0.4 * (law**0.5 - 0.1 * k) / 0.9
    b = 0.7**2 - 0.5**2 * 0.4**2
    return k, j, 0.5 * k * j / (0.25 * j**2 + b), 0.3 * k**2 / (0.09 * k**2 + 0.49)


def critic_of_a_ddim_step(slope: float, target: str, eps: Tensor, noise: Tensor, shift: float | None = None) -> Any:
    """What the first step, .9 -> .4, of the exact student leaves of an affine critic's gradient at t = .7."""
    m, std = DATA
    student, teacher = GaussianModel(m, std, Flow(), "sample"), gaussian_triad(Flow(), "sample").real_score
    critic = Affine(m - slope * 0.3 * m if shift is None else shift, slope)
    config = Config(critic_target=target, critic_times=at(0.6), importance=False)  # .4 + .6 (.9 - .4) = .7
    objective = Objective(config, Triad(student, teacher, critic), walk((0.9, 0.4), ode))
    batch = told_batch(0.1 * m + ((0.1 * std) ** 2 + 0.81) ** 0.5 * noise, eps)
    loss, _ = objective.critic_loss(batch, objective.sample(batch, 0, False).detach(), 0)
    return torch.autograd.grad(loss, (critic.shift, critic.slope))


def test_slopes_of_the_three_targets_in_closed_form() -> None:
    """The bridge finds the step's own score; x0 after a step is no draw that belongs to it, so its regression does not,
    and clean samples, which are another law, have a slope of their own. The data's would be .146341."""
    noise, eps = whitened(2)
    _, j, regression, clean = ddim_step()
    own = (1 - 0.49 / (0.25 * j**2 + 0.49 - 0.25 * 0.16)) / 0.3
    assert (own, regression) == pytest.approx((EXACT_SLOPE, REGRESSION_SLOPE), abs=1e-6)
    for target, slope in (("bridge", own), ("pred_x0", regression), ("clean", clean)):
        left = critic_of_a_ddim_step(slope, target, eps, noise)
        assert [g.item() for g in left] == pytest.approx([0, 0], abs=1e-5)
        assert abs(critic_of_a_ddim_step(slope + 1e-3, target, eps, noise)[1]) > 1e-4


def test_importance_is_the_ratio_of_densities_of_a_mean_coordinate() -> None:
    """Against torch's own normal; 1 where x itself was noised."""
    x, state, eps = (torch.randn(4, 32) for _ in range(3))
    t = torch.full((4,), 0.7)
    x_t = 0.5 * state + 0.67 * eps
    normal = torch.distributions.Normal(0.0, 1.0)
    densities = (normal.log_prob((x_t - 0.3 * x) / 0.7) - normal.log_prob(eps)).mean(1).exp()
    assert torch.allclose(importance(Flow(), x, x_t, t, eps)[:, 0], densities, rtol=1e-5)
    assert torch.allclose(importance(Flow(), x, 0.3 * x + 0.7 * eps, t, eps), torch.ones(4, 1), atol=1e-5)


def test_importance_weighs_rows_of_the_papers_critic() -> None:
    objective, batch = objective_of(), drawn(1)
    sample = objective.sample(batch, 1, False).detach()
    assert sample.s[0] > 0
    weighted = objective.critic_loss(batch, sample, 1)[0]
    objective.config.importance = False
    assert abs(weighted / objective.critic_loss(batch, sample, 1)[0] - 1) > 1e-3


def test_a_step_asks_each_network_once() -> None:
    objective = objective_of((1.0,))
    calls = []
    for name in ("generator", "real_score", "fake_score"):
        getattr(objective.triad, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    play(objective, drawn(0))
    assert sorted(calls) == ["fake_score", "fake_score", "generator", "real_score"]


@pytest.mark.parametrize("wrong", [{"ratio": 0}, {"huber": -1.0}])
def test_contradictions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"objective\.ratio is at least 1 and objective\.huber at least 0"):
        Config(**wrong)


def test_a_path_with_fresh_noise_and_a_singular_bridge_are_refused() -> None:
    triad = gaussian_triad(Flow(), "sample")
    with pytest.raises(UserError, match=r"set model\.transition=ode"):
        Objective(Config(), triad, walk(FOUR, renoise))
    Objective(Config(), triad, one_step())
    for wrong in ({"times": Times()}, {"critic_times": Times()}):
        Objective(Config(**wrong), triad, one_step())
        with pytest.raises(UserError, match="the bridge from s to t is singular"):
            Objective(Config(**wrong), triad, walk(FOUR, ode))


def laws(objective: Objective) -> list[Law]:
    """The clean law behind the state that every step hands on."""
    rollout, student = objective.rollout, objective.triad.generator
    assert isinstance(student, Student)
    return [exact_law(student, rollout, i, rollout.level_after(i), fresh=False) for i in range(len(rollout))]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "path, huber", [((1.0,), 1e-3), *(pytest.param(path, 0.0, marks=SLOW) for path in ((1.0,), FOUR))]
)
def test_learns_the_teacher(path: tuple[float, ...], huber: float) -> None:
    """Every step's law within 2 % with an exact critic; the default bends the gradient to its sign."""
    objective, moves = objective_of(path, huber=huber), 100 + 250 * len(path)
    keep_critic_exact(objective, fresh=False)
    learn(objective, players_for(objective, adam(2e-2, moves), adam(1e-9)), moves, size=64)
    for law in laws(objective):
        assert law == pytest.approx(TEACHER, rel=0.02)


@SLOW
def test_learns_the_teacher_with_one_learned_critic_for_both_intervals() -> None:
    """A line in x for every time tells the two steps apart, for their times do not meet: within 4 %."""
    torch.manual_seed(0)
    base = gaussian_triad(Flow(), "flow_prediction")
    triad = Triad(Student(Flow(), [STUDENT] * 2, (1.0, 0.5)), base.real_score, Line(Flow(), "flow_prediction"))
    objective = Objective(Config(critic_target="bridge", ratio=5), triad, walk((1.0, 0.5), ode))
    learn(objective, players_for(objective, adam(1e-2, 800), adam(5e-3)), 4000)
    for law in laws(objective):
        assert law == pytest.approx(TEACHER, rel=0.04)


class Heard(GaussianModel):
    """Whose mean is the share of the dial `steps`, and that keeps what it was told."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.7, Flow(), "flow_prediction", learned=True)
        self.heard: list[float] = []

    def forward(self, x_t, t, cond, **asked):
        self.heard.append(float(cond.dials["steps"][0]))
        return super().forward(x_t, t, Condition(), **asked)


def test_several_numbers_of_steps_are_learnt_at_once() -> None:
    """Every step picks one of them; generator and critic are told its inverse, the teacher nothing; each walk takes the
    steps of a student of that number alone."""
    generator, critic = Heard(), Heard()
    teacher = Guided(GaussianModel(1.0, 0.7, Flow(), "flow_prediction"))
    four = Rollout([Step(level, level) for level in (1.0, 0.75, 0.5, 0.25)], ode, count=4)
    objective = Objective(Config(counts=[1, 2, 4]), Triad(generator, teacher, critic), four)
    assert [[step.level for step in walk.steps] for walk in objective.walks] == [
        [1.0],
        [1.0, 0.5],
        [1.0, 0.75, 0.5, 0.25],
    ]
    seen = set()
    for step in range(24):
        draw = Draw(0, step, torch.arange(4))
        batch = Batch(draw.normal("noise", (2,)), Condition(), draw)
        generator.heard.clear(), critic.heard.clear()
        assert len(list(objective.turns(batch, step))) == 2
        (share,) = {*generator.heard, *critic.heard}
        assert len(generator.heard) <= round(1 / share)
        seen.add(share)
    assert seen == {1.0, 0.5, 0.25}
    assert four.every(2).count == 2 and Rollout(four.steps, ode).every(2).count is None


def test_a_number_of_steps_that_does_not_fit_is_refused() -> None:
    net = GaussianModel(1.0, 0.7, Flow(), "flow_prediction")
    with pytest.raises(UserError, match=r"divisors of model\.steps, 4, but 3 was given"):
        Objective(Config(counts=[3]), Triad(net, Guided(net), net), walk((1.0, 0.75, 0.5, 0.25), ode))
