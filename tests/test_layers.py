"""Who may import whom: arrows only point down. The table below is the rule, the files are read and not run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fewstep"

# A room or file -> what of fewstep it may import. Files that are not named here are bound by `cli` alone.
ALLOWED: dict[str, tuple[str, ...]] = {
    "fewstep.core": ("fewstep.core",),
    "fewstep.reading": ("fewstep.core",),
    "fewstep.models": ("fewstep.core", "fewstep.models", "fewstep.reading"),
    "fewstep.rollout": ("fewstep.core", "fewstep.models"),
    "fewstep.pairs": ("fewstep.core", "fewstep.models", "fewstep.rollout"),
    "fewstep.objectives": (
        "fewstep.core",
        "fewstep.models",
        "fewstep.rollout",
        "fewstep.pairs",
        "fewstep.objectives",
    ),
    "fewstep.data": ("fewstep.core", "fewstep.data", "fewstep.reading"),
    "fewstep.evals": ("fewstep.core", "fewstep.evals", "fewstep.reading"),
    "fewstep.train": (
        "fewstep.core",
        "fewstep.models.backbone",
        "fewstep.models.experts",
        "fewstep.models.families",
        "fewstep.models.lora",
        "fewstep.models.passes",
        "fewstep.models.precision",
        "fewstep.objectives.base",
        "fewstep.reading",
        "fewstep.train",
    ),
    "fewstep.report": (
        "fewstep.core",
        "fewstep.reading",
        "fewstep.report",
        "fewstep.train.checkpoint",
        "fewstep.train.rundir",
    ),
    "fewstep.health": (
        "fewstep.core",
        "fewstep.card",
        "fewstep.health",
        "fewstep.models.families",
        "fewstep.models.loading",
        "fewstep.models.schedulers",
        "fewstep.reading",
        "fewstep.train.rundir",
    ),
    "fewstep.config": (
        "fewstep.core",
        "fewstep.models.attention",
        "fewstep.models.execution",
        "fewstep.models.precision",
        "fewstep.objectives.base",
        "fewstep.reading",
        "fewstep.rollout",
        "fewstep.train.player",
    ),
}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(source: str) -> Iterator[str]:
    """The modules that a source names in its imports, wherever they stand; `from package import module` is module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if within(full, "fewstep") and is_module(full) else str(node.module)


def broken(name: str, source: str) -> list[str]:
    """The imports of module `name` that its room does not allow."""
    found = [other for other in imports(source) if within(other, "fewstep")]
    room = next((room for room in ALLOWED if within(name, room)), None)
    wrong = [] if room is None else [o for o in found if not any(within(o, a) for a in ALLOWED[room])]
    if name != "fewstep.__main__":
        wrong += [other for other in found if within(other, "fewstep.cli") and name != "fewstep.cli"]
    return wrong


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_room_of_the_table_is_there() -> None:
    assert len(MODULES) > 30 and all(any(within(name, room) for name in MODULES) for room in ALLOWED)


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_down(name: str) -> None:
    assert broken(name, MODULES[name].read_text()) == []


@pytest.mark.parametrize(
    "name, line, wrong",
    [
        ("fewstep.core.draw", "from fewstep.models import taps", ["fewstep.models.taps"]),
        ("fewstep.core.draw", "import fewstep.rollout as r", ["fewstep.rollout"]),
        ("fewstep.objectives.dmd", "def f():\n    from fewstep.train.loop import train", ["fewstep.train.loop"]),
        ("fewstep.objectives.dmd", "from fewstep import build", ["fewstep.build"]),
        ("fewstep.train.loop", "from fewstep.objectives import diffusion", ["fewstep.objectives.diffusion"]),
        ("fewstep.train.loop", "from fewstep.models.diffusers import FAMILIES", ["fewstep.models.diffusers"]),
        ("fewstep.train.loop", "from fewstep.objectives import base", []),
        ("fewstep.train.loop", "from fewstep.objectives.base import Turn", []),
        ("fewstep.config", "from fewstep.train import player, loop", ["fewstep.train.loop"]),
        ("fewstep.build", "from fewstep.cli import main", ["fewstep.cli"]),
        ("fewstep.__main__", "from fewstep.cli import main", []),
    ],
)
def test_the_rule_sees_what_it_forbids(name: str, line: str, wrong: list[str]) -> None:
    assert broken(name, line) == wrong


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, "fewstep.core")])
def test_the_core_stands_on_torch_alone(name: str) -> None:
    roots = {other.split(".")[0] for other in imports(MODULES[name].read_text())}
    assert roots <= {"torch", "fewstep", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, "fewstep.objectives")])
def test_objectives_know_no_library_of_networks(name: str) -> None:
    roots = {other.split(".")[0] for other in imports(MODULES[name].read_text())}
    assert not roots & {"diffusers", "transformers", "peft"}


def test_the_command_line_opens_without_the_heavy_libraries() -> None:
    heavy = ("torch", "torchvision", "diffusers", "transformers", "numpy", "matplotlib")
    code = f"import sys, fewstep.cli; fewstep.cli.parser(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
