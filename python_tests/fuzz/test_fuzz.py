# SPDX-License-Identifier: BSD-3-Clause
"""Some examples of every target; ``make fuzz`` runs many more."""

from __future__ import annotations

import pytest
import torch
from fuzz import graphs
from fuzz.oracle import check
from fuzz.targets import TARGETS, example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_call_is_right_or_refused(name):
    @settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        example(data.draw, TARGETS[name])

    run()


def test_a_solve_without_edges_is_judged_by_its_tolerance():
    arguments = {
        **graphs.csr(torch.zeros(2, 2, dtype=torch.bool)),
        "weight": torch.zeros(0),
        "dissimilarity": torch.zeros(0),
        "diagonal": torch.tensor([1.5, 0.3]),
        "rhs": torch.tensor([[20.0], [-2e-7]]),
        "initial": torch.tensor([[1.5], [-0.3]]),  # the second row ends where the first one has converged
        "rtol": 1e-6,
        "max_iter": 1000,
    }
    del arguments["reverse"]
    assert check(TARGETS["ops.laplacian_solve"], arguments)


@pytest.mark.parametrize("classes", [2, 3])
def test_logits_that_cancel_may_differ_by_their_rounding(classes):
    loop = graphs.csr(torch.ones(1, 1, dtype=torch.bool))
    arguments = {
        **loop,
        "weight": torch.tensor([1234.5]),
        "propagated": torch.tensor([[1234.567, -777.77, 333.33]])[:, :classes],
        "logit_scale": 4.0,
    }
    assert check(TARGETS["ops.leave_one_edge_out"], arguments)
