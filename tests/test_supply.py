"""What is taken from others: known versions, no code from anywhere, and of the hub one commit that is written down."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub import HfApi, constants
from packaging.requirements import Requirement
from packaging.version import Version

from fewstep import config, export, runner
from fewstep.core.errors import UserError
from fewstep.models import hub, loading, lora_files
from fewstep.objectives import base as objectives
from fewstep.train.rundir import RunDir
from tests.faults.readers import make_model

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"])]
LOCK = {
    name.lower().replace("_", "-"): version
    for name, _, version in (
        line.partition("==")
        for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
}
OLD, NEW = "a" * 40, "b" * 40


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.name)
def test_every_dependency_has_a_floor_and_a_ceiling_around_what_is_tested(asked: Requirement) -> None:
    assert sorted(one.operator for one in asked.specifier) == ["<", ">="]
    locked = LOCK[asked.name.lower().replace("_", "-")]
    assert locked in asked.specifier
    ceiling = next(Version(one.version) for one in asked.specifier if one.operator == "<")
    # No whole series is allowed that was not met: one more of the last number that the ceiling has.
    parts = len(ceiling.release)
    met = Version(locked).release[:parts]
    assert ceiling.release[:-1] == met[:-1] and ceiling.release[-1] == met[-1] + 1


def test_the_lock_is_of_versions_alone_and_setup_uses_it() -> None:
    text = (ROOT / "tools" / "constraints.txt").read_text()
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.+!]+", line) for line in text.splitlines())
    assert "--constraint tools/constraints.txt" in (ROOT / "tools" / "setup.sh").read_text()


def test_the_tests_run_on_what_is_locked() -> None:
    names = {asked.name for asked in ASKED}
    assert {name: importlib.metadata.version(name) for name in names} == {
        name: LOCK[name.lower().replace("_", "-")] for name in names
    }


def test_what_is_imported_is_asked_for() -> None:
    provided = importlib.metadata.packages_distributions()
    asked = {one.name.lower().replace("_", "-") for one in ASKED} | {"datasets"}
    for path in (ROOT / "fewstep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "fewstep"}:
                found = {one.lower().replace("_", "-") for one in provided.get(name, [name])}
                assert found & asked, f"{path.name} imports {name}, which nobody has asked for"


FETCHING = {
    *("torch.hub.load", "torch.hub.load_state_dict_from_url", "hub.load", "load_dataset", "datasets.load_dataset"),
    *("urllib.request.urlopen", "urlopen", "urlretrieve", "requests.get", "httpx.get", "snapshot_download", "gdown"),
    *("os.system", "os.popen", "runpy.run_path", "importlib.util.spec_from_file_location", "load_state_dict_from_url"),
}


def fetching(tree: ast.AST) -> Iterator[str]:
    """Calls that fetch code or weights in any way but the hub's, that run a file, or open weights of pickles."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FETCHING or name.split(".")[-1] in FETCHING:
            yield name
        if name.split(".")[0] == "subprocess" and "git" not in ast.unparse(node):
            yield name


