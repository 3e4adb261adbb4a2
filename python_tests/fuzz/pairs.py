# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the pairs family of ops."""

from __future__ import annotations

from typing import Any

from fuzz import values as v
from fuzz.oracle import Target
from fuzz.values import Draw, Number
from hypothesis import strategies as st

from ssmkernels import ops, reference

WEIGHTS = ("w1", "b1", "w2", "b2")
ALPHA = Number((0.25, 0.5, 0, 1), least=0, most=1, optional=True)
GAMMA = Number((2.0, 0, 1, 0.5, 3), least=0)
IGNORED = Number((-1, 0, -100), integer=True)
WORDS = {"interaction": ("concat", "absdiff", "product")}


def draw_pair_logits(draw: Draw) -> dict[str, Any]:
    dtype, (n, m, dim, hidden) = v.dtype(draw), v.sizes(draw, 4)
    interaction = draw(st.sampled_from(WORDS["interaction"]))
    shapes = {
        "x": (n, dim),
        "y": (m, dim),
        "w1": (hidden, 2 * dim if interaction == "concat" else dim),
        "b1": (hidden,),
        "w2": (hidden,),
    }
    # The halves of a hidden layer, times w2, have to be representable also where the unit is off.
    exponent = v.LARGEST_EXPONENT[dtype] * 2 // 3
    arguments = {name: v.values(draw, shape, dtype, exponent=exponent) for name, shape in (shapes | {"b2": ()}).items()}
    pairs = None
    if n and m and draw(st.booleans()):
        (listed,) = v.sizes(draw, 1)
        pairs = v.classes(draw, (listed, 2), min(n, m))
    return {**arguments, "interaction": interaction, "pairs": pairs}


def draw_pair_focal_loss(draw: Draw) -> dict[str, Any]:
    arguments = draw_pair_logits(draw)
    labels = {f"{name}_labels": v.classes(draw, arguments[name].shape[:1], 3) for name in ("x", "y")}
    return {
        **arguments,
        **labels,
        "alpha": ALPHA.draw(draw),
        "gamma": GAMMA.draw(draw),
        "ignore_index": IGNORED.draw(draw),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }


EMPTY = ("x", "y", "w1", "b1", "w2", "pairs")  # whose bound is known without an entry, too

TARGETS = {
    "ops.pair_logits": Target(
        draw_pair_logits,
        ops.pair_logits,
        reference.pair_logits,
        words=WORDS,
        gradient=("x", "y", *WEIGHTS),
        lists=EMPTY,
        case="pair_logits",
    ),
    "ops.pair_focal_loss": Target(
        draw_pair_focal_loss,
        ops.pair_focal_loss,
        reference.pair_focal_loss,
        numbers={"alpha": ALPHA, "gamma": GAMMA, "ignore_index": IGNORED},
        words={**WORDS, "reduction": ("mean", "sum", "none")},
        gradient=("x", "y", *WEIGHTS),
        lists=(*EMPTY, "x_labels", "y_labels"),
        case="pair_focal_loss",
    ),
}
