from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import (
    CASE_NAMES,
    CASES,
    STUDENT,
    TEACHER,
    Featured,
    Renamed,
    Student,
    adam,
    at,
    exact_law,
    gaussian_triad,
    keep_critic_exact,
    kl_gradient,
    know,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    real_batch,
    told_batch,
    walk,
    weights,
    whitened,
)
from torch import nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule, add_noise
from fewstep.models.backbone import Guided
from fewstep.models.head import Heads, MapHead
from fewstep.objectives import dmd
from fewstep.objectives.base import Triad
from fewstep.objectives.dmd2 import Config, Objective
from fewstep.objectives.pieces import gan
from fewstep.train.loop import train_step

TIMES = (1.0, 0.75, 0.5, 0.25)


def with_gan(
    schedule: NoiseSchedule, kind: Kind, features: str = "fake", rollout_times: tuple[float, ...] = (1.0,), **changes
) -> Objective:
    """DMD2 with a discriminator on a small critic, or on a teacher of the same make."""
    triad = Triad(
        Student(schedule, [STUDENT] * len(rollout_times), rollout_times),
        Guided(Featured(*TEACHER, schedule, kind).requires_grad_(False)),
        Featured(*STUDENT, schedule, kind),
    )
    config = Config(**{"gan_weight": 0.5, "gan_critic_weight": 0.7, "gan_features": features, **changes})  # type: ignore[arg-type]
    objective = Objective(config, triad, walk(rollout_times))
    objective.attach(torch.zeros(2, 32), Condition())
    return objective


@pytest.mark.parametrize("schedule, kind, t", CASES, ids=CASE_NAMES)
def test_generator_gradient_is_that_of_the_kl(schedule: NoiseSchedule, kind: Kind, t: float) -> None:
    noise, eps = whitened(2)
    config = Config(weight="snr", times=at(t), critic_times=at(t), gan_weight=0)
    played = play(Objective(config, gaussian_triad(schedule, kind), one_step()), told_batch(noise, eps))
    turn, critic = played["generator"], played["fake_score"]
    assert (turn["generator.mean"], turn["generator.std"]) == pytest.approx(kl_gradient(schedule, t), abs=1e-5)
    assert turn.touched() == {"generator"} and critic.touched() == {"fake_score"}
    assert (critic["fake_score.mean"], critic["fake_score.log_std"]) == pytest.approx((0, 0), abs=2e-6)


def test_without_gan_and_at_ratio_one_it_is_dmd_without_pairs(vp: NoiseSchedule) -> None:
    """The same draws by their last word: losses and every gradient, with the paper's weight and random times."""
    for times in ((1.0,), TIMES):
        student = Student(vp, [STUDENT] * len(times), times)
        base = gaussian_triad(vp, "epsilon", critic=(0.2, 0.9))
        triad = Triad(student, base.real_score, base.fake_score)
        first = Objective(Config(ratio=1, gan_weight=0), triad, walk(times))
        second = dmd.Objective(dmd.Config(ratio=1, regression=0), triad, walk(times))
        for step in range(3):
            one, other = (play(o, real_batch(step, draw=Renamed), step) for o in (first, second))
            for player in ("generator", "fake_score"):
                assert one[player].loss == pytest.approx(other[player].loss, rel=1e-6)
                assert one[player].gradients.keys() == other[player].gradients.keys()
                for name, gradient in one[player].gradients.items():
                    assert torch.allclose(gradient, other[player].gradients[name], rtol=1e-5, atol=1e-8)
            assert one["generator"].gradients["generator.mean"].abs().max() > 1e-3


