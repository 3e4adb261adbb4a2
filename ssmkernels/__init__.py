# SPDX-License-Identifier: BSD-3-Clause
"""CPU and CUDA kernels for semi-supervised and metric learning, as PyTorch operators, and trainers built on them.

``import ssmkernels`` registers ``torch.ops.ssmkernels``, with derivatives. It succeeds without torch and with a broken
library too: ``ssmkernels.ops`` then says what is missing. The other submodules are imported when they are first named.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = (
    "bench",
    "data",
    "distributed",
    "estimators",
    "experiments",
    "graph",
    "info",
    "metrics",
    "models",
    "nn",
    "ops",
    "reference",
    "trainers",
)

__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"ssmkernels.{name}")
    raise AttributeError(f"module 'ssmkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})


def _is_command_line() -> bool:
    """Whether this is ``python -m ssmkernels`` or the script ``ssmkernels``, whose commands import what they need.

    ``ssmkernels info`` has to work where loading the library ends the process.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return program == "-m" or Path(program).stem == "ssmkernels"


if not _is_command_line():
    with contextlib.suppress(Exception):
        importlib.import_module("ssmkernels.ops")
