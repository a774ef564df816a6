"""The arguments of `fewstep sample` and tools/sample.py; apart from sampling.py, whose imports take seconds."""

from __future__ import annotations

import argparse


def step(text: str) -> int | str:
    """A number of steps, or the word best."""
    return text if text == "best" else int(text)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Adds what `fewstep.sampling.chosen` reads: which labels or prompts."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--labels", help='names with commas between: "red disc,blue ring"; default: every label')
    which.add_argument("--label-ids", help="numbers instead of names: 0,5")
    which.add_argument("--prompt", action="append", help="for generators that read prompts; may be given several times")
    which.add_argument("--prompts-file", help="a text file with one label or prompt a line")


def add_base_first(parser: argparse.ArgumentParser) -> None:
    said = "the teacher walks instead of the student's first N steps, for its diversity; 0 to all of them"
    parser.add_argument("--base-first", type=int, metavar="N", help=said)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `fewstep.sampling.main` reads."""
    parser.add_argument("run", help="a run folder, or a diffusers pipeline folder")
    parser.add_argument("--bank", nargs="+", default=[], metavar="RUN", help="the runs of the other parts of msd")
    add_choice(parser)
    parser.add_argument("--count", type=int, help="images; labels take turns. Default: four of each, a line one image")
    parser.add_argument("--batch", type=int, help="images made at once; default: 4 of a model with a VAE, or 250")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed, i and its label alone")
    parser.add_argument("--steps", type=int, help="network passes; default: what it was trained or saved for")
    add_base_first(parser)
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; default: what the run says, or 1")
    parser.add_argument("--negative", metavar="PROMPT", help="what the images shall not show: see --negative-attention")
    parser.add_argument("--negative-attention", type=float, metavar="A", help="how strongly, 0 to 1: Z+ - A Z- (NASA)")
    parser.add_argument("--checkpoint", type=step, metavar="STEP|best", help="of a run; default: its newest checkpoint")
    parser.add_argument("--out", default="samples.png", help="the PNG with all images")
    parser.add_argument("--individual", action="store_true", help="also one PNG an image, in a folder beside it")
