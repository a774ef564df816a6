"""Runs every test, the slow tier too, and records the result with commit and date in assets/benchmarks/tests.json.

    python tools/slow_tests.py [--again]

`--again` runs the failures of the record alone, after a repair, and writes beside them how they ended, and at which
commit.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest


class Outcomes:
    """Counts the outcomes of a pytest session and keeps the names of failures."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            if report.failed:
                self.failures.append(report.nodeid)


RESULT = Path("assets/benchmarks/tests.json")
EVERY = ["-q", "-m", "slow or not slow", "--override-ini=addopts=--strict-markers", "-n", "2", "--dist", "loadfile"]


def head() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def again() -> int:
    """The failures of the record once more."""
    record, outcomes = json.loads(RESULT.read_text()), Outcomes()
    if not record["failures"]:
        return 0
    code = pytest.main([*EVERY, *sorted(set(record["failures"]))], plugins=[outcomes])
    record["again"] = {"commit": head(), **outcomes.counts, "failures": outcomes.failures}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return int(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--again", action="store_true", help="run the failures of the record alone")
    if parser.parse_args().again:
        return again()
    outcomes, began = Outcomes(), time.time()
    code = pytest.main(EVERY, plugins=[outcomes])
    result = {
        "commit": head(),
        "date": f"{date.today():%Y-%m-%d}",
        "hardware": f"{platform.machine()} CPU",
        "seconds": round(time.time() - began),
        **outcomes.counts,
        "failures": outcomes.failures,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
