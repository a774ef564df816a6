from __future__ import annotations

import pytest
import torch
from oracle import (
    CASE_NAMES,
    CASES,
    FIXTURE_VP,
    STUDENT,
    TEACHER,
    Law,
    Renamed,
    Student,
    adam,
    at,
    exact_law,
    gaussian_triad,
    jump,
    keep_critic_exact,
    kl_gradient,
    learn,
    noise_between,
    one_step,
    play,
    players_for,
    told_batch,
    walk,
    whitened,
)

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, add_noise, vp_from_betas
from fewstep.core.times import Times
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel, MixtureModel
from fewstep.objectives import dmd
from fewstep.objectives.base import Triad
from fewstep.objectives.phased_dmd import Config, Objective
from fewstep.objectives.pieces.score_gap import noised
from fewstep.rollout import ode

FOUR = (1.0, 0.75, 0.5, 0.25)
PHASED_GRADIENT = (-0.421269, 0.076442)  # flow, s = .4, t = .7, teacher N(1, .7^2), x_s = -.3 + .9 z
FIXTURE_P = (0.7, 0.5)
VP_FINE = vp_from_betas("scaled_linear", 0.00085, 0.012)

FLOWS: list[tuple[NoiseSchedule, Kind, float, float]] = [
    (Flow(), "flow_prediction", 0.4, 0.7),
    (Flow(), "sample", 0.4, 0.7),
    (Flow(), "epsilon", 0.4, 0.7),
    (FIXTURE_VP, "epsilon", 0.5, 0.75),
    (FIXTURE_VP, "sample", 0.5, 0.75),
    (FIXTURE_VP, "v_prediction", 0.5, 0.75),
]
FLOW_NAMES = [f"{type(schedule).__name__}-{kind}" for schedule, kind, _, _ in FLOWS]


def share(s: float, t: float) -> Times:
    """Times that give exactly t in (s, 1) to a draw that says 0.5."""
    return at((t - s) / (1 - s))


def between(schedule: NoiseSchedule, kind: Kind, s: float, t: float, state: Law, teacher: Law, **changes) -> Objective:
    """Phase 1 of 2, whose single step hands on x_s of the law `state`; the critic knows the clean law behind it."""
    toward, keep = jump(schedule, 1.0, s)
    student = Student(schedule, [(state[0] / toward, (state[1] - keep) / toward), STUDENT], (1.0, s))
    rollout = walk((1.0, s), ode)
    critic = GaussianModel(*exact_law(student, rollout, 0, s, fresh=False), schedule, kind, learned=True)
    times = {"times": share(s, t), "critic_times": share(s, t), "weight": "snr", "phases": 2, "phase": 1}
    triad = Triad(student, Guided(GaussianModel(*teacher, schedule, kind)), critic)
    return Objective(Config(**{**times, **changes}), triad, rollout)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule, kind, t", CASES, ids=CASE_NAMES)
def test_with_one_phase_the_gradient_is_that_of_the_kl(schedule: NoiseSchedule, kind: Kind, t: float) -> None:
    noise, eps = whitened(2)
    config = Config(phases=1, weight="snr", times=at(t), critic_times=at(t))
    played = play(Objective(config, gaussian_triad(schedule, kind), one_step()), told_batch(noise, eps))
    turn, critic = played["generator"], played["fake_score"]
    assert (turn["generator.mean"], turn["generator.std"]) == pytest.approx(kl_gradient(schedule, t), abs=1e-5)
    assert turn.touched() == {"generator"} and critic.touched() == {"fake_score"}
    assert (critic["fake_score.mean"], critic["fake_score.log_std"]) == pytest.approx((0, 0), abs=2e-6)


def state_gradient(schedule: NoiseSchedule, s: float, t: float, state: Law, teacher: Law) -> Law:
    """dKL(q_t || p_t) / d(mean, deviation) of x_s, with x_t = a x_s + b eps: a^2 (m - alpha_s m_r) / V_p and so on."""
    alpha, sigma = (v.item() for v in schedule.coefficients(torch.tensor([t], dtype=torch.float64))[:2])
    alpha_s = schedule.coefficients(torch.tensor([s], dtype=torch.float64))[0].item()
    a, b = noise_between(schedule, s, t)
    of_teacher, of_student = alpha**2 * teacher[1] ** 2 + sigma**2, a**2 * state[1] ** 2 + b**2
    mean = a**2 * (state[0] - alpha_s * teacher[0]) / of_teacher
    return mean, a**2 * state[1] * (1 / of_teacher - 1 / of_student)


