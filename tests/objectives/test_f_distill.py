from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Featured,
    Law,
    Renamed,
    Student,
    adam,
    exact_law,
    gaussian_triad,
    keep_critic_exact,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    real_batch,
    taken,
    walk,
)
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.core.times import Times
from fewstep.models.backbone import Guided
from fewstep.objectives import dmd2
from fewstep.objectives.base import Triad, Turns
from fewstep.objectives.f_distill import BINS, WEIGHTS, Config, Objective, bin_of
from fewstep.objectives.pieces import gan
from fewstep.train.loop import train_step

F = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r).square() / r,
    "pearson": lambda r: (r - 1).square(),
}
"""f of D_f(p || q) = E_q f(p / q), arXiv:2502.15681, table 1"""

FIXTURE_D = {
    "reverse_kl": (-0.600000, -0.211111),
    "softened_reverse_kl": (-0.301739, -0.031817),
    "jensen_shannon": (-0.298261, -0.179294),
    "squared_hellinger": (-0.157270, -0.102256),
    "forward_kl": (-0.740741, -0.754458),
    "jeffreys": (-1.340741, -0.965569),
    "neyman": (-1.389957, 0.141678),
    "pearson": (-3.558, -7.450),
}
"""dD_f / d(mean, deviation) of q = N(-.2, .9^2) against p = N(.4, 1), found by quadrature and finite differences"""

GRID = torch.linspace(-16, 16, 32001, dtype=torch.float64)
BOUNDED = ("softened_reverse_kl", "jensen_shannon", "forward_kl", "jeffreys")


def log_density(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    law = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, std))
    return torch.distributions.Normal(*law).log_prob(x)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weights_give_the_gradient_of_their_divergence(name: str) -> None:
    """-E_q h(r) (s_p - s_q) dx/d(mean, std) against fixture D, and against autograd through the divergence itself."""
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.2, 0.9))
    log_p, log_q = log_density(GRID, 0.4, 1.0), log_density(GRID, mean, std)
    divergence = torch.trapezoid(log_q.exp() * F[name]((log_p - log_q).exp()), GRID)
    by_hand = [g.item() for g in torch.autograd.grad(divergence, [mean, std])]
    q, ratio = log_q.detach().exp(), (log_p - log_q.detach()).exp()
    gap = -(GRID - 0.4) + (GRID + 0.2) / 0.81
    slope = -WEIGHTS[name](ratio) * gap * q  # type: ignore[index]
    ours = [torch.trapezoid(slope * dx, GRID).item() for dx in (torch.ones_like(GRID), (GRID + 0.2) / 0.9)]
    assert ours == pytest.approx(by_hand, abs=1e-7)
    assert ours == pytest.approx(FIXTURE_D[name], abs=1e-6 if name != "pearson" else 6e-4)


def test_the_weights_add_up() -> None:
    """h of the softened reverse KL and of Jensen-Shannon make that of the reverse KL; Jeffreys is both KLs."""
    r = torch.logspace(-1, 1.3, 50, dtype=torch.float64)
    h = {name: weight(r) for name, weight in WEIGHTS.items()}
    assert torch.allclose(h["softened_reverse_kl"] + h["jensen_shannon"], h["reverse_kl"], rtol=1e-12)
    assert torch.allclose(h["reverse_kl"] + h["forward_kl"], h["jeffreys"], rtol=1e-12)
    assert h["reverse_kl"].shape == r.shape and (h["reverse_kl"] == 1).all()


def test_the_gan_with_the_optimal_discriminator_is_the_softened_reverse_kl() -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    logits = log_density(x, 0.4, 1.0) - log_density(x, -0.2, 0.9)
    (got,) = torch.autograd.grad(gan.generator_loss(logits) * len(x), x)
    gap = (x - 0.4) - (x + 0.2) / 0.81  # s_q - s_p
    assert (got - WEIGHTS["softened_reverse_kl"](logits.exp()) * gap).abs().max() < 1e-12


