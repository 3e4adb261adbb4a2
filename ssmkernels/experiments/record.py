# SPDX-License-Identifier: BSD-3-Clause
"""What an experiment leaves behind for a report: ``record.json`` in its folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssmkernels._files import write_atomically

FILE = "record.json"


@dataclass(frozen=True)
class Entry:
    """One cell of a table: what the paper prints and what came out here."""

    row: str
    """The method."""
    column: str
    """The setting or data."""
    figure: str
    """What is measured: "top-1", "NMI", …"""
    unit: str
    """Of paper and values: "%" or ""."""
    paper: str
    """The paper's text; "-" if it prints none."""
    values: tuple[float, ...]
    """Ours, one per finished seed; empty if none finished."""
    failed: tuple[str, ...] = ()
    """One message per failed seed."""
    seeds: tuple[int, ...] = ()
    """Of the values; empty in records of before they were kept."""
    run: bool = True
    """False for a row of the paper that is quoted only."""

    @property
    def has_run(self) -> bool:
        """Whether a seed of it came to an end, or failed."""
        return bool(self.values or self.failed)

    @property
    def titled(self) -> str:
        """The figure with its unit."""
        return f"{self.figure}, {self.unit}" if self.unit else self.figure

    @property
    def papers_number(self) -> str:
        """The paper's mean, "94.40" of "94.40 ± 1.37"; nothing where its text is no number."""
        match = re.fullmatch(r"([-−+]?(?:\d+\.?\d*|\.\d+))(?: *%)?(?: *± *[\d.]+(?: *%)?)?", self.paper.strip())
        return match[1].replace("−", "-") if match else ""

    @property
    def digits(self) -> int:
        """Places after the point: two of a percentage, three of a share, and at least as many as the paper prints."""
        return max(2 if self.unit == "%" else 3, len(self.papers_number.partition(".")[2]))


@dataclass(frozen=True)
class Claim:
    """That one row is better than another: the report computes in which settings it holds."""

    better: str
    worse: str
    """Rows."""
    figure: str
    """That is compared."""
    lower: bool = False
    """Whether lower is better."""


@dataclass(frozen=True)
class Plot:
    """A figure of the experiment."""

    title: str
    file: str
    """PNG, relative to the folder of the record."""
    paper: str = ""
    """What the paper's figure shows, in words."""
    alt: str = ""
    """What is seen in it, for readers who do not see it; the title stands in where it is empty."""


@dataclass(frozen=True)
class Record:
    """A table or figure of a paper as it was run once: one budget, one place of the data."""

    name: str
    """As in ``ssmkernels reproduce NAME``."""
    title: str
    paper: str
    """"SimMatch", "Mixed label propagation", "MLSN" or "SLADE"."""
    budget: str
    """smoke, short or paper."""
    data: str
    """What the images were, in words."""
    seeds: tuple[int, ...]
    command: str
    """The ``ssmkernels reproduce …`` that makes it, with DIR for a folder."""
    entries: tuple[Entry, ...]
    plots: tuple[Plot, ...]
    deviations: tuple[str, ...]
    """What differs from the paper."""
    notes: str
    """Markdown: further tables of a study, or ""."""
    seconds: float
    """Wall time of all cells together, over all calls."""
    machine: str
    """Such as "2 x AMD EPYC 7763, no GPU"."""
    versions: dict[str, str]
    """Of the packages that matter: name -> version."""
    claims: tuple[Claim, ...] = ()
    """In the order in which the report has them."""


def write_record(folder: Path, record: Record) -> None:
    """Writes ``record`` into ``folder``, made if need be, by :func:`ssmkernels._files.write_atomically`."""
    write_atomically(folder / FILE, json.dumps(asdict(record), ensure_ascii=False, indent=1) + "\n")


def read_record(folder: Path) -> Record:
    """The record that :func:`write_record` left in ``folder``, by this version or an earlier one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or not a record; the message names the file and what in it is wrong.
    """
    path = folder / FILE
    try:
        values = _with_tuples(json.loads(path.read_text(encoding="utf-8")))
        for name, kind in {"entries": Entry, "plots": Plot, "claims": Claim}.items():
            values[name] = tuple(kind(**_with_tuples(part)) for part in values.get(name, ()))
        return Record(**values)
    except (ValueError, TypeError, AttributeError) as error:  # also of JSON and of UTF-8
        raise ValueError(f"{path} is not a readable record: {error}") from error


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """What the members of a dataclass were before JSON had lists in place of tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
