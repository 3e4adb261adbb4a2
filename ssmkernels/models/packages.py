# SPDX-License-Identifier: BSD-3-Clause
"""Packages that only some networks need."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, package: str, extra: str) -> Any:
    """The module, or an ``ImportError`` that names its package and the extra of ours that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {package} ({error}); install it with: pip install {package}, or 'ssmkernels[{extra}]'"
        ) from error
