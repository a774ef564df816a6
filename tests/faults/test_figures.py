"""What the README says of the last soak is what its files say, and nothing in them was other than promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = " ".join((ROOT / "README.md").read_text().split())

SAID = {
    "kills": "{kills} kills: {equal_to_the_bit} ended equal",
    "storage": "{write_sites} places, {cases} cases; {caught:,} of {damaged:,} damages noticed",
    "numbers": "{cases} runs",
    "ranks": "{losses} losses at `timeout=20`: killed {killed} s, stopped {stopped} s, hung {hung} s",
    "files": "{readers} readers, {tried:,} cases",
    "fuzz": "{cases:,} cases",
    "concurrency": "{started_at_once} starts, {resumed_after_a_kill} resumes, {read} reads",
}
BAD = ("not_as_promised", "anything but success or one sentence", "ended otherwise than promised")


def figures(subject: str) -> dict[str, Any]:
    return json.loads((ROOT / f"assets/benchmarks/soak/{subject}.json").read_text())


def with_sums(subject: str) -> dict[str, Any]:
    """The figures of a file, and what the README adds up."""
    found = figures(subject)
    if subject == "storage":
        damaged = found["damaged_files"].values()
        sums = {"cases": sum(found["tried"].values()), "damaged": sum(one["tried"] for one in damaged)}
        return {**found, **sums, "caught": sum(one["caught"] for one in damaged)}
    if subject == "ranks":
        took = found["seconds_until_all_others_have_ended"]
        return {
            **found,
            **{kind: f"{min(each):.1f} to {max(each):.1f}" for kind, each in took.items() if " " not in kind},
        }
    if subject == "concurrency":
        return {**found, "read": sum(count for what, count in found["reads"].items() if what != "checkpoints_seen")}
    return found


@pytest.mark.parametrize("subject", SAID)
def test_the_readme_says_what_the_soak_has_found(subject: str) -> None:
    assert SAID[subject].format(**with_sums(subject)) in README


@pytest.mark.parametrize("subject", SAID)
def test_nothing_was_other_than_promised(subject: str) -> None:
    found = figures(subject)
    assert all(found.get(name, 0) == 0 for name in BAD)
    if subject == "kills":
        assert found["equal_to_the_bit"] == found["kills"] >= 50
    if subject == "storage":
        assert found["as_promised"] == sum(found["tried"].values())
        assert all(one["caught"] == one["tried"] for one in found["damaged_files"].values())
    if subject == "fuzz":
        assert found["cases"] >= 1_000_000


def test_every_subject_has_figures() -> None:
    subjects = {file.stem for file in (ROOT / "tests" / "faults").glob("*.py") if "\ndef soak(" in file.read_text()}
    assert subjects == SAID.keys()
    assert {file.stem for file in (ROOT / "assets/benchmarks/soak").glob("*.json")} == subjects
