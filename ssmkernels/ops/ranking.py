# SPDX-License-Identifier: BSD-3-Clause
"""The ranking losses and similarity moments of SLADE (Duan et al., CVPR 2021) over all pairs of a batch.

No n×n matrix exists, forward or backward: distances and cosines are computed tile by tile, and memory is O(n·d). The
backward computes again only the tiles in which a pair has a loss. Dtypes: float32 and float64; half types with sums and
results in float32. Autocast leaves the inputs as they are, as it does for torch.cdist. The same input gives the same
bits, for any number of threads. Second derivatives are computed in plain PyTorch, a tile of pairs at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ssmkernels import _library
from ssmkernels.distributed import Group, is_split
from ssmkernels.ops import _autograd as autograd
from ssmkernels.ops import _checks as check
from ssmkernels.ops import _over_ranks as over_ranks
from ssmkernels.ops import _second_order as second_order

__all__ = [
    "SimilarityMoments",
    "mined_pair_ranking_loss",
    "pair_ranking_loss",
    "similarity_moments",
]

Reduction = Literal["mean_nonzero", "mean", "sum"]

REDUCTIONS = get_args(Reduction)


class SimilarityMoments(NamedTuple):
    """Means and population variances of the cosines of pairs with equal and with different labels, four scalars; 0
    without such a pair.
    """

    positive_mean: Tensor
    positive_var: Tensor
    negative_mean: Tensor
    negative_var: Tensor


def pair_ranking_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    reduction: Reduction = "mean_nonzero",
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    group: Group = "local",
) -> Tensor:
    """L_rank, equation (1): Σ [d − m_pos]_+ over pairs with equal labels plus Σ [m_neg − d]_+ over pairs with different
    ones.

    d_ij = ‖e_i − e_j‖₂ of the embeddings as given; scale them to unit length first where the loss is meant for that.
    Over all ordered pairs i ≠ j or, with references, over all pairs (embedding i, reference j). Each of the two sums is
    divided by its number of non-zero terms ("mean_nonzero", as pytorch-metric-learning's ContrastiveLoss does) or of
    pairs ("mean"), and is 0 without any. Differentiable in embeddings and references; the gradient of a distance of 0
    is 0.

    With a group, the pairs are those of the rows of all its ranks together, each of which has some, also none. They go
    round the ranks in blocks, and nothing is sent in the backward. Every rank gets the loss of all pairs, and the
    gradient of its own rows as one process has it; under DDP, which takes the mean over ranks of the gradients of the
    parameters, see :func:`ssmkernels.distributed.for_ddp`. A second derivative then raises.

    Args:
        embeddings: e [n, d].
        labels: [n] int64, any values.
        positive_margin: m_pos; below 0 it adds a constant to the loss of every positive pair.
        negative_margin: m_neg ≥ 0.
        reduction: ``"mean_nonzero"``, ``"mean"`` or ``"sum"``.
        references: [m, d], other embeddings to pair with, such as a memory of earlier batches.
        reference_labels: [m] int64, with references.
        group: the ranks whose rows make pairs: a process group, or None for the default group; not with references.
            "local", the default: the rows given are all, and nothing is communicated.

    Returns:
        A scalar; float64 for float64, otherwise float32.

    Raises:
        TypeError: a dtype or an argument's type is wrong.
        ValueError: a shape, device or value is wrong; the message names it.
    """
    _check_rows("embeddings", embeddings, "[n, d]")
    _check_labels("labels", labels, "[n]", "embeddings", embeddings)
    margins = (
        check.check_number("positive_margin", positive_margin),
        check.check_nonnegative("negative_margin", negative_margin),
    )
    check.check_choice("reduction", reduction, REDUCTIONS)
    if (references is None) != (reference_labels is None):
        missing = "references" if references is None else "reference_labels"
        raise ValueError(f"{missing} must be given too: references and reference_labels come together")
    if is_split(group):
        if references is not None:
            raise ValueError("references must be None with a group: its pairs are those of the rows of all ranks")
        x = _computed(embeddings)
        place, wanted = REDUCTIONS.index(reduction), autograd.is_wanted(embeddings)
        share = over_ranks.pair_ranking_loss(x, labels, margins, place, wanted, group)
        return over_ranks.weighted("pair_ranking_loss", share, x, reduction, group)
    labels, order = labels.sort(stable=True)
    reference_order = None
    if references is not None and reference_labels is not None:
        _check_rows("references", references, "[m, d]")
        check.check_size("references", references, 1, embeddings.shape[1], "d of embeddings")
        check.check_same_device("references", references, "embeddings", embeddings)
        _check_labels("reference_labels", reference_labels, "[m]", "references", references)
        references = check.cast(references, torch.promote_types(embeddings.dtype, references.dtype))
        embeddings = check.cast(embeddings, references.dtype)
        references = _computed(references)
        reference_labels, reference_order = reference_labels.sort(stable=True)
    return autograd.call(
        "pair_ranking_loss",
        _computed(embeddings),
        order,
        labels,
        references,
        reference_order,
        reference_labels,
        *margins,
        REDUCTIONS.index(reduction),
    )[0]


@autograd.fake("pair_ranking_loss")
def _fake_pair_ranking_loss(
    embeddings: Tensor, order: Tensor, labels: Tensor, references: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_ranking_loss(embeddings, references)


@autograd.fake("pair_ranking_loss_backward")
def _fake_pair_ranking_loss_backward(
    grad_loss: Tensor, embeddings: Tensor, order: Tensor, labels: Tensor, references: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = check.compute_dtype(embeddings.dtype)
    others = (
        embeddings.new_empty(0, dtype=dtype)
        if references is None
        else references.new_empty(references.shape, dtype=dtype)
    )
    return embeddings.new_empty(embeddings.shape, dtype=dtype), others


def _save_pair_ranking_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, positive_margin, negative_margin, _ = inputs
    _, weights, active = output
    ctx.margins = positive_margin, negative_margin
    ctx.mark_non_differentiable(weights, active)
    ctx.save_for_backward(*tensors, weights, active)


def _pair_ranking_loss_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, weights, active = ctx.saved_tensors
    rows, references = autograd.call("pair_ranking_loss_backward", grad_loss, *tensors, *ctx.margins, weights, active)
    dtype = tensors[0].dtype
    grad_references = None if tensors[3] is None else check.cast(references, dtype)
    return check.cast(rows, dtype), None, None, grad_references, *[None] * 5


def _save_pair_ranking_loss_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, positive_margin, negative_margin, weights, _ = inputs
    ctx.margins = positive_margin, negative_margin
    if tensors[4] is None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, weights)


def _pair_ranking_loss_second(ctx: Any, v: Tensor | None, v_references: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, rows, order, labels, references, reference_order, reference_labels, weights = ctx.saved_tensors
    labels = other_labels = _in_order_of_rows(order, labels)
    if references is not None:
        other_labels = _in_order_of_rows(reference_order, reference_labels)

    def parts(row_tile: slice, column_tile: slice) -> tuple[Tensor, Tensor]:
        same = labels[row_tile, None] == other_labels[column_tile]
        return same, ~same

    computed = weights.dtype
    others = None if references is None else references.to(computed)
    v = torch.zeros_like(rows, dtype=computed) if v is None else v
    v_references = torch.zeros_like(others) if others is not None and v_references is None else v_references
    coefficients = _coefficients(weights, ctx.margins, parts, references)
    grads = second_order.pair_ranking_loss(v, v_references, grad, rows.to(computed), others, coefficients)
    grad_references = None if grads[2] is None else check.cast(grads[2], references.dtype)
    return grads[0], check.cast(grads[1], rows.dtype), None, None, grad_references, *[None] * 6


autograd.register("pair_ranking_loss", _pair_ranking_loss_backward, _save_pair_ranking_loss)
autograd.register("pair_ranking_loss_backward", _pair_ranking_loss_second, _save_pair_ranking_loss_backward)


def mined_pair_ranking_loss(
    embeddings: Tensor,
    basis_features: Tensor,
    *,
    positive_threshold: float | Tensor,
    negative_threshold: float | Tensor,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    reduction: Reduction = "mean_nonzero",
    group: Group = "local",
) -> Tensor:
    """L_rank of pairs mined by the feature basis, equation (7): positives with s_ij ≥ T1, negatives with s_ij ≤ T2.

    s_ij is the cosine of r_i and r_j, the basis features, to which no gradient flows; the cosine with a row of zeros is
    0. A pair between the thresholds counts nowhere; if T1 ≤ T2 a pair can be both. Everything else as in
    :func:`pair_ranking_loss`.

    Args:
        embeddings: e [n, d].
        basis_features: r = W_a f [n, k], not normalised.
        positive_threshold: T1, a number, or a scalar tensor on the device of the embeddings, which is not read by the
            host.
        negative_threshold: T2, likewise.
        positive_margin, negative_margin, reduction, group: as in :func:`pair_ranking_loss`; with a group the thresholds
            must be the same on every rank.

    Returns:
        A scalar; float64 for float64, otherwise float32.

    Raises:
        TypeError, ValueError: as :func:`pair_ranking_loss`.
    """
    _check_rows("embeddings", embeddings, "[n, d]")
    _check_rows("basis_features", basis_features, "[n, k]")
    check.check_size("basis_features", basis_features, 0, embeddings.shape[0], "n of embeddings")
    check.check_same_device("basis_features", basis_features, "embeddings", embeddings)
    margins = (
        check.check_number("positive_margin", positive_margin),
        check.check_nonnegative("negative_margin", negative_margin),
    )
    check.check_choice("reduction", reduction, REDUCTIONS)
    dtype = torch.promote_types(embeddings.dtype, basis_features.dtype)
    embeddings, basis_features = (
        _computed(check.cast(embeddings, dtype)),
        _computed(check.cast(basis_features.detach(), dtype)),
    )
    thresholds = [
        _threshold(name, value, embeddings)
        for name, value in (("positive_threshold", positive_threshold), ("negative_threshold", negative_threshold))
    ]
    if is_split(group):
        share = over_ranks.mined_pair_ranking_loss(
            embeddings,
            basis_features,
            torch.stack(thresholds),
            margins,
            reduction,
            autograd.is_wanted(embeddings),
            group,
        )
        return over_ranks.weighted("mined_pair_ranking_loss", share, embeddings, reduction, group)
    return autograd.call(
        "mined_pair_ranking_loss",
        embeddings,
        basis_features,
        torch.stack(thresholds),
        *margins,
        REDUCTIONS.index(reduction),
    )[0]


@autograd.fake("mined_pair_ranking_loss")
def _fake_mined_pair_ranking_loss(embeddings: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_ranking_loss(embeddings, None)


@autograd.fake("mined_pair_ranking_loss_backward")
def _fake_mined_pair_ranking_loss_backward(grad_loss: Tensor, embeddings: Tensor, *rest: Any) -> Tensor:
    return embeddings.new_empty(embeddings.shape, dtype=check.compute_dtype(embeddings.dtype))


def _save_mined_pair_ranking_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, basis_features, thresholds, *ctx.margins, _ = inputs
    _, weights, active = output
    ctx.mark_non_differentiable(weights, active)
    ctx.save_for_backward(embeddings, basis_features, thresholds, weights, active)


def _mined_pair_ranking_loss_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    embeddings, basis_features, thresholds, weights, active = ctx.saved_tensors
    saved = (embeddings, basis_features, thresholds, *ctx.margins, weights, active)
    rows = autograd.call("mined_pair_ranking_loss_backward", grad_loss, *saved)
    return check.cast(rows, embeddings.dtype), *[None] * 5


def _save_mined_pair_ranking_loss_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, positive_margin, negative_margin, weights, _ = inputs
    ctx.margins = positive_margin, negative_margin
    ctx.save_for_backward(*tensors, weights)


def _mined_pair_ranking_loss_second(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    grad, rows, basis_features, thresholds, weights = ctx.saved_tensors
    basis = basis_features.to(weights.dtype)
    norms = torch.linalg.vector_norm(basis, dim=1, keepdim=True)
    basis = basis / torch.where(norms < 1e-12, torch.inf, norms)

    def parts(row_tile: slice, column_tile: slice) -> tuple[Tensor, Tensor]:
        cosines = basis[row_tile] @ basis[column_tile].t()
        return cosines >= thresholds[0], cosines <= thresholds[1]

    coefficients = _coefficients(weights, ctx.margins, parts, None)
    grads = second_order.pair_ranking_loss(v, None, grad, rows.to(weights.dtype), None, coefficients)
    return grads[0], check.cast(grads[1], rows.dtype), *[None] * 6


autograd.register("mined_pair_ranking_loss", _mined_pair_ranking_loss_backward, _save_mined_pair_ranking_loss)
autograd.register(
    "mined_pair_ranking_loss_backward", _mined_pair_ranking_loss_second, _save_mined_pair_ranking_loss_backward
)


def similarity_moments(features: Tensor, labels: Tensor, *, group: Group = "local") -> SimilarityMoments:
    """Mean and population variance of the cosines s_ij over all ordered pairs i ≠ j with equal labels, and with
    different ones.

    What the similarity-distribution loss is made of, equations (5) and (6). Between n rows of d features this takes
    O(n·d·min(n, d)): Σ s over a class is ‖Σ r‖² of its unit rows r, and Σ s² is ‖RᵀR‖²_F. Differentiable in the
    features. A row of zeros has a cosine of 0 with any other, and no gradient.

    Args:
        features: [n, d], not normalised.
        labels: [n] int64, any values.
        group: as in :func:`pair_ranking_loss`; the work is then O(n_r·N·d) on a rank with n_r of N rows.

    Returns:
        Four scalars, 0 where there is no such pair; float64 for float64, otherwise float32.

    Raises:
        TypeError, ValueError: as :func:`pair_ranking_loss`.
    """
    _check_rows("features", features, "[n, d]")
    _check_labels("labels", labels, "[n]", "features", features)
    if is_split(group):
        moments, _ = over_ranks.similarity_moments(_computed(features), labels, autograd.is_wanted(features), group)
        return SimilarityMoments(*moments.unbind())
    labels, order = labels.sort(stable=True)
    return SimilarityMoments(*autograd.call("similarity_moments", _computed(features), order, labels).unbind())


@autograd.fake("similarity_moments")
def _fake_similarity_moments(features: Tensor, order: Tensor, labels: Tensor) -> Tensor:
    return features.new_empty(4, dtype=check.compute_dtype(features.dtype))


@autograd.fake("similarity_moments_backward")
def _fake_similarity_moments_backward(grad_moments: Tensor, features: Tensor, *rest: Any) -> Tensor:
    return features.new_empty(features.shape, dtype=check.compute_dtype(features.dtype))


def _save_similarity_moments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _similarity_moments_backward(ctx: Any, grad_moments: Tensor) -> tuple[Tensor | None, ...]:
    features, order, labels, moments = ctx.saved_tensors
    grad = autograd.call("similarity_moments_backward", grad_moments, features, order, labels, moments)
    return check.cast(grad, features.dtype), None, None


def _save_similarity_moments_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _similarity_moments_second(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    # The moments, an input of the gradient, are those of the features: what they add is in the gradient of the
    # features.
    grad, features, order, labels = ctx.saved_tensors
    grads = second_order.similarity_moments(v, grad, features.to(grad.dtype), _in_order_of_rows(order, labels))
    return grads[0], check.cast(grads[1], features.dtype), None, None, None


autograd.register("similarity_moments", _similarity_moments_backward, _save_similarity_moments)
autograd.register("similarity_moments_backward", _similarity_moments_second, _save_similarity_moments_backward)


def _check_rows(name: str, rows: Tensor, shape: str) -> None:
    _library.require(rows)
    check.check_tensor(name, rows, shape, 2)
    check.check_floating(name, rows)


def _check_labels(name: str, labels: Tensor, shape: str, rows_name: str, rows: Tensor) -> None:
    if check.fits(labels, rows.shape[:1], torch.int64, rows.device):
        return
    check.check_tensor(name, labels, shape, 1)
    check.check_int64(name, labels)
    check.check_size(name, labels, 0, rows.shape[0], f"{shape[1]} of {rows_name}")
    check.check_same_device(name, labels, rows_name, rows)


def _threshold(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    dtype = check.compute_dtype(like.dtype)
    if not isinstance(value, Tensor):
        number, largest = check.check_threshold(name, value), torch.finfo(dtype).max
        number = number if -largest <= number <= largest else math.copysign(math.inf, number)
        return torch.full((), number, dtype=dtype, device=like.device)
    check.check_tensor(name, value, "[]", 0)
    check.check_floating(name, value)
    check.check_same_device(name, value, "embeddings", like)
    return value.detach().to(dtype)


def _computed(rows: Tensor) -> Tensor:
    """Half types are computed in float32: on the CPU from a copy, on CUDA the kernels read them."""
    return check.cast(rows, check.compute_dtype(rows.dtype)) if rows.is_cpu else rows


TILE = 32  # kRankingTile of the kernels


def _fake_ranking_loss(embeddings: Tensor, references: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = check.compute_dtype(embeddings.dtype)
    others = embeddings if references is None else references
    tiles = tuple((rows.shape[0] + TILE - 1) // TILE + 1 for rows in (embeddings, others))
    return (
        embeddings.new_empty((), dtype=dtype),
        embeddings.new_empty(2, dtype=dtype),
        embeddings.new_empty(tiles, dtype=torch.uint8),
    )


def _in_order_of_rows(order: Tensor, labels: Tensor) -> Tensor:
    """The label of each row, of labels that are sorted."""
    return torch.zeros_like(labels).scatter(0, order, labels)


def _coefficients(
    weights: Tensor,
    margins: tuple[float, float],
    parts: Callable[[slice, slice], tuple[Tensor, Tensor]],
    references: Tensor | None,
) -> second_order.Coefficients:
    """w₊ on positive pairs with a loss, −w₋ on negative ones; ``parts`` says which pairs of a tile are positive and
    negative.
    """

    def coefficients(rows: slice, columns: slice, distances: Tensor) -> Tensor:
        positives, negatives = parts(rows, columns)
        costs = (positives & (distances > margins[0])) * weights[0] - (negatives & (distances < margins[1])) * weights[
            1
        ]
        if references is not None:
            return costs
        places = (torch.arange(tile.start, tile.stop, device=distances.device) for tile in (rows, columns))
        row_places, column_places = places
        return torch.where(row_places[:, None] == column_places, 0, costs)

    return coefficients
