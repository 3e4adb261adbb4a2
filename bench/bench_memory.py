# SPDX-License-Identifier: BSD-3-Clause
"""The memory family under pytest-benchmark: ``pytest bench/bench_memory.py --benchmark-group-by=param:case``.

The cases are those of ``ssmkernels bench memory``, which also measures memory and floors and alternates ours with its
peers.
"""

import pytest

from ssmkernels.bench import memory

CASES = [
    pytest.param(case, name, id=f"{case.op}-B{case.size['B']}-K{case.size['K']}-{name}")
    for case in memory.cases(quick=True)
    for name in ("ours", *case.peers)
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_memory(benchmark, case, name):
    function = case.ours if name == "ours" else case.peers[name]
    function()
    benchmark.extra_info.update(op=case.op, **case.size)
    benchmark(function)
