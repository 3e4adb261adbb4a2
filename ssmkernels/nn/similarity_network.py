# SPDX-License-Identifier: BSD-3-Clause
"""The similarity network of MLSN (Wu, Feng and Zhou, Metric Learning by Similarity Network, 2020), and the draws that
feed it.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from ssmkernels import ops
from ssmkernels.ops import _checks as check
from ssmkernels.ops.pairs import Interaction, Reduction


class SimilarityNetwork(nn.Module):
    """S(x_i, y_j) = σ(w2·relu(w1·φ(x_i, y_j) + b1) + b2), the probability that two samples are of one class (section
    2.1).

    The logits of all pairs are made without the features of all pairs, see :func:`ssmkernels.ops.pair_logits`.
    Parameters are w1 [h, 2d] for "concat" and [h, d] otherwise, b1 [h], w2 [h] and b2 [], and start as those of two
    ``nn.Linear`` layers do.

    Args:
        in_features: d, size of the features.
        hidden_features: h, hidden units.
        interaction: φ: "concat", (x_i, y_j), which depends on the order of the two; "absdiff", ``|x_i − y_j|``; or
            "product", x_i∘y_j.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(self, in_features: int, hidden_features: int = 512, interaction: Interaction = "concat") -> None:
        super().__init__()
        in_features, hidden_features = (
            check.check_count("in_features", in_features),
            check.check_count("hidden_features", hidden_features),
        )
        check.check_choice("interaction", interaction, get_args(Interaction))
        self.in_features, self.hidden_features, self.interaction = in_features, hidden_features, interaction
        width = 2 * in_features if interaction == "concat" else in_features
        self.w1 = nn.Parameter(torch.empty(hidden_features, width))
        self.b1 = nn.Parameter(torch.empty(hidden_features))
        self.w2 = nn.Parameter(torch.empty(hidden_features))
        self.b2 = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(−1/√f, 1/√f) for weights and biases, f being the inputs of the layer: the default of ``nn.Linear``."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, y: Tensor, pairs: Tensor | None = None) -> Tensor:
        """Logits [n, m] of all pairs of x [n, d] and y [m, d], or [p] of the ``pairs`` [p, 2] int64 (row of x, row of
        y).
        """
        return ops.pair_logits(x, y, self.w1, self.b1, self.w2, self.b2, interaction=self.interaction, pairs=pairs)

    def focal_loss(
        self,
        x: Tensor,
        y: Tensor,
        x_labels: Tensor,
        y_labels: Tensor,
        *,
        pairs: Tensor | None = None,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """L_S, equations (1) and (2), as focal loss: a pair is positive where its labels are equal.

        Args:
            x, y: features [n, d] and [m, d].
            x_labels, y_labels: [n] and [m] int64; a pair with an ``ignore_index`` counts nowhere.
            pairs: [p, 2] int64 (row of x, row of y); all n·m pairs without.
            alpha, gamma, reduction: of :func:`ssmkernels.ops.pair_focal_loss`.
        """
        return ops.pair_focal_loss(
            x,
            y,
            x_labels,
            y_labels,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            interaction=self.interaction,
            pairs=pairs,
            alpha=alpha,
            gamma=gamma,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def class_probabilities(self, x: Tensor, centers: Tensor) -> Tensor:
        """p_1 … p_K of section 2.2: [n, K], how likely each row of x [n, d] is of the class of each center [K, d], in
        [0, 1].

        "concat" depends on the order of a pair; both orders are averaged. Rows do not sum to 1.
        """
        check.check_tensor("centers", centers, "[K, d]", 2)
        check.check_floating("centers", centers)
        check.check_size("centers", centers, 1, self.in_features, "in_features")
        check.check_same_device("centers", centers, "the weights", self.w1)
        if not check.autocast_is_enabled(centers.device):
            check.check_same_dtype("centers", centers, "the weights", self.w1)
        probs = self(x, centers).sigmoid()
        return (probs + self(centers, x).sigmoid().t()) / 2 if self.interaction == "concat" else probs

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, hidden_features={self.hidden_features}"
        return f"{sizes}, interaction={self.interaction!r}"


def sample_pairs(
    n: int,
    m: int,
    *,
    self_pairs: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """m pairs [m, 2] int64 of 2n rows, n labelled ones and then n unlabelled ones (section 2.3).

    Each is drawn on its own, uniformly from the n² labelled–labelled and the n² unlabelled–unlabelled ordered pairs:
    the labels of both sides are equally trustworthy, and no pair mixes the two. Drawn on the generator's device,
    returned on ``device``.

    Args:
        self_pairs: whether the pairs (i, i) are among them, whose label is always 1; n ≥ 2 without.

    Raises:
        ValueError, TypeError: n ≥ 1 or m ≥ 0 is not an int or out of range; the message names it.
    """
    n = check.check_count("n", n)
    if n == 1 and not self_pairs:
        raise ValueError("n must be at least 2 without self_pairs, got 1")
    partners = n if self_pairs else n - 1
    m = check.check_integer("m", m)
    if m < 0:
        raise ValueError(f"m must be at least 0, got {m}")
    if generator is None:
        drawn = torch.randint(2 * n * partners, (m,), device=device)
    else:
        drawn = torch.randint(2 * n * partners, (m,), generator=generator, device=generator.device)
    half, place = drawn // (n * partners), drawn % (n * partners)
    first, second = place // partners, place % partners
    if not self_pairs:
        second = second + (second >= first)
    rows = torch.stack([first, second], dim=1) + n * half[:, None]
    return rows.to(device)


class ClassCenters(NamedTuple):
    """One sample per class, to which others are compared."""

    features: Tensor
    """[K, d]; 0 where a class has had no sample."""
    present: Tensor
    """[K] bool, whether it has had one."""


@torch.no_grad()
def draw_class_centers(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    previous: ClassCenters | None = None,
    *,
    generator: torch.Generator | None = None,
) -> ClassCenters:
    """The class centers c_1 … c_K of a batch: for every class a random one of its labelled samples (section 2.2).

    A class that the batch lacks keeps its ``previous`` center, as it happens: of 64 rows in 10 classes 1.2 % of the
    batches lack one. The draw is a function of the generator's state and the labels.

    Args:
        features: [n, d].
        labels: [n] int64 in [0, num_classes).
        num_classes: K.
        previous: the centers of the batch before.
        generator: of the draw; its device may be another.

    Raises:
        ValueError, TypeError: an argument is not as said above; the message names it.
    """
    check.check_tensor("features", features, "[n, d]", 2)
    check.check_tensor("labels", labels, "[n]", 1)
    check.check_int64("labels", labels)
    check.check_size("labels", labels, 0, features.shape[0], "n of features")
    check.check_same_device("labels", labels, "features", features)
    num_classes = check.check_count("num_classes", num_classes)
    if previous is None:
        previous = ClassCenters(
            features.new_zeros(num_classes, features.shape[1]),
            torch.zeros(num_classes, dtype=torch.bool, device=features.device),
        )
    if previous.features.shape != (num_classes, features.shape[1]):
        shape = list(previous.features.shape)
        raise ValueError(f"previous must have features [{num_classes}, {features.shape[1]}], got shape {shape}")
    if labels.shape[0] == 0:
        return previous
    # The member with the highest ticket wins its class.
    if generator is None:
        tickets = torch.rand_like(labels, dtype=torch.float32)
    else:
        tickets = torch.rand(labels.shape[0], generator=generator, device=generator.device)
    members = labels == torch.arange(num_classes, device=labels.device)[:, None]
    present = members.any(dim=1)
    chosen = features[torch.where(members, tickets.to(labels.device), -1).argmax(dim=1)].to(previous.features.dtype)
    return ClassCenters(torch.where(present[:, None], chosen, previous.features), present | previous.present)
