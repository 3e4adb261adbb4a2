# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the memory family of ops."""

from __future__ import annotations

from typing import Any

import torch
from fuzz import values as v
from fuzz.oracle import Target
from fuzz.values import Draw, Number
from hypothesis import strategies as st
from torch import Tensor

from ssmkernels import ops, reference

TEMPERATURE = Number((0.1, 0.02, 1.0, 2, 1e-4), least=0, above=True)
SHARE = Number((0.9, 0.7, 0, 1, 0.5), least=0, most=1)


def _bank(draw: Draw, dtype: torch.dtype, sizes: tuple[int, int, int]) -> dict[str, Any]:
    slots, dim, classes = sizes
    return {"bank": v.values(draw, (slots, dim), dtype), "bank_labels": v.classes(draw, (slots,), classes)}


def _temperatures(draw: Draw) -> dict[str, Any]:
    return {name: TEMPERATURE.draw(draw) for name in ("temperature_weak", "temperature_strong")}


def draw_matching(draw: Draw, *, least_slots: int = 1) -> dict[str, Any]:
    dtype, (rows, dim) = v.dtype(draw), v.sizes(draw, 2)
    slots, classes = v.sizes(draw, 2, least=least_slots)
    classes = max(classes, 1)
    return {
        "query_weak": v.values(draw, (rows, dim), dtype),
        "query_strong": v.values(draw, (rows, dim), dtype),
        **_bank(draw, dtype, (slots, dim, classes)),
        "probs_weak": v.values(draw, (rows, classes), v.dtype(draw, (dtype, torch.float32, torch.bfloat16)), least=0),
        **_temperatures(draw),
    }


def _draw_instance_matching(draw: Draw) -> dict[str, Any]:
    return {**draw_matching(draw), "alpha": SHARE.draw(draw)}


def _draw_partial(draw: Draw) -> dict[str, Any]:
    return draw_matching(draw, least_slots=0)


def _exact_partial(**arguments: Any) -> Any:
    if len(arguments["bank"]):
        return reference.instance_matching_partial(**arguments)
    (rows, dim), classes = arguments["query_weak"].shape, arguments["probs_weak"].shape[1]
    minus = torch.full((rows,), -torch.inf, dtype=torch.float64)
    none = torch.zeros(rows, dim, dtype=torch.float64)
    return ops.InstanceMatchingPartial(
        minus, minus, minus, none.new_zeros(rows, classes), minus.new_zeros(rows), none, none
    )


def _draw_parts(draw: Draw) -> dict[str, Any]:
    arguments = _draw_partial(draw)
    split = draw(st.integers(0, len(arguments["bank"])))
    parts = {}
    for name, part in (("a", slice(0, split)), ("b", slice(split, None))):
        cut = {key: arguments[key][part] for key in ("bank", "bank_labels")}
        parts[name] = ops.instance_matching_partial(**(arguments | cut))
    return parts