@pytest.mark.parametrize("path", sorted((ROOT / "fewstep").rglob("*.py")), ids=lambda path: path.name)
def test_nothing_is_fetched_but_from_the_hub(path: Path) -> None:
    assert list(fetching(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "source",
    ["torch.hub.load('a', 'b')", "os.system('x')", "subprocess.run(['pip', 'install', 'x'])", "load_dataset('a')"],
)
def test_the_rule_sees_what_fetches(source: str) -> None:
    assert len(list(fetching(ast.parse(source)))) == 1


def test_code_is_trusted_in_one_place_and_is_our_own() -> None:
    """`trust_remote_code` is said to diffusers for the export that was just written, whose code is this package's."""
    told = {
        path.name: count
        for path in (ROOT / "fewstep").rglob("*.py")
        if (count := len(re.findall(r'"trust_remote_code": True', path.read_text())))
    }
    assert told == {"carried.py": 1}
    calls = [path.name for path in (ROOT / "fewstep").rglob("*.py") if re.search(r"[^_.\w]trusted\(", path.read_text())]
    assert sorted(calls) == ["carried.py", "export.py"]


@pytest.mark.parametrize("command", ["sample", "export", "train", "report"])
def test_help_opens_no_connection(command: str) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a connection')\n"
        "socket.socket.connect = refuse\nsocket.create_connection = refuse\n"
        f"from fewstep import cli\ncli.main([{command!r}, '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "a connection" not in done.stderr


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two commits of owner/name, whose networks differ; `main` is the old one."""
    folder = tmp_path / "hub" / "models--owner--name"
    for commit, scale in ((OLD, 1.0), (NEW, 2.0)):
        place = folder / "snapshots" / commit
        place.mkdir(parents=True)
        make_model(place)
        net = diffusers.UNet2DModel.from_pretrained(place, subfolder="unet")
        for parameter in net.parameters():
            parameter.data.fill_(scale)
        net.save_pretrained(place / "unet")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(diffusers.models.modeling_utils, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(hub, "_COMMITS", {})
    return folder


def scale_of(loaded: loading.Loaded) -> float:
    return next(loaded.net.parameters()).flatten()[0].item()


def told(teacher: str, revision: str | None = None) -> config.Config:
    objective = objectives.typed({"name": "dmd2"})  # type: ignore[arg-type]
    made = config.Config(name="x", objective=objective)  # type: ignore[arg-type]
    made.model.teacher, made.model.revision = teacher, revision
    return made


def recorded(folder: Path, made: config.Config) -> dict[str, Any]:
    run = RunDir(folder)
    run.create()
    run.write_origin("name: x\n", runner.teacher_of(made), {})
    return json.loads((folder / "origin.json").read_text())["teacher"]


def test_a_run_stays_at_the_commit_that_its_origin_names(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scale_of(loading.load("owner/name")) == 1
    assert loading.find("owner/name").where["revision"] == OLD
    assert recorded(tmp_path / "run", told("owner/name"))["commit"] == OLD
    (cache / "refs" / "main").write_text(NEW)
    assert scale_of(loading.load("owner/name")) == 1  # within a process a name means one thing
    monkeypatch.setattr(hub, "_COMMITS", {})
    assert scale_of(loading.load("owner/name")) == 2
    hub.pin_as_recorded(tmp_path / "run" / "origin.json")
    assert scale_of(loading.load("owner/name")) == 1
    assert recorded(tmp_path / "again", told("owner/name"))["commit"] == OLD


def test_loading_and_resuming_a_run_pin_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for call, before in ((export.load_run, "building.build("), (runner.play_stage, "set_up(")):
        import inspect

        source = inspect.getsource(call)
        assert 0 < source.index("pin_as_recorded") < source.index(before)


def test_the_hub_is_asked_for_one_commit_and_for_its_files(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def info(self: HfApi, source: str, revision: str | None = None, **more: Any) -> Any:
        asked.append((source, revision))
        return SimpleNamespace(sha=NEW)

    monkeypatch.setattr(HfApi, "model_info", info)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    fetched: list[str | None] = []
    for module in (diffusers.configuration_utils, diffusers.utils.hub_utils, loading):
        fetch = module.hf_hub_download

        def watched(*args: Any, fetch: Any = fetch, **given: Any) -> Any:
            fetched.append(given.get("revision"))
            return fetch(*args, **{**given, "local_files_only": True})

        monkeypatch.setattr(module, "hf_hub_download", watched)
    assert scale_of(loading.load("owner/name", "release")) == 2
    assert asked == [("owner/name", "release")] and set(fetched) == {NEW} and len(fetched) > 3
    assert (cache / "refs" / "release").read_text() == NEW
    origin = recorded(tmp_path / "run", told("owner/name", "release"))
    assert (origin["revision"], origin["commit"]) == ("release", NEW)
    monkeypatch.setattr(hub, "_COMMITS", {})
    monkeypatch.setattr(hub, "reachable", lambda: False)
    assert hub.commit_of("owner/name", "release") == NEW  # known from then on without a network


def test_a_lora_of_the_hub_is_pinned_too(cache: Path, tmp_path: Path) -> None:
    assert lora_files._where("owner/name")["revision"] == OLD
    made = told(str(tmp_path))
    made.model.lora = "owner/name"
    origin = recorded(tmp_path / "run", made)
    assert origin["commit"] is None and origin["lora_commit"] == OLD


def test_what_stands_beside_the_teacher_is_pinned_too(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = told(str(tmp_path))
    made.start = {"generator": "owner/name", "fake_score": "previous.fake_score", "real_score": "teacher"}
    assert recorded(tmp_path / "run", made)["beside"] == {"owner/name": OLD}
    monkeypatch.setattr(hub, "_COMMITS", {})
    (cache / "refs" / "main").write_text(NEW)
    hub.pin_as_recorded(tmp_path / "run" / "origin.json")
    assert scale_of(loading.load("owner/name")) == 1


def test_what_is_no_commit_pins_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "origin.json").write_text(json.dumps({"teacher": {"source": "owner/name", "commit": "../../x"}}))
    hub.pin_as_recorded(tmp_path / "origin.json")
    assert hub._COMMITS == {}
    (cache / "refs" / "main").write_text("../../../etc")
    assert hub.commit_of("owner/name") is None
    assert hub.commit_of("owner/name", NEW) == NEW
    (tmp_path / "origin.json").write_text("[")
    with pytest.raises(UserError, match=r"origin\.json cannot be read"):
        hub.pin_as_recorded(tmp_path / "origin.json")


def test_the_cache_is_enough(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert torch.isfinite(torch.tensor(scale_of(loading.load("owner/name"))))
