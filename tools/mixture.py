"""Which modes does a method keep? One step on a 2-D mixture with a component of 5 %, exact teacher, three seeds.

    python tools/mixture.py [--start mean rough] [--only NAME ...] [--seeds 0 1 2] [--steps 2000]

Generator and critic are small perceptrons that start as the teacher's denoiser. From the start `mean` every first
sample is the mean of the data, and a mode has to be found; from the start `rough` the generator was fitted to 512 of
the teacher's pairs for a while, has every mode, and can lose them. assets/benchmarks/mixture.json has the shares of
the four components, mixture_mean.png and mixture_rough.png show samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow
from fewstep.core.times import Step
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import MixtureModel
from fewstep.objectives import base
from fewstep.objectives.base import Triad
from fewstep.rollout import Rollout, ode
from fewstep.train.loop import train_step
from fewstep.train.player import Player, PlayerConfig

RESULT = Path("assets/benchmarks/mixture.json")
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0], [4.0, 3.0]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.15, 0.05])
STD = 0.35
KEPT = 0.01
"""the least share of the rare component that counts as kept"""
SAMPLES, SHOWN = 20_000, 400
STARTS = {"mean": 0, "rough": 150}
"""start -> moves on the teacher's pairs"""
GAN = {"gan_weight": 0.1, "gan_critic_weight": 1.0}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd, without pairs": ("dmd", {"regression": 0.0, "ratio": 5}),
    "dmd": ("dmd", {"ratio": 5}),
    "dmd2, without GAN": ("dmd2", {"gan_weight": 0.0}),
    "dmd2": ("dmd2", GAN),
    **{
        f"f_distill, {divergence.replace('_', ' ')}": ("f_distill", {**GAN, "divergence": divergence})
        for divergence in ("softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys")
    },
    "diff_instruct": ("diff_instruct", {"ratio": 5}),
    "swiftbrush": ("swiftbrush", {"ratio": 5}),
    "sid": ("sid", {"ratio": 5, "alpha": 1.0}),
    "flash_dmd": ("flash_dmd", {**GAN, "split": 0.5, "gan_features": "fake"}),
    "disback": ("disback", {**GAN, "record": 200, "interval": 200}),
    "sida": ("sida", {"ratio": 5, "alpha": 1.0}),
    "phased_dmd": ("phased_dmd", {"ratio": 5, "phases": 1}),
    "tdm": ("tdm", {"ratio": 5, "critic_target": "bridge"}),
    "ac_dmd": ("ac_dmd", {"ratio": 5, "consistency": 0.0}),
    "uni_dad": ("uni_dad", {**GAN, "target_teacher": "the same"}),
}
"""Row -> its objective and what differs from its defaults.

Not here: the methods that are about guidance (decoupled_dmd, snoopi), of which this teacher has none, or about labels
(msd), a reward (re_dmd) or the inside of a network (ladd, twinflow).
"""


def teacher() -> MixtureModel:
    return MixtureModel(MEANS, STD, WEIGHTS, Flow(), "flow_prediction")


class Perceptron(Backbone):
    """A velocity (B, 2) from x_t, t and its sines; the tap `hidden` (B, 1, 128) is its last hidden layer."""

    tap = "hidden"

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = Flow(), "flow_prediction"
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))
        sizes = [2 + 1 + 8, 128, 128, 128]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.body, self.out = nn.Sequential(*layers), nn.Linear(128, 2)

    def null(self, cond: Condition) -> Condition:
        return cond

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        angles = t[:, None] * self.frequencies
        hidden = self.body(torch.cat([x_t, t[:, None], angles.sin(), angles.cos()], 1))
        features = {name: hidden[:, None] for name in taps}
        return Prediction(self.out(hidden), self.kind, x_t, t, self.schedule, features)


@cache
def started(start: str, seed: int) -> tuple[Perceptron, Perceptron, Pair]:
    """Generator, critic and the teacher's pairs, alike for every method."""
    torch.manual_seed(seed)
    critic, real = Perceptron(), teacher()
    fit(critic, 2000, lambda step: denoising(critic, real, Draw(seed, step, torch.arange(256))))
    noise = Draw(seed, 0, torch.arange(512)).normal("pairs", (2,))
    ones = torch.ones(len(noise))
    pair = Pair(noise, real.flow_map(noise, ones, 0 * ones, steps=100), Condition())
    generator = copy.deepcopy(critic)
    fit(generator, STARTS[start], lambda step: (generator(noise, ones, Condition()).x0 - pair.x0).square().mean())
    return generator, critic, pair


def fit(net: nn.Module, steps: int, loss_at: Any) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()


def denoising(net: Backbone, real: Backbone, draw: Draw) -> Tensor:
    """The squared distance to the teacher's velocity at uniform times."""
    t, x0 = draw.uniform("t"), drawn(draw)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * draw.normal("eps", (2,))
    return (net(x_t, t, Condition()).value - real(x_t, t, Condition()).value).square().mean()