def test_the_closed_form_is_the_phased_fixture() -> None:
    assert state_gradient(Flow(), 0.4, 0.7, (-0.3, 0.9), TEACHER) == pytest.approx(PHASED_GRADIENT, abs=1e-6)


@pytest.mark.parametrize("schedule, kind, s, t", FLOWS, ids=FLOW_NAMES)
def test_generator_gradient_of_a_phase_that_stops_at_a_noisy_level(
    schedule: NoiseSchedule, kind: Kind, s: float, t: float
) -> None:
    """x_s = A x0 + C x_1, so the gradient in the student's x0 law is A times that in the law of x_s."""
    noise, eps = whitened(2)
    objective = between(schedule, kind, s, t, (-0.3, 0.9), TEACHER)
    turn = play(objective, told_batch(noise, eps))["generator"]
    toward, _ = jump(schedule, 1.0, s)
    mean, std = (gradient / toward for gradient in state_gradient(schedule, s, t, (-0.3, 0.9), TEACHER))
    got = (turn.gradients["generator.mean"] / toward**2, turn.gradients["generator.std"] / toward**2)
    assert (got[0][0].item(), got[1][0].item()) == pytest.approx((mean, std), abs=1e-5)
    assert got[0][1] == 0 and got[1][1] == 0  # the later phase's step is not trained
    assert turn.touched() == {"generator"}


@pytest.mark.parametrize("schedule, kind, s, t", FLOWS, ids=FLOW_NAMES)
def test_the_critic_target_is_unbiased_fixture_p(schedule: NoiseSchedule, kind: Kind, s: float, t: float) -> None:
    """x_s of x0 ~ N(.7, .5^2): a critic that holds exactly this law has no gradient left, though x0 is never made."""
    noise, eps = whitened(2)
    alpha, sigma = (v.item() for v in schedule.coefficients(torch.tensor([s], dtype=torch.float64))[:2])
    state = alpha * FIXTURE_P[0], (alpha**2 * FIXTURE_P[1] ** 2 + sigma**2) ** 0.5
    objective = between(schedule, kind, s, t, state, TEACHER)
    critic = objective.triad.fake_score
    assert (critic.mean.item(), critic.log_std.exp().item()) == pytest.approx(FIXTURE_P, rel=1e-5)
    turn = play(objective, told_batch(noise, eps))["fake_score"]
    assert (turn["fake_score.mean"], turn["fake_score.log_std"]) == pytest.approx((0, 0), abs=1e-5)
    assert turn.touched() == {"fake_score"}


