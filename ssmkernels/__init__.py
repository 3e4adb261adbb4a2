# SPDX-License-Identifier: BSD-3-Clause
"""CPU and CUDA kernels for semi-supervised and metric learning, as PyTorch operators, and trainers built on them.

Submodules are imported when they are first named, so that ``import ssmkernels`` needs nothing but Python and ``ssmkernels info`` works in
a broken installation.
"""

from __future__ import annotations

import importlib
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
