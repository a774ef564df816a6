"""DMD2 on one network: the teacher is its bare voice, the critic a LoRA voice, and the generator may be one too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import build
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.lora import LoraSpec
from fewstep.models.voices import Shared
from fewstep.objectives import dmd2
from fewstep.objectives.base import Triad
from fewstep.rollout import Rollout, Step
from fewstep.train.loop import train_step
from fewstep.train.player import PlayerConfig

Make = Callable[..., nn.Module]
SPEC = LoraSpec(4, 8.0, ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
LABELS = torch.arange(4)
LEVEL = torch.full((4,), 0.7)


def network(tiny_unet: Make) -> DiffusersBackbone:
    return DiffusersBackbone(tiny_unet(3), Flow(), "flow_prediction", null_label=4)


def shared(tiny_unet: Make, checkpointed: bool) -> Shared:
    """The same network and the same fresh voices every time."""
    inner = network(tiny_unet)
    torch.manual_seed(4)
    one = Shared(inner, {"critic": SPEC, "student": SPEC})
    if checkpointed:
        one.enable_gradient_checkpointing()
    return one


class Game:
    """DMD2 with a discriminator on the critic's (or the teacher's) features; the generator moves at steps 0 and 2."""

    def __init__(self, generator: Backbone, teacher: Backbone, critic: Backbone, **changes: Any):
        config = dmd2.Config(**{"ratio": 2, "gan_weight": 0.5, "gan_critic_weight": 0.5, **changes})
        triad = Triad(generator, Guided(teacher, 1.5), critic)
        self.objective = dmd2.Objective(config, triad, Rollout([Step(1.0, 1.0), Step(0.5, 0.5)]))
        torch.manual_seed(5)
        self.objective.attach(torch.zeros(2, 3, 8, 8), build.Condition({"class_labels": LABELS[:2]}))
        player = PlayerConfig(lr=0.01, clip=1e9, ema=0.5)
        settings = SimpleNamespace(players={"generator": player, "fake_score": player})
        self.players = build.build_players(settings, triad, self.objective)  # type: ignore[arg-type]

    def play(self, images: Any, steps: int = 3) -> list[dict[str, float]]:
        logs = []
        for step in range(steps):
            ids = torch.arange(step * 4, (step + 1) * 4)
            batches = [images(part, step) for part in ids.chunk(2)]
            logs.append(train_step(self.objective, batches, step, self.players))
        return logs


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """The names in `before` whose tensors have changed; copies of voices have come since."""
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def answer(net: Backbone, images: Any) -> Tensor:
    batch = images(LABELS, 0)
    with torch.no_grad():
        return net(batch.noise, LEVEL, batch.cond).value


@pytest.mark.parametrize("features, checkpointed", [("fake", False), ("fake", True), ("teacher", True)])
def test_a_lora_critic_beside_a_full_generator(tiny_unet: Make, images: Any, checkpointed: bool, features: str) -> None:
    """The base does not change by a bit; every tensor of the critic's adapter moves, and so does the generator."""
    one, generator = shared(tiny_unet, checkpointed), network(tiny_unet)
    critic, teacher = one.as_("critic"), one.as_(None)
    game = Game(generator, teacher, critic, gan_features=features)
    base, idle = tensors(one.backbone), tensors(one.as_("student"))
    trained, student, said = tensors(critic), tensors(generator), answer(teacher, images)
    logs = game.play(images)
    assert moved(base, one.backbone) == {name for name in base if ".critic" in name}
    assert moved(trained, critic) == set(trained) and not moved(idle, one.as_("student"))
    assert len(moved(student, generator)) > 50
    assert torch.equal(answer(teacher, images), said)
    assert not torch.equal(answer(critic, images), said)
    assert ["generator/loss" in log for log in logs] == [True, False, True]
    assert all("fake_score/loss" in log and "gan/critic" in log for log in logs)
    assert all(p.grad is None for p in one.backbone.parameters())


def networks(tiny_unet: Make, checkpointed: bool, count: int) -> list[Shared]:
    """One network for the three roles, or one for each."""
    return [shared(tiny_unet, checkpointed)] * 3 if count == 1 else [shared(tiny_unet, checkpointed) for _ in range(3)]


def outcome(nets: list[Shared], images: Any) -> tuple[Game, list[dict[str, float]]]:
    student, teacher, critic = nets[0].as_("student"), nets[1].as_(None), nets[2].as_("critic")
    game = Game(student, teacher, critic)
    return game, game.play(images)


def test_three_roles_on_one_network_are_three_on_their_own(tiny_unet: Make, images: Any) -> None:
    """Logs, adapters, heads and averages after three steps, bit for bit, with gradient checkpointing and without."""
    plays = [outcome(networks(tiny_unet, *how), images) for how in ((False, 3), (False, 1), (True, 1))]
    first, logs = plays[0]
    for game, others in plays[1:]:
        assert others == logs
        for name, player in game.players.items():
            mine = first.players[name]
            for module, same in zip(player.modules, mine.modules, strict=True):
                assert not moved(tensors(same), module)
            assert not moved(tensors(mine.followers["ema"].module), player.followers["ema"].module)


def test_the_roles_of_one_network_stay_apart(tiny_unet: Make, images: Any) -> None:
    """The base and the teacher's answers stay; each adapter moves with its player and each average trails its own."""
    one = shared(tiny_unet, True)
    before = {name: tensors(one.as_(name)) for name in ("student", "critic")}
    base, said = tensors(one.backbone), answer(one.as_(None), images)
    game, _ = outcome([one] * 3, images)
    for player, name in (("generator", "student"), ("fake_score", "critic")):
        voice = one.as_(name)
        assert moved(before[name], voice) == set(before[name])
        assert {id(p) for p in game.players[player].modules[0].parameters()} == {id(p) for p in voice.parameters()}
        average = game.players[player].followers["ema"].module
        assert not torch.equal(answer(average, images), answer(voice, images))
        assert average.net is one.backbone.net
    assert moved(base, one.backbone) == {name for name in base if ".lora_" in name}
    assert torch.equal(answer(one.as_(None), images), said)
