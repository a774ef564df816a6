from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Leaning, play, walk
from test_lcm import LAW, labelled
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.pieces.flow import as_angles
from fewstep.objectives.sana_sprint import Config, Objective
from fewstep.objectives.scm import States


class Read(Leaning):
    """A teacher with features to read: tokens (B, 3, 8) of the state."""

    tap = "trunk"

    def __init__(self) -> None:
        super().__init__(*LAW, Flow(), "flow_prediction")
        self.trunk = nn.Linear(1, 8).requires_grad_(False)

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        here = super().forward(x_t, t, cond)
        return Prediction(
            here.value, here.kind, x_t, t, here.schedule, {name: self.trunk(x_t[..., None]) for name in taps}
        )


def of(**changes: Any) -> Objective:
    torch.manual_seed(0)
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    config = Config(**{"warmup": 0, "gan_loss": "softplus", "adaptive": False, **changes})
    found = Objective(config, Triad(net, Guided(Read(), 3.0)), walk((1.0,)))
    found.attach(torch.zeros(2, 3), labelled(2).cond)
    return found


def test_turns_touch_their_players() -> None:
    played = play(of(), labelled(32))
    assert set(played) == {"generator", "discriminator"}
    assert played["generator"].touched() == {"generator"} and played["discriminator"].touched() == {"own"}
    assert abs(played["generator"]["generator.mean"]) > 1e-4


def test_the_discriminator_reaches_the_generator_by_its_weight() -> None:
    batch = labelled(64)
    grads = [play(of(gan_weight=w), batch)["generator"]["generator.mean"] for w in (0.5, 1.0, 2.0)]
    assert grads[2] - grads[1] == pytest.approx(2 * (grads[1] - grads[0]), rel=1e-3)
    assert abs(grads[1] - grads[0]) > 1e-5


def test_pure_noise_has_no_tangent() -> None:
    """cos(a) = 0 there: what is learnt of it comes from the discriminator."""
    objective, batch = of(), labelled(16)
    states = States(batch.noise, torch.ones(16), torch.randn(16, 3), batch.cond)
    g = objective.tangent(torch.randn(16, 3), torch.randn(16, 3), states, 1.0)
    assert g.abs().max() < 1e-6


def test_every_sample_is_led_by_a_guidance_of_the_list_and_told_a_tenth_of_it() -> None:
    objective, batch = of(guidances=[1.0, 1.5, 2.0]), labelled(3000, dims=1)
    scales = objective.scales(batch)
    for w in (1.0, 1.5, 2.0):
        assert (scales == w).float().mean().item() == pytest.approx(1 / 3, abs=4 * 0.47 / 3000**0.5)
    assert torch.allclose(objective.told(batch, batch.cond).dials["guidance"], 0.1 * scales)
    states = objective.states(batch)
    alone = as_angles(Guided(Read(), 1.5))(states.x, states.t, batch.cond).value
    rows = scales == 1.5
    assert torch.allclose(states.velocity[rows], alone[rows], atol=1e-5)
    assert (states.velocity[~rows] - alone[~rows]).abs().max() > 1e-2
    assert Objective.tells(Config()) == {"guidance": pytest.approx(0.15)}


def test_a_share_of_the_jumps_starts_from_pure_noise() -> None:
    heard: list[Tensor] = []

    class Ear(GaussianModel):
        def forward(self, x_t, t, cond, **more):
            heard.append(t)
            return super().forward(x_t, t, cond, **more)

    objective = of(from_noise=0.5)
    objective.triad = Triad(Ear(0.2, 0.9, Flow(), "flow_prediction"), objective.triad.real_score)
    objective.jumped(labelled(4000))
    assert (heard[0] == 1).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)


def test_jumps_and_data_are_noised_alike() -> None:
    objective, batch = of(), labelled(8)
    (a, t), (b, s) = (objective.noised(batch, x) for x in (torch.zeros(8, 3), torch.ones(8, 3)))
    assert torch.equal(t, s) and torch.allclose(b - a, (1 - t)[:, None].expand(8, 3), atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"guidances": []}, {"guidance": 9.0}, {"from_noise": 1.5}, {"gan_weight": 0.0}, {"mode": "training"}],
)
def test_contradictions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_networks_that_hear_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="told nothing"):
        of().attach(torch.zeros(2, 3), Condition())
