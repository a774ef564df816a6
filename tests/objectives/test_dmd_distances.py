"""The paired regression of DMD in what frozen networks see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import TEACHER, Student, gaussian_triad, one_step, play, told_batch, whitened
from safetensors.torch import save_file

from fewstep import build, config
from fewstep.core.batch import Condition, Pair
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.evals.reader import load_reader
from fewstep.models.lpips import BLOCKS, Lpips
from fewstep.objectives.dmd import Config, Objective
from fewstep.train.loop import train_step

CONFIG = """
name: seen
device: cpu
batch: 2
model: {{teacher: {teacher}}}
pairs: {{count: 4, steps: 2}}
objective: {{name: dmd, distance: reader, regression: 2.0}}
players: {{generator: {{lr: 1.0e-3}}, fake_score: {{lr: 1.0e-3}}}}
"""


def run_of(tiny_teacher: Path, tmp_path: Path, *overrides: str) -> build.Run:
    (tmp_path / "seen.yaml").write_text(CONFIG.format(teacher=tiny_teacher))
    run = build.build(config.load(tmp_path / "seen.yaml", overrides)[0])
    build.prepare(run, tmp_path)
    return run


@pytest.mark.parametrize("distance", ["reader", "l2"])
def test_the_regression_is_that_of_the_features(distance: str, tiny_teacher: Path, tmp_path: Path) -> None:
    """Rebuilt from the pairs and the reader itself; the reader learns nothing and is not saved with the run."""
    run = run_of(tiny_teacher, tmp_path, f"objective.distance={distance}")
    (batch,) = build.batches(run)(0)
    played = play(run.objective, batch)["generator"]
    with torch.no_grad():
        made = run.rollout(run.triad.generator, batch.pair.noise, batch.pair.cond, batch.draw).x0
    if distance == "l2":
        expected = (made - batch.pair.x0).square().mean()
        assert run.objective.perceive is None
    else:
        reader = load_reader("assets/reader")
        expected = (reader(made)[1] - reader(batch.pair.x0)[1]).square().sum(1).mean()
    assert played.logs["regression"] == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-4
    assert played.touched() == {"generator"} and not run.objective.state_dict()


def test_a_term_of_a_sum_sees_too(tiny_teacher: Path, tmp_path: Path) -> None:
    node = "{name: dmd, distance: reader, regression: 1.0}"
    run = run_of(tiny_teacher, tmp_path, "objective={name: sum, terms: [" + node + "]}")
    logs = train_step(run.objective, build.batches(run)(0), 0, run.players)
    assert logs["regression"] > 0


def test_the_features_carry_the_gradient_to_the_generator() -> None:
    """With the features x -> (x, 2 x) the distance is 5 |G(z) - y|^2 a sample, in closed form."""
    noise, eps, stored = whitened(3)
    triad = gaussian_triad(Flow(), "flow_prediction")
    batch = told_batch(noise, eps, pair=Pair(stored, TEACHER[0] + TEACHER[1] * stored, Condition()))
    means = []
    for features in (None, lambda x: [x, 2 * x]):
        objective = Objective(Config(regression=1.0), triad, one_step())
        objective.perceive = features
        assert isinstance(triad.generator, Student)
        means.append(play(objective, batch)["generator"])
    silent = play(Objective(Config(regression=0.0), triad, one_step()), batch)["generator"]
    plain, seen = (turn["generator.mean"] - silent["generator.mean"] for turn in means)
    assert seen == pytest.approx(5 * 32 * plain, rel=1e-4) and abs(plain) > 0.1
    assert means[1].logs["regression"] == pytest.approx(5 * 32 * means[0].logs["regression"], rel=1e-4)


def test_lpips_trains_from_a_file(tiny_teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vgg = {f"features.{k}": v for k, v in Lpips().features.state_dict().items()}
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, (c, _) in enumerate(BLOCKS)}
    save_file({**vgg, **linear}, tmp_path / "lpips.safetensors")
    given = ("objective.distance=lpips", f"objective.lpips={tmp_path / 'lpips.safetensors'}")
    run = run_of(tiny_teacher, tmp_path, *given)
    net = run.objective.perceive.net  # type: ignore[union-attr]
    net.side = 32
    logs = train_step(run.objective, build.batches(run)(0), 0, run.players)
    assert logs["regression"] > 0 and run.players["generator"].moves == 1


def test_lpips_without_its_weights_is_refused_before_training(tiny_teacher: Path, tmp_path: Path) -> None:
    for wrong in ({"distance": "lpips"}, {"lpips": "somewhere.pth"}):
        with pytest.raises(UserError, match="give both, or neither"):
            Config(**wrong)
    with pytest.raises(UserError, match="there are no weights of LPIPS at"):
        run_of(tiny_teacher, tmp_path, "objective.distance=lpips", "objective.lpips=absent.pth")
