"""Draw images with a trained generator, from a run folder or a diffusers pipeline folder.

python tools/sample.py runs/<run> --labels "red disc,blue ring" --count 16 --out samples.png
"""

from __future__ import annotations

import argparse
import sys

from fewstep.core.errors import UserError
from fewstep.sampling_arguments import add_arguments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    from fewstep import sampling  # takes seconds, which --help and a spelling mistake need not wait for

    try:
        sampling.main(args)
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
