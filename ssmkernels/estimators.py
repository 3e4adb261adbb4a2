# SPDX-License-Identifier: BSD-3-Clause
"""Label propagation and mixed label propagation (Zhuang and Moulin, CVPR 2023) as scikit-learn classifiers.

:mod:`ssmkernels.graph` does the work and gives more: graphs made elsewhere, GPUs, float32, dissimilar edges.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmkernels import graph

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("ssmkernels.estimators needs scikit-learn 1.6 or newer: pip install scikit-learn, or 'ssmkernels[train]'") from error

# Similarities in memory at a time in a prediction; 64 MiB of float64.
_CHUNK_ENTRIES = 2**23
# Cosines as close as this are rounded differently in one matrix product and the next: they count as equal.
_TIE = 1e-12


class LabelPropagation(ClassifierMixin, BaseEstimator):
    """Label propagation on a kNN graph, equation (16): labels flow from few labelled points to the unlabelled ones.

    The affinity of two points is the cosine of their angle to the power ``gamma``, 0 where it is negative; scale and origin of the features
    matter accordingly, and a point at the origin is no one's neighbour. Unlabelled points have the label -1 in y; where labels are strings,
    y is of dtype object and -1 the integer. Without unlabelled points, it smooths the labels. Computes in float64 on the CPU.

    Points that no label reaches (in a component of the graph without labels, or without a positive score) have the shares of the classes
    among the labels for a distribution, and so the most frequent class. So have new points without a positive cosine to a training point.

    Args:
        n_neighbors: k ≥ 1 of the graph, and of the training points that a new point is judged by; N − 1 where it is more.
        gamma: > 0, exponent of the affinity (15).
        mu: > 0, how strongly labelled points keep their label.
        mu_unlabeled: ≥ 0, how strongly unlabelled points are drawn to no label; ``mu`` for equation (12).
        balance: give every class of a component the same weight, however many labels it has.
        rtol: > 0, relative tolerance of conjugate gradients; None for 1e-6.
        max_iter: ≥ 1, iterations of conjugate gradients.

    Attributes:
        classes_: [C] the labels there are, sorted.
        label_distributions_: [N, C] scores of the training points, those below 0 as 0, rows summing to 1. Of label propagation, with a
            ``mu`` that is small beside the degrees of the graph, they are close to uniform; their order is what counts.
        transduction_: [N] the class of each training point: the largest of its row above.
        confidence_: [N] in [0, 1], equation (21) of the distribution; 0 where no label reaches.
        n_iter_: iterations of conjugate gradients.
        n_features_in_: d.
        feature_names_in_: [d], where X had names of columns.
    """

    classes_: np.ndarray
    label_distributions_: np.ndarray
    transduction_: np.ndarray
    confidence_: np.ndarray
    n_iter_: int
    _prior: np.ndarray  # [C] shares of the classes among the labels
    _directions: np.ndarray  # [N, d] training points, of length 1

    def __init__(
        self,
        n_neighbors: int = 50,
        *,
        gamma: float = 3.0,
        mu: float = 1 / 99,
        mu_unlabeled: float = 0.0,
        balance: bool = True,
        rtol: float | None = None,
        max_iter: int = 1000,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.gamma = gamma
        self.mu = mu
        self.mu_unlabeled = mu_unlabeled
        self.balance = balance
        self.rtol = rtol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any) -> LabelPropagation:
        """Propagates the labels y [N], -1 where there is none, over the points X [N, d].

        Raises:
            ValueError: X is not finite or has a single row, y has labels of fewer than two classes or no classes at all (numbers that are
                not whole), or a parameter is out of range; the message says which.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        if isinstance(self.n_neighbors, bool) or not isinstance(self.n_neighbors, (int, np.integer)):
            raise TypeError(f"n_neighbors should be an integer, got {self.n_neighbors!r}")
        if self.n_neighbors < 1:
            raise ValueError(f"n_neighbors should be at least 1, got {self.n_neighbors}")
        self.classes_, codes = _encode(y)
        prior = np.bincount(codes[codes >= 0]) / np.count_nonzero(codes >= 0)

        self._prior, self._directions = prior, _unit_rows(X)
        affinity = graph.knn_graph(torch.from_numpy(self._directions), min(int(self.n_neighbors), len(X) - 1), gamma=self.gamma)
        result = self._propagate(affinity, torch.from_numpy(codes))
        distributions = result.probs.numpy()
        distributions[result.pseudo_labels.numpy() < 0] = prior
        self.label_distributions_ = distributions
        self.transduction_ = self.classes_[distributions.argmax(axis=1)]
        self.confidence_ = result.confidence.numpy()
        self.n_iter_ = int(result.iterations.max())
        return self

    def _propagate(self, affinity: graph.Graph, labels: Tensor) -> graph.MixedLabelPropagation:
        # Mixed label propagation without dissimilar edges: scores, confidence and iterations come with it.
        none = torch.zeros_like(affinity.weight)
        return graph.mixed_label_propagation(
            affinity, labels, num_classes=len(self.classes_), beta=0.0, dissimilarity=none, **self._settings()
        )

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("mu", "mu_unlabeled", "balance", "rtol", "max_iter")}

    def predict_proba(self, X: Any) -> np.ndarray:
        """[M, C] distributions over ``classes_`` of points X [M, d]: means of those of the ``n_neighbors`` nearest training points.

        Nearest by cosine; all that are as near as the last of them count. The weights are the affinities (15). A training point is its own
        nearest neighbour here; what was found for it is in ``label_distributions_``.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        directions, distributions = torch.from_numpy(self._directions), torch.from_numpy(self.label_distributions_)
        prior = torch.from_numpy(self._prior)
        k = min(int(self.n_neighbors), len(directions))
        found = []
        for rows in torch.from_numpy(_unit_rows(X)).split(max(1, _CHUNK_ENTRIES // len(directions))):
            cosine = rows @ directions.t()
            last = cosine.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
            weight = torch.where((cosine >= last - _TIE) & (cosine > _TIE), cosine, 0.0) ** self.gamma
            total = weight.sum(dim=1, keepdim=True)
            found.append(torch.where(total > 0, weight @ distributions / total.clamp_min(torch.finfo(total.dtype).tiny), prior))
        return torch.cat(found).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """[M] the most probable class of points X [M, d]: of :meth:`predict_proba`."""
        distributions = self.predict_proba(X)
        return self.classes_[distributions.argmax(axis=1)]


class MixedLabelPropagation(LabelPropagation):
    """Mixed label propagation on a kNN graph, equations (19)-(24): label propagation, then once more with dissimilar edges found by it.

    An edge is dissimilar as far as its two ends confidently get different labels when it is taken away.
    Everything but the two parameters below is as in :class:`LabelPropagation`.

    Args:
        n_neighbors, gamma, mu, mu_unlabeled, balance, rtol, max_iter: as there.
        beta: ≥ 0, weight of dissimilar edges (24).
        logit_scale: > 0, sharpness λ of the labels (20) that dissimilar edges are judged by.
    """

    def __init__(
        self,
        n_neighbors: int = 50,
        *,
        gamma: float = 3.0,
        beta: float = 1.0,
        logit_scale: float = 4.0,
        mu: float = 1 / 99,
        mu_unlabeled: float = 0.0,
        balance: bool = True,
        rtol: float | None = None,
        max_iter: int = 1000,
    ) -> None:
        super().__init__(n_neighbors, gamma=gamma, mu=mu, mu_unlabeled=mu_unlabeled, balance=balance, rtol=rtol, max_iter=max_iter)
        self.beta = beta
        self.logit_scale = logit_scale

    def _propagate(self, affinity: graph.Graph, labels: Tensor) -> graph.MixedLabelPropagation:
        return graph.mixed_label_propagation(affinity, labels, num_classes=len(self.classes_), **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "beta": self.beta, "logit_scale": self.logit_scale}


def _encode(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes [C] of y [N], and which of them each entry is: int64 [N], -1 where it is unlabelled."""
    if y.dtype.kind == "U":
        if "-1" in y:
            raise ValueError("y is of strings and holds '-1'; y should be of dtype object, with the integer -1 where there is no label")
        unlabelled = np.zeros(len(y), dtype=bool)
    elif y.dtype == object:
        unlabelled = np.array([isinstance(label, numbers.Real) and label == -1 for label in y])
    else:
        unlabelled = y == -1
    labels = y[~unlabelled]
    if len(labels) == 0:
        raise ValueError("y should have labels of at least 2 classes, but all of it is -1 (unlabelled)")
    if labels.dtype == object:
        strings = sum(isinstance(label, str) for label in labels)
        if 0 < strings < len(labels):
            raise ValueError("y should have labels that are all strings or all numbers, got both")
        labels = labels if strings else np.array(labels.tolist())
    # Over the whole length: one label per class is no reason to suspect a regression, as it would be in labels alone.
    filled = np.full(len(y), labels[0], dtype=labels.dtype)
    filled[~unlabelled] = labels
    check_classification_targets(filled)
    classes, found = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y should have labels of at least 2 classes, got 1 class: {classes[0]!r}")
    codes = np.full(len(y), -1, dtype=np.int64)
    codes[~unlabelled] = found
    return classes, codes


def _unit_rows(X: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of length 0 as they are."""
    scaled = X / np.maximum(np.abs(X).max(axis=1, keepdims=True), np.finfo(X.dtype).tiny)  # squares neither overflow nor vanish
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), np.finfo(X.dtype).tiny)
