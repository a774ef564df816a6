"""What the hub has: whether it can be asked at all, and the one commit that a name means throughout a run.

The hub's client tries for half a minute before it says that there is no network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name

from fewstep import reading
from fewstep.core.errors import UserError

_PATIENCE = 0.5  # seconds
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@functools.cache
def reachable() -> bool:
    """Whether the hub answers at all; through a proxy that is for the client to find out."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    address = urlsplit(constants.ENDPOINT)
    found: list[bool] = []

    def knock() -> None:
        try:
            socket.create_connection((address.hostname, address.port or 443), timeout=_PATIENCE).close()
            found.append(True)
        except OSError:
            found.append(False)

    # A resolver without a network may hang for longer than anybody would wait, and knows no timeout.
    thread = Thread(target=knock, daemon=True)
    thread.start()
    thread.join(2 * _PATIENCE)
    return found == [True]


def where(revision: str | None = None) -> dict[str, Any]:
    """The keywords of `from_pretrained` for a hub id: only what lies in the cache where there is no network."""
    asked = {"revision": revision} if revision else {}
    return asked if reachable() else {**asked, "local_files_only": True}


_COMMITS: dict[tuple[str, str | None], str] = {}
"""(hub id, revision) -> what they mean in this process"""


def pinned(source: str, revision: str | None = None) -> dict[str, Any]:
    """`where`, for the commit that `revision` of the hub id `source` stands for: all files are of that one."""
    return where(commit_of(source, revision) or revision)


def commit_of(source: str, revision: str | None = None) -> str | None:
    """The commit that a branch or tag of a hub id means, asked for once; None where neither hub nor cache know it."""
    if (source, revision) not in _COMMITS:
        found = _asked(source, revision) if reachable() else _cached(source, revision)
        if found is None:
            return None
        _COMMITS[source, revision] = found
    return _COMMITS[source, revision]


def _asked(source: str, revision: str | None) -> str | None:
    if _is_commit(revision):
        return revision
    try:
        found = HfApi().model_info(source, revision=revision).sha
    except Exception:  # whoever loads it says what is wrong
        return None
    if not _is_commit(found):
        return None
    # As the hub's client does for what it fetches by name: so that the name is known without a network, too.
    with contextlib.suppress(OSError):
        reference = _reference(source, revision)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(str(found))
    return found


def _cached(source: str, revision: str | None) -> str | None:
    if _is_commit(revision):
        return revision
    try:
        found = reading.text(_reference(source, revision), 1024).strip()
    except UserError:
        return None
    return found if _is_commit(found) else None


def _reference(source: str, revision: str | None) -> Path:
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
    return folder / "refs" / (revision or "main")


def _is_commit(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[0-9a-f]{40}", name) is not None


def pin_as_recorded(origin: Path) -> None:
    """Has names mean what they meant when the run of that origin.json began, where there is one."""
    if not origin.is_file():
        return
    teacher = reading.fields(origin, finite=False).get("teacher")
    told = teacher if isinstance(teacher, dict) else {}
    for name, revision, commit in (("source", "revision", "commit"), ("lora", "", "lora_commit")):
        if (
            isinstance(told.get(name), str)
            and isinstance(told.get(revision), str | None)
            and _is_commit(told.get(commit))
        ):
            _COMMITS[told[name], told.get(revision)] = told[commit]
    beside = told.get("beside")
    for source, commit in beside.items() if isinstance(beside, dict) else ():
        if _is_commit(commit):
            _COMMITS[source, None] = commit