def test_several_steps_that_exit_at_the_first_are_one_step() -> None:
    noise, eps = whitened(2)
    turns = []
    for times in ((1.0,), TIMES):
        base = gaussian_triad(Flow(), "flow_prediction", critic=(0.2, 0.9))
        triad = Triad(Student(Flow(), [STUDENT] * len(times), times), base.real_score, base.fake_score)
        turns.append(play(Objective(Config(gan_weight=0), triad, walk(times)), told_batch(noise, eps, exit=0)))
    one, four = turns
    for name in ("mean", "std"):
        first, *rest = four["generator"].gradients[f"generator.{name}"].tolist()
        assert first == one["generator"][f"generator.{name}"] and rest == [0, 0, 0]
    assert four["fake_score"].loss == one["fake_score"].loss


@pytest.mark.parametrize("together", [True, False])
def test_both_cadences(together: bool) -> None:
    """ratio 5: the generator moves at steps 0, 5, 10; the critic at all of them, or at the others (FastGen)."""
    triad = gaussian_triad(Flow(), "flow_prediction")
    objective = Objective(Config(gan_weight=0, critic_on_generator_step=together), triad, one_step())
    players = players_for(objective, adam(1e-3), adam(1e-3))
    moves = []
    for step in range(11):
        before = players["generator"].moves, players["fake_score"].moves
        train_step(objective, [real_batch(step)], step, players)
        moves.append((players["generator"].moves - before[0], players["fake_score"].moves - before[1]))
    assert moves == [(int(step % 5 == 0), int(together or step % 5 > 0)) for step in range(11)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 0},
        {"ratio": 1, "critic_on_generator_step": False},
        {"gan_weight": -1.0},
        {"gan_start": -1},
        {"gan_r1": -0.1},
        {"gan_r1_noise": 0.0},
    ],
)
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_data_is_read_only_where_it_is_needed() -> None:
    triad = gaussian_triad(Flow(), "flow_prediction")
    for config, reads in (
        (Config(gan_weight=0), ()),
        (Config(gan_weight=0, backward_simulation=False), ("x0",)),
        (Config(gan_weight=0.1, gan_taps=["any"]), ("x0",)),
    ):
        assert Objective(config, triad, one_step()).reads == reads


def test_backward_simulation_exits_at_one_random_step_that_all_micro_batches_share() -> None:
    student = Student(Flow(), [STUDENT] * 4, TIMES)
    base = gaussian_triad(Flow(), "flow_prediction")
    objective = Objective(Config(gan_weight=0), Triad(student, base.real_score, base.fake_score), walk(TIMES))
    exits = []
    for step in range(0, 400, 5):
        samples = [objective.sample(real_batch(step, ids), step, True) for ids in torch.arange(16).chunk(4)]
        assert len({sample.index for sample in samples}) == 1
        exits.append(samples[0].index)
        assert samples[0].t.unique().tolist() == [TIMES[samples[0].index]]
        trained = torch.autograd.grad(samples[0].x0.sum(), student.mean)[0].nonzero().flatten().tolist()
        assert trained == [samples[0].index]  # earlier steps run without a gradient
        assert not objective.sample(real_batch(step), step, False).x0.requires_grad
    counts = torch.tensor(exits).bincount(minlength=4).double()
    assert len(counts) == 4 and ((counts - 20) ** 2 / 20).sum() < 16.3  # three degrees of freedom, one in a thousand


def test_backward_simulation_makes_the_students_own_states() -> None:
    """The input of step 2 has the law of the student's rollout, to four standard errors."""
    laws = [(0.4, 0.6), (-0.2, 0.9), (0.1, 1.1), (0.0, 1.0)]
    student = Student(Flow(), laws, TIMES)
    base = gaussian_triad(Flow(), "flow_prediction")
    objective = Objective(Config(gan_weight=0), Triad(student, base.real_score, base.fake_score), walk(TIMES))
    step = next(s for s in range(0, 500, 5) if objective.sample(real_batch(s), s, False).index == 2)
    x_t = objective.sample(real_batch(step, torch.arange(1 << 13)), step, False).x_t
    mean, std = exact_law(student, walk(TIMES), 1, 0.5, fresh=True)
    deviation = (0.25 * std**2 + 0.25) ** 0.5
    assert x_t.mean().item() == pytest.approx(0.5 * mean, abs=4 * deviation / x_t.numel() ** 0.5)
    assert x_t.std().item() == pytest.approx(deviation, rel=4 / (2 * x_t.numel()) ** 0.5)


