from __future__ import annotations

import pytest
import torch
from oracle import Recorder, adam, at, learn, play, players_for, told_batch, walk, whitened

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import KINDS, Kind
from fewstep.core.schedule import Flow, NoiseSchedule, Trig, add_noise
from fewstep.core.times import Times
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.diffusion import Config, Objective

MEAN, STD = 0.7, 0.5


def objective(net, **changes: object) -> Objective:
    return Objective(Config(**changes), Triad(net), walk((1.0,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_loss_at_the_exact_denoiser_is_the_posterior_variance(
    kind: Kind, t: float, schedule: NoiseSchedule
) -> None:
    """The target p x0 + q eps has Var( . | x_t) = (p sigma - q alpha)^2 s^2 / V, V = alpha^2 s^2 + sigma^2.

    No gradient is left there: the exact denoiser is the minimiser.
    """
    noise, data = whitened(2)
    when = schedule.snap(torch.tensor([t], dtype=torch.float64)).float()
    alpha, sigma = (v.item() for v in schedule.coefficients(when.double())[:2])
    size = {"epsilon": alpha, "sample": sigma, "v_prediction": 1.0, "flow_prediction": alpha + sigma}[kind]
    if kind == "v_prediction":
        size = alpha**2 + sigma**2
    variance = size**2 * STD**2 / (alpha**2 * STD**2 + sigma**2)
    net = GaussianModel(MEAN, STD, schedule, kind, learned=True)
    turn = play(objective(net, times=at(t)), told_batch(noise, noise, x0=MEAN + STD * data))["generator"]
    assert turn.loss == pytest.approx(variance, rel=2e-5)
    scale = max(1.0, size**2)
    assert abs(turn["generator.mean"]) < 1e-5 * scale and abs(turn["generator.log_std"]) < 1e-5 * scale


def test_the_network_sees_the_drawn_time_and_the_noised_data() -> None:
    net = Recorder(GaussianModel(MEAN, STD, Trig(), "epsilon"))
    draw = Draw(0, 0, torch.arange(4096))
    x0 = draw.normal("x0", (2,))
    list(objective(net, times=Times(law="logit_normal", mean=0.3, low=0.1)).turns(Batch(x0, Condition(), draw, x0), 0))
    ((x_t, t),) = net.seen
    eps = (x_t - Trig().at(t, x_t).alpha * x0) / Trig().at(t, x_t).sigma
    assert t.min() >= 0.1 and t.median().item() == pytest.approx(torch.sigmoid(torch.tensor(0.3)).item(), abs=0.02)
    assert abs(eps.mean().item()) < 4 / 8192**0.5 and eps.std().item() == pytest.approx(1, abs=4 / 16384**0.5)
    assert torch.corrcoef(torch.stack([eps.flatten(), x0.flatten()]))[0, 1].abs() < 4 / 8192**0.5
    assert torch.allclose(add_noise(Trig(), x0, eps, t), x_t, atol=1e-6)


class Labelled(GaussianModel):
    """Records the labels it was given; label 9 is the null class."""

    def null(self, cond: Condition) -> Condition:
        return cond.with_inputs(class_labels=torch.full_like(cond.inputs["class_labels"], 9))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        self.labels = cond.inputs["class_labels"]
        return super().forward(x_t, t, cond, to=to, taps=taps, stop=stop)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_the_share_of_dropped_labels(share: float) -> None:
    """To four standard errors of 2^14 samples; the others keep theirs, and another step drops others."""
    net, count = Labelled(MEAN, STD, Flow(), "flow_prediction"), 1 << 14
    labels = torch.arange(count) % 5
    dropped = []
    for step in (0, 1):
        draw = Draw(0, step, torch.arange(count))
        batch = Batch(draw.normal("noise", (1,)), Condition({"class_labels": labels}), draw, draw.normal("x0", (1,)))
        list(objective(net, label_dropout=share).turns(batch, step))
        dropped.append(net.labels == 9)
        assert torch.equal(net.labels[~dropped[-1]], labels[~dropped[-1]])
        found = dropped[-1].float().mean().item()
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)
    assert share == 0 or not torch.equal(*dropped)
    rows = torch.stack([d[labels == k].float().mean() for d in dropped for k in range(5)])
    assert (rows - share).abs().max() <= 5 * (share * (1 - share) / count * 5) ** 0.5  # alike for every label


def test_data_without_labels_has_none_to_drop() -> None:
    noise, data = whitened(2)
    net = GaussianModel(MEAN, STD, Flow(), "flow_prediction", learned=True)
    assert play(objective(net, label_dropout=0.5), told_batch(noise, noise, x0=data))["generator"].loss > 0
    for wrong in (1.0, -0.1):
        with pytest.raises(UserError):
            Config(label_dropout=wrong)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_learns_the_data(kind: Kind, vp: NoiseSchedule) -> None:
    """A Gaussian denoiser from N(0, 1) to data N(.7, .5^2) in 32 dimensions: within 2 %, 500 moves."""
    net = GaussianModel(0.0, 1.0, vp, kind, learned=True)
    train = objective(net)
    players = players_for(train, adam(2e-2, 500))
    learn(train, players, 500, extra=lambda draw: {"x0": MEAN + STD * draw.normal("x0", (32,))})
    assert (net.mean.item(), net.log_std.exp().item()) == pytest.approx((MEAN, STD), rel=0.02)
