"""Rules that a reader would otherwise have to remember, checked on the syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fewstep"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OBJECTIVES = sorted((PACKAGE / "objectives").rglob("*.py"))
DRAWN = [*OBJECTIVES, PACKAGE / "rollout.py", PACKAGE / "pairs.py"]

# Anything that takes numbers from a global or a private generator instead of a Draw.
RANDOM = {
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "randint",
    "randint_like",
    "randperm",
    "normal",
    "normal_",
    "uniform_",
    "bernoulli",
    "bernoulli_",
    "multinomial",
    "poisson",
    "exponential_",
    "manual_seed",
    "Generator",
    "seed",
}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".txt", ".cfg", ".ipynb", ".html"}
SKIPPED = {".git", ".venv", "runs", "build", "dist"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` for the expression a.b.c, and `.c` for c of anything that is not a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def yields_inside_with(tree: ast.AST, inside: bool = False) -> Iterator[int]:
    """Lines of the yields that stand in a `with`; `backward` would run after it was left."""
    for node in ast.iter_child_nodes(tree):
        if inside and isinstance(node, ast.Yield | ast.YieldFrom):
            yield node.lineno
        own_scope = isinstance(node, ast.FunctionDef | ast.Lambda)
        within = isinstance(node, ast.With | ast.AsyncWith) or (inside and not own_scope)
        yield from yields_inside_with(node, within)


def undrawn(tree: ast.AST) -> Iterator[str]:
    """Random numbers that are not a `Draw`: torch.randn(..), x.normal_(), random.random(), np.random..."""
    for node in ast.walk(tree):
        name = dotted(node)
        root, _, last = name.rpartition(".")
        if last in RANDOM and (last.endswith("_") or root.split(".")[0] in ("torch", "np", "numpy", "random")):
            yield name
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "random")
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("torch", "numpy", "random"):
            yield from (alias.name for alias in node.names if alias.name in RANDOM or node.module == "random")


def dangerous(tree: ast.AST) -> Iterator[str]:
    """Code that runs what a stranger wrote: eval and exec, pickles, remote code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            yield from names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            yield "trust_remote_code"
        if isinstance(node, ast.Call):
            name, given = dotted(node.func), {k.arg: k.value for k in node.keywords}
            if name in ("eval", "exec", "__import__"):
                yield name
            safe = given.get("weights_only")
            if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
                yield name
            if given.get("allow_pickle") is not None:
                yield "allow_pickle"


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", OBJECTIVES, ids=name_of)
def test_no_yield_stands_inside_a_with(path: Path) -> None:
    assert list(yields_inside_with(parsed(path))) == []


@pytest.mark.parametrize(
    "source, lines",
    [
        ("def f():\n    with a:\n        yield 1", [3]),
        ("def f():\n    with a:\n        if b:\n            x = yield 1\n        yield from c", [4, 5]),
        ("def f():\n    async with a:\n        yield 1", [3]),
        ("def f():\n    with a:\n        x = 1\n    yield x", []),
        ("def f():\n    with a:\n        def g():\n            yield 1", []),
    ],
)
def test_the_yield_rule_sees_them(source: str, lines: list[int]) -> None:
    assert list(yields_inside_with(ast.parse(source))) == lines


@pytest.mark.parametrize("path", DRAWN, ids=name_of)
def test_every_random_number_is_drawn(path: Path) -> None:
    assert list(undrawn(parsed(path))) == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("torch.randn(3)", 1),
        ("torch.randn_like(x)", 1),
        ("torch.manual_seed(0)", 1),
        ("torch.Generator()", 1),
        ("x.normal_()", 1),
        ("torch.nn.functional.rand(1)", 1),
        ("import random", 1),
        ("from torch import randn", 1),
        ("np.random.seed(0)", 1),
        ("batch.draw.normal('eps', (3,))", 0),
        ("draw.integers('k', 3)", 0),
        ("config.seed", 0),
        ("from collections.abc import Generator", 0),
    ],
)
def test_the_random_rule_sees_them(source: str, found: int) -> None:
    assert len(list(undrawn(ast.parse(source)))) == found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_from_outside_is_run(path: Path) -> None:
    assert list(dangerous(parsed(path))) == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("eval('1')", ["eval"]),
        ("exec(text)", ["exec"]),
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=False)", ["torch.load"]),
        ("torch.load(path, weights_only=True)", []),
        ("m.from_pretrained(x, trust_remote_code=True)", ["trust_remote_code"]),
        ("np.load(x, allow_pickle=True)", ["allow_pickle"]),
        ("net.eval()", []),
    ],
)
def test_the_danger_rule_sees_them(source: str, found: list[str]) -> None:
    assert list(dangerous(ast.parse(source))) == found


def test_there_is_no_drawer_for_everything() -> None:
    names = {part for path in PACKAGE.rglob("*") for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert {"core", "models", "train"} < names
    assert not names & {"utils", "util", "common", "helpers", "misc", "callbacks"}


def text_files() -> list[Path]:
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        kept = not any(part in SKIPPED or part.endswith((".egg-info", "_cache")) for part in parts)
        if kept and path.suffix in TEXT and path.is_file():
            found.append(path)
    return found


# A folder at the root of somebody's machine; the lookbehind leaves web addresses and relative paths alone.
MACHINE = re.compile(r"(?<![\w.~:/-])/(?:home|Users|root|mnt|work|scratch|data|workspace|srv|opt)/[\w.-]+|[A-Z]:\\\w+")


def test_no_file_knows_a_machine() -> None:
    files = text_files()
    assert len(files) > 50
    found = [
        f"{name_of(path)}: {match.group()}" for path in files for match in MACHINE.finditer(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["home", "root", "mnt", "work"])
def test_the_machine_rule_sees_them(folder: str) -> None:
    assert MACHINE.search(f"cd /{folder}/someone") and MACHINE.search(f'"/{folder}/x"')
    assert not MACHINE.search(f"https://example.org/{folder}/x") and not MACHINE.search(f"a/{folder}/x")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_opens_with_a_sentence(path: Path) -> None:
    assert len(ast.get_docstring(parsed(path)) or "") > 20  # type: ignore[arg-type]
