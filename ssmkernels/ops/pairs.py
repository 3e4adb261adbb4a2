# SPDX-License-Identifier: BSD-3-Clause
"""The similarity network of MLSN (Wu, Feng and Zhou, 2020) on pairs of rows, and its focal loss.

logit_ij = w2·relu(w1·φ(x_i, y_j) + b1) + b2, φ being [x_i, y_j] ("concat"), ``|x_i − y_j|`` ("absdiff") or
x_i∘y_j ("product"). Of all n·m pairs or of those listed; no [n, m, h] or [n, m, d] tensor exists, forward or
backward. For "concat", w1·φ + b1 = A_i + B_j with two small matrix products, so that a pair costs O(h), and not O(h·d).
Dtypes: float32 and float64; half types (also under autocast) for x, y and w1, with sums and results in float32. The
same input gives the same bits from run to run, and for any number of threads but for "concat", whose two products are
torch's matrix products. Second derivatives of the logits are computed in plain PyTorch, a tile of pairs at a time;
those of the loss raise.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ssmkernels import _library
from ssmkernels.ops import _autograd as autograd
from ssmkernels.ops import _checks as check
from ssmkernels.ops import _second_order as second_order

__all__ = [
    "pair_focal_loss",
    "pair_logits",
]

Interaction = Literal["concat", "absdiff", "product"]

Reduction = Literal["mean", "sum", "none"]

INTERACTIONS = get_args(Interaction)

REDUCTIONS = get_args(Reduction)


def pair_logits(
    x: Tensor,
    y: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    interaction: Interaction = "concat",
    pairs: Tensor | None = None,
) -> Tensor:
    """Logits of the similarity network, section 2.1 of the paper: w2·relu(w1·φ(x_i, y_j) + b1) + b2.

    Memory is O(n·m) for the result, or O(p), and O((n + m)(d + h)), also in the backward. Differentiable in x, y, w1,
    b1, w2 and b2.

    Args:
        x: [n, d].
        y: [m, d].
        w1: [h, 2d] for "concat", [h, d] for "absdiff" and "product".
        b1: [h].
        w2: [h].
        b2: [].
        interaction: φ: ``"concat"``, ``"absdiff"`` or ``"product"``.
        pairs: [p, 2] int64 rows of x and y, or None for all pairs.

    Returns:
        [n, m], or [p] with ``pairs``; float64 for float64, otherwise float32.

    Raises:
        TypeError: a dtype is wrong, or differs between the arguments (outside autocast).
        ValueError: a shape, device or value is wrong; the message names it.
    """
    return autograd.call("pair_logits", *_network(x, y, w1, b1, w2, b2, interaction, pairs))


@autograd.fake("pair_logits")
def _fake_pair_logits(
    x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, pairs: Tensor | None, interaction: int
) -> Tensor:
    return _fake_values(x, y, w2, pairs)


@autograd.fake("pair_logits_backward")
def _fake_pair_logits_backward(
    grad_logits: Tensor, x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients(x, y, w1, b1, w2, b2, like=w2)


def _pair_logits_backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    inputs = autograd.saved_inputs(ctx)
    return _spread(autograd.call("pair_logits_backward", grad_logits, *inputs), inputs[0].dtype, 0, 2)


def _pair_logits_backward_backward(ctx: Any, *v: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logits, *network, pairs, interaction = autograd.saved_inputs(ctx)
    computed = grad_logits.dtype
    given = zip(v, network, strict=True)
    cotangents = tuple(torch.zeros_like(saved, dtype=computed) if one is None else one for one, saved in given)
    grad, grads = second_order.pair_logits(cotangents, grad_logits, tuple(network), pairs, INTERACTIONS[interaction])
    return grad, *_spread(grads, network[0].dtype, 0, 2)


autograd.register("pair_logits", _pair_logits_backward, autograd.save_inputs)
autograd.register("pair_logits_backward", _pair_logits_backward_backward, autograd.save_inputs)


def pair_focal_loss(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    interaction: Interaction = "concat",
    pairs: Tensor | None = None,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
) -> Tensor:
    """Focal loss of the similarity network, equations (1) to (3) with FL = −α_t (1 − p_t)^γ log p_t as the distance
    (section 2.3).

    The target of a pair is whether its labels match. A pair with an ignored label counts nowhere: its loss is 0, and a
    mean is taken over the others (0 if there is none). With a mean or a sum the gradients are computed along with the
    loss, and memory is O((n + m)(d + h)) whatever the number of pairs. Differentiable in x, y, w1, b1, w2 and b2.

    Args:
        x, y, w1, b1, w2, b2, interaction, pairs: as for :func:`pair_logits`.
        x_labels: [n] int64.
        y_labels: [m] int64.
        alpha: weight of pairs with matching labels, in [0, 1], the others having 1 − alpha; or None to weigh all by 1.
        gamma: γ ≥ 0.
        ignore_index: the label of rows to leave out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar; with "none" [n, m], or [p] with ``pairs``. float64 for float64, otherwise float32.

    Raises:
        TypeError, ValueError: as :func:`pair_logits`.
    """
    for name, labels, rows, size in (("x_labels", x_labels, x, "n of x"), ("y_labels", y_labels, y, "m of y")):
        if check.is_matrix(rows) and check.fits(labels, rows.shape[:1], torch.int64, rows.device):
            continue
        check.check_tensor(name, labels, "[n]" if name == "x_labels" else "[m]", 1)
        check.check_int64(name, labels)
        check.check_tensor(name[0], rows, "[n, d]" if name == "x_labels" else "[m, d]", 2)
        check.check_size(name, labels, 0, rows.shape[0], size)
        check.check_same_device(name, labels, "x", x)
    if alpha is not None:
        alpha = check.check_fraction("alpha", alpha)
    gamma = check.check_nonnegative("gamma", gamma)
    ignore_index = check.check_integer("ignore_index", ignore_index)
    check.check_choice("reduction", reduction, REDUCTIONS)
    rows_x, rows_y, *network = _network(x, y, w1, b1, w2, b2, interaction, pairs)
    args = (rows_x, rows_y, x_labels, y_labels, *network, alpha, gamma, ignore_index)
    if reduction == "none":
        return autograd.call("pair_focal_loss", *args)
    with_gradients = autograd.is_wanted(x, y, w1, b1, w2, b2)
    return autograd.call("pair_focal_loss_sum", *args, reduction == "mean", with_gradients)[0]


@autograd.fake("pair_focal_loss")
def _fake_pair_focal_loss(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    pairs: Tensor | None,
    *rest: Any,
) -> Tensor:
    return _fake_values(x, y, w2, pairs)


@autograd.fake("pair_focal_loss_backward")
def _fake_pair_focal_loss_backward(
    grad_losses: Tensor,
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _fake_gradients(x, y, w1, b1, w2, b2, like=w2)


@autograd.fake("pair_focal_loss_sum")
def _fake_pair_focal_loss_sum(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    with_gradients = rest[-1]
    if with_gradients:
        return w2.new_empty(()), *_fake_gradients(x, y, w1, b1, w2, b2, like=w2)
    return w2.new_empty(()), *(w2.new_empty((0,)) for _ in range(6))


def _pair_focal_loss_backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    inputs = autograd.saved_inputs(ctx)
    return _spread(autograd.call("pair_focal_loss_backward", grad_losses, *inputs), inputs[0].dtype, 2, 5)


def _save_pair_focal_loss_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, _, _, w1, b1, w2, b2, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], x, y, w1, b1, w2, b2)


def _pair_focal_loss_sum_backward(ctx: Any, grad_loss: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under activation checkpointing each is unpacked once
    gradients, network = list(saved[:6]), saved[6:]
    if gradients[0].shape != network[0].shape:
        raise RuntimeError("pair_focal_loss_sum was called with with_gradients=False, so that it has no gradient")
    gradients = [autograd.gradient_of("pair_focal_loss", gradient, *network) for gradient in gradients]
    if torch._C._are_functorch_transforms_active():  # vmap has no rule for _foreach_mul, which is quicker
        scaled = [gradient * grad_loss for gradient in gradients]
    else:
        scaled = list(torch._foreach_mul(gradients, grad_loss))
    return _spread(tuple(scaled), network[0].dtype, 2, 7)


autograd.register_gradient("pair_focal_loss_backward")
autograd.register("pair_focal_loss", _pair_focal_loss_backward, autograd.save_inputs)
autograd.register("pair_focal_loss_sum", _pair_focal_loss_sum_backward, _save_pair_focal_loss_sum)


def _network(
    x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, interaction: str, pairs: Tensor | None
) -> tuple[Any, ...]:
    """The arguments of the kernels."""
    check.check_choice("interaction", interaction, INTERACTIONS)
    _check_network(x, y, w1, b1, w2, b2, interaction)
    if pairs is not None:
        check.check_tensor("pairs", pairs, "[p, 2]", 2)
        check.check_int64("pairs", pairs)
        check.check_size("pairs", pairs, 1, 2, "two rows")
        check.check_same_device("pairs", pairs, "x", x)
        if check.values_are_checked(x):
            for column, (rows, meaning) in enumerate(((x.shape[0], "the rows of x"), (y.shape[0], "the rows of y"))):
                check.check_range(f"pairs[:, {column}]", pairs[:, column], rows, meaning)
    x, y, w1 = check.autocast(x, y, w1)
    dtype = check.compute_dtype(x.dtype)
    b1, w2, b2 = check.cast(b1, dtype), check.cast(w2, dtype), check.cast(b2, dtype)
    if interaction == "concat" or x.is_cpu:
        # For "concat", half types would round the two parts of w1·[x_i, y_j] and turn hidden units on and off that are
        # near 0.
        x, y, w1 = check.cast(x, dtype), check.cast(y, dtype), check.cast(w1, dtype)
    return x, y, w1, b1, w2, b2, pairs, INTERACTIONS.index(interaction)


def _is_network(x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, interaction: str) -> bool:
    if not (check.is_matrix(x) and x.dtype in check.FLOATING and check.is_matrix(y) and check.is_matrix(w1)):
        return False
    dim, hidden, dtype, device = x.shape[1], w1.shape[0], x.dtype, x.device
    return (
        check.fits(y, (y.shape[0], dim), dtype, device)
        and check.fits(w1, (hidden, 2 * dim if interaction == "concat" else dim), dtype, device)
        and check.fits(b1, (hidden,), dtype, device)
        and check.fits(w2, (hidden,), dtype, device)
        and check.fits(b2, (), dtype, device)
    )


def _check_network(x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, interaction: str) -> None:
    _library.require(x)
    if _is_network(x, y, w1, b1, w2, b2, interaction):
        return
    shapes = {"x": ("[n, d]", x), "y": ("[m, d]", y), "w1": ("[h, 2d]" if interaction == "concat" else "[h, d]", w1)}
    shapes |= {"b1": ("[h]", b1), "w2": ("[h]", w2), "b2": ("[]", b2)}
    autocast = isinstance(x, Tensor) and check.autocast_is_enabled(x.device)
    for name, (shape, value) in shapes.items():
        check.check_tensor(name, value, shape, 2 if "," in shape else len(shape) - 2)
        check.check_floating(name, value)
        check.check_same_device(name, value, "x", x)
        if not autocast:
            check.check_same_dtype(name, value, "x", x)
    check.check_size("y", y, 1, x.shape[1], "d of x")
    if interaction == "concat":
        check.check_size("w1", w1, 1, 2 * x.shape[1], "2d of x")
    else:
        check.check_size("w1", w1, 1, x.shape[1], "d of x")
    check.check_size("b1", b1, 0, w1.shape[0], "h of w1")
    check.check_size("w2", w2, 0, w1.shape[0], "h of w1")


def _fake_values(x: Tensor, y: Tensor, w2: Tensor, pairs: Tensor | None) -> Tensor:
    return w2.new_empty((x.shape[0], y.shape[0]) if pairs is None else (pairs.shape[0],))


def _fake_gradients(*tensors: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(tensor.shape) for tensor in tensors)


def _spread(grads: tuple[Tensor, ...], dtype: torch.dtype, labels: int, settings: int) -> tuple[Tensor | None, ...]:
    """Gradients of an op's arguments: x and y, as many labels, the network, and as many settings."""
    x, y, w1, b1, w2, b2 = grads
    x, y, w1 = check.cast(x, dtype), check.cast(y, dtype), check.cast(w1, dtype)
    return x, y, *[None] * labels, w1, b1, w2, b2, *[None] * settings
