"""Runs every test, the slow tier too, and records the result with commit and date in assets/benchmarks/tests.json."""

from __future__ import annotations

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


def main() -> int:
    outcomes, began = Outcomes(), time.time()
    code = pytest.main(["-q", "-m", "slow or not slow", "--override-ini=addopts=--strict-markers"], plugins=[outcomes])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "commit": commit,
        "date": f"{date.today():%Y-%m-%d}",
        "hardware": f"{platform.machine()} CPU",
        "seconds": round(time.time() - began),
        **outcomes.counts,
        "failures": outcomes.failures,
    }
    target = Path("assets/benchmarks/tests.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