@pytest.mark.parametrize("process", ["flow", "vp_linear"])
def test_without_backward_simulation_later_steps_start_from_noised_data(process: str, processes) -> None:
    """And the first one from unit noise alone, though alpha at t = 1 may be above zero."""
    schedule = processes[process]
    student = Student(schedule, [STUDENT] * 4, TIMES)
    base = gaussian_triad(schedule, "epsilon")
    config = Config(gan_weight=0, backward_simulation=False)
    objective = Objective(config, Triad(student, base.real_score, base.fake_score), walk(TIMES))
    seen = set()
    for step in range(0, 100, 5):
        batch = real_batch(step)
        student.seen.clear()
        sample = objective.sample(batch, step, True)
        rows = torch.full((16,), TIMES[sample.index])
        assert len(student.seen) == 1 and torch.equal(sample.t, rows) and (sample.s == 0).all()
        noised = batch.noise if sample.index == 0 else add_noise(schedule, batch.x0, batch.noise, rows)
        assert torch.equal(student.seen[0], noised)
        assert sample.x0.requires_grad and torch.equal(sample.x, sample.x0)
        assert not objective.sample(batch, step, False).x0.requires_grad
        seen.add(sample.index)
    assert seen == {0, 1, 2, 3}


def normal(mean: float, std: float) -> torch.distributions.Normal:
    return torch.distributions.Normal(*torch.tensor([mean, std], dtype=torch.float64))


def test_the_optimal_discriminator_gives_the_softened_reverse_kl() -> None:
    """With l = log(p_t / q_t), d softplus(-l) / d x_t = -(s_p - s_q) / (1 + r), r = p / q: float64, to 1e-12."""
    p, q = normal(0.4, 1.1), normal(-0.2, 0.9)
    x = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    logits = p.log_prob(x) - q.log_prob(x)
    (got,) = torch.autograd.grad(gan.generator_loss(logits) * len(x), x)
    s_p, s_q = -(x - 0.4) / 1.1**2, (-(x + 0.2) / 0.9**2)
    expected = -(s_p - s_q) / (1 + logits.exp())
    assert (got - expected).abs().max() < 1e-12 and expected.abs().max() > 0.3


