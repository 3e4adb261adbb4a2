# SPDX-License-Identifier: BSD-3-Clause
"""What a command says of a name that it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, name: str, names: Iterable[str]) -> str:
    """``what`` is wrong, and the names that are near, or all of them."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"{what}; " + (f"did you mean {' or '.join(near)}?" if near else f"it should be one of {', '.join(names)}")
