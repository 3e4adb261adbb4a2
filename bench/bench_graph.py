# SPDX-License-Identifier: BSD-3-Clause
"""The graph family under pytest-benchmark: ``pytest bench/bench_graph.py --benchmark-group-by=param:case``.

The cases are those of ``ssmkernels bench graph --quick``.
"""

import pytest

from ssmkernels.bench import graph

CASES = [
    pytest.param(
        case,
        name,
        id=f"{case.op}-{case.phase.replace(' ', '-')}-N{case.size['N']}-C{case.size['C']}-{case.dtype}-{name}",
    )
    for case in graph.cases(quick=True)
    for name in ("ours", *case.peers)
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_graph(benchmark, case, name):
    function = case.ours if name == "ours" else case.peers[name]
    function()
    benchmark.extra_info.update(op=case.op, scale=case.peer_scale.get(name, 1.0), **case.size)
    benchmark(function)