def test_the_discriminator_loss_is_least_at_the_log_ratio() -> None:
    """Its gradient at l = log(p / q) is zero under p and q: quadrature over a fine grid, float64."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    p, q = normal(0.4, 1.1), normal(-0.2, 0.9)
    logits = p.log_prob(x) - q.log_prob(x)
    slope_fake = torch.autograd.functional.jacobian(lambda z: gan.discriminator_loss(z, z.detach()), logits)
    slope_real = torch.autograd.functional.jacobian(lambda z: gan.discriminator_loss(z.detach(), z), logits)
    total = q.log_prob(x).exp() * slope_fake + p.log_prob(x).exp() * slope_real
    assert total.abs().max() < 1e-16 and (p.log_prob(x).exp() * slope_real).abs().max() > 1e-6


def test_gan_losses_and_accuracy_by_hand() -> None:
    fake, real = torch.tensor([-1.0, 2.0, -3.0, -0.5]), torch.tensor([1.0, -2.0])
    softplus = torch.nn.functional.softplus
    assert gan.generator_loss(fake) == softplus(torch.tensor([1.0, -2.0, 3.0, 0.5])).mean()
    assert gan.discriminator_loss(fake, real) == softplus(fake).mean() + softplus(torch.tensor([-1.0, 2.0])).mean()
    assert gan.accuracy(fake, real).item() == 0.5 * (0.75 + 0.5)
    assert gan.generator_loss(torch.zeros(3)).item() == pytest.approx(torch.tensor(2.0).log().item())


def test_hinge_losses_by_hand() -> None:
    fake, real = torch.tensor([-3.0, 0.5]), torch.tensor([2.0, -0.5])
    assert gan.discriminator_loss(fake, real, "hinge").item() == 0.5 * 1.5 + 0.5 * 1.5
    assert gan.generator_loss(fake, "hinge").item() == 1.25


def test_the_hinge_gives_the_reverse_kl_where_the_logit_is_the_log_ratio() -> None:
    """-d l / d x = -(s_p - s_q): the weight h = 1, float64, to 1e-12."""
    p, q = normal(0.4, 1.1), normal(-0.2, 0.9)
    x = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(gan.generator_loss(p.log_prob(x) - q.log_prob(x), "hinge") * len(x), x)
    assert (got - ((x - 0.4) / 1.1**2 - (x + 0.2) / 0.9**2)).abs().max() < 1e-12


def test_roughness_is_the_squared_slope_of_a_line_and_nothing_for_a_constant() -> None:
    w, x, n = torch.randn(3, 16, 8, dtype=torch.float64)
    near, far = (roughness_of(lambda z: z @ w[0], x, scale * n) for scale in (0.1, 0.2))
    assert near == pytest.approx(0.01 * (n @ w[0]).square().mean().item(), rel=1e-10)
    assert far == pytest.approx(4 * near, rel=1e-10)
    assert roughness_of(lambda z: 0 * z.sum(1) + 3, x, n) == 0


def roughness_of(logit, x: torch.Tensor, n: torch.Tensor) -> float:
    return gan.roughness(logit(x), logit(x + n)).item()


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_penalty_compares_a_real_image_with_its_neighbour_at_one_time(features: str) -> None:
    """Rebuilt from its parts at t = .4: .6 x + .4 eps against .6 (x + .1 n) + .4 eps."""
    objective = with_gan(Flow(), "flow_prediction", features, critic_times=at(0.4), gan_r1=3.0)
    eps, x0 = whitened(1)[0], real_batch(ids=torch.arange(64)).x0
    batch = told_batch(*whitened(1), eps, x0=x0)
    turn = play(objective, batch, step=1)["fake_score"]

    def logits(x: torch.Tensor) -> torch.Tensor:
        seen = objective.watched(0.6 * x + 0.4 * eps, torch.full((64,), 0.4), Condition(), taps=("trunk",))
        return objective.heads(seen.features)  # type: ignore[misc]

    with torch.no_grad():
        penalty = (logits(x0) - logits(x0 + 0.1 * eps)).square().mean().item()
    assert turn.logs["gan/r1"] == pytest.approx(penalty, rel=1e-4) and penalty > 1e-7
    plain = play(with_gan_like(objective, gan_r1=0.0), batch, step=1)["fake_score"]
    assert turn.loss - plain.loss == pytest.approx(0.7 * 3 * penalty, abs=2e-6)
    slope = {name: (turn.gradients[name] - g).abs().max().item() for name, g in plain.gradients.items()}
    assert max(value for name, value in slope.items() if name.startswith("own.heads")) > 1e-6


def with_gan_like(objective: Objective, **changes) -> Objective:
    """The same networks and heads under another config."""
    other = Objective(replace(objective.config, **changes), objective.triad, objective.rollout)
    other.heads = objective.heads if other.config.gan_weight else None
    return other


def test_several_taps_have_a_head_each_and_a_loss_each() -> None:
    """The mean of the losses, not the loss of the mean, which a head that is sure of itself would silence."""
    objective = with_gan(Flow(), "flow_prediction", gan_taps=["low", "high"], times=at(0.4))
    batch = told_batch(*whitened(2), x0=real_batch(ids=torch.arange(64)).x0)
    turn = play(objective, batch)["generator"]
    student = objective.triad.generator
    with torch.no_grad():
        x_t = 0.6 * (student.mean + student.std * batch.noise) + 0.4 * batch.draw.eps  # type: ignore[attr-defined]
        seen = objective.watched(x_t, torch.full((64,), 0.4), Condition(), taps=("low", "high")).features
        each = [head(seen[name]) for name, head in zip(("low", "high"), objective.heads.heads, strict=True)]  # type: ignore[union-attr]
    assert (each[0] - each[1]).abs().max() > 1e-2
    apart = sum(nn.functional.softplus(-one).mean().item() for one in each) / 2
    assert turn.logs["gan/generator"] == pytest.approx(apart, rel=1e-5)
    look = objective.look(batch, objective.sample(batch, 0, False))
    assert torch.allclose(look.logits, (each[0] + each[1]) / 2, atol=1e-6)  # type: ignore[arg-type]


def test_the_discriminator_only_learns_before_it_is_heard() -> None:
    objective = with_gan(Flow(), "flow_prediction", gan_start=2, ratio=1)
    silent = play(with_gan_like(objective, gan_weight=0.0), real_batch(), 1)["generator"]
    before, after = (play(objective, real_batch(), step) for step in (1, 2))
    for name in ("generator.mean", "generator.std"):
        heard = play(with_gan_like(objective, gan_start=0), real_batch(), 1)["generator"][name]
        assert before["generator"][name] != heard and after["generator"][name] == heard
        assert before["generator"][name] == pytest.approx(silent[name], rel=1e-6)
    assert "gan/generator" not in before["generator"].logs and "gan/critic" in before["fake_score"].logs
    assert any(name.startswith("own.heads") for name in before["fake_score"].gradients)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_gan_reaches_the_generator_and_no_weight_of_the_critic(features: str) -> None:
    objective = with_gan(Flow(), "flow_prediction", features)
    played = play(objective, real_batch())
    turn, critic = played["generator"], played["fake_score"]
    assert turn.touched() == {"generator"}
    without = play(with_gan(Flow(), "flow_prediction", features, gan_weight=1e-12), real_batch())["generator"]
    assert abs(turn["generator.mean"] - without["generator.mean"]) > 1e-4
    heads = {name for name in critic.gradients if name.startswith("own.heads")}
    trunk = {name for name in critic.gradients if "trunk" in name}
    assert len(heads) == len(list(objective.heads.parameters()))  # type: ignore[union-attr]
    assert trunk == ({"fake_score.trunk.0.weight", "fake_score.trunk.0.bias"} if features == "fake" else set())
    assert critic.touched() == {"fake_score", "own"}
    assert all(critic.gradients[name].abs().max() > 0 for name in heads | trunk)
    assert all(p.requires_grad for name, p in weights(objective) if not name.startswith("real_score"))


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_generators_gan_gradient_is_that_of_the_non_saturating_loss(features: str) -> None:
    """Rebuilt from its parts: the same x_t, the watched network's features, the heads, softplus(-l)."""
    objective = with_gan(Flow(), "flow_prediction", features, times=at(0.4))
    batch = told_batch(*whitened(2), x0=real_batch(ids=torch.arange(64)).x0)
    turn = play(objective, batch)["generator"]
    silent = with_gan(Flow(), "flow_prediction", features, times=at(0.4), gan_weight=0)
    student = objective.triad.generator
    x_t = 0.6 * (student.mean + student.std * batch.noise) + 0.4 * batch.draw.eps  # type: ignore[attr-defined]
    rows = torch.full((64,), 0.4)
    prediction = objective.watched(x_t, rows, Condition(), taps=("trunk",))
    loss = nn.functional.softplus(-objective.heads(dict(prediction.features))).mean()  # type: ignore[misc]
    gradients = torch.autograd.grad(loss, [student.mean, student.std])
    matching = play(silent, batch)["generator"]
    for name, gradient in zip(("mean", "std"), gradients, strict=True):
        added = turn[f"generator.{name}"] - matching[f"generator.{name}"]
        assert added == pytest.approx(0.5 * gradient.item(), rel=1e-3, abs=1e-6)
    assert turn.logs["gan/generator"] == pytest.approx(loss.item(), rel=1e-5)
    assert turn.loss - matching.loss == pytest.approx(0.5 * loss.item(), rel=1e-3)


