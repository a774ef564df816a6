from __future__ import annotations

import pytest
import torch
from oracle import (
    Line,
    Recorder,
    Student,
    adam,
    at,
    gaussian_triad,
    learn,
    made,
    play,
    players_for,
    told_batch,
    walk,
    whitened,
)
from torch import Tensor

from fewstep import pairs
from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import VP, Flow, add_noise
from fewstep.core.times import Step, Times
from fewstep.models.backbone import Backbone, Remapped
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.rectified_flow import Config, Objective
from fewstep.rollout import Rollout, ode, renoise

MEAN, STD = 0.4, 0.5


class Straight(Backbone):
    """E[z - x | x_t] on the lines of the pairs (z, m + s z): x_t names its z, and v = (1 - s) z - m is a line's."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = Flow(), "flow_prediction"
        self.tilt = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        when = t[:, None]
        z = (x_t - (1 - when) * MEAN) / ((1 - when) * STD + when)
        value = (1 - STD) * z - MEAN + self.tilt[0] + self.tilt[1] * x_t
        return Prediction(value, self.kind, x_t, t, self.schedule)


def straightness(net: Backbone, noise: Tensor, steps: int = 200) -> float:
    """S = int E |(Z_1 - Z_0) - v(Z_t, t)|^2 dt along the student's own ODE from t = 1 to 0 by the midpoint rule."""
    x, rows, velocities = noise, torch.ones(len(noise)), []
    with torch.no_grad():
        for i in range(steps):
            t, h = 1 - i / steps, 1 / steps
            middle = x - 0.5 * h * net(x, t * rows, Condition()).velocity
            velocities.append(net(middle, (t - 0.5 * h) * rows, Condition()).velocity)
            x = x - h * velocities[-1]
    return sum((noise - x - v).square().mean().item() for v in velocities) / steps


def exact_pair(noise: Tensor) -> Pair:
    """The Gaussian teacher's ODE in closed form: z -> m + s z."""
    return Pair(noise, MEAN + STD * noise, Condition())


def objective(generator: Backbone, **changes: object) -> Objective:
    """For a student of one step."""
    return Objective(Config(**changes), Triad(generator), walk((1.0,), ode))  # type: ignore[arg-type]


def test_straightness_of_a_gaussian_before_and_after() -> None:
    """.2145 for s = .5 (method notes, 7.3), and nothing after the exact reflow, which keeps the coupling."""
    (noise,) = whitened(1)
    before, after = GaussianModel(MEAN, STD, Flow(), "flow_prediction"), Straight()
    assert straightness(before, noise) == pytest.approx(0.2145, abs=1e-4)
    assert straightness(after, noise) < 1e-9
    assert made(after, (1.0,)) == pytest.approx((MEAN, STD), rel=1e-5)  # so one Euler step is enough
    assert made(before, (1.0,))[1] == pytest.approx(0, abs=1e-6)  # where the teacher's gives the mean alone


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_the_exact_reflow_has_no_loss(t: float) -> None:
    (noise,) = whitened(1)
    turn = play(objective(Straight(), times=at(t)), told_batch(noise, noise, pair=exact_pair(noise)))["generator"]
    assert turn.loss < 1e-10
    assert turn.gradients["generator.tilt"].abs().max() < 1e-5


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_minimiser_is_the_mean_velocity(t: float) -> None:
    """On a coupling of independent z and x ~ N(m, s^2) it is the flow of that Gaussian, and the loss is s^2 / V.

    V = (1 - t)^2 s^2 + t^2, and s^2 / V is Var(z - x | x_t).
    """
    noise, data = whitened(2)
    net = GaussianModel(MEAN, STD, Flow(), "flow_prediction", learned=True)
    batch = told_batch(noise, noise, pair=Pair(noise, MEAN + STD * data, Condition()))
    turn = play(objective(net, times=at(t)), batch)["generator"]
    assert turn.loss == pytest.approx(STD**2 / ((1 - t) ** 2 * STD**2 + t**2), rel=1e-5)
    assert (turn["generator.mean"], turn["generator.log_std"]) == pytest.approx((0, 0), abs=1e-5)


def test_the_noise_of_the_batch_plays_no_part() -> None:
    noise, stored = whitened(2)
    net = GaussianModel(MEAN, STD, Flow(), "flow_prediction", learned=True)
    for phase in ("reflow", "distill"):
        losses = {
            play(objective(net, phase=phase), told_batch(z, z, pair=exact_pair(stored)))["generator"].loss
            for z in (noise, noise + 1)
        }
        assert len(losses) == 1 and losses.pop() > 1e-3


