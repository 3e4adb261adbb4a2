# SPDX-License-Identifier: BSD-3-Clause
"""The claims of a paper, computed from a record: in which settings one row is better than another."""

from __future__ import annotations

from typing import NamedTuple

from ssmkernels.experiments.record import Claim, Entry, Record
from ssmkernels.experiments.statistics import paired_difference


class Verdict(NamedTuple):
    """What the seeds say of a claim in a setting."""

    claim: str
    setting: str
    difference: str
    """Of the means, with the 95 % interval of the differences paired by seed."""
    verdict: str


def verdicts(record: Record) -> list[Verdict]:
    """One for every claim in every setting that has both of its rows."""
    entries = {(entry.row, entry.column, entry.figure): entry for entry in record.entries}
    verdicts = []
    for claim in record.claims:
        for column in dict.fromkeys(entry.column for entry in record.entries):
            better = entries.get((claim.better, column, claim.figure))
            worse = entries.get((claim.worse, column, claim.figure))
            if better is not None and worse is not None:
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
