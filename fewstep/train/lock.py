"""One run at a time in a folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fewstep.core.errors import SaidOnce
from fewstep.train import processes
from fewstep.train.rundir import leads_out

NAME = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_held: set[int] = set()


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Nobody else writes a run in `root` meanwhile. Of several processes the leader holds the lock.

    Raises UserError, in all processes alike, where another one has it, where the folder cannot be written or where a
    link in it leads elsewhere.
    """
    mine: list[int] = []
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    if refused := processes.from_leader(lambda: _take(root, mine)):
        raise SaidOnce(refused)
    try:
        yield
    finally:
        for file in mine:
            _give_back(file, root, new)


def _take(root: Path, mine: list[int]) -> str | None:
    """Locks `root` and adds the open file to `mine`, or says why not."""
    path = root / NAME
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            refused = _lock(file, root)
            if refused is None:
                refused = leads_out(root)
            if refused is not None:
                os.close(file)
                return refused
            if _still(path, file):
                break
            os.close(file)  # whoever had it has removed it since it was opened
        _held.add(file)
        mine.append(file)
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode())
    except OSError as error:
        return f"{path} could not be written ({error.strerror}): make room there, or choose another place with --out"
    return None


def _give_back(file: int, root: Path, new: list[Path]) -> None:
    """Leaves nothing of the lock, and of a run that has written nothing no folder either.

    Where the folder was removed meanwhile the name may be that of another run's lock.
    """
    with suppress(OSError):
        if _still(root / NAME, file):
            (root / NAME).unlink()
        for folder in new:
            folder.rmdir()
    _held.discard(file)
    os.close(file)


def _lock(file: int, root: Path) -> str | None:
    """Locks an open file; says who has it where somebody has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (
            f"another run is writing in {root} ({_owner(file)}): wait until it has ended or stop it, or start a new "
            "run in another folder"
        )
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{root} lies on a file system without locks: see to it that no second run is started in it")
    return None


def _still(path: Path, file: int) -> bool:
    """Whether the open `file` is the one that has its name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _owner(file: int) -> str:
    try:
        said = json.loads(os.pread(file, 1000, 0))
        return f"process {int(said['process'])} on {said['machine']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has just begun"


def _let_go() -> None:
    """A forked worker would keep the lock of a run that is dead."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
