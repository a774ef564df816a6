from __future__ import annotations

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Featured,
    Renamed,
    Student,
    adam,
    at,
    know,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    real_batch,
    told_batch,
    whitened,
)
from torch.nn.functional import softplus

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import sid
from fewstep.objectives.base import Triad
from fewstep.objectives.sida import Config, Objective, logits


def game(**changes) -> Objective:
    """SiDA with a critic whose encoder is a small network of pairs of coordinates."""
    torch.manual_seed(4)
    critic = Featured(*STUDENT, Flow(), "flow_prediction")
    teacher = Guided(GaussianModel(*TEACHER, Flow(), "flow_prediction"))
    triad = Triad(Student(Flow(), [STUDENT]), teacher, critic)
    return Objective(Config(**{"gan_weight": 0.5, "gan_critic_weight": 0.7, **changes}), triad, one_step())  # type: ignore[arg-type]


def test_logits_are_the_clamped_channel_means() -> None:
    maps, tokens = torch.randn(2, 6, 4, 4), torch.randn(2, 16, 6)
    maps[0, :, 0, 0], tokens[1, 3] = 50, -50
    rows = torch.ones(2)
    of_maps, of_tokens = (
        logits(Prediction(maps, "sample", maps, rows, Flow(), {"any": features})) for features in (maps, tokens)
    )
    assert of_maps.shape == of_tokens.shape == (2, 16)
    assert of_maps[0, 0] == 10 and of_tokens[1, 3] == -10
    assert of_maps[1, 5].item() == pytest.approx(maps[1, :, 1, 1].mean().item())


def test_without_its_weights_it_is_sid() -> None:
    """The same draws by their last word: losses and every gradient of both players but the encoder's own."""
    objective = game(gan_weight=0.0, gan_critic_weight=0.0)
    plain = sid.Objective(sid.Config(alpha=1.0), objective.triad, one_step())
    for step in range(3):
        one, other = (play(o, real_batch(step, draw=Renamed), step) for o in (objective, plain))
        for player in ("generator", "fake_score"):
            assert one[player].loss == pytest.approx(other[player].loss, rel=1e-6)
            for name, gradient in other[player].gradients.items():
                assert torch.allclose(gradient, one[player].gradients[name], rtol=1e-5, atol=1e-8)
        assert abs(one["generator"]["generator.mean"]) > 1e-3


def test_the_generators_adversarial_gradient_is_that_of_its_loss() -> None:
    """Rebuilt from its parts: softplus(-l) / mean |x - R| on x_t = .6 x + .4 eps."""
    noise, eps = whitened(2)
    batch = told_batch(noise, eps, x0=real_batch(ids=torch.arange(64)).x0)
    with_gan, silent = game(times=at(0.4)), game(times=at(0.4), gan_weight=0.0)
    turn, plain = (play(objective, batch)["generator"] for objective in (with_gan, silent))
    student, rows = with_gan.triad.generator, torch.full((64,), 0.4)
    x = student.mean + student.std * noise
    x_t = 0.6 * x + 0.4 * eps
    features = with_gan.triad.fake_score(x_t, rows, Condition(), taps=("trunk",)).features["trunk"]
    n = (x - with_gan.triad.real_score(x_t, rows, Condition()).x0).abs().mean(1).detach()
    loss = (softplus(-features.mean(2)).mean(1) / n).mean()
    gradients = torch.autograd.grad(loss, [student.mean, student.std])
    for name, gradient in zip(("mean", "std"), gradients, strict=True):
        added = turn[f"generator.{name}"] - plain[f"generator.{name}"]
        assert added == pytest.approx(0.5 * gradient.item(), rel=1e-3, abs=1e-6) and abs(added) > 1e-4
    assert turn.logs["gan/generator"] == pytest.approx(loss.item(), rel=1e-5)
    assert turn.touched() == {"generator"}


def test_the_critic_tells_samples_from_images_at_one_noise() -> None:
    """Rebuilt from its parts; both are noised with the same eps to the same level, and only the encoder learns it."""
    noise, eps = whitened(2)
    objective = game(critic_times=at(0.4))
    batch = told_batch(noise, eps, x0=real_batch(ids=torch.arange(64)).x0)
    turn = play(objective, batch)["fake_score"]
    critic, rows = objective.triad.fake_score, torch.full((64,), 0.4)
    (x_fake, t_fake), (x_real, t_real) = critic.seen[-2:]
    assert torch.equal(t_fake, t_real) and critic.stops[-2:] == [False, True]
    assert torch.allclose(x_real - x_fake, 0.6 * (batch.x0 - STUDENT[0] - STUDENT[1] * noise), atol=1e-5)
    with torch.no_grad():
        fake, real = (critic(x, rows, Condition(), taps=("trunk",)).features["trunk"].mean(2) for x in (x_fake, x_real))
    loss = 0.5 * (softplus(fake).mean() + softplus(-real).mean())
    variance = STUDENT[1] ** 2 / (0.6**2 * STUDENT[1] ** 2 + 0.4**2)
    assert turn.logs["gan/critic"] == pytest.approx(loss.item(), rel=1e-5)
    assert turn.loss == pytest.approx(variance + 0.7 * loss.item(), rel=1e-4)
    assert turn.touched() == {"fake_score"} and turn.gradients["fake_score.trunk.0.weight"].abs().max() > 0


def test_the_warm_up() -> None:
    """Critic and discriminator alone, then the generator by SiD, then by both."""
    objective = game(generator_start=2, gan_start=4, ratio=2)
    plain = game(gan_weight=0.0)
    whole = game()
    for step, players in enumerate((1, 1, 2, 1, 2)):
        played = play(objective, real_batch(step), step)
        assert len(played) == players and played["fake_score"].logs["gan/critic"] > 0
        if players == 2:
            same = play(plain if step < 4 else whole, real_batch(step), step)["generator"]
            assert played["generator"]["generator.mean"] == pytest.approx(same["generator.mean"], rel=1e-6)
            assert ("gan/generator" in played["generator"].logs) == (step == 4)


@pytest.mark.parametrize(
    "wrong",
    [{"ratio": 0}, {"gan_weight": -1.0}, {"gan_critic_weight": -1.0}, {"gan_start": -1}, {"critic_guidance": 2.0}],
)
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def real(draw) -> dict:
    return {"x0": TEACHER[0] + TEACHER[1] * draw.normal("real", (32,))}


@pytest.mark.slow
def test_learns_the_teacher_with_a_discriminator() -> None:
    """The optimum of SiD stays: five critic moves at 2e-2 for each of 800 at 1e-2, cosine: within 4 %."""
    objective = game(gan_weight=3e-2, gan_critic_weight=1e-1, ratio=5)
    learn(objective, players_for(objective, adam(1e-2, 800), adam(2e-2)), 4000, extra=real)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)


@pytest.mark.slow
def test_the_discriminator_alone_moves_the_mean_to_the_data() -> None:
    """A critic that says what the teacher says leaves no gap. An encoder of 32 weights without a head finds the mean of
    the data within 2 %, but is too small to see the deviation, which was seen to go to 2.1 and not to .7.
    """
    objective = game(gan_weight=1.0, gan_critic_weight=1.0, ratio=2)
    sample = objective.sample

    def blind(batch: Batch, step: int, grad: bool):
        know(objective.triad.fake_score, TEACHER)
        return sample(batch, step, grad)

    objective.sample = blind  # type: ignore[method-assign]
    learn(objective, players_for(objective, adam(5e-3, 1200), adam(1e-2)), 2400, extra=real)
    assert law_of(objective)[0] == pytest.approx(TEACHER[0], rel=0.02)