def test_a_vp_teacher_is_trained_as_the_flow_it_stands_for(vp: VP) -> None:
    """v = eps - x0 at the same sigma / alpha: equal to the exact flow Gaussian to 2e-5 up to t = .93.

    The last level of this schedule has sigma / alpha = 14.6, t = .936.
    """
    inner = GaussianModel(MEAN, STD, vp, "epsilon", learned=True)
    flow, exact = objective(inner).flow, GaussianModel(MEAN, STD, Flow(), "flow_prediction")
    assert isinstance(flow, Remapped) and isinstance(flow.schedule, Flow)
    noise, data = whitened(2)
    t = torch.linspace(0.01, 0.93, len(noise))
    x_t = add_noise(Flow(), MEAN + STD * data, noise, t)
    assert (flow(x_t, t, Condition()).velocity - exact(x_t, t, Condition()).velocity).abs().max() < 2e-5
    for phase_t in (0.1, 0.5, 0.9):
        pair = Pair(noise, MEAN + STD * data, Condition())
        turns = [
            play(objective(net, times=at(phase_t)), told_batch(noise, noise, pair=pair))["generator"]
            for net in (inner, GaussianModel(MEAN, STD, Flow(), "flow_prediction", learned=True))
        ]
        assert turns[0].loss == pytest.approx(turns[1].loss, rel=1e-5)
        assert (turns[0]["generator.mean"], turns[0]["generator.log_std"]) == pytest.approx((0, 0), abs=2e-5)


def test_a_flow_network_is_trained_as_it_is() -> None:
    net = GaussianModel(MEAN, STD, Flow(), "flow_prediction")
    assert objective(net).flow is net


@pytest.mark.parametrize("process", ["flow", "vp_linear", "edm"])
def test_distillation_in_one_step_sees_exactly_the_stored_noise(process: str, processes) -> None:
    """As the rollout does: unit noise times the schedule's deviation, though sigma at t = 1 may be less than one."""
    schedule = processes[process]
    noise, stored = whitened(2)
    net = Recorder(GaussianModel(MEAN, STD, schedule, "epsilon"))
    distil = objective(net, phase="distill")
    list(distil.turns(told_batch(noise, noise, pair=exact_pair(stored)), 0))
    draw = Draw(0, 0, torch.arange(len(noise)))
    distil.rollout(net, stored, Condition(), draw)
    (trained, told), (sampled, asked) = net.seen
    assert torch.equal(trained, stored * schedule.prior_std)
    assert torch.equal(trained, sampled) and torch.equal(told, asked)


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_distillation_compares_what_the_rollout_makes(kind: Kind) -> None:
    """Also where the network is told another time than the level its answer is read at, as some schedulers do."""
    noise, stored = whitened(2)
    net = GaussianModel(MEAN, STD, Flow(), kind)
    rollout = Rollout([Step(told=1.0, level=0.9)], ode)
    (turn,) = Objective(Config(phase="distill"), Triad(net), rollout).turns(
        told_batch(noise, noise, pair=exact_pair(stored)), 0
    )
    made = rollout(net, stored, Condition(), Draw(0, 0, torch.arange(len(noise)))).x0
    assert turn.loss.item() == pytest.approx((made - exact_pair(stored).x0).square().mean().item(), rel=1e-6)
    assert turn.loss > 1e-3


