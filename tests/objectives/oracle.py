"""Closed-form truth for objectives: exact moments, told draws, Gaussian students, and one step played by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import VP, Flow, NoiseSchedule, bridge
from fewstep.core.times import Step, Times
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective, Share, Triad, Turn, Turns
from fewstep.rollout import Rollout, ode, renoise
from fewstep.train.loop import train_step
from fewstep.train.player import Player, PlayerConfig, Pull

Law = tuple[float, float]
"""mean and deviation of every coordinate"""

STUDENT: Law = (-0.5, 1.3)  # fixture A
TEACHER: Law = (1.0, 0.7)
FIXTURE_A = (-0.661440, 0.198369)  # dKL / d(mean, deviation) at alpha = .6, sigma = .8

LEAN = 0.4
"""by how much the mean is lower without a label"""

# Four levels; index 1 has sigma = .5, index 2 alpha = .6 and sigma = .8: the levels of fixtures A and P.
FIXTURE_VP = VP(torch.tensor([0.9, 0.75, 0.36, 0.01], dtype=torch.float64))
CASES: list[tuple[NoiseSchedule, Kind, float]] = [
    (FIXTURE_VP, "epsilon", 0.75),
    (FIXTURE_VP, "sample", 0.75),
    (FIXTURE_VP, "v_prediction", 0.75),
    (Flow(), "flow_prediction", 0.4),
    (Flow(), "flow_prediction", 0.85),
]
CASE_NAMES = [f"{type(schedule).__name__}-{kind}-{t}" for schedule, kind, t in CASES]


def kl_gradient(schedule: NoiseSchedule, t: float, student: Law = STUDENT, teacher: Law = TEACHER) -> Law:
    """dKL(q_t || p_t) / d(mean, deviation) of a Gaussian student against a Gaussian teacher, float64.

    alpha^2 (mu - m_r) / V_p and alpha^2 s (1 / V_p - 1 / V_q) with V = alpha^2 s^2 + sigma^2.
    """
    alpha, sigma, _, _ = (v.item() for v in schedule.coefficients(torch.tensor([t], dtype=torch.float64)))
    of_teacher, of_student = (alpha**2 * std**2 + sigma**2 for _, std in (teacher, student))
    mean = alpha**2 * (student[0] - teacher[0]) / of_teacher
    return mean, alpha**2 * student[1] * (1 / of_teacher - 1 / of_student)


def whitened(count: int, rows: int = 64, dims: int = 32) -> list[Tensor]:
    """`count` tensors (rows, dims) whose means, variances and correlations over all elements are exactly 0, 1 and 0.

    Every fixture here is quadratic in the noise, so these give its expectation instead of an estimate.
    """
    z = torch.randn(rows * dims, count, dtype=torch.float64)
    orthonormal, _ = torch.linalg.qr(z - z.mean(0))
    return [(column * (rows * dims) ** 0.5).float().reshape(rows, dims) for column in orthonormal.unbind(1)]


@dataclass(frozen=True)
class Told:
    """A `Draw` that says what it was told: every normal is `eps`, every uniform `share`, every exit `exit`."""

    eps: Tensor
    share: float = 0.5
    exit: int = 0

    @property
    def ids(self) -> Tensor:
        return torch.arange(len(self.eps))

    def normal(self, purpose: str, shape: Any) -> Tensor:
        return self.eps

    def uniform(self, purpose: str, shape: Any = ()) -> Tensor:
        return torch.full((len(self.eps), *shape), self.share)

    def integers(self, purpose: str, high: int, shape: Any = ()) -> Tensor:
        assert self.exit < high
        return torch.full((len(self.eps), *shape), self.exit)

    def shared_integer(self, purpose: str, high: int) -> int:
        assert self.exit < high
        return self.exit


class Renamed(Draw):
    """A Draw that looks only at the last word of a purpose: two objectives then ask for the same numbers."""

    def _words(self, purpose: str, count: int, ids: Tensor) -> Tensor:
        return super()._words(purpose.split(".")[-1], count, ids)


def at(t: float) -> Times:
    """Times that give exactly t to a draw that says 0.5."""
    return Times(low=t - 0.01, high=t + 0.01)


def told_batch(noise: Tensor, eps: Tensor, x0: Tensor | None = None, pair: Pair | None = None, exit: int = 0) -> Batch:
    return Batch(noise, Condition(), Told(eps, exit=exit), x0, pair)  # type: ignore[arg-type]


class Student(Backbone):
    """x0 = mean_i + std_i x_t at its i-th time: every rollout of it is Gaussian."""

    def __init__(self, schedule: NoiseSchedule, laws: list[Law], times: tuple[float, ...] = (1.0,)):
        super().__init__()
        self.schedule, self.kind = schedule, "sample"
        self.mean = nn.Parameter(torch.tensor([mean for mean, _ in laws]))
        self.std = nn.Parameter(torch.tensor([std for _, std in laws]))
        self.register_buffer("times", torch.tensor(times))
        self.seen: list[Tensor] = []

    def null(self, cond: Condition) -> Condition:
        return cond

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        self.seen.append(x_t.detach())
        rung = (t[:, None] - self.times).abs().argmin(1)
        value = self.mean[rung, None] + self.std[rung, None] * x_t
        return Prediction(value, self.kind, x_t, t, self.schedule, {name: x_t for name in taps})


class ConsistencyMap(Backbone):
    """The exact consistency function of a Gaussian: the clean end of the probability flow through x_t."""

    def __init__(self, of: GaussianModel):
        super().__init__()
        self.of, self.schedule, self.kind = of, of.schedule, "sample"

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        value = self.of.flow_map(x_t, t, torch.zeros_like(t))
        return Prediction(value, self.kind, x_t, t, self.schedule)


class Recorder(Backbone):
    """Records the inputs of `inner`."""

    def __init__(self, inner: Backbone):
        super().__init__()
        self.inner, self.schedule, self.kind = inner, inner.schedule, inner.kind
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        self.seen.append((x_t, t))
        return self.inner(x_t, t, cond)


class Line(Backbone):
    """value = c(t) + d(t) x, per coordinate, both from a small network of t: contains every Gaussian truth."""

    def __init__(self, schedule: NoiseSchedule, kind: Kind):
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        when = torch.stack([t, t.square(), (3 * t).sin(), (3 * t).cos()], 1)
        shift, rate = self.layers(when).chunk(2, 1)
        return Prediction(shift + rate * x_t, self.kind, x_t, t, self.schedule)


class Leaning(GaussianModel):
    """A Gaussian whose clean mean is moved by +2 for label 1 and by -LEAN without a label (2): exact for each."""

    def null(self, cond: Condition) -> Condition:
        return cond.with_inputs(class_labels=torch.full_like(cond.inputs["class_labels"], 2))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        by = torch.tensor([0.0, 2.0, -LEAN])[cond.inputs["class_labels"]][:, None]
        here = super().forward(x_t - self.schedule.at(t, x_t).alpha * by, t, cond)
        return Prediction(here.target(here.x0 + by, here.eps), self.kind, x_t, t, self.schedule)


class Featured(GaussianModel):
    """A Gaussian critic whose tap `trunk` is an MLP (B, 16, 8) of every pair of coordinates, scale and all."""

    def __init__(self, mean: float, std: float, schedule: NoiseSchedule, kind: Kind):
        super().__init__(mean, std, schedule, kind, learned=True)
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.SiLU())
        self.tap = "trunk"
        self.stops: list[bool] = []
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        self.stops.append(stop)
        self.seen.append((x_t.detach(), t))
        pairs = x_t.unflatten(1, (-1, 2))
        when = t[:, None, None].expand(*pairs.shape[:2], 1)
        features = self.trunk(torch.cat([pairs, when], 2)) if taps else x_t
        prediction = super().forward(x_t, t, cond)
        prediction.features.update({name: features for name in taps})  # type: ignore[attr-defined]
        return prediction


def one_step() -> Rollout:
    return Rollout([Step(1.0, 1.0)])


def walk(times: tuple[float, ...], transition: Any = renoise) -> Rollout:
    return Rollout([Step(t, t) for t in times], transition)


def made(net: Backbone, times: tuple[float, ...], transition: Any = ode) -> tuple[float, float]:
    """Mean and deviation of 64 x 32 samples from exact unit noise."""
    (noise,) = whitened(1)
    with torch.no_grad():
        x = walk(times, transition)(net, noise, Condition(), Draw(0, 0, torch.arange(64))).x
    return x.mean().item(), x.std(unbiased=False).item()


def real_batch(step: int = 0, ids: Tensor | None = None, draw: type[Draw] = Draw) -> Batch:
    """Noise and real samples of the teacher's law."""
    source = draw(0, step, torch.arange(16) if ids is None else ids)
    x0 = TEACHER[0] + TEACHER[1] * source.normal("real", (32,))
    return Batch(source.normal("noise", (32,)), Condition(), source, x0)


