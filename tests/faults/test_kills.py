"""Killed while it makes pairs, writes a checkpoint or evaluates, a run that is resumed ends as if left alone.

Asked to stop it saves what would be lost, says how to go on and exits with 0; asked twice it stops at once.
"""

from __future__ import annotations

import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.config import SaveConfig
from fewstep.train import checkpoint
from tests.faults.harness import Server, different, leftovers, the_run, traces
from tests.faults.kills import SCENES, Whole, killed, moments, whole


@pytest.mark.parametrize("phase", ["pairs", "checkpoint", "evaluation"])
def test_killed_and_resumed_a_run_is_the_same_to_the_bit(
    phase: str, server: Server, gan: Whole, tmp_path: Path
) -> None:
    (moment,) = moments(gan, seed=len(phase), count=1, phases=(phase,))
    outcome = killed(server, gan, moment, tmp_path)
    assert outcome.faults == [] and outcome.resumed


def stopped(
    server: Server, whole: Whole, arguments: list[str], phase: str, number: signal.Signals, call: int
) -> list[str]:
    """Asks a run to stop; returns the command that it says goes on."""
    done = whole.scene.play(server, arguments, {"signal": number, "phase": phase, "call": call})
    assert done.code == 0, (phase, done.errors[-2000:])
    assert done.seconds < SaveConfig().grace and "Traceback" not in done.errors
    *_, said, command = done.said.rstrip().splitlines()
    assert said.startswith(f"stopped by {number.name}") and said.endswith("continue with")
    program = "fewstep " if whole.scene.processes == 1 else "torchrun --nproc-per-node 2 -m fewstep.cli "
    assert command.startswith(program)
    return shlex.split(command.removeprefix(program))


def test_asked_to_stop_in_turn_everywhere_a_run_goes_on_by_the_command_it_prints(
    server: Server, gan: Whole, tmp_path: Path
) -> None:
    arguments = gan.scene.arguments(gan.teacher, tmp_path)
    term, ctrl_c = signal.SIGTERM, signal.SIGINT
    for phase, number, call in (
        ("pairs", ctrl_c, 3000),
        ("step", term, 9000),
        ("evaluation", ctrl_c, 2000),
        ("checkpoint", term, 4000),
        ("step", ctrl_c, 9000),
        ("export", term, 20_000),
    ):
        arguments = stopped(server, gan, arguments, phase, number, call)
    assert server.run(arguments).code == 0
    run = the_run(tmp_path)
    assert run is not None and different(gan.left, traces(run)) == [] and leftovers(run) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_asked_twice_a_run_stops_at_once(number: signal.Signals, server: Server, gan: Whole, tmp_path: Path) -> None:
    """In the middle of a step, which is neither finished nor saved."""
    arguments = gan.scene.arguments(gan.teacher, tmp_path)
    fault = {"signal": number, "phase": "step", "call": 9000, "twice": 0.0}
    done = server.run(arguments, fault)
    assert done.code == -number
    run = the_run(tmp_path)
    assert run is not None and not any(checkpoint.available(place) for place in run.rglob("checkpoints"))


@pytest.mark.slow
def test_two_processes_of_which_one_is_asked_stop_together(server: Server, tmp_path: Path) -> None:
    """In a step, and in an evaluation that both make."""
    scene = replace(SCENES["fsdp2"], more=("steps=5", "evals.samples=0"))
    left_alone = whole(server, scene, tmp_path / "whole")
    arguments = scene.arguments(left_alone.teacher, tmp_path / "asked")
    for phase, call in (("step", 9000), ("evaluation", 2000), ("checkpoint", 2000), ("export", 20_000)):
        arguments = stopped(server, left_alone, arguments, phase, signal.SIGTERM, call)
    assert server.run_two(arguments).code == 0
    run = the_run(tmp_path / "asked")
    assert run is not None and different(left_alone.left, traces(run)) == [] and leftovers(run) == []
