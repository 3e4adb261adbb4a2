# SPDX-License-Identifier: BSD-3-Clause
"""Everything that is fuzzed, by name. A new function is one entry in the file of its family."""

from __future__ import annotations

from fuzz import classifiers, graphs, memory, modules, pairs, propagation, ranking, retrieval, split, structure
from fuzz.contents import copied, tensors_of
from fuzz.oracle import Target, check
from fuzz.spoil import spoiled
from fuzz.values import Draw
from hypothesis import note
from hypothesis import strategies as st

from ssmkernels.graph import Graph

FAMILIES = (memory, graphs, pairs, ranking, structure, split, propagation, retrieval, classifiers, modules)
TARGETS: dict[str, Target] = {name: target for family in FAMILIES for name, target in family.TARGETS.items()}


def example(draw: Draw, target: Target) -> bool:
    """Draws a call, right or with one argument out of place, and checks it. Returns whether it was accepted."""
    arguments = target.draw(draw)
    wrong = spoiled(draw, target, arguments) if draw(st.integers(0, 2)) == 0 else None
    ones = draw(st.booleans())
    given = {name: copied(value) if name in target.writes else value for name, value in arguments.items()}
    try:
        return check(target, arguments, wrong, ones)
    except Exception:  # as text a tensor takes longer than its call
        note(f"wrong: {wrong}")
        for name, value in given.items():
            note(f"{name} = {value!r}")
            if isinstance(value, Graph):
                note(str(tensors_of(value)))
        raise
