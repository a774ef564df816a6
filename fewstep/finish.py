"""What a run leaves when it ends: the table, the export and the report."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep import build, measure
from fewstep.build import Run
from fewstep.config import FEWEST_SAMPLES, Config, check_samples
from fewstep.core.errors import UserError
from fewstep.export import export, load_run
from fewstep.train.checkpoint import write_text
from fewstep.train.rundir import RunDir


def finish(run: Run, folder: RunDir) -> None:
    """Measures, exports and reports; says where everything lies."""
    from fewstep import report  # matplotlib, which nothing else needs

    if run.config.evals.samples:
        table = measure.table(run, run.config.evals.samples)
        write_text(folder.root / "table.json", json.dumps(table, indent=1))
        print(report.as_text(table))
    if run.config.model.teacher is not None:
        measure.save_comparison(run, folder.root / "comparison.png")
    if run.config.save.export:
        try:
            print(f"diffusers pipeline: {export(run, folder.export)}")
        except UserError as refusal:
            print(f"not exported: {refusal}")
    print(f"report: {report.write_report(folder)}")


def dry_run(configs: list[Config]) -> None:
    """Prints players, parameters, their memory and the first shapes of every stage, without allocating a weight."""
    for i, config in enumerate(configs):
        print(f"stage {i + 1} of {len(configs)}: {config.name}, {config.steps} steps")
        print("\n".join(build.describe(config)))


def evaluate(folder: Path, step: int | str | None, samples: int) -> None:
    """Measures the generator of a run folder again and writes its table and page anew."""
    from fewstep import report

    check_samples("--samples", samples)
    if not samples:
        raise UserError(f"--samples 0 leaves nothing to measure: give at least {FEWEST_SAMPLES} images")
    run = load_run(folder, step)
    table = measure.table(run, samples)
    write_text(folder / "table.json", json.dumps(table, indent=1))
    print(report.as_text(table))
    print(f"report: {report.write_report(RunDir(folder))}")