def gaussian_triad(
    schedule: NoiseSchedule, kind: Kind, student: Law = STUDENT, teacher: Law = TEACHER, critic: Law | None = None
) -> Triad:
    """A one-step student, its frozen Gaussian teacher, and a learnable critic that holds the student's law."""
    return Triad(
        Student(schedule, [student]),
        Guided(GaussianModel(*teacher, schedule, kind)),
        GaussianModel(*(critic or student), schedule, kind, learned=True),
    )


def networks(objective: Objective) -> dict[str, nn.Module]:
    """Everything that has weights, by role; `own` are the objective's modules."""
    triad = objective.triad
    roles = {"generator": triad.generator, "real_score": triad.real_score, "fake_score": triad.fake_score}
    return {**{name: net for name, net in roles.items() if net is not None}, "own": objective}


def weights(objective: Objective) -> Iterator[tuple[str, nn.Parameter]]:
    for role, network in networks(objective).items():
        for name, parameter in network.named_parameters():
            yield f"{role}.{name}", parameter


@dataclass
class Played:
    """What a turn's loss was, and the gradient it left on every weight of the run."""

    loss: float
    logs: dict[str, float]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.gradients[name].item()

    def touched(self) -> set[str]:
        """The roles with a gradient, be it zero."""
        return {name.split(".")[0] for name in self.gradients}


