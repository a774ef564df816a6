from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from oracle import STUDENT, Featured, Student, gaussian_triad, one_step, play, real_batch, walk

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.objectives import base, dmd, dmd2
from fewstep.objectives.base import Triad
from fewstep.objectives.sum import Config, Objective

SNR = {"name": "dmd", "weight": "snr", "regression": 0.0, "ratio": 2}
PLAIN = {"name": "dmd", "weight": "none", "regression": 0.0, "ratio": 2}


def triad() -> Triad:
    torch.manual_seed(3)
    base_triad = gaussian_triad(Flow(), "flow_prediction", critic=(0.1, 0.8))
    return Triad(Student(Flow(), [STUDENT]), base_triad.real_score, base_triad.fake_score)


def summed(*terms: dict) -> Objective:
    return Objective(Config(terms=list(terms)), triad(), one_step())


def single(node: dict) -> dmd.Objective:
    return dmd.Objective(dmd.Config(**{k: v for k, v in node.items() if k != "name"}), triad(), one_step())


@pytest.mark.parametrize("step", [0, 1])
def test_the_sum_of_two_is_the_sum_of_their_losses_and_gradients(step: int) -> None:
    both = play(summed({**SNR, "scale": 0.5}, {**PLAIN, "scale": 3.0}), real_batch(step), step)
    first, second = (play(single(node), real_batch(step), step) for node in (SNR, PLAIN))
    assert tuple(both) == tuple(first) == (("generator", "fake_score") if step == 0 else ("fake_score",))
    for player, turn in both.items():
        assert turn.loss == pytest.approx(0.5 * first[player].loss + 3 * second[player].loss, rel=1e-6)
        for name, gradient in turn.gradients.items():
            expected = 0.5 * first[player].gradients[name] + 3 * second[player].gradients[name]
            assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-8) and expected.abs().max() > 1e-4


def test_one_term_is_that_objective() -> None:
    alone, wrapped = play(single(SNR), real_batch()), play(summed(SNR), real_batch())
    for player, turn in alone.items():
        assert wrapped[player].loss == turn.loss
        assert all(torch.equal(wrapped[player].gradients[name], g) for name, g in turn.gradients.items())
        assert wrapped[player].logs == turn.logs


def test_the_sample_is_made_once() -> None:
    objective = summed(SNR, PLAIN, SNR)
    play(objective, real_batch())
    assert len(objective.triad.generator.seen) == 1


def test_what_its_terms_read_learn_and_need_is_its_own() -> None:
    teacher, critic = (Featured(1.0, 0.7, Flow(), "flow_prediction") for _ in range(2))
    roles = Triad(Student(Flow(), [STUDENT]), Guided(teacher.requires_grad_(False)), critic)
    node = {"name": "dmd2", "ratio": 2, "gan_weight": 0.5, "scale": 2.0}
    objective = Objective(Config(terms=[SNR, node, {**SNR, "regression": 0.25}]), roles, one_step())
    assert set(objective.reads) == {"x0", "pair"}
    assert Objective.needs(objective.config) == ("generator", "real_score", "fake_score")
    objective.attach(torch.zeros(2, 32), Condition())
    (heads,) = objective.learns()["fake_score"]
    assert heads is objective.terms[1].heads
    assert any(name.startswith("terms.1.heads.") for name in objective.state_dict())
    two = Objective(Config(terms=[SNR, node]), roles, one_step())
    two.attach(torch.zeros(2, 32), Condition())
    alone = dmd2.Objective(dmd2.Config(ratio=2, gan_weight=0.5), roles, one_step())
    alone.heads = two.terms[1].heads
    rest = dmd.Objective(dmd.Config(weight="snr", regression=0, ratio=2), roles, one_step())
    got, a, b = (play(o, real_batch())["fake_score"].loss for o in (two, rest, alone))
    assert got == pytest.approx(a + 2 * b, rel=1e-6)


@dataclass
class PullConfig:
    name: str = "pull"


class Pull(base.Objective):
    """A term without a critic: the square of the sample."""

    def generator_loss(self, batch: Batch, sample, step: int):
        return sample.x0.square().mean(), {}


def test_scales_stay_with_their_terms_where_one_has_no_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    found = base.find
    module = SimpleNamespace(Objective=Pull, Config=PullConfig)
    monkeypatch.setattr(base, "find", lambda name: module if name == "pull" else found(name))
    objective = summed({**SNR, "scale": 3.0}, {"name": "pull", "scale": 7.0})
    swapped = Objective(Config(terms=[{"name": "pull", "scale": 7.0}, {**SNR, "scale": 3.0}]), triad(), one_step())
    alone = play(single(SNR), real_batch())
    assert play(objective, real_batch())["fake_score"].loss == pytest.approx(3 * alone["fake_score"].loss, rel=1e-6)
    batch = real_batch()
    sample = swapped.sample(batch, 0, True)
    generator, _ = swapped.generator_loss(batch, sample, 0)
    critic, _ = swapped.critic_loss(batch, sample.detach(), 0)
    pulled = 7 * sample.x0.square().mean().item()
    assert generator.item() == pytest.approx(pulled + 3 * alone["generator"].loss, rel=1e-6)
    assert critic.item() == pytest.approx(3 * alone["fake_score"].loss, rel=1e-6)


@pytest.mark.parametrize("name", ["diffusion", "consistency", "rectified_flow"])
def test_objectives_with_turns_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' plays turns of its own"):
        summed(SNR, {"name": name})


def test_wrong_terms_are_refused() -> None:
    with pytest.raises(UserError, match="there is no objective 'dmd3': use one of"):
        summed({"name": "dmd3"})
    with pytest.raises(UserError, match="there is no objective"):
        summed({"scale": 2.0})
    with pytest.raises(UserError, match="terms is empty"):
        Config()
    with pytest.raises(Exception, match="ratios"):
        summed({"name": "dmd", "ratios": 2})


def test_every_objective_is_found_by_its_file_name() -> None:
    known = {"consistency", "diffusion", "dmd", "dmd2", "phased_dmd", "rectified_flow", "sum"}
    assert known <= set(base.names()) and not {"base", "pieces"} & set(base.names())
    for name in base.names():
        module = base.find(name)
        assert issubclass(module.Objective, base.Objective)
        assert module.Config.__dataclass_fields__["name"].default == name
    with pytest.raises(UserError, match="no objective 'base'"):
        base.find("base")


def test_a_sum_can_walk_several_steps() -> None:
    times = (1.0, 0.5)
    roles = triad()
    student = Student(Flow(), [STUDENT, STUDENT], times)
    objective = Objective(Config(terms=[SNR, PLAIN]), Triad(student, roles.real_score, roles.fake_score), walk(times))
    trained = {
        play(objective, real_batch(step), step)["generator"].gradients["generator.mean"].nonzero().item()
        for step in range(0, 40, 2)
    }
    assert trained == {0, 1}
