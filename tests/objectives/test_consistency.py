from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import ConsistencyMap, Line, Recorder, adam, learn, made, play, told_batch, walk, whitened
from torch import Tensor

from fewstep import cli
from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import KINDS, Kind, Prediction
from fewstep.core.schedule import EDM, Flow, NoiseSchedule, add_noise, vp_from_betas
from fewstep.core.times import Grid, Times
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.consistency import Config, Objective
from fewstep.objectives.pieces.curriculum import Curriculum
from fewstep.objectives.pieces.distances import distance, each
from fewstep.objectives.pieces.teacher_step import teacher_step
from fewstep.rollout import GammaJump, Transition, cps, ode, renoise
from fewstep.train.player import Follower, Player, constant_decay

LAW = (1.0, 0.7)
VP = vp_from_betas("linear", 1e-4, 0.02)
PROCESSES: list[tuple[NoiseSchedule, Kind]] = [(Flow(), "flow_prediction"), (VP, "epsilon"), (VP, "v_prediction")]
NAMES = ["flow", "vp-epsilon", "vp-v"]


def at_the_map(schedule: NoiseSchedule, kind: Kind, count: int, **changes: Any) -> Objective:
    """The exact consistency function as the generator, on a grid of `count` intervals."""
    teacher = GaussianModel(*LAW, schedule, kind)
    triad = Triad(ConsistencyMap(GaussianModel(*LAW, schedule, kind, learned=True)), Guided(teacher))
    config = Config(**{"target": "self", "distance": "l2", "grid": Grid(count), **changes})
    return Objective(config, triad, walk((1.0,)))


def on_the_grid(count: int, t: float) -> float:
    """The uniform number that picks the rung t of a ladder with `count` intervals."""
    return (round(t * count) - 0.5) / count


def told_data(share: float) -> Batch:
    """Exact moments of data and noise, on the interval that `share` picks."""
    x0, eps = whitened(2)
    batch = told_batch(eps, eps, LAW[0] + LAW[1] * x0)
    return Batch(batch.noise, batch.cond, type(batch.draw)(eps, share=share), batch.x0)  # type: ignore[call-arg, arg-type]