def test_distillation_in_several_steps_sees_the_lines_of_the_pairs() -> None:
    """At step i x_t = (1 - t_i) x + t_i z, each sample at a step of its own, and the clean sample is the answer."""
    times = (1.0, 0.75, 0.5, 0.25)
    student = Student(Flow(), [(0.1 * i, 0.3 + 0.1 * i) for i in range(4)], times)
    draw = Draw(0, 0, torch.arange(256))
    stored = draw.normal("stored", (32,))
    batch = Batch(draw.normal("noise", (32,)), Condition(), draw, pair=exact_pair(stored))
    distil = Objective(Config(phase="distill", distance="l1"), Triad(student), walk(times, ode))
    loss = play(distil, batch)["generator"].loss
    x_t = student.seen[0]
    lines = torch.stack([add_noise(Flow(), MEAN + STD * stored, stored, torch.full((256,), t)) for t in times])
    lines[0] = stored
    distances, index = (lines - x_t).abs().mean(2).min(0)
    assert distances.max() < 1e-6
    counts = index.bincount(minlength=4).double()
    assert ((counts - 64) ** 2 / 64).sum() < 16.3  # three degrees of freedom, one in a thousand
    answer = student.mean[index, None] + student.std[index, None] * x_t
    assert loss == pytest.approx((answer - MEAN - STD * stored).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_distillation_of_own_states_answers_for_the_whole_walk(window: int) -> None:
    """The loss is that of the rollout's end, and its gradient reaches the last `window` steps, as autograd has it."""
    times = (1.0, 0.75, 0.5, 0.25)
    affine = [(0.1 * i, 0.3 + 0.1 * i) for i in range(4)]
    student, mirror = Student(Flow(), affine, times), Student(Flow(), affine, times)
    draw = Draw(0, 0, torch.arange(64))
    stored = draw.normal("stored", (32,))
    batch = Batch(draw.normal("noise", (32,)), Condition(), draw, pair=exact_pair(stored))
    config = Config(phase="distill", states="own", exits=Exits(law="last", window=window))
    turn = play(Objective(config, Triad(student), walk(times, ode)), batch)["generator"]
    x = stored
    for i, (t, after) in enumerate(zip(times, (*times[1:], 0.0), strict=True)):
        x0 = mirror.mean[i] + mirror.std[i] * x
        eps = (x - (1 - t) * x0) / t
        x = (1 - after) * x0 + after * eps
        x = x if i >= 4 - window else x.detach()
    loss = (x - MEAN - STD * stored).square().mean()
    loss.backward()
    assert turn.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in mirror.named_parameters():
        found = turn.gradients[f"generator.{name}"]
        assert torch.allclose(found, weight.grad, rtol=1e-4, atol=1e-7) and found.count_nonzero() == window


def test_one_step_of_own_states_is_the_plain_distillation() -> None:
    noise, stored = whitened(2)
    student, batch = Student(Flow(), [(0.1, 0.3)]), told_batch(noise, noise, pair=exact_pair(stored))
    own, line = (play(objective(student, phase="distill", states=s), batch)["generator"] for s in ("own", "line"))
    assert own.loss == line.loss and own.loss > 1e-3
    assert all(torch.equal(own.gradients[name], line.gradients[name]) for name in line.gradients)


def test_own_states_want_a_walk_that_the_noise_decides() -> None:
    with pytest.raises(UserError, match=r"objective\.states=own .* set model\.transition=ode"):
        Objective(
            Config(phase="distill", states="own"), Triad(Student(Flow(), [(0.0, 1.0)])), walk((1.0, 0.5), renoise)
        )


def test_distillation_ends_at_the_teachers_own_coupling() -> None:
    """E (a + b z - (m + s z))^2 = (a - m)^2 + (b - s)^2: the gradient vanishes at (m, s) alone."""
    (stored,) = whitened(1)
    for law, gradient in (((MEAN, STD), (0.0, 0.0)), ((-0.5, 1.3), (2 * (-0.5 - MEAN), 2 * (1.3 - STD)))):
        triad = gaussian_triad(Flow(), "flow_prediction", student=law)
        distil = Objective(Config(phase="distill"), triad, walk((1.0,)))
        turn = play(distil, told_batch(stored, stored, pair=exact_pair(stored)))["generator"]
        assert (turn["generator.mean"], turn["generator.std"]) == pytest.approx(gradient, abs=1e-5)
        assert turn.loss == pytest.approx((law[0] - MEAN) ** 2 + (law[1] - STD) ** 2, abs=1e-6)


def teacher_pairs(dims: int) -> pairs.Pairs:
    """4096 pairs by 40 Euler steps of the teacher, as a run makes them."""
    teacher = GaussianModel(MEAN, STD, Flow(), "flow_prediction")
    ladder = tuple((torch.arange(40, 0, -1) / 40).tolist())
    return pairs.make_pairs(teacher, walk(ladder, ode), lambda rows: Condition(), (dims,), 4096, seed=3)


def test_pairs_are_the_teachers_map() -> None:
    """40 Euler steps multiply z by prod (1 - h c(t)), c the slope of v: .4818 where the ODE itself has s = .5."""
    stored, rate = teacher_pairs(8), 1.0
    for i in range(40):
        t = 1 - i / 40
        rate *= 1 - (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) / 40
    pair = stored.of(Draw(0, 5, torch.arange(512)))
    assert rate == pytest.approx(0.4818, abs=1e-4)
    assert torch.allclose(pair.x0, MEAN + rate * pair.noise, atol=1e-5)
    assert torch.equal(stored.of(Draw(0, 5, torch.arange(512))).x0, pair.x0)


def test_paths_are_states_of_the_teachers_walk() -> None:
    """At levels .5, its own, and .33, put between two of its 40: x_t = a z + b, the product over the Euler steps."""
    teacher = GaussianModel(MEAN, STD, Flow(), "flow_prediction")
    ladder = (torch.arange(40, 0, -1) / 40).tolist()
    walked = pairs.through(walk(tuple(ladder), ode), [Step(0.5, 0.5), Step(0.33, 0.33)])
    assert [step.level for step in walked.steps] == sorted({*ladder, 0.33}, reverse=True)
    stored = pairs.make_pairs(teacher, walked, lambda rows: Condition(), (8,), 64, seed=3, kept=[0.5, 0.33])
    assert stored.path is not None and stored.path.shape == (64, 2, 8)
    pair = stored.of(Draw(0, 5, torch.arange(32)))
    levels = [step.level for step in walked.steps]
    scale, offset = 1.0, 0.0
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        if t in (0.5, 0.33):
            assert torch.allclose(pair.path[:, int(t == 0.33)], offset + scale * pair.noise, atol=1e-5)
        slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        scale, offset = (
            scale * (1 + (s - t) * slope),
            offset * (1 + (s - t) * slope) - (s - t) * MEAN * (1 + (1 - t) * slope),
        )
    assert torch.allclose(pair.x0, offset + scale * pair.noise, atol=1e-5)


def test_distillation_on_paths_learns_the_map_from_every_step() -> None:
    """x0 as an affine function of the teacher's own state, two steps: 1.5 %, where on lines the second is another."""
    teacher = GaussianModel(MEAN, STD, Flow(), "flow_prediction")
    long = walk(tuple((torch.arange(40, 0, -1) / 40).tolist()), ode)
    stored = pairs.make_pairs(teacher, long, lambda rows: Condition(), (8,), 4096, seed=3, kept=[0.5])
    assert stored.path is not None
    student = Student(Flow(), [(-0.5, 1.3), (-0.5, 1.3)], (1.0, 0.5))
    distil = Objective(Config(phase="distill", states="teacher"), Triad(student), walk((1.0, 0.5), ode))
    learn(distil, players_for(distil, adam(2e-2, 700)), 700, shape=(8,), extra=lambda draw: {"pair": stored.of(draw)})
    for i, x in enumerate((pairs.noise_of(3, torch.arange(4096), (8,)), stored.path[:, 0])):
        slope = ((x - x.mean()) * (stored.x0 - stored.x0.mean())).mean() / x.var(correction=0)
        assert student.std[i].item() == pytest.approx(slope.item(), rel=0.015)
        assert student.mean[i].item() == pytest.approx((stored.x0.mean() - slope * x.mean()).item(), rel=0.015)


def test_reflow_straightens_and_keeps_the_marginal() -> None:
    """S from .2145 to below .003 in 800 moves; one Euler step then makes the pairs' law within 3 %."""
    stored, (noise,) = teacher_pairs(8), whitened(1)
    student = Line(Flow(), "flow_prediction")
    reflow = objective(student, times=Times())
    players = players_for(reflow, adam(1e-2, 800))
    learn(reflow, players, 800, shape=(8,), extra=lambda draw: {"pair": stored.of(draw)})
    assert straightness(student, noise) < 0.003
    before = (stored.x0 - pairs.noise_of(stored.seed, torch.arange(len(stored)), stored.x0.shape[1:])).square().mean()
    x, steps = noise, 100
    with torch.no_grad():
        for i in range(steps):
            x = x - student(x, torch.full((len(x),), 1 - i / steps), Condition()).velocity / steps
    assert (noise - x).square().mean() < 1.02 * before  # no convex cost of transport grows by reflow
    law = (stored.x0.mean().item(), stored.x0.std().item())
    for times in ((1.0,), (1.0, 0.75, 0.5, 0.25)):
        assert made(student, times, ode) == pytest.approx(law, rel=0.03)
    assert made(student, (1.0, 0.5), renoise)[0] == pytest.approx(MEAN, rel=0.1)


def test_distillation_learns_the_one_step_map() -> None:
    """The teacher's 40 Euler steps in one: mean and deviation of the pairs within 1 %."""
    stored = teacher_pairs(8)
    triad = gaussian_triad(Flow(), "flow_prediction", student=(-0.5, 1.3))
    distil = Objective(Config(phase="distill"), triad, walk((1.0,)))
    learn(distil, players_for(distil, adam(2e-2, 500)), 500, shape=(8,), extra=lambda draw: {"pair": stored.of(draw)})
    student = triad.generator
    law = (stored.x0.mean().item(), stored.x0.std().item())
    assert (student.mean.item(), student.std.item()) == pytest.approx(law, rel=0.01)  # type: ignore[operator]
