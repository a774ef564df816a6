"""The usual illnesses of distillation, one small function each: a Stage -> a Finding.

A finding is `ok`, `ILL`, or `-` where what was logged does not tell, and says with which numbers. Where one illness
brings another along (samples that are torn apart show no label either), only the first one is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.health import signs
from fewstep.health.record import Stage
from fewstep.health.signs import MOVES, Sign


@dataclass(frozen=True)
class Finding:
    """What one check has found: its evidence with numbers and, of an illness, what to change."""

    check: str
    state: Literal["ok", "ILL", "-"]
    evidence: str
    advice: str = ""


Check = Callable[[Stage], Finding]


def unknown(check: str, why: str) -> Finding:
    return Finding(check, "-", why)


def judged(check: str, sign: Sign, advice: str) -> Finding:
    """A finding by a sign: ILL with the advice, or ok."""
    return Finding(check, "ILL" if sign.ill else "ok", str(sign), advice if sign.ill else "")


def stopped(stage: Stage) -> Finding:
    """Losses, gradients and logs are finite numbers."""
    check = "finite numbers"
    reason = stage.rows[-1].get("stopped")
    if reason:
        return Finding(
            check,
            "ILL",
            f"the run stopped at step {stage.rows[-1].get('step')}: {reason}",
            "resume from the last checkpoint with a lower players.<name>.lr or clip, or model.precision=fp32",
        )
    broken = [(row.get("step"), key) for row in stage.rows for key in signs.not_finite(row)]
    if broken:
        step, key = broken[0]
        return Finding(
            check,
            "ILL",
            f"{key} is not finite from step {step} on ({len(broken)} such values)",
            "lower players.<name>.lr or clip of the player that logs it, or set model.precision=fp32",
        )
    return Finding(check, "ok", f"all that {len(stage.rows)} steps have logged is finite")


def critic(stage: Stage) -> Finding:
    """The fake score follows the generator, neither behind it nor astray."""
    check = "critic"
    if not signs.values(stage.rows, "lag"):
        return unknown(check, "this objective has no critic")
    behind, astray = signs.lag(stage.moves), signs.pull(stage.recent, signs.ASTRAY)
    if behind is None or astray is None:
        return unknown(check, _early(stage))
    rate, own = (stage.asked(f"players.{name}.lr", 0.0) for name in ("fake_score", "generator"))
    if _astray(stage):
        return judged(check, astray, f"lower players.fake_score.lr (it is {rate:g}, the generator's {own:g})")
    return judged(
        check,
        behind,
        f"raise players.fake_score.lr (it is {rate:g}, the generator's {own:g}), or objective.ratio (it is "
        f"{stage.asked('objective.ratio', 1)}) so that the critic moves more often",
    )


def guidance(stage: Stage) -> Finding:
    """The guided teacher pulls no harder than images can bear."""
    check = "guidance"
    scale = stage.asked("model.guidance", 1.0)
    if scale == 1:
        return Finding(check, "ok", "the teacher is not guided (model.guidance is 1)")
    sign = signs.pull(stage.recent) or signs.saturation(stage.recent, stage.moves[:1])
    if sign is None:
        return unknown(check, _early(stage))
    advice = f"lower model.guidance (it is {scale:g}): 1 to 3 for class labels, up to 8 for prompts"
    return judged(check, sign, advice)


def generator(stage: Stage) -> Finding:
    """The generator's moves are small enough that it stays where images are."""
    check = "generator's rate"
    sign = signs.saturation(stage.recent, stage.moves[:1])
    if sign is None:
        return unknown(check, _early(stage))
    if sign.ill and (_overguided(stage) or _astray(stage)):
        return unknown(check, "cannot be told while the scores pull too hard")
    rate = stage.asked("players.generator.lr", 0.0)
    return judged(
        check,
        sign,
        f"lower players.generator.lr (it is {rate:g}) tenfold or more and start again: what it has torn apart does not "
        "grow together",
    )


def collapse(stage: Stage) -> Finding:
    """Samples of one batch differ from each other."""
    check = "diversity"
    sign = signs.spread(stage.recent, stage.moves[:1])
    if sign is None:
        return unknown(check, _early(stage))
    return judged(
        check,
        sign,
        "start from a regression on pairs (a first stage with objective.name=rectified_flow), lower "
        "players.generator.lr, or raise players.fake_score.lr so that the critic sees the collapse",
    )


