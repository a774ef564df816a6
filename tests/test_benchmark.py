"""The benchmark: rows are known by what decides them, and kept once each; nothing is trained here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, "tools")
import benchmark
import benchmark_plots

from fewstep.core.errors import UserError

DMD, DMD2 = (benchmark.Entry(name, f"configs/scenes/{name}.yaml", 0) for name in ("dmd", "dmd2"))


def test_hashes_know_config_seed_budget_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {DMD.settings((100, 50)), DMD2.settings((100, 50)), DMD.settings((101, 50)), DMD.settings((100, 51))}
    keys.add(benchmark.Entry("dmd", DMD.file, 1).settings((100, 50)))
    assert len(keys) == 5 and DMD.settings((100, 50)) in keys
    before = DMD.code(), DMD2.code()
    assert before[0] != before[1]
    monkeypatch.setattr(benchmark, "code_of", lambda module: "other")
    assert DMD.code() not in before


def test_only_what_is_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.keep(tmp_path, DMD, row(9.0, 0.5), (100, 50))
    assert benchmark.missing(tmp_path, [DMD, DMD2], (100, 50), False) == [DMD2]
    assert benchmark.missing(tmp_path, [DMD], (200, 50), False) == [DMD]
    monkeypatch.setattr(benchmark, "code_of", lambda module: "other")
    assert benchmark.missing(tmp_path, [DMD], (100, 50), False) == []
    assert benchmark.missing(tmp_path, [DMD], (100, 50), True) == [DMD]


def test_the_code_of_a_method_is_all_that_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what another method reads, and not comments."""
    package = tmp_path / "fewstep_made"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text("from fewstep.core.schedule import bridge\nx = bridge\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = benchmark.code_of("fewstep_made.method")
    benchmark.code_of.cache_clear()
    (package / "method.py").write_text("from fewstep.core.schedule import bridge  # why\nx = bridge\n")
    assert benchmark.code_of("fewstep_made.method") == first
    benchmark.code_of.cache_clear()
    (package / "method.py").write_text("from fewstep.core.batch import Batch as bridge\nx = bridge\n")
    assert benchmark.code_of("fewstep_made.method") != first
    benchmark.code_of.cache_clear()


def row(frechet: float, coverage: float) -> dict[str, object]:
    measured = {"frechet": frechet, "precision": 0.5, "coverage": coverage, "diversity": 0.9, "label_accuracy": 1.0}
    cost = {"passes": 80_000, "seconds": 100.0}
    return {**measured, "steps": 1, "law_distance": 0.1, "rare_kept": "36 / 37", "rare": [], "training": cost}


def test_a_row_is_kept_once_and_the_table_has_mean_and_deviation(tmp_path: Path) -> None:
    for seed, frechet in ((0, 9.0), (1, 11.0), (0, 10.0)):
        entry = benchmark.Entry("dmd", "configs/scenes/dmd.yaml", seed)
        benchmark.keep(tmp_path, entry, row(frechet, 0.5 + seed / 10), (80_000, 100))
    rows = benchmark.load(tmp_path)
    assert [(kept["seed"], kept["frechet"]) for kept in rows] == [(1, 11.0), (0, 10.0)]
    benchmark_plots.write(tmp_path, rows)
    line = (tmp_path / "table.md").read_text().splitlines()[2]
    assert line.startswith("| `dmd` | 1 | 2 | 10.5 ± 0.7 | 0.500 ± 0.000 | 0.550 ± 0.071 | 36 ± 0 |")
    assert {"quality_diversity.png", "cost.png"} <= {file.name for file in tmp_path.iterdir()}
    assert all(json.loads(text)["commit"] for text in (tmp_path / "rows.jsonl").read_text().splitlines())


def test_baselines_come_once_and_four_steps_with_one() -> None:
    found = [(entry.name, entry.seed) for entry in benchmark.entries("scenes", [], [], [0, 1])]
    assert found[:3] == [("teacher", 0), ("undistilled", 0), ("undistilled_four_steps", 0)]
    assert found.count(("dmd_four_steps", 1)) == 1 and len(found) == len(set(found))
    with pytest.raises(UserError, match="name them by --configs"):
        benchmark.entries("other", [], [], [0])
