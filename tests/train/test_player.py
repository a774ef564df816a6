from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.train.player import Follower, NonFinite, Player, PlayerConfig, ema_decay


class Weights(nn.Module):
    """Three weights, a frozen one and a counting buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype))
        self.fixed = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def player(**changes: object) -> Player:
    return Player("generator", [Weights()], PlayerConfig(**changes))  # type: ignore[arg-type]


def push(one: Player, gradient: list[float]) -> float:
    """One move along `gradient`."""
    one.parameters[0].grad = torch.tensor(gradient)
    return one.move(0)


def weights(one: Player) -> Tensor:
    return one.parameters[0].detach().clone()


def test_the_rate_follows_its_own_moves() -> None:
    one = player(lr=0.1, warmup=4, decay=10, clip=1e9)
    rates = []
    for _ in range(12):
        rates.append(one.learning_rate())
        push(one, [1.0, 1.0, 1.0])
    expected = [0.1 * min(1, (n + 1) / 4) * 0.5 * (1 + math.cos(math.pi * min(1, n / 10))) for n in range(12)]
    assert rates == pytest.approx(expected, abs=1e-12) and one.moves == 12
    assert rates[0] == 0.025 and rates[10] == rates[11] == 0


def test_without_warm_up_or_decay_the_rate_is_constant() -> None:
    one = player(lr=0.02)
    assert [one.learning_rate(), push(one, [1.0, 0, 0]) and one.learning_rate()] == [0.02, 0.02]


def test_weights_move_by_the_rate_of_each_move() -> None:
    """Under a constant gradient Adam moves by the rate itself, in the direction of the sign."""
    one = player(lr=0.1, warmup=3, clip=1e9, eps=1e-12)
    start = weights(one)
    for _ in range(5):
        push(one, [2.0, -0.5, 1.0])
    travelled = 0.1 * (1 / 3 + 2 / 3 + 1 + 1 + 1)
    assert torch.allclose(weights(one) - start, travelled * torch.tensor([-1.0, 1.0, -1.0]), rtol=1e-5, atol=0)


def test_the_first_move_is_adamw() -> None:
    one = player(lr=0.1, weight_decay=0.5, eps=0.1, clip=1e9, betas=[0.9, 0.99])
    push(one, [2.0, -0.5, 0.0])
    start, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, -0.5, 0.0])
    expected = start * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 0.1)
    assert torch.allclose(weights(one), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip, kept", [(2.5, 0.5), (5.0, 1.0), (100.0, 1.0)])
def test_the_gradient_is_clipped_over_all_parameters(clip: float, kept: float) -> None:
    """The norm of (3, 0, 0) and (4, 0, 0) in two modules is 5; what the optimizer saw is its first moment."""
    one = Player("critic", [Weights(), Weights()], PlayerConfig(clip=clip))
    for parameter, value in zip(one.parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([value, 0.0, 0.0])
    assert one.move(0) == pytest.approx(5)
    moments = [one.optimizer.state[p]["exp_avg"][0].item() for p in one.parameters]
    assert moments == pytest.approx([3 * kept, 4 * kept], rel=1e-5)


def test_only_trainable_parameters_are_played() -> None:
    one = player()
    assert len(one.parameters) == 1 and one.parameters[0] is one.modules[0].w
    assert [name for name, _ in one.named_parameters()] == ["0.w", "0.fixed"]
    with pytest.raises(UserError, match="player empty has no trainable parameter"):
        Player("empty", [Weights().requires_grad_(False)], PlayerConfig())


def test_gradients_are_cleared_after_a_move() -> None:
    one = player()
    push(one, [1.0, 1.0, 1.0])
    assert one.parameters[0].grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    one = player(lr=0.1)
    one.followers["ema"] = Follower(one.modules[0], lambda moves: 0.5)
    push(one, [1.0, 2.0, 3.0])
    before, state = weights(one), copy.deepcopy(one.optimizer.state[one.parameters[0]])
    shadow = one.followers["ema"].module.w.clone()
    one.parameters[0].grad = torch.tensor([1.0, bad, 0.0])
    with pytest.raises(NonFinite, match=r"gradient of player generator is (nan|inf) at step 17: the move was refused"):
        one.move(17)
    assert torch.equal(weights(one), before) and one.moves == 1
    assert torch.equal(one.followers["ema"].module.w, shadow)
    after = one.optimizer.state[one.parameters[0]]
    assert set(after) == set(state) and all(torch.equal(after[k], state[k]) for k in state)


def test_a_follower_is_the_running_mean_of_its_formula() -> None:
    one, decays = player(lr=0.3), [0.5, 0.9, 0.0, 0.75]
    follower = Follower(one.modules[0], lambda moves: decays[moves - 1])
    one.followers["ema"] = follower
    shadow = weights(one)
    for n, decay in enumerate(decays):
        push(one, [1.0, -1.0, float(n)])
        shadow = decay * shadow + (1 - decay) * weights(one)
        assert torch.allclose(follower.module.w, shadow, rtol=1e-6, atol=1e-7)
    assert not torch.equal(follower.module.w, weights(one))


def test_followers_trail_moves_of_their_player_only() -> None:
    one = player()
    follower = Follower(one.modules[0], lambda moves: 0.0)
    push(one, [1.0, 1.0, 1.0])
    assert not torch.equal(follower.module.w, weights(one))  # it was not made a follower of the player
    one.followers["ema"] = follower
    push(one, [1.0, 1.0, 1.0])
    assert torch.equal(follower.module.w, weights(one))


def test_followers_copy_buffers_and_stay_out_of_training() -> None:
    one = player()
    one.modules[0].train()
    one.followers["ema"] = follower = Follower(one.modules[0], lambda moves: 0.9)
    one.modules[0].seen += 5
    push(one, [1.0, 1.0, 1.0])
    assert follower.module.seen.item() == 5
    assert not follower.module.training and not any(p.requires_grad for p in follower.module.parameters())


def test_a_follower_of_bfloat16_weights_is_float32() -> None:
    """A bfloat16 average with decay .9999 would never move."""
    module = Weights(torch.bfloat16)
    follower = Follower(module, lambda moves: 0.9999)
    with torch.no_grad():
        module.w += 1
    follower.follow(1)
    assert follower.module.w.dtype == torch.float32
    expected = torch.tensor([1.0, -2.0, 3.0]) + 1e-4
    assert torch.allclose(follower.module.w, expected, rtol=0, atol=2e-7)


def test_the_average_is_of_use_from_the_start() -> None:
    decay = ema_decay(0.99)
    assert [decay(n) for n in (1, 10, 90)] == pytest.approx([2 / 11, 11 / 20, 91 / 100])
    assert decay(10_000) == 0.99


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": -1e-4},
        {"lr": math.nan},
        {"ema": 1.0},
        {"ema": -0.1},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"clip": 0.0},
        {"clip": math.nan},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    (value,) = wrong.values()
    with pytest.raises(UserError) as caught:
        PlayerConfig(**wrong)  # type: ignore[arg-type]
    assert str(value) in str(caught.value)
