# SPDX-License-Identifier: BSD-3-Clause
"""The labelled memory buffer of SimMatch (Zheng et al., CVPR 2022) as a module."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ssmkernels import ops
from ssmkernels.distributed import (
    Group,
    RowGather,
    RowShard,
    all_gather_counted,
    is_distributed,
    rank_of,
    split_rows,
    states_are_sharded,
    world_size,
)
from ssmkernels.nn._group import WithGroup
from ssmkernels.ops import _checks as check

Mode = Literal["temporal", "teacher"]


class LabeledMemory(WithGroup):
    """K slots, one per labelled image: its embedding [K, D] and its class [K], both buffers of the module's state.

    Slots are numbered 0 … K−1 by the caller (the place of an image in the labelled set). With ``labels`` given, rows
    are kept sorted by class inside, which turns the class sums of :func:`ssmkernels.ops.instance_matching` into segment
    sums; slot numbers do not change.

    In a step, first read (:meth:`instance_matching`), then write (:meth:`update`). An empty slot is 0; its first update
    sets it to the embedding itself, and a full pass over the labelled set fills the memory.

    On several ranks the memory is one: what any rank writes is written on all, by one collective an update. Either each
    rank has all of it, or, with ``split``, one R-th: K·D/R numbers, for which the queries of all ranks go to every rank
    and partial sums come back. The results are those of one process; every rank has to make every call, also with no
    rows of its own. :meth:`state_dict` and :meth:`features` then collect the whole memory, on every rank, so that a
    state loads on any number of ranks; within :func:`ssmkernels.distributed.sharded_states` a state has this rank's
    part alone.

    Args:
        num_slots: K ≥ 1.
        dim: D ≥ 1.
        num_classes: L ≥ 1.
        labels: [K] int64, the class of each slot, where known beforehand.
        mode: "temporal", for small K: slot ← normalise(momentum·slot + (1 − momentum)·embedding), embeddings from the
            student; "teacher", for large K: slot ← normalise(embedding), embeddings from an EMA teacher.
        momentum: share of the old embedding in "temporal" mode, in [0, 1].
        group: the ranks that share the memory; by default the default group, where there is one.
        split: each rank keeps a part of the slots. The group must exist by then, and stay.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    bank: Tensor
    labels: Tensor
    rows: Tensor

    def __init__(
        self,
        num_slots: int,
        dim: int,
        num_classes: int,
        *,
        labels: Tensor | None = None,
        mode: Mode = "temporal",
        momentum: float = 0.7,
        group: Group = None,
        split: bool = False,
    ) -> None:
        super().__init__()
        num_slots, dim = check.check_count("num_slots", num_slots), check.check_count("dim", dim)
        self.num_classes = check.check_count("num_classes", num_classes)
        check.check_choice("mode", mode, get_args(Mode))
        self.mode = mode
        momentum = check.check_fraction("momentum", momentum)
        self.momentum = momentum if mode == "temporal" else 0.0
        rows = torch.arange(num_slots)
        sorted_labels = torch.zeros(num_slots, dtype=torch.int64)
        if labels is not None:
            check.check_tensor("labels", labels, "[K]", 1)
            check.check_int64("labels", labels)
            check.check_size("labels", labels, 0, num_slots, "num_slots")
            check.check_range("labels", labels, self.num_classes, "the number of classes")
            sorted_labels, order = labels.cpu().sort(stable=True)
            rows[order] = torch.arange(num_slots)
        self.set_group(group)
        self.num_slots = num_slots
        self.split = bool(split) and is_distributed(group)
        self.own = split_rows(num_slots, rank_of(group), world_size(group)) if self.split else slice(0, num_slots)
        self._gather = RowGather()
        self.register_buffer("bank", torch.zeros(self.own.stop - self.own.start, dim))
        self.register_buffer("labels", sorted_labels[self.own].clone())
        self.register_buffer("rows", rows)  # the row of each slot

    @property
    def buffers_differ_between_ranks(self) -> bool:
        """Read by :func:`ssmkernels.distributed.broadcast_buffers`."""
        return self.split

    def instance_matching(
        self,
        query_weak: Tensor,
        query_strong: Tensor,
        probs_weak: Tensor,
        *,
        temperature_weak: float = 0.1,
        temperature_strong: float = 0.1,
        alpha: float = 0.9,
    ) -> ops.InstanceMatching:
        """:func:`ssmkernels.ops.instance_matching` against this memory: queries [B, D], probs_weak [B, L] → p̂ [B, L],
        loss [B].
        """
        for name, query in (("query_weak", query_weak), ("query_strong", query_strong)):
            check.check_tensor(name, query, "[B, D]", 2)
            check.check_floating(name, query)
        check.check_tensor("probs_weak", probs_weak, "[B, L]", 2)
        check.check_size("probs_weak", probs_weak, 1, self.num_classes, "num_classes")
        return ops.instance_matching(
            query_weak.to(self.bank.dtype),
            query_strong.to(self.bank.dtype),
            self.bank,
            self.labels,
            probs_weak,
            temperature_weak=temperature_weak,
            temperature_strong=temperature_strong,
            alpha=alpha,
            group=self.group if self.split else "local",
        )

    @torch.no_grad()
    def update(self, slots: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        """Writes embeddings [B, D] and labels [B] into slots [B] int64; on several ranks those of every rank, in rank
        order. The ranks' B may differ.
        """
        check.check_tensor("slots", slots, "[B]", 1)
        check.check_int64("slots", slots)
        check.check_same_device("slots", slots, "the memory", self.bank)
        check.check_tensor("embeddings", embeddings, "[B, D]", 2)
        check.check_floating("embeddings", embeddings)
        check.check_same_device("embeddings", embeddings, "the memory", self.bank)
        check.check_size("embeddings", embeddings, 0, slots.shape[0], "B of slots")
        check.check_size("embeddings", embeddings, 1, self.bank.shape[1], "dim")
        check.check_tensor("labels", labels, "[B]", 1)
        check.check_int64("labels", labels)
        check.check_size("labels", labels, 0, slots.shape[0], "B of slots")
        check.check_same_device("labels", labels, "the memory", self.bank)
        if check.values_are_checked(slots):
            check.check_range("slots", slots, self.num_slots, "the slots of the memory")
            check.check_range("labels", labels, self.num_classes, "the number of classes")
        slots = slots.resolve_neg()  # torch's indexing ignores the negative bit of an index
        written = [slots, embeddings.to(self.bank.dtype), labels]
        if is_distributed(self.group):
            written = self._gather(written, group=self.group)
        slots, embeddings, labels = written
        rows = self.rows[slots]
        if self.split:
            mine = (rows >= self.own.start) & (rows < self.own.stop)
            rows, embeddings, labels = rows[mine] - self.own.start, embeddings[mine], labels[mine]
        ops.memory_update_(self.bank, self.labels, rows, embeddings, labels, momentum=self.momentum)

    def features(self) -> Tensor:
        """The embeddings in slot order, [K, D], a copy."""
        return self._whole(self.bank)[self.rows]

    def _whole(self, part: Tensor) -> Tensor:
        """The rows of all ranks, of a buffer of which each has a part."""
        if not self.split:
            return part
        ranks = world_size(self.group)
        parts = [split_rows(self.num_slots, rank, ranks) for rank in range(ranks)]
        return all_gather_counted(part, [rows.stop - rows.start for rows in parts], group=self.group)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("bank", "labels"):
            own = destination[prefix + name]
            if self.split and states_are_sharded():
                destination[prefix + name] = RowShard(own)
            else:
                destination[prefix + name] = self._whole(own)

    def _load_from_state_dict(self, state_dict: OrderedDict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes the whole memory, as a tensor or as anything that reads rows, or this rank's part."""
        for name in ("bank", "labels"):
            value: Any = state_dict.get(prefix + name)
            if isinstance(value, RowShard):
                state_dict[prefix + name] = value.rows
            elif getattr(value, "shape", ())[:1] == (self.num_slots,):
                state_dict[prefix + name] = value[self.own]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        sizes = f"num_slots={self.num_slots}, dim={self.bank.shape[1]}, num_classes={self.num_classes}"
        return f"{sizes}, mode={self.mode!r}, momentum={self.momentum}, split={self.split}"
