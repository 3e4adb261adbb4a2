# SPDX-License-Identifier: BSD-3-Clause
"""What the commands on a finished run have in common on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

from ssmkernels.trainers.loop import Accelerator


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    text = (description or "").replace("``", "")
    return argparse.ArgumentParser(
        prog=f"ssmkernels {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of the run, --run.out of ssmkernels train")
    parser.add_argument(
        "--accelerator",
        choices=get_args(Accelerator),
        default="auto",
        help="device; auto takes a GPU where there is one",
    )


def add_best(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--best",
        action="store_true",
        help="the network of best.pt, which was best on the validation classes, instead of the last (mixed-lp, slade)",
    )


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str], action: Callable[[Any], None]) -> int:
    """Parses ``argv`` and runs ``action`` with what it says; 1 where that fails for a reason of the user's."""
    options = parser.parse_args(argv)
    try:
        action(options)
    except ModuleNotFoundError:
        raise  # ssmkernels.cli says what to install
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0
