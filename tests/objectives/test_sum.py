from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import STUDENT, Featured, Law, Student, exact_law, gaussian_triad, one_step, play, real_batch, walk

from fewstep import cli, config
from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.objectives import base, dmd, dmd2
from fewstep.objectives.base import Triad
from fewstep.objectives.sum import Config, Objective
from fewstep.rollout import Sample, cps, ode, renoise

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


def test_a_later_term_logs_under_its_number() -> None:
    """Every log of every term alone is there, by its own name for the first and with the term's number for the rest."""
    nodes = (SNR, {**SNR, "regression": 0.5}, PLAIN)
    draw = real_batch().draw
    pair = Pair(draw.normal("stored", (32,)), draw.normal("made", (32,)), Condition())
    batch = replace(real_batch(), pair=pair)
    alone = [play(single(node), batch)["generator"].logs for node in nodes]
    logs = play(summed(*nodes), batch)["generator"].logs
    of_sample = {f"{of}/{what}" for of in ("x0", "data") for what in ("mean", "std", "saturated", "spread")}
    assert set(logs) == {"gap", "lag", "gap/2", "lag/2", "regression", "gap/3", "lag/3"} | of_sample
    for name in ("gap", "lag"):
        assert (logs[name], logs[f"{name}/2"], logs[f"{name}/3"]) == tuple(found[name] for found in alone)
    assert logs["regression"] == alone[1]["regression"] and logs["x0/std"] == alone[0]["x0/std"]
    both = play(summed({**SNR, "regression": 0.5}, {**PLAIN, "regression": 0.1}), batch)["generator"].logs
    assert {"regression", "regression/2"} <= set(both)


PHASED = {"name": "phased_dmd", "phases": 2, "ratio": 1}
CLEAN = {"name": "dmd2", "ratio": 1, "gan_weight": 0.0}
HALF = (1.0, 0.5)
LAWS: list[Law] = [(0.4, 0.6), (-0.2, 0.9)]


def two_steps(*terms: dict, transition: Any = renoise) -> Objective:
    roles = triad()
    return Objective(
        Config(terms=list(terms)),
        Triad(Student(Flow(), LAWS, HALF), roles.real_score, roles.fake_score),
        walk(HALF, transition),
    )


@pytest.mark.parametrize("clean", [CLEAN, {**PLAIN, "ratio": 1}], ids=["dmd2", "dmd"])
@pytest.mark.parametrize("step, level", [(0, 0.5), (1, 0.0)])
def test_a_phase_is_judged_by_its_state_and_its_clean_sample(clean: dict, step: int, level: float) -> None:
    """3 phased DMD + .5 of a method without phases: the sum of each alone, the latter on the phase's x0 at level 0."""
    both = play(two_steps({**PHASED, "scale": 3.0}, {**clean, "scale": 0.5}), real_batch(step), step)
    phased, other = two_steps(PHASED).terms[0], two_steps(clean).terms[0]
    sampled: list[Sample] = []

    def of_the_phase(batch: Batch, step: int, grad: bool) -> Sample:
        sampled.append(two_steps(PHASED).terms[0].sample(batch, step, grad))
        made = other.rollout(other.triad.generator, batch.noise, batch.cond, batch.draw, exit=sampled[-1].index, grad=1)
        assert torch.equal(made.x0, sampled[-1].x0)
        return made

    other.sample = of_the_phase  # type: ignore[assignment, method-assign]
    first, second = (play(objective, real_batch(step), step) for objective in (phased, other))  # type: ignore[arg-type]
    assert sampled[0].s.unique().tolist() == [level]
    for player in ("generator", "fake_score"):
        assert both[player].loss == pytest.approx(3 * first[player].loss + 0.5 * second[player].loss, rel=1e-5)
        for name, gradient in both[player].gradients.items():
            expected = 3 * first[player].gradients[name] + 0.5 * second[player].gradients[name]
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7) and expected.abs().max() > 1e-4


def test_a_state_and_its_clean_sample_have_one_law_by_renoising_alone() -> None:
    """The clean law behind x_s against the law of x0; the critic that both terms share can hold only one."""
    student = Student(Flow(), LAWS, HALF)
    of_x0 = exact_law(student, walk(HALF), 0, 0.0, fresh=True)
    assert exact_law(student, walk(HALF), 0, 0.5, fresh=True) == pytest.approx(of_x0, rel=1e-6)
    behind = exact_law(student, walk(HALF, ode), 0, 0.5, fresh=False)
    assert behind[1] > 1.5 * of_x0[1]
    for transition in (ode, cps(0.5)):
        with pytest.raises(UserError, match=r"one law with fresh noise alone, so set model\.transition=renoise"):
            two_steps(PHASED, CLEAN, transition=transition)
    for fine in ((PHASED, PHASED), (CLEAN, PHASED), ({**PHASED, "phases": 1}, CLEAN)):
        assert len(two_steps(*fine, transition=ode).terms) == 2


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
    with pytest.raises(UserError, match="terms is empty"):
        Config()


MISTAKES = {
    "{name: dmd, ratios: 2}": "term 2 of 2: Key 'ratios' not in 'Config'. Did you mean: 'ratio'? at ratios",
    "{name: dmd, ratio: soon}": "term 2 of 2: Value 'soon' of type 'str' could not be converted to Integer",
    "{name: dmd, ratio: 0}": "term 2 of 2: objective.ratio is at least 1",
    "{name: dmd, times: {lo: 0.1}}": "Did you mean: 'low'? at times.lo",
    "{name: dmd, scale: heavy}": "term 2 of 2: scale is a number, but heavy was given",
    "{name: dmd, scale: true}": "scale is a number, but True was given",
    "{name: dmd, scale: .nan}": "scale is a number, but nan was given",
    "{name: dmd, scale: }": "scale is a number, but None was given",
    "{name: dmd3}": "term 2 of 2: there is no objective 'dmd3': use one of",
    "{name: consistency}": "the objective 'consistency' plays turns of its own",
    "{scale: 2}": "term 2 of 2: name is missing: use one of ac_dmd, ",
    "dmd": "term 2 of 2: a term has keys of its own: write {name: dmd}",
    "3": "write {name: 3}",
}


@pytest.mark.parametrize("node", MISTAKES)
def test_a_wrong_term_ends_with_one_sentence(node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, before anything is built: exit code 2, no traceback."""
    file = tmp_path / "sum.yaml"
    file.write_text(f"name: x\nobjective: {{name: sum, terms: [{{name: dmd2}}, {node}]}}\n")
    assert cli.main(["config", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("fewstep: objective.terms, term 2 of 2: ")
    assert MISTAKES[node] in said.err and len(said.err.splitlines()) == 1


def test_terms_that_are_no_list_and_right_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sum.yaml"
    wrong = {"dmd": "at terms", "{name: dmd}": "a list where keys", "[]": "terms is empty", "": "at terms"}
    for terms, why in wrong.items():
        file.write_text(f"name: x\nobjective: {{name: sum, terms: {terms}}}\n")
        assert cli.main(["config", str(file)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fewstep: ") and why in said and len(said.splitlines()) == 1
    file.write_text("name: x\nobjective: {name: sum, terms: [{name: dmd2}, {name: dmd, ratio: 5, scale: 2}]}\n")
    assert cli.main(["config", str(file)]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    assert config.load(tmp_path / "shown.yaml") == config.load(file) and "scale: 2" in shown


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
