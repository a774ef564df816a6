"""The command line: fewstep plan | prepare | train | sample | eval | compare | export | report | doctor | config | ...

Heavy imports wait inside the commands, so that a spelling mistake is answered at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.core.errors import Lost, SaidOnce, UserError
from fewstep.sampling_arguments import add_arguments, add_base_first, add_choice, step

if TYPE_CHECKING:
    from fewstep.config import Config


def train(args: argparse.Namespace) -> None:
    from fewstep import build, finish, runner
    from fewstep.train import audience, lock, processes
    from fewstep.train.interrupts import Interrupts, Stopped

    configs = _configs(args)
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            _furnish(args, configs, Path(folder))
            finish.dry_run(configs)
        return
    device, timeout = build.pick_device(configs[0].device), configs[0].timeout
    # Outermost: a launcher that ends all processes lets this one say first which of them was lost.
    with audience.optional(), Interrupts() as interrupts, processes.started(device, timeout):
        root = processes.from_leader(lambda: _place(args, configs[0].name)[0])
        with lock.held(root):
            # Only now nobody else adds to what is there, or takes from it.
            resume = processes.from_leader(lambda: None if args.resume is None else _place(args, configs[0].name)[1])
            _furnish(args, configs, root)
            if processes.leads():
                print(f"run folder: {root}")
            try:
                runner.play(configs, root, resume, finish.finish, interrupts)
            except Stopped:
                if processes.leads():
                    print(_farewell(args, interrupts.asked or "another process", root, configs[0].name))


def _farewell(args: argparse.Namespace, by: str, root: Path, name: str) -> str:
    """What a run that was asked to stop has saved, and the command that goes on with it."""
    from fewstep import runner

    again = ["train", args.config, *args.overrides, f"--out={args.out}", *(["--tiny"] if args.tiny else [])]
    again += ["--resume", str(root)]
    count = os.environ.get("WORLD_SIZE", "1")
    start = ["fewstep"] if count == "1" else ["torchrun", "--nproc-per-node", count, "-m", "fewstep.cli"]
    try:
        saved = runner.resume_point(root, name)[1]
    except UserError:
        return f"stopped by {by} before anything was made: start the same command again"
    where = f"saved in {saved}" if saved else "before its first checkpoint"
    return f"stopped by {by}; {where}: continue with\n{shlex.join([*start, *again])}"


def _configs(args: argparse.Namespace) -> list[Config]:
    """The stages that the arguments name, made small for --tiny."""
    from fewstep import config

    if not args.tiny:
        return config.load(args.config, args.overrides)
    from fewstep import shrink

    return shrink.load(args.config, args.overrides)


def _furnish(args: argparse.Namespace, configs: list[Config], root: Path) -> None:
    """With --tiny, the teacher that the configs shall learn from, in the run folder `root`."""
    if not args.tiny:
        return
    from fewstep import runner, shrink

    try:
        shrink.furnish(configs, root)
    except OSError as error:
        raise runner.unwritten(error, root) from None


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


def prepare(args: argparse.Namespace) -> None:
    from fewstep import prepare as preparing

    preparing.prepare(Path(args.config), args.overrides, Path(args.out) if args.out else None)


def sample(args: argparse.Namespace) -> None:
    from fewstep import sampling

    sampling.main(args)


def evaluate(args: argparse.Namespace) -> None:
    from fewstep import evaluation, finish

    first = Path(args.targets[0])
    plain = args.metrics is None and args.reference is None and args.base_first is None
    if len(args.targets) == 1 and plain and evaluation.is_run(first):
        finish.evaluate(first, args.step, args.samples)
    else:
        evaluation.main(args)


def compare(args: argparse.Namespace) -> None:
    from fewstep import sidebyside

    sidebyside.main(args)


def export(args: argparse.Namespace) -> None:
    import torch

    from fewstep import export as exporting

    run = exporting.load_run(Path(args.run), args.step)
    folder = Path(args.to) if args.to else Path(args.run) / "export"
    dtype = torch.float16 if args.dtype == "float16" else torch.float32
    try:
        print(f"diffusers pipeline: {exporting.export(run, folder, dtype)}")
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"the export to {folder} could not be written ({reason}): make room or choose another place"
        ) from None


def report(args: argparse.Namespace) -> None:
    from fewstep import report as reporting
    from fewstep.train.rundir import RunDir

    for run in map(Path, args.run):
        if not (run / "config.yaml").is_file() and not any(run.glob("stage_*/config.yaml")):
            raise UserError(f"there is no run folder {run}: give one that `fewstep train` has made")
    folders, to = [RunDir(Path(run)) for run in args.run], Path(args.out) if args.out else None
    if len(folders) == 1:
        print(f"report: {reporting.write_report(folders[0], to)}")
    else:
        print(f"report: {reporting.write_comparison(folders, to or Path('comparison.html'))}")


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


def families(args: argparse.Namespace) -> None:
    from fewstep import families

    print(families.describe(args.name))


def _run_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="a run folder")
    _step_argument(command)


def _metric_arguments(command: argparse.ArgumentParser) -> None:
    said = "frechet, kernel, neighbours, clip_score, prompt_diversity; with commas between"
    command.add_argument("--metrics", help=f"{said}. Default: the first three")
    command.add_argument("--extractor", default="reader", help="reader (of the scenes), inception, clip or dinov2")
    command.add_argument("--weights", help="file or folder of the extractor's weights")
    command.add_argument("--clip", help="file or folder of the CLIP of clip_score; default: that of the scenes")
    command.add_argument("--model", help="architecture of open_clip that a file of CLIP weights is of")
    command.add_argument("--reference", help="scenes, captioned, images or an .npz; default: the run's data")
    command.add_argument("--resolution", type=int, help="of images where no run says it")
    command.add_argument("--prompts-file", help="a prompt a line; default: unseen captions of the reference")
    command.add_argument("--steps", type=int, help="network passes of pipeline folders; default: what they say")
    command.add_argument("--batch", type=int, default=50, help="images made at once")
    command.add_argument("--out", default="evals", help="the folder for eval.jsonl and eval.png")


def _step_argument(command: argparse.ArgumentParser) -> None:
    said = "the checkpoint of this step, or the best; default: the newest"
    command.add_argument("--step", type=step, default=None, metavar="N|best", help=said)


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

    one = commands.add_parser("prepare", help="make what the training of a config reads: latents, prompts, pairs")
    one.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    one.add_argument("overrides", nargs="*", help="key=value, such as pairs.count=20000")
    one.add_argument("--out", help="the folder to fill; default: data.prepared, or prepared/<name>")
    one.set_defaults(call=prepare)

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
    add_arguments(one)

    one = commands.add_parser("eval", help="measure a run beside its teacher, or several targets beside each other")
    one.add_argument("targets", nargs="+", help="run folders, pipeline folders, folders of images; one run: its table")
    _step_argument(one)
    one.add_argument("--samples", type=int, default=2000, help="images to measure")
    add_base_first(one)
    _metric_arguments(one)
    one.set_defaults(call=evaluate)

    one = commands.add_parser("compare", help="put samples of several models from the same noise side by side")
    one.add_argument("targets", nargs="+", help="run folders and pipeline folders")
    add_choice(one)
    one.add_argument("--count", type=int, help="columns; labels or prompts take turns. Default: at least eight")
    one.add_argument("--seed", type=int, default=0, help="of the noise")
    one.add_argument("--out", default="compare.png", help="the picture")
    one.set_defaults(call=compare)

    one = commands.add_parser("export", help="write a plain diffusers pipeline folder")
    _run_arguments(one)
    one.add_argument("--to", help="the folder to write; default: <run>/export")
    one.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    one.set_defaults(call=export)

    one = commands.add_parser("report", help="write the self-contained page of a run again, or compare several")
    one.add_argument("run", nargs="+", help="a run folder, or several to compare")
    one.add_argument("--out", metavar="PAGE", help="default: <run>/report.html; of several runs comparison.html here")
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

    one = commands.add_parser("families", help="list the families of diffusers models, or all about one")
    one.add_argument("name", nargs="?")
    one.set_defaults(call=families)
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


def _on_a_terminal(said: str) -> str:
    """A sentence that may hold what a file says: no mark of it is a command to the terminal."""
    from fewstep.reading import shown

    return shown(said, 4000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 for a mistake of the user's (one sentence on stderr).

    130 is Ctrl-C, 141 a reader who went away, such as `head`; `doctor` returns 1 for a run that is ill.
    """
    # Two threads that spin for each other stall for seconds when a third process wants a core.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # xformers logs a page when it finds another torch than it was built for; diffusers imports it unasked.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    # diffusers warns of every old scheduler and every cast; what matters of that is a UserError here.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Of a connection that has ended torch's own log has a page, and fewstep a sentence.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    args = _parse(arguments)
    try:
        return args.call(args) or 0
    except UserError as error:
        if not (_process() and isinstance(error, SaidOnce)):
            print(f"fewstep{_process()}: {_on_a_terminal(str(error))}", file=sys.stderr)
        if isinstance(error, Lost):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        return 2
    except KeyboardInterrupt:
        print("fewstep: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read along, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = f"{error.filename} could not be read or written" if error.filename else "reading or writing failed"
        print(f"fewstep{_process()}: {_on_a_terminal(f'{what} ({error.strerror or error})')}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
