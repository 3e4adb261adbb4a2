# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the ranking family of ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fuzz import values as v
from fuzz.oracle import Target, Undecided
from fuzz.values import Draw, Number
from hypothesis import strategies as st
from torch import Tensor

from ssmkernels import ops, reference

MARGINS = {"positive_margin": Number((0.0, 0.5, 1, -0.5)), "negative_margin": Number((0.5, 1, 3.0, 0), least=0)}
THRESHOLDS = {
    "positive_threshold": Number((0.5, 0, 0.9, -1, 1), infinite=True),
    "negative_threshold": Number((0.3, 0, -0.2, -1, 1), infinite=True),
}
REDUCTIONS = ("mean_nonzero", "mean", "sum")


def _settings(draw: Draw) -> dict[str, Any]:
    return {
        **{name: number.draw(draw) for name, number in MARGINS.items()},
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }


def draw_pair_ranking_loss(draw: Draw) -> dict[str, Any]:
    rows, others, dim = v.sizes(draw, 3)
    labels = v.classes(draw, (rows,), draw(st.integers(1, 4))) - draw(st.sampled_from([0, 0, 1, 2**62]))
    arguments = {"embeddings": v.values(draw, (rows, dim), v.dtype(draw)), "labels": labels, **_settings(draw)}
    if draw(st.booleans()):
        arguments["references"] = v.values(draw, (others, dim), v.dtype(draw))
        arguments["reference_labels"] = v.classes(draw, (others,), 4)
    return arguments


def draw_mined(draw: Draw) -> dict[str, Any]:
    rows, dim, basis = v.sizes(draw, 3)
    return {
        "embeddings": v.values(draw, (rows, dim), v.dtype(draw)),
        "basis_features": v.values(draw, (rows, basis), v.dtype(draw)),
        **{name: number.draw(draw) for name, number in THRESHOLDS.items()},
        **_settings(draw),
    }


def draw_moments(draw: Draw) -> dict[str, Any]:
    rows, dim = v.sizes(draw, 2)
    return {
        "features": v.values(draw, (rows, dim), v.dtype(draw)),
        "labels": v.classes(draw, (rows,), draw(st.integers(1, 4))),
    }


def _decided(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """The reference in float64, undecided where squares of its differences vanish."""

    def exact(**arguments: Any) -> Any:
        rows = [arguments[name] for name in names if isinstance(arguments.get(name), Tensor)]
        if any(bool(((part != 0) & (part.abs() < 1e-150)).any()) for part in rows):
            raise Undecided
        return function(**arguments)

    return exact


TARGETS = {
    "ops.pair_ranking_loss": Target(
        draw_pair_ranking_loss,
        ops.pair_ranking_loss,
        _decided(reference.pair_ranking_loss, "embeddings", "references"),
        numbers=MARGINS,
        words={"reduction": REDUCTIONS},
        gradient=("embeddings", "references"),
        case="pair_ranking_loss",
    ),
    "ops.mined_pair_ranking_loss": Target(
        draw_mined,
        ops.mined_pair_ranking_loss,
        _decided(reference.mined_pair_ranking_loss, "embeddings"),
        numbers={**MARGINS, **THRESHOLDS},
        words={"reduction": REDUCTIONS},
        gradient=("embeddings",),
        case="mined_pair_ranking_loss",
        lists=("basis_features",),
    ),
    "ops.similarity_moments": Target(
        draw_moments,
        ops.similarity_moments,
        reference.similarity_moments,
        gradient=("features",),
        case="similarity_moments",
    ),
}
