# SPDX-License-Identifier: BSD-3-Clause
"""Bounds of the memory family: softmax of the products of queries and bank, and means under it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bounds.rounding import EXP, Rounding, Softmax, products, softmax


def _class_sums(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    return values.new_zeros(values.shape[0], classes).index_add(1, labels, values)


def _target(logits: Tensor, error: Tensor, labels: Tensor, probs: Tensor, rounding: Rounding) -> tuple[Softmax, Tensor]:
    """q̂ = softmax(w + log p[y]), and in which rows p is not zero on the whole bank: q̂ is the plain softmax in the
    others.

    log p has an error of (EXP + 1)·u of itself, 1 for p where it is rounded to the dtype of the sums; adding it rounds
    once more.
    """
    log_probs = probs[:, labels].log()
    known = log_probs.isfinite().any(1, keepdim=True)
    log_probs = torch.where(known, log_probs, 0.0)
    sums = logits + log_probs
    finite = log_probs.nan_to_num(neginf=0.0)
    added = rounding.unit * ((EXP + 1) * finite.abs() + 1 + (logits + finite).abs())
    return softmax(sums, error + torch.where(known, added, 0.0), rounding), known[:, 0]


def _mean_error(weights: Softmax, bank: Tensor, rounding: Rounding) -> Tensor:
    """Error of Σ_j q_j bank_j: of the weights, of the sum, and of weights that tensor cores take in the half type of
    the bank.
    """
    slots, size = bank.shape[0], bank.abs()
    return (
        weights.error @ size
        + (rounding.gamma(slots + 3) + weights.sum_error + rounding.half) * (weights.probs @ size)
        + rounding.tiny
    )


def _unit_inputs(inputs: dict[str, Any], *names: str) -> list[Tensor]:
    return [inputs[name].double() for name in names]


def unfold(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """q̂: the relative error of a softmax, and what is flushed to 0."""
    query, bank, probs = _unit_inputs(inputs, "query", "bank", "probs")
    rounding = Rounding.of(inputs["bank"].dtype)
    logits, error = products(query, bank, rounding, scale=1 / inputs.get("temperature", 0.1))
    target, _ = _target(logits, error, inputs["bank_labels"], probs, rounding)
    return {"unfolded": target.error}


def aggregate(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """out_c = Σ q_j over the slots of c; ∂query = Σ_j q_j (g_{y_j} − Σ_c g_c out_c) bank_j/t."""
    query, bank = _unit_inputs(inputs, "query", "bank")
    labels, classes, temperature = inputs["bank_labels"], inputs["num_classes"], inputs.get("temperature", 0.1)
    rounding = Rounding.of(inputs["bank"].dtype)
    logits, error = products(query, bank, rounding, scale=1 / temperature)
    q = softmax(logits, error, rounding)
    sums = _class_sums(q.probs, labels, classes)
    sums_error = _class_sums(q.error, labels, classes) + q.sum_error * sums
    bounds = {"aggregated": sums_error}
    if "aggregated" in grads:
        g = grads["aggregated"].double()
        mean = (g * sums).sum(1, keepdim=True)
        mean_error = (g.abs() * sums_error).sum(1, keepdim=True) + rounding.gamma(classes + 2) * (g.abs() * sums).sum(
            1, keepdim=True
        )
        slope, own = (g - mean)[:, labels], g.abs()[:, labels]
        weight = q.error * slope.abs() + q.probs * (1 + q.relative) * (
            mean_error + 3 * rounding.unit * (own + mean.abs())
        )
        size = bank.abs()
        total = weight @ size + (rounding.gamma(bank.shape[0] + 4) + rounding.half) * (
            (q.probs * (own + mean.abs())) @ size
        )
        bounds["grad query"] = rounding.stored(
            (q.probs * slope) @ bank / temperature, total / temperature + rounding.tiny / temperature
        )
    return bounds


def instance_matching_partial(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log-normalisers, class sums and means under q^w, q̂ and q^s."""
    return _matching(inputs)[0]


def instance_matching(inputs: dict[str, Any], grads: dict[str, Tensor], *, parts: int = 1) -> dict[str, Tensor]:
    """pseudo_probs = α p + (1 − α) q_agg; loss = log Σ e^s − Σ q̂ s; ∂query_strong = g (mˢ − m̂)/t_s."""
    partial, values, rounding = _matching(inputs, parts=parts)
    probs, alpha = inputs["probs_weak"].double(), inputs.get("alpha", 0.9)
    temperature = inputs.get("temperature_strong", 0.1)
    mixed = alpha * probs + (1 - alpha) * values["aggregated"]
    loss = values["log_strong"] - values["target_logit"]
    bounds = {
        # Six roundings: p, α, 1 − α, both products, the sum; 1 − α is taken of the rounded α, so its error is one of α.
        "pseudo_probs": (1 - alpha) * partial["aggregated"]
        + rounding.gamma(6) * mixed
        + 2 * rounding.unit * alpha * values["aggregated"],
        "loss": partial["log_strong"] + partial["target_logit"] + rounding.unit * loss.abs(),
    }
    if "loss" in grads:
        g = grads["loss"].double().abs()[:, None] / temperature
        slope = values["strong_mean"] - values["target_mean"]
        error = partial["strong_mean"] + partial["target_mean"] + rounding.gamma(4) * slope.abs()
        bounds["grad query_strong"] = rounding.stored(g * slope, g * error)
    return bounds


