"""A value that is not finite, wherever it comes from, stops a run before anything is moved or saved, and is named."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import cli
from fewstep.build import Run
from fewstep.train import checkpoint, loop, parallel, soundness
from fewstep.train.player import NonFinite
from tests.family_runs import DMD2, batch, build_run, play

STEP = 4  # the generator's turn comes too: ratio is 2


@pytest.fixture
def run(tmp_path: Path) -> Run:
    torch.manual_seed(0)
    one = build_run("unet2d", tmp_path, DMD2)
    play(one, range(STEP))
    return one


def state(run: Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in checkpoint.collect(run.players, run.objective).items()}


def network(run: Run, role: str) -> nn.Module:
    return run.teacher.net if role == "real_score" else getattr(run.objective.triad, role).net


def in_weight(role: str, name: str = "conv_in.weight") -> Callable[[Run, float], None]:
    def spoil(run: Run, bad: float) -> None:
        with torch.no_grad():
            network(run, role).get_parameter(name).view(-1)[3] = bad

    return spoil


def in_follower(run: Run, bad: float) -> None:
    with torch.no_grad():
        run.players["generator"].followers["ema"].module.net.conv_out.weight.view(-1)[0] = bad


def in_moment(run: Run, bad: float) -> None:
    player = run.players["fake_score"]
    weight = run.objective.triad.fake_score.net.conv_in.weight
    player.optimizer.state[weight]["exp_avg_sq"].view(-1)[5] = bad


def in_gradient(run: Run, bad: float) -> None:
    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[1] = bad
        return spoiled

    run.objective.triad.generator.net.conv_in.weight.register_hook(spoil)


def in_output(role: str) -> Callable[[Run, float], None]:
    def spoil(run: Run, bad: float) -> None:
        block = network(run, role).mid_block
        block.register_forward_hook(lambda module, given, output: output + bad)

    return spoil


def in_data(run: Run, bad: float) -> None:
    """See `stopped`."""


LOSS = rf"the loss of player \w+ is (nan|inf) at step {STEP}: it was not moved; .* is"
MOVE = f"at step {STEP}: the move was refused; .* is"
BEGUN = f"is not finite at step {STEP}: nothing was moved"
CASES: dict[str, tuple[Callable[[Run, float], None], str]] = {
    "data": (in_data, f"data: x0 {BEGUN}"),
    "teacher's weight": (in_weight("real_score"), f"{LOSS} real_score: output of .*net.conv_in"),
    "teacher": (in_output("real_score"), f"{LOSS} real_score: output of .*net.mid_block"),
    "critic": (in_output("fake_score"), f"{LOSS} fake_score: output of .*net.mid_block"),
    "critic's weight": (in_weight("fake_score"), f"{LOSS} fake_score: weight 0.net.conv_in.weight"),
    "generator": (in_output("generator"), f"{LOSS} generator: output of .*net.mid_block"),
    "generator's weight": (in_weight("generator"), f"{LOSS} generator: weight 0.net.conv_in.weight"),
    "gradient": (in_gradient, f"{MOVE} generator: gradient of 0.net.conv_in.weight"),
    "follower": (in_follower, f"generator: net.conv_out.weight of ema {BEGUN}"),
    "moment": (in_moment, f"fake_score: exp_avg_sq of 0.net.conv_in.weight {BEGUN}"),
}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The players of which a tensor has changed."""
    assert before.keys() == after.keys()
    return {k.split("/")[0] for k, v in before.items() if not torch.equal(v.nan_to_num(7.7), after[k].nan_to_num(7.7))}


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", CASES)
def test_what_is_not_finite_is_named_and_nothing_has_moved(where: str, bad: float, run: Run) -> None:
    spoil, said = CASES[where]
    spoil(run, bad)
    given = batch(run, STEP, torch.arange(4))
    if where == "data":
        given.x0[1, 0, 0, 0] = bad  # type: ignore[index]
    before = state(run)
    with pytest.raises(NonFinite, match=said):
        loop.train_step(run.objective, [given], STEP, run.players)
    assert moved(before, state(run)) == set()


