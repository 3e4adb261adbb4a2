# SPDX-License-Identifier: BSD-3-Clause
"""The command ``ssmkernels``: each subcommand is a module's ``main(argv) -> exit status``, imported only when it is
called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ssmkernels import __version__

COMMANDS = {
    "train": ("ssmkernels.trainers.cli", "train a model with one of the papers' methods"),
    "reproduce": ("ssmkernels.experiments.cli", "run a table or figure of a paper"),
    "report": ("ssmkernels.experiments.report_page", "one page of what reproduce has left in a folder"),
    "demo": ("ssmkernels.experiments.demo", "a few minutes' comparison on real images that come with the packages"),
    "bench": ("ssmkernels.bench", "time the ops beside eager PyTorch and torch.compile"),
    "info": ("ssmkernels.info", "what was built, what machine this is, and what is wrong"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"usage: ssmkernels [--help] [--version] COMMAND ...\n\n{commands}\n\nssmkernels COMMAND --help tells what a"
        " command takes."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status; 2 for an unknown one, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if name == "--version":
        print(f"ssmkernels {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"ssmkernels: unknown command {name!r}; it should be one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    try:
        return int(importlib.import_module(module).main(arguments[1:]) or 0)
    except KeyboardInterrupt:
        print("\nssmkernels: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
