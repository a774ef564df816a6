from __future__ import annotations

from typing import Any

import pytest
import torch
from maps import LAW, NAMES, PROCESSES, Jump, Perceptron, data_batch, train, walked
from oracle import walk
from torch import Tensor

from fewstep import build, config
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.imm import Config, Objective, discrepancy
from fewstep.rollout import GammaJump, ode, renoise


def objective_of(net: Backbone, **changes: Any) -> Objective:
    return Objective(Config(**changes), Triad(net), walk((1.0,), ode))


def test_the_nearer_time_by_hand() -> None:
    """t in [.006, .994]: r(.5) = .4897 and r(.9) = .8996; never below s, and alike in a group of four."""
    objective = objective_of(GaussianModel(*LAW, Flow(), "flow_prediction"))
    batch = data_batch(4096)
    t, r, s = objective.interval(batch)
    assert (t > r).all() and (r >= s).all() and (s >= 0.006).all() and ((r == s).any() and (r > s).any())
    for time in (t, r, s):
        assert torch.equal(time.reshape(-1, 4), time.reshape(-1, 4)[:, :1].expand(-1, 4))
        assert len(time.unique()) > 1000
    for given, nearer in ((0.5, 0.4897), (0.9, 0.8996)):
        assert objective.nearer(torch.tensor([given])).item() == pytest.approx(nearer, abs=6e-5)
    assert torch.allclose(r[r > s], objective.nearer(t)[r > s], atol=1e-6)


def test_the_nearer_state_is_the_jump_that_knows_the_image() -> None:
    """x_r of the same image and noise is the jump of x_t with x0; t to r to s is t to s, to float32."""
    x0, eps = torch.randn(64, 3), torch.randn(64, 3)
    t, r, s = (torch.full((64,), time) for time in (0.8, 0.5, 0.1))
    x_t = add_noise(Flow(), x0, eps, t)
    x_r = Prediction(x0, "sample", x_t, t, Flow()).to(r)
    assert torch.allclose(x_r, add_noise(Flow(), x0, eps, r), atol=1e-6)
    straight = Prediction(x0, "sample", x_t, t, Flow()).to(s)
    assert torch.allclose(Prediction(x0, "sample", x_r, r, Flow()).to(s), straight, atol=1e-6)


def test_equal_groups_are_alike_and_points_that_meet_have_a_gradient() -> None:
    x, width = torch.randn(5, 4, 3), torch.full((5,), 0.5)
    assert discrepancy(x, x.flip(1), width).abs().max() < 1e-6
    assert discrepancy(x, x + 1, width).min() > 1e-2
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(discrepancy(x, x.detach().clone(), width).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-5
    same = torch.zeros(1, 4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(discrepancy(same, same.detach(), width[:1]).sum(), same)
    assert torch.equal(gradient, torch.zeros(1, 4, 3))


def test_the_discrepancy_by_hand() -> None:
    """Two points against two in one dimension, width .5."""
    x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.5], [3.0]]])
    k = lambda d: torch.tensor(-abs(d) / 0.5).exp().item()
    byhand = (2 + 2 * k(1)) / 4 + (2 + 2 * k(2.5)) / 4 - 2 * (k(0.5) + k(3) + k(0.5) + k(2)) / 4
    assert discrepancy(x, y, torch.tensor([0.5])).item() == pytest.approx(byhand, rel=1e-5)


def test_one_particle_is_consistency_training() -> None:
    """M = 1: 2 - 2 exp(-|f(x_t) - f(x_r)| / ((t - s) D)), which only the same point at s makes zero."""
    x, y, width = torch.randn(8, 1, 3), torch.randn(8, 1, 3), torch.rand(8)
    far = (x - y).norm(dim=2)[:, 0]
    assert torch.allclose(discrepancy(x, y, width), 2 - 2 * torch.exp(-far / (width * 3)), atol=1e-6)