def slope(counts: list[int], residuals: list[float]) -> float:
    """d log(residual) / d log(h) by least squares, h = 1 / count."""
    return float(np.polyfit(np.log([1 / count for count in counts]), np.log(residuals), 1)[0])


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("solver, order", [("euler", 2), ("heun", 3)])
def test_one_teacher_step_leaves_a_residual_of_its_order(
    schedule: NoiseSchedule, kind: Kind, solver: str, order: int
) -> None:
    """rms f(x_t, t) - f(x_s, s) at the exact map goes like h^2 (DDIM) and h^3 (Heun).

    Seen at t = .5, h = 1/40 .. 1/100: 2.02 and 3.01 for the flow, 2.06 and 3.10 for VP.
    """
    counts = [40, 50, 100]
    residuals = []
    for count in counts:
        turn = play(at_the_map(schedule, kind, count, solver=solver), told_data(on_the_grid(count, 0.5)))["generator"]
        residuals.append(turn.loss**0.5)
    assert slope(counts, residuals) == pytest.approx(order, abs=0.2)
    assert residuals[-1] > 1e-6  # far above rounding


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_an_exact_teacher_step_leaves_nothing(
    schedule: NoiseSchedule, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = at_the_map(schedule, kind, 10)
    exact = objective.triad.real_score.inner.flow_map
    monkeypatch.setattr(objective, "cleaner", lambda x_t, x0, eps, t, s, cond: exact(x_t, t, s))
    for t in (0.1, 0.5, 1.0):  # 0.1 steps onto the clean end itself
        turn = play(objective, told_data(on_the_grid(10, t)))["generator"]
        assert turn.loss**0.5 < 1e-5
        assert turn.gradients["generator.of.mean"].abs() < 1e-5


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_the_teacher_solves_its_ode(schedule: NoiseSchedule, kind: Kind, solver: str, order: int) -> None:
    """Many steps from t = .9 to .2 against the closed-form flow map: global order 1 (DDIM) and 2 (Heun)."""
    teacher, (z,) = GaussianModel(*LAW, schedule, kind), whitened(1)
    rows = torch.ones(len(z))
    counts, errors = [7, 14, 28], []
    for count in counts:
        ladder = torch.linspace(0.9, 0.2, count + 1)
        x = z
        for t, s in itertools.pairwise(ladder):
            x = teacher_step(teacher, x, t * rows, s * rows, Condition(), solver)  # type: ignore[arg-type]
        errors.append((x - teacher.flow_map(z, 0.9 * rows, 0.2 * rows)).square().mean().sqrt().item())
    assert slope(counts, errors) == pytest.approx(order, abs=0.25)


def test_a_heun_step_onto_the_clean_end_is_the_ddim_step() -> None:
    teacher, (x,) = GaussianModel(*LAW, VP, "epsilon"), whitened(1)
    t, s = torch.linspace(0.1, 1, len(x)), torch.zeros(len(x))
    s[::2] = 0.05
    euler, heun = (teacher_step(teacher, x, t, s, Condition(), solver) for solver in ("euler", "heun"))  # type: ignore[arg-type]
    assert torch.equal(euler[1::2], heun[1::2]) and (euler[::2] - heun[::2]).abs().max() > 1e-3
    start = GaussianModel(
        *LAW, Flow(), "flow_prediction"
    )  # alpha = 0 at t = 1: the step cannot be Heun in sigma / alpha
    ones = torch.ones(len(x))
    assert torch.equal(*(teacher_step(start, x, ones, 0.9 * ones, Condition(), kind) for kind in ("euler", "heun")))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_boundary_is_exact_for_every_kind(kind: Kind, schedule: NoiseSchedule) -> None:
    """At s = 0 the target is x_s bit for bit, whatever the network would say of a clean input."""
    net = GaussianModel(*LAW, schedule, kind)
    objective = Objective(Config(target="self"), Triad(net, Guided(net)), walk((1.0,)))
    (x_s,) = whitened(1)
    s = torch.zeros(len(x_s))
    s[::2] = 0.5
    target = objective.target(x_s, s, torch.zeros_like(s), Condition())
    assert torch.equal(target[1::2], x_s[1::2])
    assert torch.equal(target[::2], net(x_s, s, Condition()).x0[::2])
    assert not torch.equal(target[::2], x_s[::2])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_raw_readings_reach_the_boundary_by_themselves(kind: Kind) -> None:
    """f(x, t) -> x as t -> 0 for any bounded output: sigma goes to zero. A sample network has no such skip."""
    (x,) = whitened(1)
    for t in (1e-2, 1e-4, 1e-6):
        rows = torch.full((len(x),), t)
        f = Prediction(torch.ones_like(x), kind, x, rows, Flow()).x0
        assert (f - x).abs().max() < 10 * t
    assert (Prediction(torch.ones_like(x), "sample", x, rows, Flow()).x0 - x).abs().max() > 0.5


def test_the_target_carries_no_gradient() -> None:
    """Against the same loss written out: sg on the target, and not without it."""
    objective, batch = at_the_map(Flow(), "flow_prediction", 5), told_data(on_the_grid(5, 0.6))
    turn = play(objective, batch)["generator"]
    net, rows = objective.triad.generator, torch.ones(64)
    x_t = add_noise(Flow(), batch.x0, batch.noise, 0.6 * rows)
    x_s = teacher_step(objective.triad.real_score, x_t, 0.6 * rows, 0.4 * rows, Condition(), "euler")
    f, target = net(x_t, 0.6 * rows, Condition()).x0, net(x_s, 0.4 * rows, Condition()).x0
    loss = distance(f, target.detach(), "l2")
    (stopped,) = torch.autograd.grad(loss, net.of.log_std, retain_graph=True)
    (through,) = torch.autograd.grad(distance(f, target, "l2"), net.of.log_std)
    assert turn.loss == pytest.approx(loss.item(), rel=1e-4)
    assert turn["generator.of.log_std"] == pytest.approx(stopped.item(), rel=1e-4)
    assert abs(stopped - through) > 0.5 * abs(stopped)
    assert turn.touched() == {"generator"}


def regression(y: Tensor, x: Tensor) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line of y on x over all elements, float64."""
    a, b = x.double().flatten(), y.double().flatten()
    rate = ((a - a.mean()) * (b - b.mean())).mean() / (a - a.mean()).square().mean()
    return rate.item(), (b.mean() - rate * a.mean()).item()


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_training_without_a_teacher_is_right_on_average_only(schedule: NoiseSchedule, kind: Kind) -> None:
    """f(x_t) - f(x_s) with x_s from the data itself: O(h) for each sample, the O(h^2) of distillation on average.

    E[x_s | x_t] is the DDIM step of the exact denoiser, and everything is linear, so with exact moments the
    regression on x_t is that of the teacher's step to rounding.
    """
    rms, lines = [], []
    for count in (10, 20, 40):
        t, s = torch.full((64,), 0.6), torch.full((64,), 0.6 - 1 / count)
        residuals = {}
        for mode in ("training", "distillation"):
            objective = at_the_map(schedule, kind, count, mode=mode)
            batch = told_data(0.5)
            x_t = add_noise(schedule, batch.x0, batch.noise, t)
            x_s = objective.cleaner(x_t, batch.x0, batch.noise, t, s, batch)
            f = objective.triad.generator(x_t, t, batch.cond).x0
            residuals[mode] = f - objective.target(x_s, s, torch.zeros_like(s), batch.cond)
            rate, intercept = regression(residuals[mode], x_t)
            if mode == "training":
                rms.append(residuals[mode].square().mean().sqrt().item() * count)
                lines.append((rate, intercept))
        assert (rate, intercept) == pytest.approx(lines[-1], abs=3e-6)
        assert residuals["distillation"].square().mean().sqrt().item() * count < 0.5 * rms[-1]
    assert min(rms) > 0.15 and max(rms) < 1.6 * min(rms)  # of order h
    rates = [abs(rate) for rate, _ in lines]
    assert slope([10, 20, 40], rates) == pytest.approx(2, abs=0.35)


def test_training_asks_for_no_teacher() -> None:
    assert Objective.needs(Config(mode="training")) == ("generator",)
    assert Objective.needs(Config()) == ("generator", "real_score")
    assert Objective.reads == ("x0",)
    triad = Triad(GaussianModel(*LAW, Flow(), "flow_prediction", learned=True))
    objective = Objective(Config(mode="training", target="self"), triad, walk((1.0,)))
    assert play(objective, told_data(0.5))["generator"].loss > 0


def test_the_grid_neighbours_are_what_the_networks_see() -> None:
    net = Recorder(GaussianModel(*LAW, Flow(), "flow_prediction"))
    teacher = Recorder(GaussianModel(*LAW, Flow(), "flow_prediction"))
    objective = Objective(Config(target="self", grid=Grid(8, shift=3.0)), Triad(net, Guided(teacher)), walk((1.0,)))
    draw = Draw(0, 0, torch.arange(256))
    batch = Batch(draw.normal("noise", (4,)), Condition(), draw, draw.normal("x0", (4,)))
    list(objective.turns(batch, 0))
    (x_s, s), (x_t, t) = net.seen
    ladder = Grid(8, shift=3.0).times(Flow())
    index = torch.searchsorted(ladder, t)
    assert torch.equal(ladder[index], t) and torch.equal(ladder[index - 1], s)
    assert torch.equal(teacher.seen[0][0], x_t) and torch.equal(teacher.seen[0][1], t)
    assert torch.equal(x_s, teacher.inner(x_t, t, Condition()).to(s))
    assert len(index.unique()) == 8


def test_the_follower_trails_with_its_decay_and_gives_the_target() -> None:
    """shadow <- .95 shadow + .05 weights after each move, and the target is its answer."""
    generator = GaussianModel(*LAW, Flow(), "flow_prediction", learned=True)
    triad = Triad(generator, Guided(GaussianModel(*LAW, Flow(), "flow_prediction")))
    objective = Objective(Config(distance="l2", grid=Grid(5)), triad, walk((1.0,)))
    assert objective.followers() == {"target": 0.95}
    assert Objective(Config(target="self"), triad, walk((1.0,))).followers() == {}
    player = Player("generator", [generator], adam(0.1))
    player.followers["target"] = Follower(generator, constant_decay(objective.followers()["target"]))
    objective.targets["target"] = player.followers["target"].module  # type: ignore[assignment]
    shadow = generator.mean.item()
    for _ in range(3):
        play(objective, told_data(on_the_grid(5, 0.6)))
        player.move(0)
        shadow = 0.95 * shadow + 0.05 * generator.mean.item()
        assert objective.targets["target"].mean.item() == pytest.approx(shadow, rel=1e-6)
    assert abs(generator.mean.item() - shadow) > 1e-2
    (x_s,) = whitened(1)
    rows = torch.full((64,), 0.4)
    assert torch.equal(
        objective.target(x_s, rows, 0 * rows, Condition()), objective.targets["target"](x_s, rows, Condition()).x0
    )
    assert not torch.equal(objective.target(x_s, rows, 0 * rows, Condition()), generator(x_s, rows, Condition()).x0)
    assert not any(p.requires_grad for p in objective.targets["target"].parameters())
    for wrong in (1.0, -0.1):
        with pytest.raises(UserError):
            Config(target_decay=wrong)


def test_distances_by_hand() -> None:
    a, b = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.0, 2.0, 0.5]])
    assert distance(a, b, "l2").item() == pytest.approx(17 / 3)
    assert distance(a, b, "l1").item() == pytest.approx(5 / 3)
    huber = ((1 + 1e-6) ** 0.5 + (16 + 1e-6) ** 0.5 - 2e-3) / 3
    assert distance(a, b, "huber").item() == pytest.approx(huber, rel=1e-6)
    assert distance(a, a, "huber").item() == 0


FOUR = (1.0, 0.75, 0.5, 0.25)


def walked(transition: Transition, times: tuple[float, ...]) -> tuple[float, float]:
    """Mean and deviation of 2^17 numbers that the exact map makes along the flow."""
    (noise,) = whitened(1, rows=4096)
    draw = Draw(0, 0, torch.arange(len(noise)))
    x = walk(times, transition)(
        ConsistencyMap(GaussianModel(*LAW, Flow(), "flow_prediction")), noise, Condition(), draw
    ).x
    return x.mean().item(), x.std().item()


def ode_deviation(times: tuple[float, ...]) -> float:
    """By hand: f = 1 + .7 (x - a) / r with a = 1 - t, r^2 = .49 a^2 + t^2; then x_s = (1 - s) f + s / t (x - a f)."""
    x = 1.0
    for t, s in itertools.pairwise((*times, 0.0)):
        f = 0.7 * x / (0.49 * (1 - t) ** 2 + t**2) ** 0.5
        x = (1 - s) * f + s / t * (x - (1 - t) * f)
    return x


@pytest.mark.parametrize("times, deviation", [((1.0,), 0.7), ((1.0, 0.5), 0.9748), (FOUR, 1.1590)])
def test_an_exact_map_walked_by_the_ode_is_wrong_beyond_one_step(times: tuple[float, ...], deviation: float) -> None:
    """The noise it is read to hold is a function of the sample that it is added to again."""
    assert ode_deviation(times) == pytest.approx(deviation, abs=1e-4)
    assert walked(ode, times) == pytest.approx((1.0, deviation), abs=1e-3)


def test_an_exact_map_that_renoises_is_right_and_half_fresh_noise_is_not_enough() -> None:
    """Four standard errors of 2^17 numbers: .006."""
    assert walked(renoise, FOUR) == pytest.approx(LAW, abs=0.008)
    assert walked(cps(0.5), FOUR)[1] > 0.95 and walked(GammaJump(0.5), FOUR)[1] > 0.8


@pytest.mark.parametrize("transition", [ode, cps(0.5), GammaJump(0.5)])
def test_several_steps_without_fresh_noise_alone_are_refused(transition: Transition) -> None:
    net = GaussianModel(*LAW, Flow(), "flow_prediction")
    with pytest.raises(UserError, match=r"4 steps .* model\.transition=renoise, or use one step"):
        Objective(Config(), Triad(net, Guided(net)), walk(FOUR, transition))
    for fine in (walk((1.0,), transition), walk(FOUR, renoise)):
        assert Objective(Config(), Triad(net, Guided(net)), fine).rollout is fine


def test_the_command_line_refuses_them(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before training, and when a one-step run whose transition is the ODE is asked for four."""
    given = ["configs/scenes/consistency.yaml", f"model.teacher={tiny_teacher}", "batch=2", "steps=1"]
    assert cli.main(["train", *given, "model.steps=4", "--dry-run"]) == 2
    assert cli.main(["train", *given, "model.steps=4", "model.transition=renoise", "--dry-run"]) == 0
    quiet = ["evals.every=0", "evals.samples=0", "save.export=false"]
    assert cli.main(["train", *given, *quiet, f"--out={tmp_path / 'runs'}"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    picture = ["--count=2", f"--out={tmp_path / 'x.png'}"]
    assert cli.main(["sample", str(run), *picture]) == 0
    assert cli.main(["sample", str(run), "--steps=4", *picture]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    refusals = [line for line in said if line.startswith("fewstep: ")]
    assert len(refusals) == 2 and all("a consistency function is no denoiser: 4 steps" in line for line in refusals)


@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_learns_the_map_of_the_discretised_teacher(mode: str) -> None:
    """One step of the student ends where the teacher's own 8 DDIM steps end: mean and deviation within 2 %.

    These are the fixed point of consistency distillation, and of training on average, not the exact (1, .7).
    """
    count = 8
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    student = Line(Flow(), "flow_prediction")
    config = Config(mode=mode, distance="l2", grid=Grid(count), target_decay=0.9)  # type: ignore[arg-type]
    objective = Objective(config, Triad(student, Guided(teacher)), walk((1.0,)))
    player = Player("generator", [student], adam(1e-2, 1200))
    player.followers["target"] = Follower(student, constant_decay(config.target_decay))
    objective.targets["target"] = player.followers["target"].module  # type: ignore[assignment]
    learn(objective, {"generator": player}, 1200, extra=lambda draw: {"x0": LAW[0] + LAW[1] * draw.normal("x0", (32,))})
    ladder = tuple((torch.arange(count, 0, -1) / count).tolist())
    limit = made(teacher, ladder)
    assert limit[0] == pytest.approx(1.0, abs=1e-3) and 0.5 < limit[1] < 0.69  # DDIM falls short of .7
    assert made(student, (1.0,)) == pytest.approx(limit, rel=0.02)


def test_curricula_are_the_published_curves() -> None:
    """CT: 1 to 150 intervals and mu from .95^2 to .95^(2/150); iCT: 10, 20, .. 1280, each for an eighth of the run."""
    root = Curriculum("root", start=2, end=150, over=800)
    assert [root.count(k, 18) for k in (0, 800, 5000)] == [1, 150, 150]
    assert root.count(400, 18) == math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4) - 1) == 106
    assert root.follower(0) == pytest.approx(0.95**2) and root.follower(800) == pytest.approx(0.95 ** (2 / 150))
    doubling = Curriculum("doubling", start=10, end=1280, over=800)
    assert [doubling.count(k, 18) for k in (0, 99, 100, 350, 700, 800, 9000)] == [10, 10, 20, 80, 1280, 1280, 1280]
    assert Curriculum().count(7, 18) == 18


def test_a_curriculum_drives_the_grid_and_the_follower() -> None:
    net = GaussianModel(*LAW, Flow(), "flow_prediction", learned=True)
    config = Config(mode="training", curriculum=Curriculum("root", over=10, end=20))
    objective, (u,) = Objective(config, Triad(net), walk((1.0,))), whitened(1)
    batch = Batch(u, Condition(), Draw(0, 0, torch.arange(len(u))), u)
    for step in (0, 3, 10):
        t, m = objective.neighbours(batch, step)
        assert torch.allclose(t - m, torch.full_like(t, 1 / config.curriculum.count(step, 18)), atol=1e-6)
    law = objective.followers()["target"]
    assert callable(law) and law(10) == pytest.approx(0.95 ** (2 / 20))


def test_karras_rungs() -> None:
    """Even in sigma^(1/7) between .002 and 80, as N = 40 of the paper."""
    times = Grid(39, law="karras").times(EDM()).double() * 80
    roots = times[1:] ** (1 / 7)
    assert times[-1].item() == pytest.approx(80) and times[0] == 0
    steps = (roots[1:] - roots[:-1]) / (80 ** (1 / 7) - 0.002 ** (1 / 7)) * 39
    assert (steps - 1).abs().max() < 1e-3


def test_intervals_by_a_law_are_its_integrals() -> None:
    """iCT: erf differences of the log-normal, mean -1.1 and deviation 2, within four standard errors."""
    grid, law = Grid(10, law="karras"), Times(law="log_normal", mean=-1.1, std=2.0)
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    t, m = grid.around(law(u, EDM()), EDM())
    rungs = grid.times(EDM()).double() * 80
    below = 0.5 * (1 + torch.erf((rungs.clamp(min=1e-12).log() + 1.1) / (2 * 2**0.5)))
    below[0], below[-1] = 0, 1
    for i in range(10):
        share = ((t * 80 - rungs[i + 1]).abs() < 1e-4).double().mean()
        assert share.item() == pytest.approx((below[i + 1] - below[i]).item(), abs=4 * 0.5 / 200_000**0.5)
    assert (m < t).all()


def test_the_huber_of_a_sample() -> None:
    """c = .00054 sqrt(values): .030 for CIFAR-10, .060 for ImageNet-64; far from it the gradient is a unit vector."""
    for values, c in ((3072, 0.030), (12288, 0.060)):
        small = torch.full((1, values), 1e-6)
        expected = (values * 1e-12 + c * c) ** 0.5 - c
        assert each(small, 0 * small, "sample_huber").item() == pytest.approx(expected, rel=0.03, abs=1e-9)
    x = (5 * torch.randn(2, 48)).requires_grad_()
    (slope_of,) = torch.autograd.grad(each(x, torch.zeros(2, 48), "sample_huber").sum(), x)
    assert torch.allclose(slope_of, (x / x.norm(dim=1, keepdim=True)).detach(), atol=1e-5)
    for kind in ("l2", "l1", "huber"):
        assert each(x, 0 * x, kind).mean().item() == pytest.approx(distance(x, 0 * x, kind).item(), rel=1e-5)  # type: ignore[arg-type]


def test_the_weight_is_one_over_the_step() -> None:
    objective = at_the_map(Flow(), "flow_prediction", 4, weight="inverse_step", distance="l1")
    f, target = torch.ones(2, 3), torch.zeros(2, 3)
    assert objective.loss(f, target, torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.3])).item() == pytest.approx(3.5)


@pytest.mark.parametrize("wrong", [{"start": 0}, {"start": 9, "end": 3}, {"over": 0}, {"decay": 1.0}])
def test_curricula_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="curriculum"):
        Curriculum(**wrong)