def test_a_step_goes_on_with_large_values(run: Run) -> None:
    """What only adds up to more than a float holds is looked at one by one, and found well."""
    in_moment(run, 3e38)
    moments = next(iter(run.players["generator"].optimizer.state.values()))
    moments["exp_avg_sq"].fill_(3e38)
    loop.train_step(run.objective, [batch(run, STEP, torch.arange(4))], STEP, run.players)
    soundness.check(run.players, STEP)
    assert all(player.moves == STEP // (2 if name == "generator" else 1) + 1 for name, player in run.players.items())


@pytest.mark.parametrize("where", ["follower", "moment", "generator's weight"])
def test_what_is_not_finite_is_not_saved(where: str, run: Run) -> None:
    soundness.check(run.players, STEP)
    spoil, said = CASES[where]
    spoil(run, math.nan)
    name = said.removesuffix(f" {BEGUN}").split(" is ")[-1]
    with pytest.raises(NonFinite, match=f"{name} is not finite after step {STEP}: it was not saved"):
        soundness.check(run.players, STEP)


def test_large_values_are_finite_and_whole_numbers_do_not_count() -> None:
    half = torch.full((9,), 6e4, dtype=torch.float16)
    large = [torch.full((9,), 3e38), torch.full((3,), -3e38), half, torch.ones(2, dtype=torch.long), torch.ones(0)]
    named = [(str(i), value) for i, value in enumerate(large)]
    assert soundness.sought(named) is None and soundness.sought([]) is None
    assert parallel.zero_of(large).isnan() and parallel.zero_of([half, torch.full((9,), 1e37)]) == 0
    for bad in (math.nan, math.inf, -math.inf):
        for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            wrong = torch.tensor([1.0, bad], dtype=kind)
            assert soundness.sought([*named, ("wrong", wrong)]) == "wrong" and parallel.zero_of([wrong]).isnan()


@pytest.mark.parametrize(
    "at, late, told",
    [
        (4, False, "generator: exp_avg of 0.net.conv_in.weight is not finite at step 4: nothing was moved"),
        (5, True, "generator: exp_avg of 0.net.conv_in.weight is not finite after step 6: it was not saved"),
    ],
    ids=["before a step", "before a checkpoint"],
)
def test_a_run_ends_in_a_sentence_and_keeps_its_checkpoints(
    at: int,
    late: bool,
    told: str,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    played = loop.train_step

    def spoiled(objective: Any, batches: Any, step: int, players: Any) -> Any:
        logs = played(objective, batches, step, players) if late else {}
        if step == at:
            next(iter(players["generator"].optimizer.state.values()))["exp_avg"].view(-1)[0] = math.nan
        return logs or played(objective, batches, step, players)

    monkeypatch.setattr(loop, "train_step", spoiled)
    quick = ["batch=4", "save.every=2", "save.export=false", "evals.every=0", "evals.samples=0", "steps=8"]
    command = ["train", "configs/scenes/dmd2.yaml", f"model.teacher={tiny_teacher}", *quick, f"--out={tmp_path}"]
    assert cli.main(command) == 2
    (folder,) = tmp_path.glob("*_dmd2")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()) == ["0000002", "0000004"]
    said = capsys.readouterr().err
    assert told in said
    assert f"the last good checkpoint is {folder / 'checkpoints' / '0000004'}" in said and "Traceback" not in said
    assert len((folder / "log.jsonl").read_text().splitlines()) >= 5


@pytest.mark.slow
def test_looking_costs_a_fraction_of_a_move(run: Run) -> None:
    given = batch(run, STEP, torch.arange(4))
    looked, all_of_it = [], []
    for step in range(STEP, STEP + 20):
        began = time.perf_counter()
        assert all(parallel.zero_of(tensor for _, tensor in player.carried()) == 0 for player in run.players.values())
        looked.append(time.perf_counter() - began)
        began = time.perf_counter()
        loop.train_step(run.objective, [given], step, run.players)
        all_of_it.append(time.perf_counter() - began)
    assert statistics.median(looked) < 0.1 * statistics.median(all_of_it)