def play(objective: Objective, batch: Batch, step: int = 0) -> dict[str, Played]:
    """Plays the turns of one step as the loop does, without moving anything; player -> what happened."""
    result: dict[str, Played] = {}
    for turn in taken(objective.turns(batch, step)):
        assert turn.player not in result
        for _, parameter in weights(objective):
            parameter.grad = None
        turn.loss.backward()
        gradients = {name: p.grad.clone() for name, p in weights(objective) if p.grad is not None}
        logs = {name: value.item() for name, value in turn.logs.items()}
        result[turn.player] = Played(turn.loss.item(), logs, gradients)
    return result


def taken(turns: Turns) -> Iterator[Turn]:
    """The turns of one micro-batch alone, which is answered with what it shares."""
    answer: Tensor | None = None
    while True:
        try:
            turn = turns.send(answer)
        except StopIteration:
            return
        answer = turn.value if isinstance(turn, Share) else None
        if isinstance(turn, Turn):
            yield turn


def jump(schedule: NoiseSchedule, t: float, s: float) -> tuple[float, float]:
    """(A, C) with x_s = A x0 + C x_t for the ODE jump from level t to level s."""
    (a_t, g_t), (a_s, g_s) = (
        [v.item() for v in schedule.coefficients(torch.tensor([time], dtype=torch.float64))[:2]] for time in (t, s)
    )
    return a_s - g_s * a_t / g_t, g_s / g_t


