# SPDX-License-Identifier: BSD-3-Clause
"""The search of neighbours under pytest-benchmark: ``pytest bench/bench_neighbours.py``.

The cases are those of ``ssmkernels bench neighbours --quick``.
"""

import pytest

from ssmkernels.bench import neighbours

CASES = [
    pytest.param(case, name, id=f"{case.op}-N{case.size['N']}-d{case.size['d']}-{name}")
    for case in neighbours.cases(quick=True)
    for name in ("ours", *case.peers)
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_neighbours(benchmark, case, name):
    function = case.ours if name == "ours" else case.peers[name]
    function()
    benchmark.extra_info.update(op=case.op, **case.size)
    benchmark(function)
