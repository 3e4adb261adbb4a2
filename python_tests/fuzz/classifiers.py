# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the scikit-learn estimators: a fit, and predictions of other points."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from fuzz import values as v
from fuzz.contents import Tensors
from fuzz.graphs import SCALE, draw_linked, symmetric
from fuzz.oracle import Finding, Target
from fuzz.propagation import BETA, EXPONENT, MAX_ITER, MU, MU_UNLABELED, RTOL
from fuzz.structure import GAMMA
from fuzz.values import Draw, Number
from hypothesis import strategies as st
from torch import Tensor

from ssmkernels import estimators

SETTINGS = {
    "n_neighbors": Number((2, 1, 50), least=1, integer=True),
    "gamma": GAMMA,
    "mu": MU,
    "mu_unlabeled": MU_UNLABELED,
    "rtol": RTOL,
    "max_iter": MAX_ITER,
}
MIXED = {**SETTINGS, "beta": BETA, "logit_scale": SCALE}
AFFINITIES = ("cosine", "precomputed")


def _draw(numbers: dict[str, Number], affinity: str, draw: Draw) -> dict[str, Any]:
    rows, others, dim = draw(st.integers(2, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dtype = v.dtype(draw, v.WIDE_FLOATS)
    y = v.classes(draw, (rows,), 4, without=("expanded",)) - 1
    y = torch.cat([torch.tensor([0, 1]), y[2:]])
    if affinity == "precomputed":
        points = symmetric(draw, draw_linked(draw, rows), dtype, EXPONENT)
        new = v.values(draw, (others, rows), dtype, least=0, exponent=EXPONENT)
    else:
        points, new = (v.values(draw, (count, dim), dtype, exponent=EXPONENT) for count in (rows, others))
    settings = {name: number.draw(draw) for name, number in numbers.items()}
    return {"X": points, "y": y, "new": new, "affinity": affinity, "balance": draw(st.booleans()), **settings}


def _array(value: Any) -> Any:
    return value.resolve_neg().numpy() if isinstance(value, Tensor) and value.dtype != torch.bfloat16 else value


def _call(estimator: type, *, X: Any, y: Any, new: Any, **settings: Any) -> dict[str, Tensor]:
    made = estimator(**settings).fit(_array(X), _array(y))
    return {
        "classes": torch.from_numpy(made.classes_),
        "distributions": torch.from_numpy(made.label_distributions_),
        "transduction": torch.from_numpy(made.transduction_),
        "confidence": torch.from_numpy(made.confidence_),
        "probs": torch.from_numpy(made.predict_proba(_array(new))),
        "predicted": torch.from_numpy(made.predict(_array(new))),
    }


def _check(arguments: dict[str, Any], results: Tensors) -> None:
    classes = torch.from_numpy(np.unique(np.asarray(_array(arguments["y"]))))
    if not results["classes"].equal(classes[classes != -1].to(results["classes"].dtype)):
        raise Finding(f"the classes are {results['classes']}")
    for name, of in (("transduction", "distributions"), ("predicted", "probs")):
        rows = results[of]
        if not bool(((rows.sum(dim=1) - 1).abs() < 1e-9).all()) or not bool((rows >= 0).all()):
            raise Finding(f"{of} is no distribution: {rows}")
        if not results[name].equal(results["classes"][rows.argmax(dim=1)]):
            raise Finding(f"{name} is not the largest of {of}")
    if not bool(((results["confidence"] >= 0) & (results["confidence"] <= 1)).all()):
        raise Finding(f"confidence is {results['confidence']}")


def _target(estimator: type, numbers: dict[str, Number], affinity: str) -> Target:
    return Target(
        partial(_draw, numbers, affinity),
        partial(_call, estimator),
        holds=_check,
        numbers=numbers,
        words={"affinity": AFFINITIES},
        fixed=("balance",),
        judged_elsewhere=("X", "y", "new"),
        undefined=("rtol", "max_iter", "affinity"),
    )


TARGETS = {
    f"estimators.{estimator.__name__}{'' if affinity == 'cosine' else '.' + affinity}": _target(
        estimator, numbers, affinity
    )
    for affinity in AFFINITIES
    for estimator, numbers in (
        (estimators.LabelPropagation, SETTINGS),
        (estimators.MixedLabelPropagation, MIXED),
    )
}