def exact_law(student: Student, rollout: Rollout, index: int, stop: float, fresh: bool) -> Law:
    """The law of the clean variable behind the state at level `stop` that a rollout exiting at `index` hands on.

    `fresh`: the rollout renoises; otherwise it walks the ODE. At stop = 0 it is the law of the samples.
    """
    schedule, mean, variance = student.schedule, 0.0, 1.0
    for i in range(index + 1):
        a, b = student.mean[i].item(), student.std[i].item()
        here, after = rollout.steps[i].level, rollout.level_after(i) if i < index else stop
        if after == 0:
            return a + b * mean, abs(b) * variance**0.5
        if fresh:
            clean, keep = schedule.coefficients(torch.tensor([after], dtype=torch.float64))[:2]
            mean, variance = clean.item() * (a + b * mean), (clean.item() * b) ** 2 * variance + keep.item() ** 2
        else:
            toward, keep = jump(schedule, here, after)
            mean, variance = toward * a + (toward * b + keep) * mean, (toward * b + keep) ** 2 * variance
    alpha, sigma = (v.item() for v in schedule.coefficients(torch.tensor([stop], dtype=torch.float64))[:2])
    assert variance > sigma**2, "there is no clean variable behind this state"
    return mean / alpha, ((variance - sigma**2) / alpha**2) ** 0.5


def law_of(objective: Objective) -> Law:
    """Mean and deviation of a one-step student."""
    student = objective.triad.generator
    assert isinstance(student, Student)
    return student.mean.item(), student.std.item()


def know(critic: GaussianModel, law: Law) -> None:
    """Sets a critic to a law, exactly."""
    with torch.no_grad():
        critic.mean.fill_(law[0])
        critic.log_std.copy_(torch.tensor(law[1]).log())


def keep_critic_exact(objective: Objective, fresh: bool) -> None:
    """Before every look at a sample the critic is told the law of the rollout that made it."""
    sample = objective.sample

    def told(batch: Batch, step: int, grad: bool) -> Any:
        made = sample(batch, step, grad)
        stop, student = made.s[0].item(), objective.triad.generator
        assert isinstance(student, Student) and isinstance(objective.triad.fake_score, GaussianModel)
        know(objective.triad.fake_score, exact_law(student, objective.rollout, made.index, stop, fresh))
        return made

    objective.sample = told  # type: ignore[method-assign]


def adam(lr: float, decay: int = 0) -> PlayerConfig:
    """Plain Adam with a cosine over `decay` moves."""
    return PlayerConfig(lr=lr, betas=[0.9, 0.999], clip=1e6, decay=decay)


def learn(
    objective: Objective,
    players: dict[str, Player],
    steps: int,
    size: int = 128,
    shape: tuple[int, ...] = (32,),
    extra: Callable[[Draw], dict[str, Any]] = lambda draw: {},
) -> None:
    """`steps` real training steps on unit noise; `extra(draw)` gives x0, pair or another condition."""
    for step in range(steps):
        draw = Draw(0, step, torch.arange(step * size, (step + 1) * size))
        batch = Batch(**{"noise": draw.normal("noise", shape), "cond": Condition(), "draw": draw, **extra(draw)})
        train_step(objective, [batch], step, players)


def players_for(objective: Objective, generator: PlayerConfig, critic: PlayerConfig | None = None) -> dict[str, Player]:
    """The players of a run: each network with the objective's own modules of that name."""
    configs = {"generator": generator, **({} if critic is None else {"fake_score": critic})}
    joined = objective.learns()
    players = {
        name: Player(name, [getattr(objective.triad, name), *joined.get(name, [])], config)
        for name, config in configs.items()
    }
    for name, decay in objective.drawn().items():
        pull = Pull(getattr(objective.triad, name), objective.triad.generator, decay, name)
        players["generator"].pulls.append(pull)
    return players


def noise_between(schedule: NoiseSchedule, s: float, t: float) -> tuple[float, float]:
    """(a, b) of the forward process from level s to level t."""
    one = torch.ones(1, 1)
    a, b = bridge(schedule, torch.tensor([s]), torch.tensor([t]), one)
    return a.item(), b.item()
