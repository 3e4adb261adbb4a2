# SPDX-License-Identifier: BSD-3-Clause
"""The pairs family under pytest-benchmark: ``pytest bench/bench_pairs.py --benchmark-group-by=param:case``.

The cases are those of ``ssmkernels bench pairs --quick``.
"""

import pytest

from ssmkernels.bench import pairs

CASES = [
    pytest.param(
        case,
        name,
        id=f"{case.phase.replace(' ', '-')}-n{case.size['n']}-h{case.size['h']}-p{case.size.get('p', 'all')}-{name}",
    )
    for case in pairs.cases(quick=True)
    for name in ("ours", *case.peers)
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_pairs(benchmark, case, name):
    function = case.ours if name == "ours" else case.peers[name]
    function()
    benchmark.extra_info.update(op=case.op, **case.size)
    benchmark(function)