def test_the_critic_learns_from_denoising_and_the_discriminator_together() -> None:
    objective = with_gan(Flow(), "flow_prediction", critic_times=at(0.4))
    noise, eps = whitened(2)
    x0 = real_batch(ids=torch.arange(64)).x0
    turn = play(objective, told_batch(noise, eps, x0=x0), step=1)["fake_score"]
    variance = STUDENT[1] ** 2 / (0.6**2 * STUDENT[1] ** 2 + 0.4**2)  # the posterior variance of eps - x0
    assert turn.loss == pytest.approx(variance + 0.7 * turn.logs["gan/critic"], rel=1e-4)
    assert 0 <= turn.logs["gan/accuracy"] <= 1


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_discriminator_compares_samples_with_real_images(features: str) -> None:
    """Rebuilt from its parts: softplus(l_fake) + softplus(-l_real) on (.6 x + .4 eps) of either, t = .4."""
    objective = with_gan(Flow(), "flow_prediction", features, critic_times=at(0.4))
    noise, eps = whitened(2)
    batch = told_batch(noise, eps, x0=real_batch(ids=torch.arange(64)).x0)
    turn = play(objective, batch, step=1)["fake_score"]
    with torch.no_grad():
        fake, real = (
            objective.heads(  # type: ignore[misc]
                dict(
                    objective.watched(
                        0.6 * x + 0.4 * eps, torch.full((64,), 0.4), Condition(), taps=("trunk",)
                    ).features
                )
            )
            for x in (STUDENT[0] + STUDENT[1] * noise, batch.x0)
        )
    loss = nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()
    assert turn.logs["gan/critic"] == pytest.approx(loss.item(), rel=1e-5)
    assert turn.logs["gan/accuracy"] == pytest.approx(gan.accuracy(fake, real).item(), abs=0.01)


