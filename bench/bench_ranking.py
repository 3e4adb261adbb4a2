# SPDX-License-Identifier: BSD-3-Clause
"""The ranking family under pytest-benchmark: ``pytest bench/bench_ranking.py --benchmark-group-by=param:case``.

The cases are those of ``ssmkernels bench ranking --quick``.
"""

import pytest

from ssmkernels.bench import ranking

CASES = [
    pytest.param(case, name, id=f"{case.op}-{case.phase.replace(' ', '-')}-n{case.size['n']}-d{case.size['d']}-{name}")
    for case in ranking.cases(quick=True)
    for name in ("ours", *case.peers)
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_ranking(benchmark, case, name):
    function = case.ours if name == "ours" else case.peers[name]
    function()
    benchmark.extra_info.update(op=case.op, **case.size)
    benchmark(function)