@pytest.mark.parametrize("schedule, kind, s, t", FLOWS, ids=FLOW_NAMES)
def test_the_naive_critic_target_is_biased(
    schedule: NoiseSchedule, kind: Kind, s: float, t: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same test with x_s taken for the clean sample and eps for the noise (eps - x_s for a flow) must fail:
    by 200 times the tolerance at least (least for a flow's eps, whose slope is off by sigma_t / b = 1.04 alone)."""
    noise, eps = whitened(2)
    monkeypatch.setattr(Prediction, "bridge_target", lambda self, x_s, s, eps: self.target(x_s, eps))
    alpha, sigma = (v.item() for v in schedule.coefficients(torch.tensor([s], dtype=torch.float64))[:2])
    state = alpha * FIXTURE_P[0], (alpha**2 * FIXTURE_P[1] ** 2 + sigma**2) ** 0.5
    turn = play(between(schedule, kind, s, t, state, TEACHER), told_batch(noise, eps))["fake_score"]
    assert max(abs(turn["fake_score.mean"]), abs(turn["fake_score.log_std"])) > 2e-3


@pytest.mark.parametrize("t, deviation, weight", [(0.42, 0.1640, 0.269), (0.5, 0.3727, 1.0), (0.7, 0.6708, 1.0)])
def test_the_critic_loss_is_weighted_near_the_end_of_its_interval(t: float, deviation: float, weight: float) -> None:
    """min(1, 10 b^2) times the plain error; s = .4 and t = .42 give b = .164 and weight .27 (method notes, 24)."""
    noise, eps = whitened(2)
    objective = between(Flow(), "flow_prediction", 0.4, t, (0.42, 0.5), TEACHER)
    a, b = noise_between(Flow(), 0.4, t)
    assert b == pytest.approx(deviation, abs=1e-4) and min(1, 10 * b**2) == pytest.approx(weight, abs=1e-3)
    loss = play(objective, told_batch(noise, eps))["fake_score"].loss
    sample = objective.sample(told_batch(noise, eps), 0, False)
    prediction = objective.triad.fake_score(a * sample.x + b * eps, torch.full((len(noise),), t), Condition())
    plain = (prediction.value - prediction.bridge_target(sample.x, sample.s, eps)).square().mean().item()
    assert loss == pytest.approx(min(1, 10 * b**2) * plain, rel=1e-4)


def test_one_phase_is_dmd(vp: NoiseSchedule) -> None:
    """The same draws by their last word: losses and every gradient, one step and four, with the paper's weight."""
    for times in ((1.0,), FOUR):
        student = Student(vp, [STUDENT] * len(times), times)
        base = gaussian_triad(vp, "epsilon", critic=(0.2, 0.9))
        triad = Triad(student, base.real_score, base.fake_score)
        first = Objective(Config(phases=1, ratio=1, critic_times=Times()), triad, walk(times, ode))
        second = dmd.Objective(dmd.Config(ratio=1, regression=0), triad, walk(times, ode))
        for step in range(3):
            draw = Renamed(0, step, torch.arange(16))
            batch = Batch(draw.normal("noise", (32,)), Condition(), draw)
            one, other = play(first, batch, step), play(second, batch, step)
            for player in ("generator", "fake_score"):
                assert one[player].loss == pytest.approx(other[player].loss, rel=1e-6)
                for name, gradient in other[player].gradients.items():
                    assert torch.allclose(one[player].gradients[name], gradient, rtol=1e-5, atol=1e-8)


MIXTURE = torch.tensor([[-1.0], [0.4], [1.5]]), 0.2, torch.tensor([0.5, 0.2, 0.3])
BINS = 24


def misfit(schedule: NoiseSchedule, kind: Kind, s: float, t: float, naive: bool) -> float:
    """Mean over 24 bins of x_t of the squared z-score of (critic target - truth) on 240,000 bridges: 1 if unbiased.

    The truth is the exact output of a network that knows the three Gaussians which the states x_s are noised from.
    """
    draw, (means, std, weights) = Draw(0, 0, torch.arange(240_000)), MIXTURE
    part = torch.bucketize(draw.uniform("part"), weights.cumsum(0)[:-1])
    x0 = means[part] + std * draw.normal("x0", (1,))
    at_s, at_t = (torch.full((len(x0),), time) for time in (s, t))
    x_s = add_noise(schedule, x0, draw.normal("noise", (1,)), at_s)
    eps = draw.normal("eps", (1,))
    truth = MixtureModel(*MIXTURE, schedule, kind)(noised(schedule, x_s, at_s, at_t, eps), at_t, Condition())
    target = truth.target(x_s, eps) if naive else truth.bridge_target(x_s, at_s, eps)
    sorted_errors = (target - truth.value)[truth.x_t[:, 0].argsort(), 0].double().reshape(BINS, -1)
    z = sorted_errors.mean(1) / (sorted_errors.std(1) / sorted_errors.shape[1] ** 0.5)
    return z.square().mean().item()


@pytest.mark.parametrize("s, t", [(0.3, 0.4), (0.25, 0.5), (0.6, 0.8)])
@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "sample", "v_prediction"])
def test_on_a_mixture_the_critic_target_is_the_true_conditional(kind: Kind, s: float, t: float) -> None:
    """24 bins: the mean of their squared z-scores is 1 with a deviation of .29, so at most 2.4 for an unbiased target.

    x_s in the place of the clean sample (eps - x_s for a flow) is told apart from it by more than ten times that.
    """
    schedule = Flow() if kind == "flow_prediction" else VP_FINE
    assert misfit(schedule, kind, s, t, naive=False) < 2.4
    assert misfit(schedule, kind, s, t, naive=True) > 24