def labels(stage: Stage) -> Finding:
    """What is asked for is what is made."""
    check = "labels"
    if _saturated(stage):
        return unknown(check, "cannot be told from samples that are no images")
    measured = [stage.table["rows"][-1]] if stage.table is not None else stage.evals[-1:]
    if measured and (sign := signs.accuracy(measured[0])) is not None:
        return judged(check, sign, _relabel(stage))
    if not signs.values(stage.rows, "x0/label"):
        return unknown(check, "no class labels are logged here; `fewstep eval` measures what can be read from images")
    sign = signs.label(stage.recent)
    return unknown(check, _early(stage)) if sign is None else judged(check, sign, _relabel(stage))


def _relabel(stage: Stage) -> str:
    if stage.asked("model.guidance", 1.0) < 1:
        return "set model.guidance to 1 or more: below it the teacher is led away from the label"
    return (
        "see whether the teacher knows its labels (the first row of the table, or `fewstep sample` on "
        f"{stage.asked('model.teacher')}): its class embedding and model.null_label; then lower players.generator.lr"
    )


def discriminator(stage: Stage) -> Finding:
    """The discriminator and the generator are a match for each other."""
    check = "discriminator"
    if not signs.values(stage.rows, "gan/accuracy"):
        return unknown(check, "this objective has no discriminator")
    if _saturated(stage):
        return unknown(check, "samples that are no images are told apart by anyone")
    weight = stage.asked("objective.gan_critic_weight", 0.0)
    won, swallowed = signs.won(stage.recent), signs.swallowed(stage.rows[len(stage.rows) // 2 :], weight)
    if won is None or swallowed is None:
        return unknown(check, _early(stage))
    return judged(
        check,
        swallowed if swallowed.ill else won,
        f"lower objective.gan_critic_weight (it is {weight:g}, 1e-2 is healthy) or, if that is low, "
        "players.fake_score.lr",
    )


def times(stage: Stage) -> Finding:
    """The student is sampled, measured and exported at the times it was trained at."""
    check = "sampling times"
    walked = stage.origin.get("sampling")
    if not isinstance(walked, dict):
        return unknown(check, "origin.json does not say at which times this run trains: an older version made it")
    wrong = [*_changed(stage, walked), *_measured(stage, walked), *_exported(stage, walked)]
    count = walked["steps"]
    shown = ", ".join(f"{level:.3f}" for _, level in walked["times"][:8])
    if not wrong:
        beside = "" if stage.export is None else ", and the export walks the same"
        return Finding(check, "ok", f"trained in {count} step{'s' if count > 1 else ''} at t = {shown}{beside}")
    return Finding(
        check,
        "ILL",
        f"trained in {count} step{'s' if count > 1 else ''} at t = {shown}, but {'; '.join(wrong)}",
        "sample with what was trained: put model.steps, model.shift and model.transition in config.yaml back, write "
        "the export again with `fewstep export`, the table with `fewstep eval`",
    )


def _changed(stage: Stage, walked: dict[str, Any]) -> list[str]:
    now = {key: stage.asked(f"model.{key}") for key in ("steps", "shift", "transition")}
    return [f"config.yaml has model.{k}={v}, trained was {walked.get(k)}" for k, v in now.items() if v != walked.get(k)]


def _measured(stage: Stage, walked: dict[str, Any]) -> list[str]:
    if stage.table is None:
        return []
    found = re.match(r"student, (\d+) step", str(stage.table["rows"][-1].get("name")))
    if found is None or int(found[1]) == walked["steps"]:
        return []
    return [f"table.json measures {found[1]} steps"]


def _exported(stage: Stage, walked: dict[str, Any]) -> list[str]:
    if stage.export is None:
        return []
    from fewstep.health import exported  # diffusers takes seconds to load

    return exported.differences(stage.export, walked["times"])


def _early(stage: Stage) -> str:
    count = len(stage.moves)
    return f"the generator has logged {count} moves, {MOVES} are needed" if count < MOVES else "nothing is logged of it"


def _saturated(stage: Stage) -> bool:
    sign = signs.saturation(stage.recent, stage.moves[:1])
    return sign is not None and sign.ill


def _astray(stage: Stage) -> bool:
    """Whether the scores lie far apart for no reason but the critic's own."""
    sign = signs.pull(stage.recent, signs.ASTRAY)
    return sign is not None and sign.ill and stage.asked("model.guidance", 1.0) == 1


def _overguided(stage: Stage) -> bool:
    return guidance(stage).state == "ILL"


CHECKS: tuple[Check, ...] = (stopped, critic, guidance, generator, collapse, labels, discriminator, times)


def examine(stage: Stage) -> list[Finding]:
    """Every check of a stage, in the order in which illnesses bring each other along."""
    return [check(stage) for check in CHECKS]