def with_gan(kind: type, **changes) -> dmd2.Objective:
    torch.manual_seed(0)
    times = (1.0, 0.5)
    triad = Triad(
        Student(Flow(), [STUDENT, (0.3, 0.8)], times),
        Guided(Featured(*TEACHER, Flow(), "flow_prediction").requires_grad_(False)),
        Featured(*STUDENT, Flow(), "flow_prediction"),
    )
    config = {Objective: Config, dmd2.Objective: dmd2.Config}[kind](gan_weight=0.5, ratio=1, **changes)
    objective = kind(config, triad, walk(times))
    objective.attach(torch.zeros(2, 32), Condition())
    return objective


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_reverse_kl_is_dmd2(features: str) -> None:
    """Losses and every gradient of both players, to 2e-6 of the largest of a tensor."""
    base, ours = (
        with_gan(kind, gan_features=features, **changes)
        for kind, changes in ((dmd2.Objective, {}), (Objective, {"divergence": "reverse_kl"}))
    )
    for step in range(3):
        expected, played = (play(o, real_batch(step, draw=Renamed), step) for o in (base, ours))
        for player in ("generator", "fake_score"):
            assert played[player].loss == pytest.approx(expected[player].loss, rel=1e-6)
            assert played[player].gradients.keys() == expected[player].gradients.keys()
            for name, gradient in expected[player].gradients.items():
                apart = (played[player].gradients[name] - gradient).abs().max()
                assert apart <= 2e-6 * gradient.abs().max() + 1e-9
        assert expected["generator"].gradients["generator.mean"].abs().max() > 1e-3


def test_another_divergence_is_another_gradient() -> None:
    one, other = (play(with_gan(Objective, divergence=d), real_batch())["generator"] for d in ("reverse_kl", "pearson"))
    mean = [played.gradients["generator.mean"] for played in (one, other)]
    assert (mean[0] - mean[1]).abs().max() > 1e-3 * mean[0].abs().max()
    assert one.logs["ratio/spread"] == 0 and other.logs["ratio/spread"] > 1e-3


def look_at(logits: Tensor, t: Tensor) -> dmd2.Look:
    nothing = torch.zeros(len(t), 1)
    return dmd2.Look(nothing, nothing, t, nothing, nothing, logits, None)


def weights_of(objective: Objective, logits: Tensor, t: Tensor) -> Tensor:
    """What `weights` returns to a micro-batch that is the whole batch."""
    found: list[Tensor] = []

    def told() -> Turns:
        found.append((yield from objective.weights(look_at(logits, t))))

    assert list(taken(told())) == []
    return found[0]


def test_a_factor_on_the_ratios_of_a_bin_changes_nothing() -> None:
    objective = Objective(
        Config(divergence="jensen_shannon", gan_taps=["none"]), gaussian_triad(Flow(), "flow_prediction"), one_step()
    )
    t = 0.02 + 0.96 * (torch.arange(200) + 0.5) / 200
    logits = torch.randn(200).clamp(-1.5, 1.5)
    plain = weights_of(objective, logits, t)
    assert plain.mean().item() == pytest.approx(1, abs=1e-6) and plain.std() > 0.1
    scaled = torch.where(bin_of(t, objective.config.times) == 3, logits + 0.6, logits)  # r stays inside [.1, 20]
    assert torch.allclose(weights_of(objective, scaled, t), plain, rtol=1e-5)
    raw = torch.where(bin_of(t, objective.config.times) == 3, logits + 5, logits)
    assert not torch.allclose(weights_of(objective, raw, t), plain, rtol=1e-2)  # clipped first


def test_weights_by_hand() -> None:
    """Two bins: ratios 1, 3 and 2, 6 are .5, 1.5 of their bins' means; forward KL takes them as they are."""
    objective = Objective(
        Config(divergence="forward_kl", gan_taps=["none"]), gaussian_triad(Flow(), "flow_prediction"), one_step()
    )
    t = torch.tensor([0.05, 0.06, 0.9, 0.92])
    weight = weights_of(objective, torch.tensor([1.0, 3.0, 2.0, 6.0]).log(), t)
    assert weight.tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5], rel=1e-5)
    levels = objective.levels.tolist()
    assert levels == pytest.approx([2.0] + 8 * [1.0] + [4.0], rel=1e-5)  # a bin without samples keeps its own


