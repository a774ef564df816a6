"""The command line: fewstep train | sample | eval | export | report | config | objectives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fewstep.core.errors import UserError


def train(args: argparse.Namespace) -> None:
    from fewstep import config, finish, runner
    from fewstep.train import rundir

    configs = config.load(args.config, args.overrides)
    resume = None
    if args.resume is not None:
        root, resume = runner.resume_point(Path(args.resume) if args.resume else Path(args.out), configs[0].name)
    else:
        root = rundir.new(Path(args.out), configs[0].name)
    if args.dry_run:
        finish.dry_run(configs)
        return
    print(f"run folder: {root}")
    runner.play(configs, root, resume, finish.finish)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fewstep", description="Turns a diffusion or flow model into a few-step generator."
    )
    commands = top.add_subparsers(dest="command", required=True)

    one = commands.add_parser("train", help="train from a config, with key=value overrides")
    one.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    one.add_argument("overrides", nargs="*", help="key=value, such as model.steps=4")
    one.add_argument("--out", default="runs", help="where the run folder goes")
    one.add_argument(
        "--resume",
        nargs="?",
        const="",
        default=None,
        metavar="RUN",
        help="a run or checkpoint; alone: the newest run",
    )
    one.add_argument(
        "--dry-run", action="store_true", help="print players, parameters, memory and first shapes, then stop"
    )
    one.set_defaults(call=train)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        args.call(args)
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewstep: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
