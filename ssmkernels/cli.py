# SPDX-License-Identifier: BSD-3-Clause
"""The command ``ssmkernels``: each subcommand is a module's ``main(argv) -> exit status``, imported only when it is
called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ssmkernels import __version__
from ssmkernels._files import WriteError
from ssmkernels._names import unknown


class Command(NamedTuple):
    module: str
    summary: str
    extra: str = "train"
    """What to install with the package for this command: ``pip install "ssmkernels[extra]"``."""


COMMANDS = {
    "train": Command("ssmkernels.trainers.cli", "train a model with one of the papers' methods"),
    "evaluate": Command("ssmkernels.finished.evaluate", "evaluate a finished run again"),
    "predict": Command("ssmkernels.finished.predict", "classes or embeddings of a folder of images by a finished run"),
    "export": Command("ssmkernels.finished.export", "weights, program and model card of a finished run"),
    "reproduce": Command("ssmkernels.experiments.cli", "run a table or figure of a paper"),
    "report": Command("ssmkernels.experiments.report", "one page of what reproduce has left in a folder"),
    "demo": Command(
        "ssmkernels.experiments.demo", "a few minutes' comparison on real images that come with the packages"
    ),
    "bench": Command("ssmkernels.bench", "time the ops beside eager PyTorch and torch.compile", "bench"),
    "info": Command("ssmkernels.info", "what was built, what machine this is, and what is wrong"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: ssmkernels [--help] [--version] COMMAND ...\n\n{commands}\n\n"
        "ssmkernels COMMAND --help says what a command takes."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status: 1 where a package or folder is missing or cannot be written, 2 for
    an unknown one, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if name == "--version":
        print(f"ssmkernels {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"ssmkernels: {unknown(f'there is no command {name!r}', name, COMMANDS)}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        return int(importlib.import_module(command.module).main(arguments[1:]) or 0)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "ssmkernels":
            raise
        needed = "torch" if error.name.partition(".")[0] == "torch" else f'"ssmkernels[{command.extra}]"'
        print(f"ssmkernels {name}: {error.name} is not installed; pip install {needed}", file=sys.stderr)
        return 1
    except WriteError as error:  # the disk is full, say
        print(f"ssmkernels {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nssmkernels: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