def merge_instance_matching(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Partial results of two parts, merged and finished: those of the whole, and two roundings of every log-normaliser.

    The share of a part is e^{log_a − log_b} of the other's, whose exponent has the error of both log-normalisers.
    """
    return instance_matching({name: value for name, value in inputs.items() if name != "split"}, grads, parts=2)


def _matching(inputs: dict[str, Any], *, parts: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor], Rounding]:
    """Bounds and exact values of the partial result."""
    weak, strong, bank, probs = _unit_inputs(inputs, "query_weak", "query_strong", "bank", "probs_weak")
    labels, classes = inputs["bank_labels"], probs.shape[1]
    rounding = Rounding.of(inputs["bank"].dtype)
    w, w_error = products(weak, bank, rounding, scale=1 / inputs.get("temperature_weak", 0.1))
    s, s_error = products(strong, bank, rounding, scale=1 / inputs.get("temperature_strong", 0.1))
    if parts > 1:
        merged = [4 * (parts - 1) * rounding.unit * (logits.abs().amax(1, keepdim=True) + 4) for logits in (w, s)]
        w_error, s_error = w_error + merged[0], s_error + merged[1]
    q_weak, q_strong = softmax(w, w_error, rounding), softmax(s, s_error, rounding)
    q_target, known = _target(w, w_error, labels, probs, rounding)
    slots = bank.shape[0]
    sums = _class_sums(q_weak.probs, labels, classes)
    size = (q_target.probs * s.abs()).sum(1)
    values = {
        "log_weak": q_weak.log_normalizer,
        "log_target": torch.where(known, q_target.log_normalizer, -torch.inf),
        "log_strong": q_strong.log_normalizer,
        "aggregated": sums,
        "target_logit": (q_target.probs * s).sum(1),
        "target_mean": q_target.probs @ bank,
        "strong_mean": q_strong.probs @ bank,
    }
    bounds = {
        "log_weak": q_weak.log_error,
        "log_target": torch.where(known, q_target.log_error, 0.0),
        "log_strong": q_strong.log_error,
        "aggregated": _class_sums(q_weak.error, labels, classes) + q_weak.sum_error * sums + slots * rounding.tiny,
        # Σ_j q̂_j s_j: of the weights, of the logits, and of the sum.
        "target_logit": (q_target.error * s.abs() + q_target.probs * s_error).sum(1)
        + (rounding.gamma(slots + 3) + q_target.sum_error) * size,
        "target_mean": _mean_error(q_target, bank, rounding),
        "strong_mean": _mean_error(q_strong, bank, rounding),
    }
    return bounds, values, rounding


def memory_update_(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Slot ← mixed/‖mixed‖, mixed = m·old + (1 − m)·new.

    mixed has an error of 3u(m|old| + (1 − m)|new|) per element, and of the smallest normal number, below which results
    may be flushed; its norm has one of their length and γ_{D+3} of itself (the sum may be in the dtype of the bank). A
    slot written again in the same batch starts from a rounded one, so errors add up over its writes.
    """
    rounding = Rounding.of(inputs["bank"].dtype)
    bank, features, momentum = inputs["bank"].double().clone(), inputs["features"].double(), inputs.get("momentum", 0.7)
    error = torch.zeros_like(bank)
    for row, slot in enumerate(inputs["index"].tolist()):
        size = momentum * bank[slot].abs() + (1 - momentum) * features[row].abs()
        mixed = momentum * bank[slot] + (1 - momentum) * features[row]
        mixed_error = momentum * error[slot] + rounding.gamma(3) * size + rounding.tiny
        norm = torch.linalg.vector_norm(mixed).clamp_min(1e-12)
        norm_error = (mixed.abs() * mixed_error).sum() / norm + rounding.gamma(bank.shape[1] + 3) * norm
        bank[slot] = mixed / norm
        error[slot] = (mixed_error + bank[slot].abs() * norm_error) / norm + rounding.gamma(2) * bank[slot].abs()
        error[slot] = rounding.stored(bank[slot], error[slot])
    return {"bank": error, "bank_labels": torch.zeros_like(inputs["bank_labels"], dtype=torch.float64)}
