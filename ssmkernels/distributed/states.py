# SPDX-License-Identifier: BSD-3-Clause
"""States of modules whose rows are split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

_OWN_ROWS = ContextVar("states_have_own_rows", default=False)


@dataclass(frozen=True)
class RowShard:
    """This rank's rows [n, ...] of a tensor that no rank has whole, and which is those of all ranks in their order."""

    rows: Tensor


@contextmanager
def sharded_states() -> Iterator[None]:
    """Within it the ``state_dict()`` of a module whose rows are split over ranks has them as :class:`RowShard`, and
    nothing is sent; otherwise it has those of all ranks. For checkpoints of which every rank writes a share.
    """
    before = _OWN_ROWS.set(True)
    try:
        yield
    finally:
        _OWN_ROWS.reset(before)


def states_are_sharded() -> bool:
    """Whether it is within :func:`sharded_states`."""
    return _OWN_ROWS.get()
