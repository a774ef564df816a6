from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.objectives.base import Objective, Share, Triad, Turn
from fewstep.rollout import Rollout, Step
from fewstep.train.loop import train, train_step
from fewstep.train.player import NonFinite, Player, PlayerConfig


class Net(nn.Module):
    """A small perceptron in place of a network."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass
class Game:
    """Two players and an objective over them."""

    objective: Objective
    players: dict[str, Player]
    nets: dict[str, nn.Module] = field(default_factory=dict)

    def play(self, micro_batches: int, steps: int = 1, rows: int = 8) -> list[dict[str, float]]:
        parts = [batches(step, rows, micro_batches) for step in range(steps)]
        return [train_step(self.objective, part, step, self.players) for step, part in enumerate(parts)]

    def weights(self) -> dict[str, Tensor]:
        parts = {name: nn.utils.parameters_to_vector(net.parameters()) for name, net in self.nets.items()}
        return {name: vector.detach().clone() for name, vector in parts.items()}


def batches(step: int, rows: int, parts: int) -> list[Batch]:
    ids = torch.arange(step * rows, (step + 1) * rows)
    draws = [Draw(5, step, part) for part in ids.chunk(parts)]
    return [Batch(draw.normal("noise", (3,)), Condition(), draw) for draw in draws]


def game(kind: type[Objective], **config: Any) -> Game:
    nets = {"generator": Net(1), "fake_score": Net(2)}
    settings = PlayerConfig(lr=0.01, betas=[0.5, 0.9], eps=1e-3, clip=1.0)
    players = {name: Player(name, [net], settings) for name, net in nets.items()}
    objective = kind(config, Triad(**nets), Rollout([Step(1, 1)]))  # type: ignore[arg-type]
    return Game(objective, players, nets)


class TwoPlayers(Objective):
    """A generator's turn that needs the mean over the whole batch and leaks onto the critic, then the critic's."""

    def turns(self, batch: Batch, step: int):
        generator, critic = self.triad.generator, self.triad.fake_score
        x = generator(batch.noise) + 0.1 * batch.draw.normal("jitter", (3,))
        mean = yield Share(x.detach().mean(0))
        loss = (critic(x - mean) ** 2).mean()
        yield Turn("generator", loss, {"centre": mean.norm(), "spread": (x - mean).square().mean()})
        x = x.detach()
        yield Turn("fake_score", ((critic(x) - mean) ** 2).mean())


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_equal_one_batch_in_numbers(parts: int) -> None:
    whole, split = game(TwoPlayers), game(TwoPlayers)
    for a, b in zip(whole.play(1, steps=3), split.play(parts, steps=3), strict=True):
        assert (
            set(a)
            == set(b)
            == {
                "centre",
                "spread",
                "generator/loss",
                "generator/grad_norm",
                "fake_score/loss",
                "fake_score/grad_norm",
            }
        )
        assert a == pytest.approx(b, abs=1e-6)
    for name, weights in whole.weights().items():
        assert (weights - split.weights()[name]).abs().max() < 1e-6
        assert whole.players[name].moves == split.players[name].moves == 3


def test_a_share_is_the_mean_over_all_micro_batches() -> None:
    seen: list[float] = []

    class Shares(Objective):
        def turns(self, batch: Batch, step: int):
            seen.append((yield Share(batch.noise.mean())).item())
            answer = yield Turn("generator", self.triad.generator(batch.noise).mean())
            assert answer is None

    game(Shares).play(4)
    exact = torch.cat([batch.noise for batch in batches(0, 8, 4)]).mean().item()
    assert seen == pytest.approx([exact] * 4, abs=1e-7)


@pytest.mark.parametrize("mover, bystander", [("generator", "fake_score"), ("fake_score", "generator")])
@pytest.mark.parametrize("parts", [1, 2])
def test_only_the_player_of_the_turn_moves(mover: str, bystander: str, parts: int) -> None:
    class One(Objective):
        def turns(self, batch: Batch, step: int):
            yield Turn(mover, self.triad.fake_score(self.triad.generator(batch.noise)).square().mean())

    one = game(One)
    before = one.weights()
    one.play(parts)
    after = one.weights()
    assert torch.equal(after[bystander], before[bystander]) and one.players[bystander].moves == 0
    assert (after[mover] - before[mover]).abs().max() > 1e-4 and one.players[mover].moves == 1
    leaked = [p.grad for p in one.nets[bystander].parameters()]
    assert any(g is not None and g.abs().max() > 0 for g in leaked)  # the test would notice a move


@pytest.mark.parametrize("parts", [1, 4])
def test_what_a_bystander_was_left_with_does_not_count(parts: int) -> None:
    """The critic moves as if the generator's turn had never touched it."""

    class Critic(Objective):
        def turns(self, batch: Batch, step: int):
            generator, critic = self.triad.generator, self.triad.fake_score
            x = generator(batch.noise)
            if self.config["leak"]:
                yield Turn("generator", 100 * critic(x).square().mean(), move=False)
            yield Turn("fake_score", (critic(x.detach()) - batch.noise).square().mean())

    clean, leaky = game(Critic, leak=False), game(Critic, leak=True)
    clean_logs, leaky_logs = clean.play(parts)[0], leaky.play(parts)[0]
    assert leaky_logs["fake_score/grad_norm"] == clean_logs["fake_score/grad_norm"]
    assert torch.equal(clean.weights()["fake_score"], leaky.weights()["fake_score"])