def test_real_images_are_noised_on_their_own() -> None:
    """Neither the times nor the noises of samples and real images have anything to do with each other."""
    objective = with_gan(Flow(), "flow_prediction")
    critic, batch = objective.triad.fake_score, real_batch(1, torch.arange(4096))
    critic.seen.clear()
    list(objective.turns(batch, 1))
    (x_fake, t_fake), (x_real, t_real) = critic.seen
    made = STUDENT[0] + STUDENT[1] * batch.noise
    of_fake = (x_fake - (1 - t_fake[:, None]) * made) / t_fake[:, None]
    of_real = (x_real - (1 - t_real[:, None]) * batch.x0) / t_real[:, None]
    clear = (t_fake > 0.05) & (t_real > 0.05)  # rounding in x_t is divided by t
    for a, b, count in ((t_fake, t_real, 4096), (of_fake[clear], of_real[clear], int(clear.sum()) * 32)):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()) < 4 / count**0.5
    assert of_real[clear].std().item() == pytest.approx(1, abs=0.02)


def test_one_pass_of_the_critic_serves_score_and_discriminator() -> None:
    """fake: one full pass on the generator's turn; one full and one stopped on the critic's. teacher: see below."""
    own, teacher = with_gan(Flow(), "flow_prediction"), with_gan(Flow(), "flow_prediction", "teacher")
    for objective in (own, teacher):
        for net in (objective.triad.fake_score, objective.triad.real_score.inner):
            net.stops.clear()
        play(objective, real_batch())
    assert own.triad.fake_score.stops == [False, False, True]
    assert own.triad.real_score.inner.stops == [False]
    assert teacher.triad.fake_score.stops == [False, False]
    assert teacher.triad.real_score.inner.stops == [False, True, True, True]


