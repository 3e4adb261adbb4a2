# SPDX-License-Identifier: BSD-3-Clause
"""Some examples of every target; ``make fuzz`` runs many more."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from fuzz import graphs
from fuzz.oracle import check
from fuzz.targets import TARGETS, example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmkernels import estimators, graph, metrics, nn, ops
from ssmkernels.graph import comparisons

EXAMPLES = 100
MODULES = {
    "ops": ops,
    "graph": graph,
    "graph.comparisons": comparisons,
    "metrics": metrics,
    "estimators": estimators,
    "nn": nn,
}


def public_names(module: ModuleType) -> list[str]:
    """What a module exports: ``__all__``, or else what it defines without an underscore."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def test_everything_public_is_a_target():
    missing = []
    for module_name, module in MODULES.items():
        for name in public_names(module):
            value = getattr(module, name)
            only_holds = hasattr(value, "_fields") or not callable(value)  # a result, or a module
            if not only_holds and f"{module_name}.{name}" not in TARGETS:
                missing.append(f"{module_name}.{name}")
    assert not missing


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_call_is_right_or_refused(name):
    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
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
