"""A second run in a folder is refused while the first one lives; readers of a run that trains see it at one moment."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fewstep import finish
from fewstep.core.errors import UserError
from fewstep.train import checkpoint, lock
from tests.faults import concurrency
from tests.faults.harness import Server


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_leaves_no_lock(server: Server, tmp_path: Path) -> None:
    assert concurrency.second(server, tmp_path, "out") == []


def test_of_several_that_start_at_once_one_plays(server: Server, tmp_path: Path) -> None:
    assert concurrency.at_once(server, tmp_path, "out", 3) == []


def test_readers_of_a_run_that_trains_see_one_moment_of_it(server: Server, tmp_path: Path) -> None:
    run = concurrency.finished(server, tmp_path)
    with concurrency.written(run):
        looked, wrong = concurrency.reads(run, 6, tmp_path / "page.html")
    assert wrong == [] and looked["checkpoints_seen"] > 2 and (tmp_path / "page.html").is_file()


def test_a_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    """The lock of an open file goes on in forked children."""
    told, tell = os.pipe()
    if not (run := os.fork()):
        with lock.held(tmp_path):
            worker = os.fork()
            if not worker:
                signal.pause()
            os.write(tell, str(worker).encode())
            signal.pause()
    worker = int(os.read(told, 20))
    try:
        with pytest.raises(UserError, match="another run is writing"), lock.held(tmp_path):
            pass
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        with lock.held(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_leaves_nothing_and_follows_no_link(tmp_path: Path) -> None:
    with lock.held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / lock.NAME).is_file()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "precious").write_text("kept")
    (tmp_path / lock.NAME).symlink_to("precious")
    with pytest.raises(UserError, match=f"{lock.NAME} could not be written"), lock.held(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_run_whose_folder_was_removed_leaves_the_lock_of_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with lock.held(folder):
        shutil.rmtree(folder)
        following = contextlib.ExitStack()
        following.enter_context(lock.held(folder))
    with following:
        assert (folder / lock.NAME).is_file()
        with pytest.raises(UserError, match="another run is writing"), lock.held(folder):
            pass


def test_where_there_are_no_locks_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path):
        assert "file system without locks" in capsys.readouterr().out


def test_of_a_checkpoint_that_is_removed_while_it_is_read_the_next_is_taken(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path / f"{step:07d}", step, {}, {"value": torch.tensor(float(step))})

    def read(path: Path) -> int:
        if path.name == "0000002" and not (tmp_path / "0000003").exists():
            checkpoint.write(tmp_path / "0000003", 3, {}, {"value": torch.tensor(3.0)})
            checkpoint.prune(tmp_path / "0000003", 1)
        return int(checkpoint.verify(path)["step"])

    assert checkpoint.steady(lambda: checkpoint.available(tmp_path)[-1], read) == 3
    (tmp_path / "0000003" / checkpoint.STATE).write_bytes(b"damaged")
    with pytest.raises(checkpoint.Damaged):
        checkpoint.steady(lambda: checkpoint.available(tmp_path)[-1], read)


def test_an_evaluation_of_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--samples 0 leaves nothing to measure"):
        finish.evaluate(tmp_path, None, 0)
