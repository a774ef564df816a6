"""Whether the hub can be asked: its client tries for half a minute before it says that there is no network."""

from __future__ import annotations

import functools
import os
import socket
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

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
