"""Without a network nobody waits for the hub's client to give up."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import diffusers
import pytest
from huggingface_hub import constants

from fewstep.core.errors import UserError
from fewstep.models import hub, loading


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nobody had said that there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


@pytest.mark.parametrize("hangs", [False, True])
def test_an_absent_hub_is_known_within_a_second(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: object, **kwargs: object) -> None:
        time.sleep(5 if hangs else 0)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "create_connection", connect)
    assert diffusers.DiffusionPipeline  # imported when it is first asked for
    began = time.perf_counter()
    assert hub.where("main") == {"revision": "main", "local_files_only": True}
    with pytest.raises(UserError, match="the hub has no pipeline of that name within reach"):
        loading.find("nobody/nothing")
    assert time.perf_counter() - began < 2


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.where() == {}


def test_a_proxy_is_left_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://nowhere.invalid:1")
    assert hub.reachable()
