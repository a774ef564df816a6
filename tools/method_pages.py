"""One page for each method under assets/methods/: what it optimises, when to choose it, its keys, its measured rows.

    python tools/method_pages.py [--check]

The text is the docstring of the objective and tools/method_notes.yaml; keys and defaults are those of its Config; rows
are those of assets/benchmarks/scenes/rows.jsonl. `--check` writes nothing and fails where a page is not up to date.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import benchmark
import benchmark_plots
from omegaconf import OmegaConf

from fewstep import config
from fewstep.objectives import base

PAGES = Path("assets/methods")
NOTES = Path("tools/method_notes.yaml")


@functools.cache
def notes() -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(NOTES))  # type: ignore[return-value]


def methods() -> list[str]:
    """Every objective that has notes."""
    return sorted(set(notes()) & set(base.names()))


def keys(name: str) -> str:
    """A table of the keys of an objective with their defaults."""
    module = base.find(name)
    default = OmegaConf.to_container(OmegaConf.structured(module.Config))
    comments = config.comments(module.Config)
    lines = ["| key | default | |", "|---|---|---|"]
    for key, value in default.items():  # type: ignore[union-attr]
        if key != "name":
            told = comments.get(key, "").replace("|", "\\|").replace("\n", " ")
            lines.append(f"| `{key}` | `{config.inline(value)}` | {told} |")
    return "\n".join(lines)


@functools.cache
def ends() -> dict[Path, str]:
    """The configs of the scenes, and the objective of the last stage of each."""
    files = sorted(Path("configs/scenes").glob("*.yaml"))
    own = [file for file in files if file.name != "base.yaml"]
    return {file: config.load(file)[-1].objective.name for file in own}  # type: ignore[attr-defined]


def configs(name: str) -> list[str]:
    """The configs that end with this objective."""
    return [str(file) for file, last in ends().items() if last == name]


def measured(name: str) -> str:
    """Its rows of the benchmark beside those of the teacher and the undistilled generator."""
    rows = benchmark.load(benchmark.RESULTS / "scenes")
    own = [row for row in rows if row["name"].removesuffix("_four_steps") == name]
    if not own:
        return "Not measured yet."
    beside = [row for row in rows if row["name"] in benchmark.BASELINES]
    by_name: dict[str, list[Any]] = {}
    for row in [*own, *beside]:
        by_name.setdefault(row["name"], []).append(benchmark_plots.with_rare(row))
    return benchmark_plots.table(list(by_name.values())).strip()


def page(name: str) -> str:
    told = notes()[name]
    official = [f"- {where}: {values}." for where, values in told["official"].items()]
    train = [f"fewstep train {file}" for file in configs(name)]
    parts = [
        f"# `{name}`",
        (base.find(name).__doc__ or "").strip(),
        f"**When to choose it.** {told['choose']}",
        "## Measured",
        "From the built-in flow teacher, at equal network passes (`python tools/benchmark.py scenes`):",
        measured(name),
        "## Run it",
        "```bash\n" + "\n".join(train) + "\n```",
        "## Keys",
        keys(name),
        "## Official values",
        "\n".join(official),
    ]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    lines = [
        f"- [`{name}`]({name}.md): {(base.find(name).__doc__ or '').strip().splitlines()[0]}" for name in methods()
    ]
    return "# Methods\n\nWritten by `python tools/method_pages.py`.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    wanted = {PAGES / f"{name}.md": page(name) for name in methods()} | {PAGES / "README.md": index()}
    if args.check:
        old = [str(file) for file, text in wanted.items() if not file.exists() or file.read_text() != text]
        sys.exit(f"not up to date: {', '.join(old)}; run python tools/method_pages.py" if old else 0)
    PAGES.mkdir(parents=True, exist_ok=True)
    for file, text in wanted.items():
        file.write_text(text)
    print(f"{len(wanted)} pages in {PAGES}")


if __name__ == "__main__":
    main()
