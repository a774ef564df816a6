"""`fewstep doctor`: reads what a run has left behind, names the usual illnesses and says what to change."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path

from fewstep.health.curves import CURVES
from fewstep.health.illnesses import Finding, examine
from fewstep.health.record import Stage, read

WIDTH = 100


def main(root: Path, as_json: bool) -> int:
    """Examines the run in `root`. Returns 0 for a healthy one, 1 for an ill one; raises UserError for no run."""
    stages = read(root)
    found = [(stage, examine(stage)) for stage in stages]
    ill = any(finding.state == "ILL" for _, findings in found for finding in findings)
    if as_json:
        told = [
            {"name": stage.name, "step": stage.rows[-1].get("step"), "findings": [asdict(f) for f in findings]}
            for stage, findings in found
        ]
        print(json.dumps({"run": str(root), "healthy": not ill, "stages": told}, indent=1))
    else:
        print("\n\n".join(as_text(stage, findings) for stage, findings in found))
    return 1 if ill else 0


def as_text(stage: Stage, findings: list[Finding]) -> str:
    """A line for each check, then what to change."""
    where = f"{stage.name}: " if stage.name else ""
    done, planned = stage.rows[-1].get("step"), stage.asked("steps")
    lines = [f"{where}{stage.asked('objective.name')}, step {done} of {planned}"]
    width = max(len(finding.check) for finding in findings)
    lines += [f"{finding.state:3}  {finding.check:{width}}  {finding.evidence}" for finding in findings]
    for finding in findings:
        if finding.advice:
            lines += ["", *textwrap.wrap(f"{finding.check}: {finding.advice}", WIDTH, break_on_hyphens=False)]
    return "\n".join(lines)


def explain() -> str:
    """What each logged curve is and how it looks in a healthy run."""
    return "\n\n".join(f"{name}\n{textwrap.indent(textwrap.fill(said, 96), '    ')}" for name, said in CURVES.items())