def four_steps(**changes) -> Objective:
    base = gaussian_triad(Flow(), "flow_prediction")
    student = Student(Flow(), [STUDENT] * 4, FOUR)
    return Objective(Config(**changes), Triad(student, base.real_score, base.fake_score), walk(FOUR, ode))


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_phases_exit_inside_themselves_and_stop_where_the_next_begins(phase: int) -> None:
    objective = four_steps(phase=phase, ratio=3)
    seen: dict[int, set[int]] = {}
    for step in range(60):
        draw = Draw(0, step, torch.arange(4))
        batch = Batch(draw.normal("noise", (32,)), Condition(), draw)
        sample, part = objective.sample(batch, step, True), objective.phase_of(step)
        assert part == (phase - 1 if phase else (step + 2) // 3 % 2)
        assert sample.s.unique().tolist() == [0.5 if part == 0 else 0.0]
        seen.setdefault(part, set()).add(sample.index)
        student = objective.triad.generator
        trained = torch.autograd.grad(sample.x.sum(), student.mean)[0].nonzero().flatten().tolist()
        assert trained == [sample.index]  # phase 2 never reaches the weights of phase 1
    assert seen == {0: {0: {0, 1}, 1: {2, 3}}, 1: {0: {0, 1}}, 2: {1: {2, 3}}}[phase]


def test_times_lie_above_the_level_where_the_phase_ends() -> None:
    for schedule in (Flow(), FIXTURE_VP):
        for times in (Config().times, Config().critic_times):
            s = torch.full((1000,), 0.5)
            t = times((torch.arange(1000) + 0.5) / 1000, schedule, s)
            assert (t > s).all() and t.max() > 0.9


@pytest.mark.parametrize("wrong", [{"phases": 0}, {"phase": 3}, {"phase": -1}, {"ratio": 0}, {"times": Times()}])
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_steps_must_be_a_multiple_of_the_phases() -> None:
    with pytest.raises(UserError, match="4 steps cannot be shared out to 3 phases"):
        four_steps(phases=3)


def laws(objective: Objective) -> list[Law]:
    """The clean law behind the state that every exit of every phase hands on."""
    rollout, phases = objective.rollout, objective.config.phases
    length = len(rollout) // phases
    stops = [rollout.level_after(index // length * length + length - 1) for index in range(len(rollout))]
    student = objective.triad.generator
    return [exact_law(student, rollout, i, stop, fresh=False) for i, stop in enumerate(stops)]  # type: ignore[arg-type]


def test_learns_the_teacher_with_one_phase() -> None:
    """From (-.5, 1.3) to N(1, .7^2) with an exact critic, 700 moves of Adam at 2e-2, cosine: within 2 %."""
    objective = Objective(Config(phases=1, ratio=1), gaussian_triad(Flow(), "flow_prediction"), one_step())
    keep_critic_exact(objective, fresh=False)
    learn(objective, players_for(objective, adam(2e-2, 700), adam(1e-9)), 700, size=64)
    assert laws(objective) == [pytest.approx(TEACHER, rel=0.02)]


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_learns_the_teacher_with_two_phases_of_two_steps(shared: bool) -> None:
    """Alternating phases, or one after the other: what every exit hands on is the teacher's law within 2 %."""
    objective = four_steps(ratio=1, phase=0 if shared else 1)
    keep_critic_exact(objective, fresh=False)
    for phase, steps in ((0, 1400),) if shared else ((1, 800), (2, 800)):
        objective.config.phase = phase
        learn(objective, players_for(objective, adam(2e-2, steps), adam(1e-9)), steps, size=64)
    for law in laws(objective):
        assert law == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_teacher_with_learned_critics() -> None:
    """Two phases of one step as two stages, each with its own critic (five moves at 2e-2 each): within 4 %."""
    base = gaussian_triad(Flow(), "flow_prediction")
    student = Student(Flow(), [STUDENT, STUDENT], (1.0, 0.5))
    for phase in (1, 2):
        critic = GaussianModel(*TEACHER, Flow(), "flow_prediction", learned=True)
        triad = Triad(student, base.real_score, critic)
        objective = Objective(Config(phase=phase, ratio=5), triad, walk((1.0, 0.5), ode))
        learn(objective, players_for(objective, adam(1e-2, 1200), adam(2e-2)), 6000)
    for law in laws(objective):
        assert law == pytest.approx(TEACHER, rel=0.04)
