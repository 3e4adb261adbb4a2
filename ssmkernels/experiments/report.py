# SPDX-License-Identifier: BSD-3-Clause
"""What a report says of a record, in texts and Markdown tables."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence

from ssmkernels.experiments.record import Claim, Entry, Record
from ssmkernels.experiments.statistics import mean_and_std, paired_difference


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def ours(entry: Entry, seeds: int) -> str:
    """``mean ± std (n = 3)``, ``n = 3 of 5`` where not all ``seeds`` finished; a dash where none did. Failed ones
    are counted.
    """
    count = len(entry.values)
    number = f" (n = {count} of {seeds})" if count < seeds else f" (n = {count})" if count > 1 else ""
    finite = all(map(math.isfinite, entry.values))
    text = (mean_and_std(entry.values, digits=_digits(entry)) if finite else "nan") + number if count else "-"
    return f"{text}, {len(entry.failed)} failed" if entry.failed else text


def difference(entry: Entry) -> str:
    """Our mean minus the paper's, with its sign; a dash where either is no number."""
    paper = _papers_number(entry)
    if not paper or not entry.values or not all(map(math.isfinite, entry.values)):
        return "-"
    digits = _digits(entry)
    return f"{round(statistics.fmean(entry.values) - float(paper), digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.00


def _papers_number(entry: Entry) -> str:
    """The paper's mean, "94.40" of "94.40 ± 1.37"; nothing where its text is no number."""
    found = re.fullmatch(r"([-−+]?(?:\d+\.?\d*|\.\d+))(?: *%)?(?: *± *[\d.]+(?: *%)?)?", entry.paper.strip())
    return found[1].replace("−", "-") if found else ""


def _digits(entry: Entry) -> int:
    """Places after the point: two of a percentage, three of a share, and at least as many as the paper prints."""
    return max(2 if entry.unit == "%" else 3, len(_papers_number(entry).partition(".")[2]))


def verdicts(record: Record) -> list[tuple[str, str, str, str]]:
    """(claim, setting, difference, verdict) of every claim in every setting that has both of its rows."""
    entries = {(each.row, each.column, each.figure): each for each in record.entries}
    columns = dict.fromkeys(each.column for each in record.entries)
    return [
        (
            f"{claim.better} {'below' if claim.lower else 'above'} {claim.worse}, {titled(better)}",
            column,
            *_verdict(claim, better, worse),
        )
        for claim in record.claims
        for column in columns
        if (better := entries.get((claim.better, column, claim.figure)))
        and (worse := entries.get((claim.worse, column, claim.figure)))
    ]


def _verdict(claim: Claim, better: Entry, worse: Entry) -> tuple[str, str]:
    """The difference paired by seed with its 95 % interval, and what it says of the claim."""
    first, second = _by_seed(better), _by_seed(worse)
    both = [seed for seed in first if seed in second]
    difference = paired_difference([first[seed] for seed in both], [second[seed] for seed in both])
    if difference is None:
        return "-", "no seed has both"
    text = difference.text(_digits(better))
    if difference.seeds == 1:
        return text, "one seed says nothing about the next"
    wins = difference.seeds - difference.wins if claim.lower else difference.wins
    words = {1: "holds", -1: "the opposite holds", 0: "undecided"}[-difference.sign if claim.lower else difference.sign]
    return text, f"{words} (in {wins} of {difference.seeds} seeds)"


def _by_seed(entry: Entry) -> dict[int, float]:
    """Values by seed; by their number in records that do not say the seeds, where only entries without failures can
    be paired.
    """
    if entry.seeds:
        return dict(zip(entry.seeds, entry.values, strict=True))
    return {} if entry.failed else dict(enumerate(entry.values, start=1))


def failures(record: Record) -> dict[str, tuple[str, ...]]:
    """ "method, setting" -> what its failed seeds said, each message once. A seed fails for all its figures
    together.
    """
    said: dict[str, dict[str, None]] = {}
    for entry in record.entries:
        if entry.failed:
            said.setdefault(f"{entry.row}, {entry.column}", {}).update(dict.fromkeys(entry.failed))
    return {cell: tuple(messages) for cell, messages in said.items()}


def progress(record: Record) -> str:
    """Finished cells of all, a cell being a method in a setting with a seed; failed ones are said. A dash for a
    record without a table.
    """
    seeds = max(1, len(record.seeds))
    finished: dict[tuple[str, str], int] = {}
    failed: dict[tuple[str, str], int] = {}
    for entry in record.entries:
        cell = entry.row, entry.column
        finished[cell] = max(finished.get(cell, 0), min(len(entry.values), seeds))
        failed[cell] = max(failed.get(cell, 0), len(entry.failed))
    if not finished:
        return "-"
    text = f"{sum(finished.values())}/{seeds * len(finished)}"
    return f"{text}, {sum(failed.values())} failed" if any(failed.values()) else text


def duration(seconds: float) -> str:
    """Such as ``42 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def by_setting(record: Record) -> dict[str, list[Entry]]:
    """The entries under their column; in one column those of a method stand together. Both in the order in which
    they first appear.
    """
    rows = list(dict.fromkeys(entry.row for entry in record.entries))
    columns: dict[str, list[Entry]] = {}
    for entry in sorted(record.entries, key=lambda entry: rows.index(entry.row)):
        columns.setdefault(entry.column, []).append(entry)
    return {column: columns[column] for column in dict.fromkeys(entry.column for entry in record.entries)}


def titled(entry: Entry) -> str:
    """The figure with its unit."""
    return f"{entry.figure}, {entry.unit}" if entry.unit else entry.figure


def facts(record: Record) -> dict[str, str]:
    """What a reader has to know before the numbers."""
    return {
        "Budget": record.budget,
        "Data": record.data,
        "Seeds": ", ".join(map(str, record.seeds)) or "-",
        "Cells finished": progress(record),
        "Run time": f"{duration(record.seconds)} on {record.machine}",
        "Versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()) or "-",
    }
