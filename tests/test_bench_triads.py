"""The benchmark of large triads where there is no GPU: tiny networks, every case measured or refused in a sentence."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs at real size")]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("triads") / "triads.json"
    command = [sys.executable, "tools/bench_triads.py", "--families", "wan", "--rounds", "1", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(out.read_text())


def test_says_that_there_is_no_gpu(record):
    assert "for want of a GPU" in record["hardware"]


def test_every_case_is_measured_or_refused(record):
    refused = {row["attention"]: row["refused"] for row in record["rows"] if "refused" in row}
    assert set(refused) == {"flash", "xformers", "flex"}
    assert all("needs a GPU" in sentence for sentence in refused.values())
    measured = [row for row in record["rows"] if "refused" not in row]
    assert [(row["roles"], row["attention"], row["compile"]) for row in measured] == [
        ("full", "sdpa", False),
        ("full", "math", False),
        ("full", "sdpa", True),
        ("lora", "sdpa", False),
        ("lora", "sdpa", True),
    ]
    assert all(0 < row["share"] < 1 and row["cycle"] > 0 for row in measured)


def test_the_plan_is_within_15_percent_of_the_peak(record):
    rows = [row for row in record["rows"] if "planned_gb" in row]
    assert len(rows) == 3
    assert [row["planned_gb"] / row["peak_gb"] for row in rows] == pytest.approx([1] * 3, rel=0.15)
