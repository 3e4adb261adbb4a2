# SPDX-License-Identifier: BSD-3-Clause
"""What every op must show, over the list of cases."""

from __future__ import annotations

import pytest
from cases import CASES, DTYPES, Case, double, to

from ssmkernels import ops, reference

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def problems(case: Case):
    """Every size as it comes, and every variant at two odd sizes."""
    middle = case.sizes[2:4]
    yield from ((size, case.variants[0]) for size in case.sizes if size not in middle)
    yield from ((size, variant) for size in middle for variant in case.variants)


def judge(case: Case, inputs, device="cpu", seed=0):
    """The results, within their bounds."""
    grads = case.grads(inputs, seed)
    found = case.evaluate(ops, to(inputs, device), None if grads is None else to(grads, device))
    found = {name: value.cpu() for name, value in found.items()}
    exact = case.evaluate(reference, double(inputs), grads)
    for name, margin in case.margins(inputs, grads, found, exact).items():
        assert margin <= 1, f"{name} is off by {margin:.2g} times its bound"
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_value_and_gradient(case, dtype, device):
    for size, variant in problems(case):
        judge(case, case.draw(size, dtype, **variant), device)
