# SPDX-License-Identifier: BSD-3-Clause
"""The labelled memory of SimMatch (Zheng et al., CVPR 2022): instance matching, aggregate, unfold, and the update of
the bank.

Shapes: B rows (unlabelled images), D features, K slots of the bank, L classes. Features are usually L2-normalised;
nothing here assumes it. Dtypes: float32, float64, bfloat16, float16. Results are float32 (float64 for float64),
whatever the inputs. Under ``torch.autocast`` queries and bank are taken in autocast's dtype, probabilities are not. The
same input gives the same bits, for any number of threads.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels import _library, distributed
from ssmkernels.distributed import Group
from ssmkernels.ops import _autograd as autograd
from ssmkernels.ops import _checks as check
from ssmkernels.ops import _second_order as second_order

__all__ = [
    "InstanceMatching",
    "InstanceMatchingPartial",
    "aggregate",
    "finish_instance_matching",
    "instance_matching",
    "instance_matching_partial",
    "memory_update_",
    "merge_instance_matching",
    "unfold",
]


class InstanceMatching(NamedTuple):
    """What :func:`instance_matching` returns."""

    pseudo_probs: Tensor
    """[B, L] p̂ = α p^w + (1 − α) q_agg, no gradient."""
    loss: Tensor
    """[B] cross-entropy of q̂ and q^s, differentiable in ``query_strong``."""


class InstanceMatchingPartial(NamedTuple):
    """What is known after one part of a bank: log-normalisers, and means under the distributions they normalise. No
    gradient.
    """

    log_weak: Tensor
    """[B] log Σ_j e^{w_j}; −inf for an empty part."""
    log_target: Tensor
    """[B] log Σ_j e^{w_j} p^w[y_j]; −inf where p^w is zero on every class of the part, q̂ then being q^w."""
    log_strong: Tensor
    """[B] log Σ_j e^{s_j}."""
    aggregated: Tensor
    """[B, L] class sums of q^w."""
    target_logit: Tensor
    """[B] Σ_j q̂_j s_j."""
    target_mean: Tensor
    """[B, D] Σ_j q̂_j bank_j."""
    strong_mean: Tensor
    """[B, D] Σ_j q^s_j bank_j."""


def instance_matching(
    query_weak: Tensor,
    query_strong: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    probs_weak: Tensor,
    *,
    temperature_weak: float = 0.1,
    temperature_strong: float = 0.1,
    alpha: float = 0.9,
    group: Group = "local",
) -> InstanceMatching:
    r"""Pseudo-labels and instance-matching loss of SimMatch, equations (3)-(10), in one pass over the bank.

    With q^w = softmax(query_weak·bankᵀ / temperature_weak) and q^s likewise:

    - q_agg[b, c] = Σ_{j: label j = c} q^w_j, and ``pseudo_probs`` = α ``probs_weak`` + (1 − α) q_agg;
    - q̂_j ∝ q^w_j ``probs_weak``[label_j], and ``loss`` = −Σ_j q̂_j log q^s_j.

    Nothing of size B×K is stored, forward or backward: extra memory is O(B·(L + D)). Where ``probs_weak`` is zero on
    every class of the bank, q̂ = q^w. The gradient flows to ``query_strong`` only; a second derivative raises.

    With a group, the bank is that of all its ranks together, each of which has a part of the slots and queries of its
    own, in any number, also none. Everything else is as with one process: the queries of all ranks go to every rank by
    one all_gather, the partial sums over each part of the bank come back by one all_to_all. Every rank has to call it.

    Args:
        query_weak: [B, D] embeddings of the weak view.
        query_strong: [B, D] embeddings of the strong view.
        bank: [K, D], K ≥ 1; any strides (a transposed [D, K] buffer works in place).
        bank_labels: [K] int64 in [0, L).
        probs_weak: [B, L] class probabilities of the weak view, ≥ 0.
        temperature_weak: t_w > 0.
        temperature_strong: t_s > 0.
        alpha: α in [0, 1], the share of ``probs_weak`` in the pseudo-label.
        group: the ranks between which the bank is split: a process group, or None for the default group. "local", the
            default: the bank is whole, and nothing is communicated.

    Returns:
        :class:`InstanceMatching`: pseudo_probs [B, L] and loss [B].

    Raises:
        TypeError: a dtype is wrong or differs between queries and bank (outside autocast), or labels are not int64.
        ValueError: a shape, device, temperature, alpha, label or probability is out of range; the message names it.
    """
    _library.require(bank)
    args = _check_matching(
        query_weak, query_strong, bank, bank_labels, probs_weak, temperature_weak, temperature_strong
    )
    alpha = check.check_fraction("alpha", alpha)
    if distributed.is_split(group):
        merged = _match_over_ranks(args, group)
        return finish_instance_matching(
            merged, query_strong, probs_weak, temperature_strong=temperature_strong, alpha=alpha
        )
    if bank.shape[0] == 0:
        raise ValueError(f"bank must have at least one slot, got shape {list(bank.shape)}")
    with_gradient = autograd.is_wanted(args[1])
    pseudo_probs, loss, _ = autograd.call("instance_matching", *args, alpha, with_gradient, check.allow_tf32(args[2]))
    return InstanceMatching(pseudo_probs, loss)


@torch.no_grad()
def _match_over_ranks(args: tuple[Any, ...], group: Group) -> InstanceMatchingPartial:
    """The partial result of this rank's queries over the parts of the bank that the ranks of the group have.

    Args:
        args: of this rank, as :func:`_check_matching` gives them.
    """
    query_weak, query_strong, bank, bank_labels, probs_weak, *temperatures = args
    rows, dim = query_weak.shape
    classes = probs_weak.shape[1]
    names, same = ("D of bank", "the bytes of its numbers", "L of probs_weak"), (dim, bank.element_size(), classes)
    sizes = distributed.gather_sizes([*same, rows, bank.shape[0]], bank.device, group=group)
    distributed.agree_on(names, same, sizes)
    if sum(size[4] for size in sizes) == 0:
        raise ValueError("bank must have at least one slot on some rank, got none on any")
    counts = [size[3] for size in sizes]
    mine = [query_weak, query_strong, probs_weak]
    everyone = distributed.all_gather_counted(distributed.pack_rows(mine), counts, group=group)
    weak, strong, probs = distributed.unpack_rows(everyone, mine)
    partial = torch.ops.ssmkernels.instance_matching_partial.default(
        weak, strong, bank, bank_labels, probs, *temperatures, check.allow_tf32(bank)
    )
    columns = [part if part.ndim == 2 else part[:, None] for part in partial]
    widths = [column.shape[1] for column in columns]
    parts = []
    for received in distributed.exchange_rows(torch.cat(columns, dim=1), counts, group=group):
        of_rank = [
            column if like.ndim == 2 else column[:, 0]
            for column, like in zip(received.split(widths, dim=1), partial, strict=True)
        ]
        parts.append(InstanceMatchingPartial(*of_rank))
    return reduce(merge_instance_matching, parts)


@autograd.fake("instance_matching")
def _fake_instance_matching(
    query_weak: Tensor,
    query_strong: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    probs_weak: Tensor,
    temperature_weak: float,
    temperature_strong: float,
    alpha: float,
    with_gradient: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = check.compute_dtype(query_weak.dtype)
    rows, dim = query_weak.shape
    return (
        bank.new_empty((rows, probs_weak.shape[1]), dtype=dtype),
        bank.new_empty((rows,), dtype=dtype),
        bank.new_empty((rows if with_gradient else 0, dim), dtype=dtype),
    )


def _save_instance_matching(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    pseudo_probs, _, gradient = output
    ctx.mark_non_differentiable(pseudo_probs, gradient)
    ctx.save_for_backward(inputs[1], gradient)


def _instance_matching_backward(
    ctx: Any, grad_probs: Tensor, grad_loss: Tensor, grad_gradient: Tensor
) -> tuple[Tensor | None, ...]:
    query_strong, gradient = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return (None,) * 10
    if gradient.shape[0] != query_strong.shape[0]:
        raise RuntimeError("instance_matching was called with with_gradient=False, so that it has no gradient")
    gradient = autograd.gradient_of("instance_matching", gradient, query_strong)
    return (None, check.cast(grad_loss.unsqueeze(1) * gradient, query_strong.dtype), *[None] * 8)


autograd.register("instance_matching", _instance_matching_backward, _save_instance_matching)


@torch.no_grad()
def instance_matching_partial(
    query_weak: Tensor,
    query_strong: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    probs_weak: Tensor,
    *,
    temperature_weak: float = 0.1,
    temperature_strong: float = 0.1,
) -> InstanceMatchingPartial:
    """:func:`instance_matching` over one part of a bank, to be merged with the other parts.

    For a bank split over chunks, files or ranks: one partial result each, :func:`merge_instance_matching` pairwise,
    then :func:`finish_instance_matching`. Arguments as there; ``bank`` [K, D] may be empty.
    """
    _library.require(bank)
    args = _check_matching(
        query_weak, query_strong, bank, bank_labels, probs_weak, temperature_weak, temperature_strong
    )
    return InstanceMatchingPartial(
        *torch.ops.ssmkernels.instance_matching_partial.default(*args, check.allow_tf32(args[2]))
    )


@autograd.fake("instance_matching_partial")
def _fake_instance_matching_partial(
    query_weak: Tensor,
    query_strong: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    probs_weak: Tensor,
    temperature_weak: float,
    temperature_strong: float,
    allow_tf32: bool,
) -> tuple[Tensor, ...]:
    dtype = check.compute_dtype(query_weak.dtype)
    rows, dim = query_weak.shape
    sizes = ((rows,), (rows,), (rows,), (rows, probs_weak.shape[1]), (rows,), (rows, dim), (rows, dim))
    return tuple(bank.new_empty(size, dtype=dtype) for size in sizes)


autograd.register_vmap("instance_matching_partial")


@torch.no_grad()
def merge_instance_matching(a: InstanceMatchingPartial, b: InstanceMatchingPartial) -> InstanceMatchingPartial:
    """The partial result of two disjoint parts of a bank taken together. Empty parts merge too.

    Raises:
        TypeError, ValueError: one of them is no partial result, or ``b`` is not of the same queries and classes as
            ``a``.
    """
    _check_partial("a", a)
    _check_partial("b", b)
    if [part.shape for part in a] != [part.shape for part in b]:
        raise ValueError(f"b must be of the queries and classes of a, got shapes {_sizes(b)} beside {_sizes(a)}")

    def shares(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest = torch.maximum(log_a, log_b)
        shift = largest.masked_fill(largest.isneginf(), 0)  # −inf where both parts are empty: both shares are 0 then
        a, b = (log_a - shift).exp(), (log_b - shift).exp()
        # Divided by the sum, rather than taken off in the exponent, so that the shares of large logits add up to 1.
        total = a + b
        scale = torch.where(total == 0, 1, total)
        return largest + scale.log(), a / scale, b / scale

    log_weak, weak_a, weak_b = shares(a.log_weak, b.log_weak)
    log_strong, strong_a, strong_b = shares(a.log_strong, b.log_strong)
    log_target, target_a, target_b = shares(a.log_target, b.log_target)
    unknown = log_target.isneginf()  # q̂ is q^w in both parts, so it is in the whole
    target_a, target_b = torch.where(unknown, weak_a, target_a), torch.where(unknown, weak_b, target_b)

    def mix(share_a: Tensor, x: Tensor, share_b: Tensor, y: Tensor) -> Tensor:
        return share_a[:, None] * x + share_b[:, None] * y

    return InstanceMatchingPartial(
        log_weak=log_weak,
        log_target=log_target,
        log_strong=log_strong,
        aggregated=mix(weak_a, a.aggregated, weak_b, b.aggregated),
        target_logit=target_a * a.target_logit + target_b * b.target_logit,
        target_mean=mix(target_a, a.target_mean, target_b, b.target_mean),
        strong_mean=mix(strong_a, a.strong_mean, strong_b, b.strong_mean),
    )


def finish_instance_matching(
    partial: InstanceMatchingPartial,
    query_strong: Tensor,
    probs_weak: Tensor,
    *,
    temperature_strong: float = 0.1,
    alpha: float = 0.9,
) -> InstanceMatching:
    """Pseudo-labels [B, L] and loss [B] once every part of the bank is merged; the gradient flows to ``query_strong``.

    Args:
        partial: the merged result, made with the same queries, probabilities and temperatures.
        query_strong: [B, D], as given to :func:`instance_matching_partial`; only its gradient is used.
        probs_weak: [B, L].
        temperature_strong: t_s > 0.
        alpha: α in [0, 1].

    Raises:
        TypeError, ValueError: as :func:`instance_matching`.
    """
    _check_partial("partial", partial)
    for name, value, shape in (("query_strong", query_strong, "[B, D]"), ("probs_weak", probs_weak, "[B, L]")):
        like, meaning = (partial.strong_mean, "D") if name == "query_strong" else (partial.aggregated, "L")
        check.check_tensor(name, value, shape, 2)
        check.check_floating(name, value)
        check.check_same_device(name, value, "partial", like)
        check.check_size(name, value, 0, like.shape[0], "B of partial")
        check.check_size(name, value, 1, like.shape[1], f"{meaning} of partial")
    temperature_strong = check.check_positive("temperature_strong", temperature_strong)
    alpha = check.check_fraction("alpha", alpha)
    dtype = partial.log_weak.dtype
    pseudo_probs = alpha * probs_weak.detach().to(dtype) + (1 - alpha) * partial.aggregated
    gradient = (partial.strong_mean - partial.target_mean) / temperature_strong
    query = autograd.once_differentiable("instance_matching", query_strong)
    slope = ((query - query_strong.detach()).to(dtype) * gradient).sum(dim=1)  # 0, and ∂loss/∂query_strong its gradient
    return InstanceMatching(pseudo_probs, partial.log_strong - partial.target_logit + slope)


def aggregate(
    query: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, *, temperature: float = 0.1
) -> Tensor:
    """Class sums of the instance similarities, equation (9): out[b, c] = Σ_{j: label j = c} softmax(query·bankᵀ /
    temperature)_j.

    Differentiable in ``query``; the backward sweeps the bank again. Nothing of size B×K is stored. Second derivatives
    are computed in plain PyTorch, a part of the bank at a time.

    Args:
        query: [B, D].
        bank: [K, D], K ≥ 1; any strides.
        bank_labels: [K] int64 in [0, num_classes).
        num_classes: L ≥ 1.
        temperature: > 0.

    Returns:
        [B, L], rows summing to 1.

    Raises:
        TypeError, ValueError: as :func:`instance_matching`.
    """
    _library.require(bank)
    _check_bank("query", query, bank, bank_labels)
    temperature = check.check_positive("temperature", temperature)
    num_classes = check.check_count("num_classes", num_classes)
    if bank.shape[0] == 0:
        raise ValueError(f"bank must have at least one slot, got shape {list(bank.shape)}")
    if check.values_are_checked(bank_labels):
        check.check_range("bank_labels", bank_labels, num_classes, "the number of classes")
    query, bank = check.autocast(query, check.fixed(bank))
    return autograd.call("aggregate", query, bank, bank_labels, num_classes, temperature, check.allow_tf32(bank))[0]


@autograd.fake("aggregate")
def _fake_aggregate(
    query: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, temperature: float, allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    dtype = check.compute_dtype(query.dtype)
    return bank.new_empty((query.shape[0], num_classes), dtype=dtype), bank.new_empty((query.shape[0],), dtype=dtype)


@autograd.fake("aggregate_backward")
def _fake_aggregate_backward(grad_aggregated: Tensor, query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape, dtype=check.compute_dtype(query.dtype))


def _save_aggregate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, bank, bank_labels, _, ctx.temperature, ctx.allow_tf32 = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, bank, bank_labels, *output)


def _aggregate_backward(ctx: Any, grad_aggregated: Tensor, grad_normalizer: Tensor) -> tuple[Tensor | None, ...]:
    query, bank, bank_labels, aggregated, log_normalizer = ctx.saved_tensors
    saved = (query, bank, bank_labels, aggregated, log_normalizer)
    grad_query = autograd.call("aggregate_backward", grad_aggregated, *saved, ctx.temperature, ctx.allow_tf32)
    return (check.cast(grad_query, query.dtype), *[None] * 5)


def _save_aggregate_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_aggregated, query, bank, bank_labels, _, _, ctx.temperature, _ = inputs
    ctx.save_for_backward(grad_aggregated, query, bank, bank_labels)


def _aggregate_backward_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    grad_aggregated, query, bank, bank_labels = ctx.saved_tensors
    grads = second_order.aggregate(v, grad_aggregated, query, bank, bank_labels, ctx.temperature)
    return grads[0], check.cast(grads[1], query.dtype), *[None] * 6


autograd.register("aggregate", _aggregate_backward, _save_aggregate)
autograd.register("aggregate_backward", _aggregate_backward_backward, _save_aggregate_backward)


@torch.no_grad()
def unfold(query: Tensor, bank: Tensor, bank_labels: Tensor, probs: Tensor, *, temperature: float = 0.1) -> Tensor:
    """The calibrated instance similarities q̂, equations (7) and (8), materialised.

    out_j ∝ softmax(query·bankᵀ / temperature)_j probs[label_j].

    For looking at and for other losses; :func:`instance_matching` never stores them. No gradient. Where ``probs`` is
    zero on every class of the bank, q̂ is the softmax itself.

    Args:
        query: [B, D].
        bank: [K, D], K ≥ 1; any strides.
        bank_labels: [K] int64 in [0, L).
        probs: [B, L], ≥ 0.
        temperature: > 0.

    Returns:
        [B, K], rows summing to 1.

    Raises:
        TypeError, ValueError: as :func:`instance_matching`.
    """
    _library.require(bank)
    _check_bank("query", query, bank, bank_labels)
    probs = _check_probs("probs", probs, query, bank_labels)
    temperature = check.check_positive("temperature", temperature)
    if bank.shape[0] == 0:
        raise ValueError(f"bank must have at least one slot, got shape {list(bank.shape)}")
    query, bank = check.autocast(query, bank)
    probs = check.cast(probs, check.compute_dtype(bank.dtype))
    return torch.ops.ssmkernels.unfold.default(query, bank, bank_labels, probs, temperature, check.allow_tf32(bank))


@autograd.fake("unfold")
def _fake_unfold(
    query: Tensor, bank: Tensor, bank_labels: Tensor, probs: Tensor, temperature: float, allow_tf32: bool
) -> Tensor:
    return bank.new_empty((query.shape[0], bank.shape[0]), dtype=check.compute_dtype(query.dtype))


autograd.register_vmap("unfold")


@torch.no_grad()
def memory_update_(
    bank: Tensor, bank_labels: Tensor, index: Tensor, features: Tensor, labels: Tensor, *, momentum: float = 0.7
) -> None:
    """Temporal ensemble of SimMatch, in place: bank[index] ← normalise(momentum·bank[index] + (1 − momentum)·features),
    labels with it.

    An index that occurs twice in a batch is applied in batch order. Read the bank (:func:`instance_matching`) before
    writing it in a step.

    Args:
        bank: [K, D], any strides, without a gradient; written.
        bank_labels: [K] int64; written.
        index: [B] int64 in [0, K), the slot of each row.
        features: [B, D], dtype of the bank.
        labels: [B] int64.
        momentum: share of the old feature, in [0, 1]; 0 replaces the slot.

    Raises:
        TypeError, ValueError: as :func:`instance_matching`, and where features, index or labels share memory with what
            is written, or two slots of the bank do; nothing is written then.
    """
    _library.require(bank)
    check.check_tensor("bank", bank, "[K, D]", 2)
    check.check_floating("bank", bank)
    check.check_tensor("bank_labels", bank_labels, "[K]", 1)
    check.check_size("bank_labels", bank_labels, 0, bank.shape[0], "K of bank")
    check.check_tensor("index", index, "[B]", 1)
    check.check_tensor("features", features, "[B, D]", 2)
    check.check_size("features", features, 1, bank.shape[1], "D of bank")
    check.check_size("features", features, 0, index.shape[0], "B of index")
    check.check_same_dtype("features", features, "bank", bank)
    check.check_tensor("labels", labels, "[B]", 1)
    check.check_size("labels", labels, 0, index.shape[0], "B of index")
    for name, value in (("bank_labels", bank_labels), ("index", index), ("labels", labels)):
        check.check_int64(name, value)
    for name, value in (("bank_labels", bank_labels), ("index", index), ("features", features), ("labels", labels)):
        check.check_same_device(name, value, "bank", bank)
    momentum = check.check_fraction("momentum", momentum)
    check.check_written("bank", bank, {"features": features})
    check.check_written("bank_labels", bank_labels, {"index": index, "labels": labels})
    if check.values_are_checked(index):
        check.check_range("index", index, bank.shape[0], "the slots of bank")
        check.check_at_least_zero("labels", labels)
    torch.ops.ssmkernels.memory_update_.default(bank, bank_labels, index, features, labels, momentum)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((bank, bank_labels))  # autograd then sees that a saved bank has changed


@autograd.fake("memory_update_")
def _fake_memory_update(*arguments: Any) -> None:
    return None


def _check_partial(name: str, value: object) -> None:
    if not isinstance(value, InstanceMatchingPartial):
        raise TypeError(f"{name} must be an InstanceMatchingPartial, got {type(value).__name__}")


def _sizes(partial: InstanceMatchingPartial) -> list[list[int]]:
    return [list(part.shape) for part in partial]


def _check_bank(name: str, query: Tensor, bank: Tensor, bank_labels: Tensor) -> None:
    if check.is_matrix(bank) and bank.dtype in check.FLOATING and check.is_matrix(query):
        slots, dim = bank.shape
        good_query = check.fits(query, (query.shape[0], dim), bank.dtype, bank.device)
        if good_query and check.fits(bank_labels, (slots,), torch.int64, bank.device):
            return
    check.check_tensor(name, query, "[B, D]", 2)
    check.check_tensor("bank", bank, "[K, D]", 2)
    check.check_tensor("bank_labels", bank_labels, "[K]", 1)
    check.check_floating(name, query)
    check.check_floating("bank", bank)
    check.check_int64("bank_labels", bank_labels)
    check.check_same_device(name, query, "bank", bank)
    check.check_same_device("bank_labels", bank_labels, "bank", bank)
    check.check_size(name, query, 1, bank.shape[1], "D of bank")
    check.check_size("bank_labels", bank_labels, 0, bank.shape[0], "K of bank")
    if not check.autocast_is_enabled(bank.device):
        check.check_same_dtype(name, query, "bank", bank)


def _check_probs(name: str, probs: Tensor, query: Tensor, bank_labels: Tensor) -> Tensor:
    check.check_tensor(name, probs, "[B, L]", 2)
    check.check_floating(name, probs)
    check.check_same_device(name, probs, "bank", bank_labels)
    check.check_size(name, probs, 0, query.shape[0], "B of the query")
    if probs.shape[1] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {list(probs.shape)}")
    if check.values_are_checked(bank_labels):
        check.check_range("bank_labels", bank_labels, probs.shape[1], f"the classes of {name}")
        check.check_weights(name, probs)
    return probs


def _check_matching(
    query_weak: Tensor,
    query_strong: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    probs_weak: Tensor,
    temperature_weak: float,
    temperature_strong: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, float]:
    _check_bank("query_weak", query_weak, bank, bank_labels)
    _check_bank("query_strong", query_strong, bank, bank_labels)
    check.check_size("query_strong", query_strong, 0, query_weak.shape[0], "B of query_weak")
    probs_weak = _check_probs("probs_weak", probs_weak, query_weak, bank_labels)
    temperature_weak = check.check_positive("temperature_weak", temperature_weak)
    temperature_strong = check.check_positive("temperature_strong", temperature_strong)
    query_weak, query_strong, bank = check.autocast(check.fixed(query_weak), query_strong, check.fixed(bank))
    probs_weak = check.cast(check.fixed(probs_weak), check.compute_dtype(bank.dtype))
    return query_weak, query_strong, bank, bank_labels, probs_weak, temperature_weak, temperature_strong