def drawn(draw: Draw) -> Tensor:
    """True samples (B, 2) of the mixture."""
    component = torch.bucketize(draw.uniform("component"), WEIGHTS.cumsum(0)[:-1])
    return MEANS[component] + STD * draw.normal("data", (2,))


@dataclass(frozen=True)
class Result:
    shares: list[float]
    """of the samples within four deviations of a component, by nearest mean; they need not sum to 1"""
    samples: Tensor

    @property
    def kept(self) -> bool:
        return self.shares[-1] >= KEPT

    def points(self) -> list[list[float]]:
        """Some of the samples, for the picture."""
        return [[round(x, 2) for x in point] for point in self.samples[:SHOWN].tolist()]


def shares(samples: Tensor) -> list[float]:
    distance, nearest = torch.cdist(samples, MEANS).min(1)
    return [((nearest == i) & (distance < 4 * STD)).float().mean().item() for i in range(len(MEANS))]


def run(method: str, start: str, seed: int, steps: int) -> Result:
    """Trains `method` for `steps` steps of 128 samples and looks at what its one step makes."""
    name, differs = METHODS[method]
    generator, critic, pair = (copy.deepcopy(part) for part in started(start, seed))
    module = base.find(name)
    config = module.Config(**differs)
    needs = module.Objective.needs(config)
    roles: dict[str, Backbone] = {"real_score": Guided(teacher(), 1.0), "fake_score": critic}
    roles["target_score"] = roles["real_score"]
    triad = Triad(generator, **{role: net for role, net in roles.items() if role in needs})
    torch.manual_seed(seed)
    objective = module.Objective(config, triad, Rollout([Step(1.0, 1.0)], ode))
    objective.attach(torch.zeros(2, 2), Condition())
    joined = objective.learns()
    rates = {"generator": 2e-4, **({"fake_score": 1e-3} if "fake_score" in needs else {})}
    players = {
        role: Player(role, [getattr(triad, role), *joined.get(role, [])], PlayerConfig(lr=lr, betas=[0.9, 0.999]))
        for role, lr in rates.items()
    }
    for step in range(steps):
        draw = Draw(seed + 100, step, torch.arange(step * 128, step * 128 + 128))
        rows = draw.integers("pair", len(pair.noise))
        real = drawn(draw) if "x0" in objective.reads else None
        given = Pair(pair.noise[rows], pair.x0[rows], Condition()) if "pair" in objective.reads else None
        train_step(objective, [Batch(draw.normal("noise", (2,)), Condition(), draw, real, given)], step, players)
    return made(generator)


@torch.no_grad()
def made(generator: Backbone) -> Result:
    draw = Draw(9, 0, torch.arange(SAMPLES))
    samples = Rollout([Step(1.0, 1.0)], ode)(generator, draw.normal("noise", (2,)), Condition(), draw).x0
    return Result(shares(samples), samples)


def plot(rows: dict[str, Any], file: Path) -> None:
    """The samples of each row's first seed, the components as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = -(-len(rows) // 6), 6
    figure, axes = pyplot.subplots(*size, figsize=(2.3 * size[1], 2.4 * size[0]), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, row) in zip(axes.flat, rows.items(), strict=False):
        axis.scatter(*torch.tensor(row["points"]).T, s=2, alpha=0.5, color="#0072B2")
        axis.scatter(*MEANS.T, s=40, marker="+", color="#D55E00")
        axis.set(xlim=(-4, 6), ylim=(-4, 5))
        axis.set_title(f"{name}: {row['shares'][0][-1]:.1%}", fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", nargs="+", choices=tuple(STARTS), default=list(STARTS))
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for start in args.start:
        compare(start, args.only, args.seeds, args.steps)


def compare(start: str, methods: list[str], seeds: list[int], steps: int) -> None:
    """Adds the rows of `methods` from a start to the record, one by one, and draws them."""
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows = record.setdefault(start, {})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    true = drawn(Draw(9, 0, torch.arange(SAMPLES)))
    known = {"truth": lambda seed: Result(shares(true), true), "start": lambda seed: made(started(start, seed)[0])}
    for method in (*known, *methods):
        results = [known[method](seed) if method in known else run(method, start, seed, steps) for seed in seeds]
        row = {"shares": [result.shares for result in results], "kept": [result.kept for result in results]}
        row |= {"steps": steps, "commit": commit, "date": f"{date.today():%Y-%m-%d}"}
        rows[method] = row | {"points": results[0].points()}
        rare = ", ".join(f"{result.shares[-1]:.3f}" for result in results)
        print(f"{start:6} {method:36} rare component {rare}", flush=True)
        RESULT.write_text(json.dumps(record) + "\n")
    plot(rows, RESULT.with_name(f"mixture_{start}.png"))


if __name__ == "__main__":
    main()
