"""The command line: fewstep plan | train | sample | eval | export | report | doctor | config | objectives.

Heavy imports wait inside the commands, so that a spelling mistake is answered at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.core.errors import UserError

if TYPE_CHECKING:
    from fewstep.config import Config


def train(args: argparse.Namespace) -> None:
    from fewstep import build, finish, runner
    from fewstep.train import processes

    configs = _configs(args)
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            _furnish(args, configs, Path(folder))
            finish.dry_run(configs)
        return
    with processes.started(build.pick_device(configs[0].device)):
        root, resume = processes.from_leader(lambda: _place(args, configs[0].name))
        _furnish(args, configs, root)
        if processes.leads():
            print(f"run folder: {root}")
        runner.play(configs, root, resume, finish.finish)


def _configs(args: argparse.Namespace) -> list[Config]:
    """The stages that the arguments name, made small for --tiny."""
    from fewstep import config

    if not args.tiny:
        return config.load(args.config, args.overrides)
    from fewstep import shrink

    return shrink.load(args.config, args.overrides)


def _furnish(args: argparse.Namespace, configs: list[Config], root: Path) -> None:
    """With --tiny, the teacher that the configs shall learn from, in the run folder `root`."""
    if args.tiny:
        from fewstep import shrink

        shrink.furnish(configs, root)


def _place(args: argparse.Namespace, name: str) -> tuple[Path, Path | None]:
    """The folder of the run, and the checkpoint to resume from."""
    from fewstep import runner
    from fewstep.train import rundir

    if args.resume is None:
        return rundir.new(Path(args.out), name), None
    return runner.resume_point(Path(args.resume or args.out), name)


def plan(args: argparse.Namespace) -> None:
    from fewstep import plan as planning

    planning.show(Path(args.config), args.overrides, args.gpus, args.memory)


def sample(args: argparse.Namespace) -> None:
    from fewstep import sampling

    sampling.main(args)


def evaluate(args: argparse.Namespace) -> None:
    from fewstep import finish

    finish.evaluate(Path(args.run), args.step, args.samples)


def export(args: argparse.Namespace) -> None:
    import torch

    from fewstep import export as exporting

    run = exporting.load_run(Path(args.run), args.step)
    folder = Path(args.to) if args.to else Path(args.run) / "export"
    dtype = torch.float16 if args.dtype == "float16" else torch.float32
    print(f"diffusers pipeline: {exporting.export(run, folder, dtype)}")


def report(args: argparse.Namespace) -> None:
    from fewstep import report as reporting
    from fewstep.train.rundir import RunDir

    if not (Path(args.run) / "config.yaml").is_file() and not any(Path(args.run).glob("stage_*/config.yaml")):
        raise UserError(f"there is no run folder {args.run}: give one that `fewstep train` has made")
    print(f"report: {reporting.write_report(RunDir(Path(args.run)))}")


def doctor(args: argparse.Namespace) -> int:
    from fewstep import doctor as examining

    if args.explain:
        print(examining.explain())
        return 0
    if args.run is None:
        raise UserError("a run folder is missing: `fewstep doctor runs/<name>`, or --explain for what the curves say")
    return examining.main(Path(args.run), args.json)


def show_config(args: argparse.Namespace) -> None:
    from fewstep import config

    for i, stage in enumerate(_configs(args)):
        print(f"{'---' if i else ''}\n{config.to_yaml(stage)}".strip())


def objectives(args: argparse.Namespace) -> None:
    from fewstep import config

    print(config.describe_objectives(args.name))


def _run_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="a run folder")
    command.add_argument("--step", type=int, default=None, help="the checkpoint of this step; default: the newest")


def _tiny_argument(command: argparse.ArgumentParser) -> None:
    said = "two steps on a tiny random model of the teacher's classes; offline"
    command.add_argument("--tiny", action="store_true", help=said)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fewstep", description="Makes few-step generators of diffusion and flow models.")
    commands = top.add_subparsers(dest="command", required=True)

    one = commands.add_parser("plan", help="say what a config will hold in memory, and what would make it fit")
    one.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    one.add_argument("overrides", nargs="*", help="key=value, such as batch=16")
    one.add_argument("--gpus", type=int, default=1, help="over how many the run is shared out")
    one.add_argument("--memory", metavar="SIZE", help="of one GPU, such as 24GB: names what to switch on to fit")
    one.set_defaults(call=plan)

    one = commands.add_parser("train", help="train from a config, with key=value overrides")
    one.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    one.add_argument("overrides", nargs="*", help="key=value, such as model.steps=4")
    one.add_argument("--out", default="runs", help="where the run folder goes")
    one.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="a run folder or checkpoint; alone: the newest run"
    )
    _tiny_argument(one)
    one.add_argument("--dry-run", action="store_true", help="print players, memory and first shapes, then stop")
    one.set_defaults(call=train)

    one = commands.add_parser("sample", help="draw images with a trained generator")
    one.set_defaults(call=sample)
    from fewstep.sampling_arguments import add_arguments

    add_arguments(one)

    one = commands.add_parser("eval", help="measure a trained generator beside its teacher")
    _run_arguments(one)
    one.add_argument("--samples", type=int, default=2000, help="images to measure")
    one.set_defaults(call=evaluate)

    one = commands.add_parser("export", help="write a plain diffusers pipeline folder")
    _run_arguments(one)
    one.add_argument("--to", help="the folder to write; default: <run>/export")
    one.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    one.set_defaults(call=export)

    one = commands.add_parser("report", help="write the self-contained page of a run again")
    one.add_argument("run", help="a run folder")
    one.set_defaults(call=report)

    one = commands.add_parser(
        "doctor", help="name what is wrong with a run and what to change: exits with 0 if healthy, 1 if ill"
    )
    one.add_argument("run", nargs="?", help="a run folder, finished or still training")
    one.add_argument("--json", action="store_true", help="print the findings as JSON")
    one.add_argument("--explain", action="store_true", help="say what each logged curve looks like in a healthy run")
    one.set_defaults(call=doctor)

    one = commands.add_parser("config", help="print a config with every default filled in")
    one.add_argument("config")
    one.add_argument("overrides", nargs="*")
    _tiny_argument(one)
    one.set_defaults(call=show_config)

    one = commands.add_parser("objectives", help="list the objectives, or the keys of one")
    one.add_argument("name", nargs="?")
    one.set_defaults(call=objectives)
    return top


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may also stand behind options, where argparse leaves them over."""
    commands = parser()
    args, left = commands.parse_known_args(arguments)
    if left and (not hasattr(args, "overrides") or any(text.startswith("-") or "=" not in text for text in left)):
        commands.error(f"unrecognised arguments: {' '.join(left)}")
    if left:
        args.overrides += left
    return args


def _process() -> str:
    """Which process speaks, where it is not the first of several."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (process {rank})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for a mistake of the user's (one sentence on stderr), or 130 for Ctrl-C.

    `doctor` returns 1 for a run that is ill.
    """
    # Two threads that spin for each other stall for seconds when a third process wants a core.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # xformers logs a page when it finds another torch than it was built for; diffusers imports it unasked.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    # diffusers warns of every old scheduler and every cast; what matters of that is a UserError here.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    args = _parse(arguments)
    try:
        return args.call(args) or 0
    except UserError as error:
        print(f"fewstep{_process()}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewstep: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