def test_bins_are_equal_parts_of_the_times() -> None:
    times = Times(low=0.2, high=0.7)
    assert bin_of(torch.tensor([0.2, 0.249, 0.251, 0.69, 0.7]), times).tolist() == [0, 0, 1, 9, 9] and BINS == 10


def test_levels_follow_once_a_move_however_many_micro_batches_there_are() -> None:
    ends = []
    for parts in (1, 4):
        objective = with_gan(Objective, bin_decay=0.5, divergence="jeffreys")
        players = players_for(objective, adam(1e-3), adam(1e-3))
        for step in range(3):
            batches = [real_batch(step, ids) for ids in torch.arange(16).chunk(parts)]
            train_step(objective, batches, step, players)
        ends.append((objective.levels.clone(), objective.triad.generator.mean.detach().clone()))
    for one, four in zip(*ends, strict=True):
        assert torch.allclose(one, four, rtol=1e-4, atol=1e-5)
    assert (ends[0][0] - 1).abs().max() > 1e-2


def test_the_sample_is_made_twice_where_the_generator_moves_and_looked_at_once() -> None:
    objective = with_gan(Objective, exits=replace(Config().exits, law="last"))
    objective.config.ratio = 2
    student, critic, teacher = objective.triad.generator, objective.triad.fake_score, objective.triad.real_score.inner
    for step, passes in ((0, 4), (1, 2)):
        for net in (student, critic, teacher):
            net.seen.clear()
        play(objective, real_batch(step), step)
        assert len(student.seen) == passes and len(critic.seen) == (3 if step == 0 else 2)
        assert len(teacher.seen) == (step == 0)
        assert step or torch.equal(student.seen[1], student.seen[3])


@pytest.mark.parametrize(
    "wrong", [{"gan_weight": 0.0}, {"ratio_low": 0.0}, {"ratio_low": 30.0}, {"bin_decay": 1.0}, {"ratio": 0}]
)
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def knows_the_ratio(objective: Objective, teacher: Law = TEACHER) -> None:
    """The discriminator says log p_t / q_t, in the mean over the coordinates, and the generator does not hear it."""
    schedule = objective.triad.generator.schedule

    def judge(x_t: Tensor, t: Tensor, cond: Condition):
        c = schedule.at(t, x_t)
        laws = (teacher, exact_law(objective.triad.generator, objective.rollout, 0, 0.0, fresh=True))  # type: ignore[arg-type]
        p, q = (
            torch.distributions.Normal(c.alpha * mean, (c.alpha**2 * std**2 + c.sigma**2).sqrt()) for mean, std in laws
        )
        logits = (p.log_prob(x_t) - q.log_prob(x_t)).detach().mean(1)
        return objective.triad.fake_score(x_t, t, cond).x0.detach(), logits, None

    objective.judge = judge  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDED)
def test_learns_the_teacher_with_the_exact_ratio(name: str) -> None:
    """From (-.5, 1.3) to N(1, .7^2), exact critic and ratio, 600 moves of Adam at 2e-2, cosine: within 2 %."""
    objective = Objective(
        Config(divergence=name, ratio=1, gan_taps=["none"]),  # type: ignore[arg-type]
        gaussian_triad(Flow(), "flow_prediction"),
        one_step(),
    )
    knows_the_ratio(objective)
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(2e-2, 600), adam(1e-9)), 600, size=64)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_teacher_with_a_learned_critic_and_discriminator() -> None:
    """Five critic moves at 2e-2 for each of 800 generator moves at 1e-2: within 4 %."""
    torch.manual_seed(0)
    triad = Triad(
        Student(Flow(), [STUDENT]),
        Guided(Featured(*TEACHER, Flow(), "flow_prediction").requires_grad_(False)),
        Featured(*STUDENT, Flow(), "flow_prediction"),
    )
    objective = Objective(Config(gan_weight=3e-2, gan_critic_weight=1e-1), triad, one_step())
    objective.attach(torch.zeros(2, 32), Condition())
    players = players_for(objective, adam(1e-2, 800), adam(2e-2))
    learn(objective, players, 4000, extra=lambda draw: {"x0": TEACHER[0] + TEACHER[1] * draw.normal("real", (32,))})
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)
