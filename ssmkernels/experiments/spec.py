# SPDX-License-Identifier: BSD-3-Clause
"""What a table or figure of a paper is: data in ``papers/*.yaml``, rows × columns of training runs with the paper's
numbers beside them.

A table there has a ``title``, the ``method`` of ``ssmkernels train``, ``rows`` and ``columns`` (label: arguments),
``figures`` (what is read from a run), ``budgets``, and, where it has some, the paper's ``numbers`` (column: row: one
text per figure), ``claims``, ``deviations``, a ``plot``, and ``embedded`` and ``classes``: what replaces these keys on
images inside packages, and on a folder of class folders. ``cells`` and ``after`` name functions of ``analyses/``: of
cells that are no training runs, and of what is done with finished ones.
"""

from __future__ import annotations

import functools
import importlib
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ssmkernels.experiments.jobs import Job
from ssmkernels.experiments.record import Claim

Arguments = str | Sequence[Any]
"""One text, or texts in lists of lists."""
BUDGETS = ("smoke", "short", "paper")
PAPERS = {
    "SimMatch": "simmatch",
    "Mixed label propagation": "mixed_lp",
    "MLSN": "mlsn",
    "SLADE": "slade",
}
"""Of a paper the file of its tables."""


@dataclass(frozen=True)
class Figure:
    """A number of a finished job: of a run the median of ``name`` over its ``last`` evaluations, or its value in the
    evaluation where ``best`` is highest; of anything else the value under ``name``, or the value that it is.
    """

    title: str
    name: str
    last: int = 20
    best: str | None = None
    unit: str = "%"

    def of(self, value: Any) -> float | None:
        """None where the job does not have it."""
        number = value.get(self.name) if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and "history" in value:
            records = value["history"]
            if self.name not in records[-1]:
                return None
            if self.best is not None:
                number = max(records, key=lambda record: record[self.best])[self.name]
            else:
                number = statistics.median(record[self.name] for record in records[-self.last :])
        return None if number is None else (100 if self.unit == "%" else 1) * float(number)


@dataclass(frozen=True)
class Budget:
    """How much of the paper's training is done."""

    seeds: int
    arguments: tuple[str, ...] = ()
    devices: int = 1
    """That the paper trains a cell on: with fewer, a batch goes through the network in pieces."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One entry of a table for each of its figures: the job of each seed, and what the paper says, one text per
    figure.
    """

    row: str
    column: str
    figures: tuple[Figure, ...]
    paper: tuple[str, ...]
    job: Callable[[int], Job]
    """Of a seed."""
    config: Any = None
    """Of its training with the first seed."""


@dataclass(frozen=True)
class Table:
    """A table or figure as its file has it. Arguments are those of ``ssmkernels train``; in them ``{data}`` is what
    --data says, ``{all}`` the number of training images, ``{steps}`` the steps of a whole run of SLADE, and ``{swav}``
    the backbone that SwAV has fine-tuned as the column's entry in ``swav`` says, where there are weights to start from.
    """

    name: str
    paper: str
    title: str
    method: str = ""
    rows: Mapping[str, Arguments] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[Mapping[str, Any]] = ()
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    quoted: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """As numbers, of the paper's rows that are not run."""
    offline: str = ""
    """Replaces the images where none are given, for the smoke budget."""
    claims: Sequence[Sequence[str]] = ()
    """[better row, worse row], of the first figure."""
    lower_is_better: bool = False
    deviations: Sequence[str] = ()
    notes: str = ""
    plot: Mapping[str, Any] = field(default_factory=dict)
    cells: str = ""
    after: str = ""
    swav: Mapping[str, str] = field(default_factory=dict)
    swav_smoke: str = ""
    start: str = ""
    """Arguments of every row where SwAV's weights are there."""
    embedded: Mapping[str, Any] = field(default_factory=dict)
    classes: Mapping[str, Any] = field(default_factory=dict)

    def variant(self, kind: str) -> Table:
        """With what stands under ``kind``, "embedded" or "classes", in place of its own."""
        own = {key.name: getattr(self, key.name) for key in fields(self)}
        return _table({**own, **own[kind], "embedded": {}, "classes": {}})

    def budget(self, name: str) -> Budget:
        values = {**self.budgets[name]}
        return Budget(values.pop("seeds"), words(values.pop("arguments", "")), **values)

    def read_figures(self) -> tuple[Figure, ...]:
        return tuple(Figure(**figure) for figure in self.figures)

    def read_claims(self) -> tuple[Claim, ...]:
        title = self.figures[0]["title"] if self.claims else ""
        return tuple(Claim(better, worse, title, self.lower_is_better) for better, worse in self.claims)

    def hook(self, key: str) -> Callable[..., Any] | None:
        """The function of ``analyses`` that ``cells`` or ``after`` names, as module.function."""
        name = getattr(self, key)
        if not name:
            return None
        module, _, function = name.partition(".")
        analysis: Callable[..., Any] = getattr(
            importlib.import_module(f"ssmkernels.experiments.analyses.{module}"), function
        )
        return analysis


def words(arguments: Arguments) -> tuple[str, ...]:
    """Settings and values, one after the other."""
    return tuple(shlex.split(" ".join(flat([arguments]))))


def flat(texts: Sequence[Any]) -> list[str]:
    """Texts in lists of lists, as the files have them where one part takes in another."""
    return [text for part in texts for text in ([part] if isinstance(part, str) else flat(part))]


def _table(values: Mapping[str, Any]) -> Table:
    unknown = sorted(values.keys() - {key.name for key in fields(Table)})
    if unknown:
        raise ValueError(f"table {values['name']!r} has {', '.join(unknown)}, which is unknown")
    return Table(**values)


@functools.cache
def load_tables() -> dict[str, Table]:
    """Every table of the papers by name."""
    return {name: table for paper, file in PAPERS.items() for name, table in read_tables(paper, file).items()}


def read_tables(paper: str, file: str) -> dict[str, Table]:
    """The tables of a file in ``papers/``; keys that begin with an underscore are there for others to refer to."""
    content = yaml.safe_load((Path(__file__).parent / "papers" / f"{file}.yaml").read_text(encoding="utf-8"))
    return {
        name: _table({"name": name, "paper": paper, **values})
        for name, values in content.items()
        if not name.startswith("_")
    }