@pytest.mark.parametrize("parts", [1, 2])
def test_a_leak_between_two_moves_does_not_count(parts: int) -> None:
    class Between(Objective):
        def turns(self, batch: Batch, step: int):
            generator, critic = self.triad.generator, self.triad.fake_score
            yield Turn("fake_score", critic(batch.noise).square().mean())
            if self.config["leak"]:
                yield Turn("generator", 100 * critic(generator(batch.noise)).square().mean(), move=False)
            yield Turn("fake_score", (critic(batch.noise) - 1).square().mean())

    clean, leaky = game(Between, leak=False), game(Between, leak=True)
    assert clean.play(parts)[0]["fake_score/grad_norm"] == leaky.play(parts)[0]["fake_score/grad_norm"]
    assert torch.equal(clean.weights()["fake_score"], leaky.weights()["fake_score"])


@pytest.mark.parametrize("parts", [1, 2])
def test_turns_that_do_not_move_add_up(parts: int) -> None:
    class Sum(Objective):
        def turns(self, batch: Batch, step: int):
            losses = [self.triad.generator(batch.noise + i).square().mean() for i in range(3)]
            if self.config["together"]:
                yield Turn("generator", torch.stack(losses).sum())
            else:
                for i, loss in enumerate(losses):
                    yield Turn("generator", loss, move=i == 2)

    together, apart = game(Sum, together=True), game(Sum, together=False)
    norms = [one.play(parts)[0]["generator/grad_norm"] for one in (together, apart)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert torch.allclose(together.weights()["generator"], apart.weights()["generator"], rtol=0, atol=1e-6)
    assert together.players["generator"].moves == apart.players["generator"].moves == 1


def test_a_gradient_that_was_not_moved_does_not_reach_the_next_step() -> None:
    class Deferred(Objective):
        def turns(self, batch: Batch, step: int):
            yield Turn("generator", self.triad.generator(batch.noise).square().mean(), move=step == 1)

    two, one = game(Deferred), game(Deferred)
    train_step(two.objective, batches(0, 8, 1), 0, two.players)
    for each in (two, one):
        train_step(each.objective, batches(1, 8, 1), 1, each.players)
    assert torch.equal(two.weights()["generator"], one.weights()["generator"])


def test_several_moves_of_one_player_in_one_step() -> None:
    class Thrice(Objective):
        def turns(self, batch: Batch, step: int):
            for _ in range(3):
                yield Turn("generator", self.triad.generator(batch.noise).square().mean())

    thrice, once = game(Thrice), game(Thrice)
    thrice.play(2)
    assert thrice.players["generator"].moves == 3
    weights = nn.utils.parameters_to_vector(once.nets["generator"].parameters())
    for _ in range(3):
        noise = batches(0, 8, 1)[0].noise
        once.nets["generator"](noise).square().mean().backward()
        once.players["generator"].move(0)
    moved = once.weights()["generator"]
    assert (moved - weights).abs().max() > 1e-3
    assert torch.allclose(thrice.weights()["generator"], moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad_row", [0, 7])
def test_a_loss_that_is_not_finite_is_named_and_moves_nothing(bad_row: int) -> None:
    class Breaks(Objective):
        def turns(self, batch: Batch, step: int):
            scale = torch.where(batch.draw.ids == step * 8 + bad_row, torch.inf, 1.0)
            yield Turn("generator", self.triad.generator(batch.noise).mean())
            yield Turn("fake_score", (scale[:, None] * self.triad.fake_score(batch.noise)).square().mean())

    one = game(Breaks)
    before = one.weights()["fake_score"]
    with pytest.raises(NonFinite, match="the loss of player fake_score is inf at step 6: it was not moved"):
        train_step(one.objective, batches(6, 8, 4), 6, one.players)
    assert torch.equal(one.weights()["fake_score"], before)
    assert [one.players[name].moves for name in ("generator", "fake_score")] == [1, 0]


def test_only_one_graph_is_alive_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []

    class Counted(Objective):
        def turns(self, batch: Batch, step: int):
            x = self.triad.generator(batch.noise)
            alive.append(weakref.ref(x))
            most.append(sum(ref() is not None for ref in alive))
            loss = x.square().mean()
            del x
            yield Turn("generator", loss)

    game(Counted).play(4)
    assert len(most) == 4 and max(most) == 1


def test_training_plays_the_steps_asked_and_stops_when_told() -> None:
    one = game(TwoPlayers)
    asked: list[int] = []
    played: list[int] = []

    def data(step: int) -> list[Batch]:
        asked.append(step)
        return batches(step, 4, 2)

    def after(step: int, logs: dict[str, float]) -> bool:
        played.append(step)
        assert logs["generator/loss"] > 0
        return step == 5

    train(one.objective, data, one.players, range(3, 9), after)
    assert asked == played == [3, 4, 5] and one.players["generator"].moves == 3
    train(one.objective, data, one.players, range(6, 8), after)
    assert played[3:] == [6, 7]


def test_an_interrupted_run_equals_an_uninterrupted_one() -> None:
    whole, halves = game(TwoPlayers), game(TwoPlayers)
    whole.play(2, steps=4)
    for steps in (range(2), range(2, 4)):
        train(halves.objective, lambda step: batches(step, 8, 2), halves.players, steps, lambda step, logs: False)
    for name, weights in whole.weights().items():
        assert torch.equal(weights, halves.weights()[name])