def _exact_merge(a: Any, b: Any) -> Any:
    """Means weighted by the shares of the two parts, which sum to 1."""

    def shares(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([log_a, log_b])
        return tuple(torch.where(both.isneginf().all(dim=0), 0, both.softmax(dim=0)).unbind())

    def mixed(weights: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return weights[0][:, None] * x + weights[1][:, None] * y

    weak, strong, target = (
        shares(getattr(a, name), getattr(b, name)) for name in ("log_weak", "log_strong", "log_target")
    )
    log_target = torch.logaddexp(a.log_target, b.log_target)
    target = tuple(torch.where(log_target.isneginf(), w, t) for w, t in zip(weak, target, strict=True))
    return ops.InstanceMatchingPartial(
        torch.logaddexp(a.log_weak, b.log_weak),
        log_target,
        torch.logaddexp(a.log_strong, b.log_strong),
        mixed(weak, a.aggregated, b.aggregated),
        mixed(target, a.target_logit[:, None], b.target_logit[:, None])[:, 0],
        mixed(target, a.target_mean, b.target_mean),
        mixed(strong, a.strong_mean, b.strong_mean),
    )


def _draw_finish(draw: Draw) -> dict[str, Any]:
    arguments = draw_matching(draw)
    return {
        "partial": ops.instance_matching_partial(**arguments),
        **{name: arguments[name] for name in ("query_strong", "probs_weak", "temperature_strong")},
        "alpha": SHARE.draw(draw),
    }


def _exact_finish(
    partial: Any, query_strong: Tensor, probs_weak: Tensor, temperature_strong: float, alpha: float
) -> Any:
    slope = (partial.strong_mean - partial.target_mean) / temperature_strong
    loss = partial.log_strong - partial.target_logit + ((query_strong - query_strong.detach()) * slope).sum(dim=1)
    return ops.InstanceMatching(alpha * probs_weak + (1 - alpha) * partial.aggregated, loss)


def _draw_aggregate(draw: Draw) -> dict[str, Any]:
    dtype, (rows, dim) = v.dtype(draw), v.sizes(draw, 2)
    slots, classes = v.sizes(draw, 2, least=1)
    bank = _bank(draw, dtype, (slots, dim, classes))
    return {
        "query": v.values(draw, (rows, dim), dtype),
        **bank,
        "num_classes": classes,
        "temperature": TEMPERATURE.draw(draw),
    }


def _draw_unfold(draw: Draw) -> dict[str, Any]:
    arguments = draw_matching(draw)
    return {
        "query": arguments["query_weak"],
        "bank": arguments["bank"],
        "bank_labels": arguments["bank_labels"],
        "probs": arguments["probs_weak"],
        "temperature": arguments["temperature_weak"],
    }


def _draw_update(draw: Draw) -> dict[str, Any]:
    dtype, (rows, dim) = v.dtype(draw), v.sizes(draw, 2)
    (slots,) = v.sizes(draw, 1, least=1)
    return {
        "bank": v.values(draw, (slots, dim), dtype, without=v.WRITTEN),
        "bank_labels": v.classes(draw, (slots,), 5, without=v.WRITTEN),
        "index": v.classes(draw, (rows,), slots),
        "features": v.values(draw, (rows, dim), dtype),
        "labels": v.classes(draw, (rows,), 5),
        "momentum": SHARE.draw(draw),
    }


MATCHING = {"temperature_weak": TEMPERATURE, "temperature_strong": TEMPERATURE}
TARGETS = {
    "ops.instance_matching": Target(
        _draw_instance_matching,
        ops.instance_matching,
        reference.instance_matching,
        normalized=("pseudo_probs",),
        numbers={**MATCHING, "alpha": SHARE},
        gradient=("query_strong",),
        case="instance_matching",
    ),
    "ops.instance_matching_partial": Target(
        _draw_partial,
        ops.instance_matching_partial,
        _exact_partial,
        normalized=("aggregated",),
        numbers=MATCHING,
        case="instance_matching_partial",
    ),
    "ops.merge_instance_matching": Target(_draw_parts, ops.merge_instance_matching, _exact_merge),
    "ops.finish_instance_matching": Target(
        _draw_finish,
        ops.finish_instance_matching,
        _exact_finish,
        numbers={"temperature_strong": TEMPERATURE, "alpha": SHARE},
        gradient=("query_strong",),
    ),
    "ops.aggregate": Target(
        _draw_aggregate,
        ops.aggregate,
        reference.aggregate,
        normalized=("value",),
        numbers={"num_classes": Number((1,), least=1, integer=True, shapes=True), "temperature": TEMPERATURE},
        gradient=("query",),
        case="aggregate",
    ),
    "ops.unfold": Target(
        _draw_unfold, ops.unfold, reference.unfold, numbers={"temperature": TEMPERATURE}, case="unfold"
    ),
    "ops.memory_update_": Target(
        _draw_update,
        ops.memory_update_,
        reference.memory_update_,
        numbers={"momentum": SHARE},
        writes=("bank", "bank_labels"),
        case="memory_update_",
    ),
}