def test_heads_are_made_for_the_features_and_move_with_the_critic() -> None:
    objective = with_gan(Flow(), "flow_prediction")
    assert isinstance(objective.heads, Heads) and objective.heads.names == ("trunk",)
    assert objective.learns() == {"fake_score": [objective.heads]}
    players = players_for(objective, adam(1e-2), adam(1e-2))
    before = {name: p.clone() for name, p in weights(objective)}
    train_step(objective, [real_batch(1)], 1, players)
    changed = {name.split(".")[0] for name, p in weights(objective) if not torch.equal(before[name], p)}
    assert changed == {"fake_score", "own"}
    silent = with_gan(Flow(), "flow_prediction", gan_weight=0)
    assert silent.heads is None and silent.learns() == {} and "own" not in {n.split(".")[0] for n, _ in weights(silent)}
    assert any(name.startswith("heads.") for name in objective.state_dict())


@pytest.mark.parametrize("channels", [8, 32, 64, 128])
def test_a_head_tells_its_inputs_apart(channels: int) -> None:
    """Group norm on the last 1x1 map needs many channels a group: one alone is zero, two are +-1 without a slope.

    Unit normal inputs must give different logits, and as in any smooth function a gradient of about their deviation.
    """
    head, x = MapHead(channels, 4), torch.randn(64, channels, 4, 4, requires_grad=True)
    logits = head(x)
    logits.sum().backward()
    slope = x.grad.flatten(1).norm(dim=1)
    assert logits.std() > 1e-2
    assert slope.median() > 0.5 * logits.std() and slope.max() < 20 * slope.median()


def test_learns_the_teacher_in_two_steps_with_an_exact_critic() -> None:
    """Backward simulation over two renoised steps: both exits reach N(1, .7^2) from (-.5, 1.3) within 2 %."""
    times = (1.0, 0.5)
    base = gaussian_triad(Flow(), "flow_prediction")
    student = Student(Flow(), [STUDENT, STUDENT], times)
    triad = Triad(student, base.real_score, base.fake_score)
    objective = Objective(Config(ratio=1, gan_weight=0), triad, walk(times))
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(2e-2, 1000), adam(1e-9)), 1000, size=64)
    for index in (0, 1):
        assert exact_law(student, objective.rollout, index, 0.0, fresh=True) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_teacher_with_a_learned_critic(vp: NoiseSchedule) -> None:
    """Five critic moves at 2e-2 for each of 1200 generator moves at 1e-2, cosine: within 4 %."""
    objective = Objective(Config(gan_weight=0), gaussian_triad(vp, "epsilon"), one_step())
    learn(objective, players_for(objective, adam(1e-2, 1200), adam(2e-2)), 6000)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)


@pytest.mark.slow
def test_learns_the_data_from_the_discriminator_alone() -> None:
    """A critic that always says what the teacher says leaves no gap, so only the GAN moves the student: within 5 %."""
    objective = with_gan(Flow(), "flow_prediction", gan_weight=1.0, gan_critic_weight=1.0, ratio=2)
    sample = objective.sample

    def blind(batch: Batch, step: int, grad: bool):
        know(objective.triad.fake_score, TEACHER)
        return sample(batch, step, grad)

    objective.sample = blind  # type: ignore[method-assign]
    players = players_for(objective, adam(5e-3, 1200), adam(1e-2))
    learn(objective, players, 2400, extra=lambda draw: {"x0": TEACHER[0] + TEACHER[1] * draw.normal("real", (32,))})
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.05)


@pytest.mark.slow
def test_learns_the_teacher_with_a_discriminator() -> None:
    """As above with a GAN on the critic's trunk: the optimum is the same, so still within 4 %."""
    objective = with_gan(Flow(), "flow_prediction", gan_weight=3e-2, gan_critic_weight=1e-1, ratio=5)
    players = players_for(objective, adam(1e-2, 1200), adam(2e-2))
    learn(objective, players, 6000, extra=lambda draw: {"x0": TEACHER[0] + TEACHER[1] * draw.normal("real", (32,))})
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)