def slopes(
    law: tuple[float, float], gap: int = 12, particles: int = 4, of: tuple[NoiseSchedule, Kind] = PROCESSES[0]
) -> tuple[Tensor, Tensor]:
    """Mean and standard error, over 30 batches, of the gradient in mean and log-deviation of the exact map of a law."""
    net = GaussianModel(*law, *of, learned=True)
    objective, found = objective_of(Jump(net), gap=gap), []
    objective.group = particles
    for seed in range(30):
        (turn,) = objective.turns(data_batch(512, seed, dims=1), 0)
        found.append(torch.stack(torch.autograd.grad(turn.loss, [net.mean, net.log_std])))
    all_of = torch.stack(found)
    return all_of.mean(0), all_of.std(0) / 30**0.5


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_at_the_exact_map_the_gradient_is_zero_on_average(process: tuple[NoiseSchedule, Kind]) -> None:
    """Within four standard errors; a map to a lower mean is pushed up, one to a narrower law is pushed apart."""
    mean, error = slopes(LAW, of=process)
    assert (mean.abs() < 4 * error).all()
    low, error = slopes((0.5, 0.7), of=process)
    assert low[0] < -10 * error[0]
    narrow, error = slopes((1.0, 0.4), of=process)
    assert narrow[1] < -10 * error[1]


def test_few_particles_and_a_wide_gap_narrow_the_law() -> None:
    """A particle and its own image are not independent: the exact map's gradient in the log-deviation goes like 1 / M.

    Seen with gap = 4: .26, .056 and .005 for M = 1, 4 and 64.
    """
    one, four, many = (slopes(LAW, 4, particles)[0][1] for particles in (1, 4, 64))
    assert one > 0.15 and 0.03 < four < one / 3 and many.abs() < 0.02


def test_the_weight_by_hand() -> None:
    """t = .5: l = 0, -l' = 8, alpha / (alpha^2 + sigma^2) = 1, so 4 sigmoid(b)."""
    weight = objective_of(GaussianModel(*LAW, Flow(), "flow_prediction"), bias=1.0).weight(torch.tensor([0.5, 0.2]))
    slope, log_snr = 2 / (0.2 * 0.8), 2 * torch.tensor(0.8 / 0.2).log()
    assert weight[0].item() == pytest.approx(4 * 0.7310586, rel=1e-5)
    assert weight[1].item() == pytest.approx(
        (0.5 * torch.sigmoid(1 - log_snr) * slope * 0.8 / (0.64 + 0.04)).item(), rel=1e-5
    )


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_exact_steps_ends_alike(count: int) -> None:
    noise = torch.randn(64, 3)
    net = Jump(GaussianModel(*LAW, Flow(), "flow_prediction"))
    assert torch.allclose(walked(net, count, noise), 1 + 0.7 * noise, atol=1e-5)


def test_it_learns_the_law() -> None:
    """From random weights, 1,500 steps on data alone: the law of one and of two steps. Seen: 1.00 and .654."""
    torch.manual_seed(0)
    net = Perceptron()
    train(objective_of(net, gap=10), 1500, 3e-3)
    noise = torch.randn(4096, 1)
    with torch.no_grad():
        for count in (1, 2):
            x = walked(net, count, noise)
            assert abs(x.mean() - 1) < 0.1 and abs(x.std() - 0.7) < 0.1


def test_a_group_stays_together_and_keeps_its_own_images() -> None:
    """In a run: the images and labels are those of every sample, not of the group's first."""
    run = build.build(config.load("configs/scenes/imm.yaml", ["batch=16", "micro_batches=2", "data.workers=0"])[0])
    parts, ids = build.batches(run)(0), torch.arange(16)
    assert [len(part) for part in parts] == [8, 8] and run.objective.group == 4
    assert torch.equal(torch.cat([part.x0 for part in parts]), run.source.images(ids))
    assert torch.equal(torch.cat([part.cond.inputs["class_labels"] for part in parts]), run.source.label_of(ids))
    with pytest.raises(UserError, match="4 samples a group"):
        build.build(config.load("configs/scenes/imm.yaml", ["batch=6"])[0])
    assert Objective.needs(Config()) == ("generator",)


def test_fresh_noise_is_for_where_the_network_has_landed() -> None:
    triad = Triad(GaussianModel(*LAW, Flow(), "flow_prediction"))
    with pytest.raises(UserError, match=r"deterministic: set model\.transition=ode"):
        Objective(Config(), triad, walk((1.0, 0.5), renoise))
    Objective(Config(), triad, walk((1.0, 0.5), GammaJump(1.0)))


@pytest.mark.parametrize(
    "wrong, word", [({"gap": 0}, "gap"), ({"times": Times()}, "times"), ({"times": Times(high=0.9)}, "times")]
)
def test_keys_that_cannot_be(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Config(**wrong)
