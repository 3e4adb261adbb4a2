# SPDX-License-Identifier: BSD-3-Clause
"""Means, their spread, differences paired by seed, and what these say of a paper's claims: the one place where numbers
of several runs become one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ssmkernels.experiments.record import Claim, Entry, Record


def mean_and_std(values: Sequence[float], *, digits: int = 2) -> str:
    """``mean ± std`` (of the sample); the value alone where there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean (Student's t); 0 for one value."""
    if len(values) == 1:
        return 0.0
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


class Difference(NamedTuple):
    """What a row has more than another, over the seeds that both have."""

    mean: float
    half_width: float
    """Of the 95 % confidence interval; 0 for one seed."""
    wins: int
    """Seeds in which the first row is higher."""
    seeds: int

    @property
    def sign(self) -> int:
        """1 where the interval lies above 0, −1 where it lies below, else 0; 0 for one seed, which has no interval."""
        return 0 if self.seeds == 1 else (self.mean > self.half_width) - (self.mean < -self.half_width)

    def text(self, digits: int) -> str:
        """``mean (lower to upper)``, the ends of the interval; the value alone of one seed."""
        mean = f"{self.mean:+.{digits}f}"
        if self.seeds == 1:
            return mean
        return f"{mean} ({self.mean - self.half_width:+.{digits}f} to {self.mean + self.half_width:+.{digits}f})"


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """``first`` minus ``second``, seed by seed; None where there is no seed."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        return None
    wins = sum(difference > 0 for difference in differences)
    return Difference(statistics.fmean(differences), half_width(differences), wins, len(differences))


class Verdict(NamedTuple):
    """What the seeds say of a claim in a setting."""

    claim: str
    setting: str
    difference: str
    """Of the means, with the 95 % interval of the differences paired by seed."""
    verdict: str


def verdicts(record: Record) -> list[Verdict]:
    """One for every claim in every setting that has both of its rows, of which one at least was run."""
    entries = {(entry.row, entry.column, entry.figure): entry for entry in record.entries}
    verdicts = []
    for claim in record.claims:
        for column in dict.fromkeys(entry.column for entry in record.entries):
            better = entries.get((claim.better, column, claim.figure))
            worse = entries.get((claim.worse, column, claim.figure))
            if better is not None and worse is not None and (better.has_run or worse.has_run):
                relation = "below" if claim.lower else "above"
                text = f"{claim.better} {relation} {claim.worse}, {better.titled}"
                verdicts.append(Verdict(text, column, *_verdict(claim, better, worse)))
    return verdicts


def _verdict(claim: Claim, better: Entry, worse: Entry) -> tuple[str, str]:
    """The difference paired by seed with its 95 % interval, and what it says of the claim."""
    first, second = _by_seed(better), _by_seed(worse)
    both = [seed for seed in first if seed in second]
    difference = paired_difference([first[seed] for seed in both], [second[seed] for seed in both])
    if difference is None:
        return "-", "no seed has both"
    text = difference.text(better.digits)
    if difference.seeds == 1:
        return text, "one seed says nothing about the next"
    wins = difference.seeds - difference.wins if claim.lower else difference.wins
    sign = -difference.sign if claim.lower else difference.sign
    words = {1: "holds", -1: "the opposite holds", 0: "undecided"}[sign]
    return text, f"{words} (in {wins} of {difference.seeds} seeds)"


def _by_seed(entry: Entry) -> dict[int, float]:
    """Values by seed; by their number in records that do not say the seeds, where only entries without failures can
    be paired.
    """
    if entry.seeds:
        return dict(zip(entry.seeds, entry.values, strict=True))
    return {} if entry.failed else dict(enumerate(entry.values, start=1))
