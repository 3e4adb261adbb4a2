# SPDX-License-Identifier: BSD-3-Clause
"""What the losses with pytorch-metric-learning's calling convention share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssmkernels.distributed import Group, check_group, is_split
from ssmkernels.nn import _metric_learning as package
from ssmkernels.nn import _pair_arguments as pair
from ssmkernels.ops import _checks as check

if TYPE_CHECKING:
    from typing_extensions import Self


class PairLoss(nn.Module):
    """A loss over pairs of embeddings, called as pytorch-metric-learning's are.

    Its ``DistributedLossWrapper`` takes only instances of its ``BaseMetricLossFunction``. Where that package has been
    imported, a loss made here is one, as ``pathlib.Path()`` is a ``PosixPath`` where there are such; nothing else of it
    changes. The package is not imported.

    ``distance``, ``reducer`` and ``embedding_regularizer`` are objects of that package. A subclass computes the usual
    ones itself; with any other the loss is computed by the package's own class of the same name.

    Args:
        ignore_index: rows with this label are in no pair and in no mean; None has no such label.
        distance, reducer: of ``pytorch_metric_learning.distances`` and ``.reducers``; None for the defaults there.
        embedding_regularizer: called with the embeddings; its value times ``embedding_reg_weight`` is added.
        group: the ranks whose rows make pairs.
    """

    _package_loss: nn.Module | None

    # Self, or pyright would take the result for a PairLoss and not look at __init__.
    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        theirs = package.get("losses.BaseMetricLossFunction")
        made: Any = cls if theirs is None or issubclass(cls, theirs) else _subclass_of_both(cls, theirs)
        return super().__new__(made)

    def __init__(
        self,
        ignore_index: int | None,
        distance: nn.Module | None,
        reducer: nn.Module | None,
        embedding_regularizer: nn.Module | None,
        embedding_reg_weight: float,
        group: Group,
    ) -> None:
        nn.Module.__init__(self)  # not theirs, which makes a distance and reducers
        check_group(group)
        self.group = group
        package.check_instance("distance", distance, "distances.BaseDistance")
        package.check_instance("reducer", reducer, "reducers.BaseReducer")
        package.check_instance("embedding_regularizer", embedding_regularizer, "regularizers.BaseRegularizer")
        self.ignore_index = None if ignore_index is None else check.check_integer("ignore_index", ignore_index)
        self.distance, self.reducer = distance, reducer
        self.normalize = distance is None or bool(distance.normalize_embeddings)
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = check.check_number("embedding_reg_weight", embedding_reg_weight)
        self._package_loss = None

    def _leave_to_package(self, path: str, **parameters: float) -> None:
        """Has the loss computed by the package's own class, made with these parameters, distance and reducer."""
        if self.group != "local":
            raise ValueError(
                "group needs a distance and a reducer that the docstring names; for others use the package's"
                f" DistributedLossWrapper (got distance={self.distance}, reducer={self.reducer})"
            )
        if self.ignore_index is not None:
            raise ValueError(
                "ignore_index needs a distance and a reducer that the docstring names; with others, leave those rows"
                f" out of the call (got distance={self.distance}, reducer={self.reducer})"
            )
        self._package_loss = package.get(path)(
            **parameters,
            distance=self.distance,
            reducer=self.reducer,
            embedding_regularizer=self.embedding_regularizer,
            embedding_reg_weight=self.embedding_reg_weight,
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar in float32 (float64 for float64 embeddings), also under autocast; 0, with gradient 0,
        without any pair.

        Where there are at most one positive and one negative pair, the loss is 0, as in pytorch-metric-learning.

        Args:
            embeddings: [n, d], floating point, of any length.
            labels: [n], integers; may be None beside ``indices_tuple``.
            indices_tuple: the pairs to take, from a miner: 3 tensors (anchors, positives, negatives) or 4 (anchors,
                positives, anchors, negatives), each [p], integers.
            ref_emb: [m, d]; pairs are then (row of ``embeddings``, row of ``ref_emb``), and both have a gradient.
            ref_labels: [m], integers; ``labels`` where None and m = n. As in pytorch-metric-learning, (i, i) is a pair
                unless this is the very tensor ``labels``.

        Raises:
            ValueError, TypeError: an argument is not as said above; the message names it.
        """
        arguments = (embeddings, labels, indices_tuple, ref_emb, ref_labels)
        x, y, pairs = pair.check_pair_arguments(*arguments, self.ignore_index)
        if self._package_loss is not None:
            return self._package_loss(*arguments)
        if is_split(self.group):
            self._check_split(indices_tuple, ref_emb)
        loss = self._loss_of_pairs(embeddings, x, y, pairs)
        if self.embedding_regularizer is None:
            return loss
        return loss + self.embedding_reg_weight * self.embedding_regularizer(embeddings)

    def _loss_of_pairs(
        self, embeddings: Tensor, x: Tensor, y: Tensor, pairs: pair.PairIndices | pair.PairLabels
    ) -> Tensor:
        if isinstance(pairs, pair.PairLabels) and is_split(self.group):
            return self._loss_over_ranks(x, pairs.labels)
        if x.shape[0] == 0 or pair.at_most_one_is_listed(pairs):
            return pair.zero_loss(embeddings)
        loss = self._loss(x, y, pairs)
        if isinstance(pairs, pair.PairIndices) or pairs.skip_diagonal or x.shape[0] * y.shape[0] > 2:
            return loss  # by labels alone, a batch has each of its pairs in both orders
        positives, negatives = pair.pair_masks(pairs, x.shape[0], y.shape[0])
        return torch.where((positives.sum() <= 1) & (negatives.sum() <= 1), 0, loss)

    def _loss(self, x: Tensor, y: Tensor, pairs: pair.PairIndices | pair.PairLabels) -> Tensor:
        """Of embeddings and references, at least one of each, which are one tensor where the pairs are within a
        batch.
        """
        raise NotImplementedError

    def _check_split(self, indices_tuple: Sequence[Tensor] | None, ref_emb: Tensor | None) -> None:
        for name, value in (("indices_tuple", indices_tuple), ("ref_emb", ref_emb)):
            if value is not None:
                raise ValueError(f"{name} must be None with a group: its pairs are those of the rows of all ranks")
        if self.embedding_regularizer is not None:
            raise ValueError("embedding_regularizer must be None with a group")

    def _loss_over_ranks(self, x: Tensor, labels: Tensor) -> Tensor:
        """Of the pairs of the rows of all ranks of the group, of which this one has ``x``."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (getattr(type(self), "_made_from", type(self)),), self.__dict__


def _new(cls: type[PairLoss]) -> PairLoss:
    return cls.__new__(cls)


_of_both: dict[tuple[type, type], type] = {}


def _subclass_of_both(cls: type, theirs: type) -> type:
    if (cls, theirs) not in _of_both:
        # Under the name of the first, by which pytorch-metric-learning's other wrappers know which losses they take.
        attributes = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_made_from": cls,
        }
        _of_both[cls, theirs] = type(cls.__name__, (cls, theirs), attributes)
    return _of_both[cls, theirs]
