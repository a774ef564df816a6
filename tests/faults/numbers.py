"""Runs in which one value of one tensor becomes NaN or infinite, beside the same run that was left alone."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.faults.harness import Server, different, leftovers, the_run, traces
from tests.faults.kills import SCENES, Whole, whole

ALONE = replace(SCENES["dmd2_gan"], more=("steps=6", "save.keep=9", "save.export=false", "evals.samples=0"))
TOGETHER = replace(ALONE, processes=2)

# What the sentence has to say of each place. A loss has the whole of its graph to name: the tensor comes first.
SAID = {
    "data": r"data: x0 is not finite at step {}: nothing was moved",
    "teacher": r"at step {}: it was not moved; .* is real_score: output of \S*conv_in",
    "teacher's output": r"at step {}: it was not moved; .* is real_score: output of \S*mid_block",
    "critic": r"at step {}: it was not moved; .* is fake_score: weight 0.net.conv_in.weight",
    "critic's output": r"at step {}: it was not moved; .* is fake_score: output of \S*mid_block",
    "generator": r"at step {}: it was not moved; .* is generator: weight 0.net.conv_in.weight",
    "generator's output": r"at step {}: it was not moved; .* is generator: output of \S*mid_block",
    "gradient": r"player fake_score is (nan|inf) at step {}: .* is fake_score: gradient of 0.net.conv_in.weight",
    "moment": r"fake_score: exp_avg of 0.net.conv_in.weight is not finite at step {}: nothing was moved",
    "follower": r"generator: \S*conv_in.weight of ema is not finite at step {}: nothing was moved",
}
STEPS = (4, 5)
"""of six: the generator has its turn in the first and not in the second, and the teacher with it; step 4 is saved"""


def met(server: Server, whole: Whole, place: str, value: str, step: int, out: Path) -> list[str]:
    """What is wrong with how a run of `whole` ends whose `place` has a `value` at `step`, and with its resume."""
    scene, arguments = whole.scene, whole.scene.arguments(whole.teacher, out)
    said = scene.play(server, arguments, {"place": place, "value": value, "step": step}).sentence
    run = the_run(out)
    assert run is not None
    wrong = [] if re.search(SAID[place].format(step), said) else [f"another sentence: {said}"]
    newest = run / "checkpoints" / "0000004"
    wrong += [] if f"the last good checkpoint is {newest}" in said else [f"no checkpoint is offered: {said}"]
    wrong += [f"{name} was left behind" for name in leftovers(run)]
    saved = {name: found for name, found in traces(run).items() if name.startswith("checkpoints/")}
    there = {name: found for name, found in whole.left.items() if re.match(r"checkpoints/000000[24]/", name)}
    wrong += [f"{name} is not what it was" for name in different(saved, there)]
    again = scene.play(server, [*arguments, "--resume", str(run)])
    wrong += [] if again.code == 0 else [f"the resume ended with {again.code}: {again.errors[-1500:]}"]
    return wrong + [f"{name} differs after the resume" for name in different(whole.left, traces(run))]


def soak(folder: Path) -> dict[str, Any]:
    """Every place, both values, two steps, one process and two. Raises AssertionError where one is not as promised."""
    tried: dict[str, int] = {}
    faults: list[str] = []
    with Server() as server:
        for scene in (ALONE, TOGETHER):
            reference = whole(server, scene, folder / f"on_{scene.processes}")
            for place in SAID:
                for value in ("nan", "inf"):
                    for step in STEPS[:1] if "teacher" in place else STEPS:
                        case = f"{place}, {value} at step {step} on {scene.processes}"
                        wrong = met(server, reference, place, value, step, folder / "case")
                        shutil.rmtree(folder / "case")
                        tried[place] = tried.get(place, 0) + 1
                        faults += [f"{case}: {one}" for one in wrong]
                        print(f"{case}: {wrong or 'as it should be'}", flush=True)
    figures = {
        "tried": tried,
        "cases": sum(tried.values()),
        "processes": [1, 2],
        "not_as_promised": len({fault.split(":")[0] for fault in faults}),
    }
    assert not faults, (figures, faults)
    return figures
