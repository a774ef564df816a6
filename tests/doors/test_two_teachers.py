"""Two teachers, one of them trained: the real score is a blend whose second part learns from data."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.core.batch import Batch, Condition
from fewstep.core.schedule import Flow, add_noise
from fewstep.models.backbone import Blend, frozen
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective, Triad, Turn
from fewstep.objectives.pieces.score_gap import surrogate
from fewstep.rollout import Rollout, Step
from fewstep.train.loop import train_step
from fewstep.train.player import Player, PlayerConfig


def gaussian(mean: float, learned: bool) -> GaussianModel:
    return GaussianModel(mean, 1.0, Flow(), "flow_prediction", learned=learned)


class TwoTeachers(Objective):
    """The data has mean 2; the trained teacher learns it, the student follows the blend."""

    def __init__(self, config: Any, triad: Triad, rollout: Rollout):
        super().__init__(config, triad, rollout)
        self.trained = gaussian(0.0, learned=True)
        self.blend = (Blend([triad.real_score, self.trained], [0.5, 0.5]),)  # a tuple: saved once, as `trained`

    def learns(self) -> dict[str, list[Any]]:
        return {"fake_score": [self.trained]} if self.config == "joined" else {}

    def denoising(self, net: GaussianModel, x: Any, batch: Batch, purpose: str) -> Any:
        eps, t = batch.draw.normal(purpose, (1,)), 0.1 + 0.8 * batch.draw.uniform(purpose + ".t")
        prediction = net(add_noise(Flow(), x, eps, t), t, batch.cond)
        return (prediction.value - prediction.target(x, eps)).square().mean()

    def turns(self, batch: Batch, step: int):
        sample = self.rollout(self.triad.generator, batch.noise, batch.cond, batch.draw, grad=1)
        t = 0.1 + 0.8 * batch.draw.uniform("t")
        x_t = add_noise(Flow(), sample.x0.detach(), batch.draw.normal("eps", (1,)), t)
        with torch.no_grad():
            real, fake = self.blend[0](x_t, t, batch.cond).x0, self.triad.fake_score(x_t, t, batch.cond).x0
        yield Turn("generator", surrogate(sample.x0, fake - real))
        critic = self.denoising(self.triad.fake_score, sample.x0.detach(), batch, "critic")
        data = self.denoising(self.trained, 2 + batch.draw.normal("data", (1,)), batch, "teacher")
        if self.config == "joined":
            yield Turn("fake_score", critic + data)
        else:
            yield Turn("fake_score", critic)
            yield Turn("trained", data)


def triad() -> Triad:
    return Triad(gaussian(-1.0, True), gaussian(0.0, False), gaussian(-1.0, True))


ROLLOUT = Rollout([Step(0.9, 0.9)])


def test_a_third_player_is_a_player_like_the_others(points: Any) -> None:
    networks = triad()
    objective = TwoTeachers("apart", networks, ROLLOUT)
    modules = {"generator": networks.generator, "fake_score": networks.fake_score, "trained": objective.trained}
    players = {name: Player(name, [module], PlayerConfig(lr=0.03)) for name, module in modules.items()}
    for step in range(150):
        ids = torch.arange(step * 32, (step + 1) * 32)
        train_step(objective, [points(part, step) for part in ids.chunk(2)], step, players)
    assert [player.moves for player in players.values()] == [150] * 3
    assert abs(objective.trained.mean.item() - 2) < 0.3
    assert networks.real_score.mean.item() == 0 and networks.generator.mean.item() > -0.5


def test_the_second_teacher_can_join_the_critic(stage: Any, points: Any) -> None:
    one = stage(TwoTeachers, triad(), ROLLOUT, config="joined", lr=0.03)
    assert set(one.players) == {"generator", "fake_score"} and len(one.players["fake_score"].modules) == 2
    one.play(points, steps=100, rows=32)
    assert one.objective.trained.mean.item() > 1.5
    assert set(one.objective.state_dict()) == {"trained.mean", "trained.log_std"}


def test_one_trained_part_of_a_blend_gets_the_gradient() -> None:
    fixed, trained = gaussian(0.0, False), gaussian(0.0, True)
    blend = Blend([fixed, trained], [0.5, 0.5])
    x, t = torch.randn(4, 1), torch.full((4,), 0.5)
    blend(x, t, Condition()).x0.sum().backward()
    whole = 0.5 * torch.autograd.grad(trained(x, t, Condition()).x0.sum(), trained.mean)[0]
    assert fixed.mean.grad is None and torch.allclose(trained.mean.grad, whole)
    with frozen(blend):
        assert not blend(x, t, Condition()).x0.requires_grad
