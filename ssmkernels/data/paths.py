# SPDX-License-Identifier: BSD-3-Clause
"""Many paths in few bytes."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PATHS_OF_A_RUN = 64
SCANNED_AT_ONCE = 2**20  # bytes


class PathList:
    """N paths one after another in one array of bytes, and where every 64th begins: what they are long, and an eighth
    of a byte each. There is no Python object for a path, whose reference count would unshare the memory of loading
    processes.

    Args:
        text: [B] uint8, a separator after every path; the last one may lack it.
        separator: one byte.
        file: that ``text`` is a memory map of; a copy in another process then maps it too.
    """

    def __init__(self, text: np.ndarray, separator: bytes, file: Path | None = None) -> None:
        self.text, self.separator, self.file = text, separator, file
        self.starts, self.count = _starts(text, separator[0])

    @classmethod
    def of(cls, paths: Iterable[str | os.PathLike[str]]) -> PathList:
        """Paths that are gone through once, in memory."""
        text = bytearray()
        for path in paths:
            text += os.fsencode(path) + b"\0"
        return cls(np.frombuffer(text, np.uint8), b"\0")

    @classmethod
    def mapped(cls, file: Path) -> PathList:
        """The lines of a text file, which all processes that map it share.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is empty.
        """
        if file.stat().st_size == 0:
            raise ValueError(f"{file} lists no images; it should list at least one")
        return cls(np.memmap(file, np.uint8, mode="r"), b"\n", file)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> bytes:
        place = operator.index(index)
        place += self.count if place < 0 else 0
        if not 0 <= place < self.count:
            raise IndexError(f"path {index} of {self.count}")
        run, within = divmod(place, PATHS_OF_A_RUN)
        return self._run(run)[within]

    def __iter__(self) -> Iterator[bytes]:
        for run in range(len(self.starts) - 1):
            yield from self._run(run)

    def _run(self, run: int) -> list[bytes]:
        text = self.text[self.starts[run] : self.starts[run + 1]].tobytes()
        return text.removesuffix(self.separator).split(self.separator)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({} if self.file is None else {"text": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.file is not None:
            self.text = np.memmap(self.file, np.uint8, mode="r")


def _starts(text: np.ndarray, separator: int) -> tuple[np.ndarray, int]:
    """Where each run begins and the last one ends, int64, and the number of paths."""
    starts, count = [0], 0
    for begin in range(0, len(text), SCANNED_AT_ONCE):
        ends = begin + np.flatnonzero(text[begin : begin + SCANNED_AT_ONCE] == separator)
        starts.extend((1 + ends[(PATHS_OF_A_RUN - 1 - count) % PATHS_OF_A_RUN :: PATHS_OF_A_RUN]).tolist())
        count += len(ends)
    if len(text) and text[-1] != separator:
        count += 1
    if starts[-1] < len(text):
        starts.append(len(text))
    return np.array(starts, dtype=np.int64), count
