# SPDX-License-Identifier: BSD-3-Clause
"""Ctrl-C ends a long op with KeyboardInterrupt, and the next call is as if nothing had been."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

# Each takes many seconds on one thread.
CALLS = {
    "pair_focal_loss": "ops.pair_focal_loss(rows(60000, 8), rows(60000, 8), labels(60000), labels(60000), *network)",
    "pair_ranking_loss": "ops.pair_ranking_loss(rows(200000, 64), labels(200000))",
    "similarity_moments": "ops.similarity_moments(rows(12000, 4096), labels(12000))",
    "aggregate": "ops.aggregate(rows(20000, 64), rows(200000, 64), labels(200000), 10)",
    "laplacian_solve": "ops.laplacian_solve(*path(200000), rhs=rows(200000, 100), rtol=1e-12, max_iter=1000000)",
    "knn_graph": "graph.knn_graph(rows(400000, 64), 50)",
}
CHILD = """
import sys
import torch
from ssmkernels import graph, ops
def rows(n, d):
    return torch.randn(n, d)
def labels(n):
    return torch.randint(10, (n,))
def path(n):
    starts = torch.arange(n + 1).mul(2).sub(1).clamp(0, 2 * n - 2)
    col = torch.stack([torch.arange(n) - 1, torch.arange(n) + 1], 1).flatten()[1:-1]
    return starts, col, torch.ones(2 * n - 2), None, torch.full((n,), 1e-9)
network = rows(128, 16), rows(1, 128)[0], rows(1, 128)[0], torch.tensor(0.5)
def answer():
    return ops.aggregate(torch.eye(3), torch.eye(3), torch.arange(3), 3)
before = answer()
for call in sys.stdin:
    print("started", flush=True)
    try:
        eval(call)
        print("finished", flush=True)
    except KeyboardInterrupt:
        print("interrupted", torch.equal(answer(), before), flush=True)
"""


@pytest.fixture(scope="module")
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that makes the calls which it reads."""
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c(child: subprocess.Popen[str], name: str) -> None:
    assert child.stdin is not None and child.stdout is not None
    print(CALLS[name], file=child.stdin, flush=True)
    assert child.stdout.readline() == "started\n"
    assert not select.select([child.stdout], [], [], 1)[0]  # the op has begun
    child.send_signal(signal.SIGINT)
    assert select.select([child.stdout], [], [], 60)[0]
    assert child.stdout.readline() == "interrupted True\n"
