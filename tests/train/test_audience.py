"""A run whose printing nobody reads any more goes on, and saves when it is asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.train import audience
from fewstep.train.checkpoint import available, wrong


def test_a_stream_without_a_reader_falls_silent() -> None:
    reader, writer = os.pipe()
    stream = audience.Unheard(os.fdopen(writer, "w", buffering=1))
    assert stream.write("heard\n") == 6 and os.read(reader, 20) == b"heard\n"
    os.close(reader)
    for _ in range(3):
        assert stream.write("unheard\n") == 8
        stream.flush()
    stream.close()


def test_a_full_disk_under_the_log_is_no_end_of_a_run() -> None:
    stream = audience.Unheard(open("/dev/full", "w", buffering=1))  # noqa: SIM115
    for _ in range(3):
        assert stream.write("unheard\n") == 8
        stream.flush()
    stream.close()


def test_what_is_printed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with audience.optional():
        print("one")
        print("two", file=sys.stderr)
    assert capsys.readouterr() == ("one\n", "two\n")


@pytest.mark.slow
def test_ctrl_c_that_ends_the_reader_too_saves_the_run(tiny_teacher: Path, tmp_path: Path) -> None:
    """As `fewstep train .. 2>&1 | tee log` on a terminal: all of the pipe get the signal, and `tee` is gone first."""
    given = ["configs/scenes/dmd2.yaml", f"model.teacher={tiny_teacher}", "batch=4", "steps=100000", "evals.samples=0"]
    started = [sys.executable, "-m", "fewstep.cli", "train", *given, "save.every=100000", f"--out={tmp_path / 'runs'}"]
    run = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    logs = lambda: [log for log in tmp_path.glob("runs/*/log.jsonl") if len(log.read_text().splitlines()) > 2]
    deadline = time.monotonic() + 120
    while not logs():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.1)
    assert run.stdout is not None
    run.stdout.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 0
    (saved,) = available(logs()[0].parent / "checkpoints")
    assert wrong(saved) is None
