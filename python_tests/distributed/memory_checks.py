# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch's memory in parts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shards import assert_close, integers, normal, shard
from torch import Tensor
from traffic import counted

from ssmkernels import nn, ops
from ssmkernels.distributed import split_rows

B, D, K, L = 23, 8, 61, 7


def unit(rows: int, seed: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(normal(rows, D, seed=seed, dtype=dtype), dim=1)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, bank, labels in order and p^w, which is 0 on all of some ranks' classes, and in a row on every class."""
    labels = integers(L, K, seed=3).sort().values
    probs = normal(B, L, seed=4, dtype=dtype).softmax(dim=1)
    probs[3] = 0
    probs[4, : L - 1] = 0
    probs[5, 1:] = 0
    return unit(B, 0, dtype), unit(B, 1, dtype), unit(K, 2, dtype), labels, probs


def check_instance_matching(group: dist.ProcessGroup) -> None:
    for dtype in (torch.float32, torch.float64):
        weak, strong, bank, labels, probs = problem(dtype)
        for even in (True, False):
            rows, slots = shard(B, group, even=even), shard(K, group, even=even)
            for scale in (1, 300):  # logits up to 10 and up to 3000
                settings = {"temperature_weak": 0.1 / scale, "temperature_strong": 0.2 / scale, "alpha": 0.7}
                query = strong.clone().requires_grad_()
                whole = ops.instance_matching(weak, query, bank, labels, probs, **settings)
                own_query = strong[rows].clone().requires_grad_()
                own = ops.instance_matching(
                    weak[rows], own_query, bank[slots], labels[slots], probs[rows], **settings, group=group
                )
                assert_close(own.loss, whole.loss[rows].detach())
                assert_close(own.pseudo_probs, whole.pseudo_probs[rows])
                weights = normal(B, seed=5, dtype=dtype)
                (expected,) = torch.autograd.grad((whole.loss * weights).sum(), query)
                (gradient,) = torch.autograd.grad((own.loss * weights[rows]).sum(), own_query)
                torch.testing.assert_close(
                    gradient,
                    expected[rows],
                    rtol=0,
                    atol=expected.abs().max() * (1e-5 if dtype.itemsize == 4 else 1e-10),
                )


def check_traffic_of_instance_matching(group: dist.ProcessGroup) -> None:
    weak, strong, bank, labels, probs = problem(torch.float32)
    ranks, slots = dist.get_world_size(group), shard(K, group)
    rows = 5
    with counted() as (calls, received):
        ops.instance_matching(
            weak[:rows], strong[:rows], bank[slots], labels[slots], probs[:rows], group=group
        ).loss.sum()
    assert calls == {"all_gather": 2, "all_to_all": 1}
    sizes = 5 * 8
    assert received["all_gather"] == (ranks - 1) * (sizes + rows * (2 * D + L) * 4)
    assert received["all_to_all"] == (ranks - 1) * rows * (4 + L + 2 * D) * 4


def check_errors_reach_every_rank(group: dist.ProcessGroup) -> None:
    weak, strong, bank, labels, probs = problem(torch.float32)
    with pytest.raises(ValueError, match="bank must have at least one slot on some rank, got none on any"):
        ops.instance_matching(weak, strong, bank[:0], labels[:0], probs, group=group)
    if dist.get_rank(group) == 1:
        probs = torch.cat([probs, probs], dim=1)
    with pytest.raises(
        ValueError, match=rf"L of probs_weak must be the same on every rank, got \d+ here and \[{L}, 14"
    ):
        ops.instance_matching(weak, strong, bank, labels, probs, group=group)


def check_labeled_memory(group: dist.ProcessGroup) -> None:
    labels = integers(L, K, seed=6)
    for known in (True, False):
        options = {"labels": labels if known else None}
        whole = nn.LabeledMemory(K, D, L, group="local", **options)
        split = nn.LabeledMemory(K, D, L, group=group, split=True, **options)
        replica = nn.LabeledMemory(K, D, L, group=group, **options)
        own = split_rows(K, dist.get_rank(group), dist.get_world_size(group))
        assert split.bank.shape == (own.stop - own.start, D)
        for step in range(3):
            slots, embeddings = integers(K, 40, seed=step), unit(40, 10 + step, torch.float32)
            rows = shard(40, group, even=step == 0)
            whole.update(slots, embeddings, labels[slots])
            for memory in (split, replica):
                with counted() as (calls, _):
                    memory.update(slots[rows], embeddings[rows], labels[slots[rows]])
                if step == 2:  # as many rows as in the step before
                    assert calls == {"all_gather": 1}
        for memory in (split, replica):
            assert memory.features().equal(whole.features())
            for name, value in memory.state_dict().items():
                assert value.equal(whole.state_dict()[name]), name
        _check_state_moves(split, whole, group)
        _check_matching_of_modules(split, whole, group)


def _check_state_moves(split: nn.LabeledMemory, whole: nn.LabeledMemory, group: dist.ProcessGroup) -> None:
    """From parts to one process and back, and through copies."""
    empty = nn.LabeledMemory(K, D, L, group=group, split=True)
    empty.load_state_dict(whole.state_dict())
    assert empty.bank.equal(split.bank)
    file = io.BytesIO()
    torch.save(split, file)
    file.seek(0)
    for other in (copy.deepcopy(split), torch.load(file, weights_only=False)):
        assert other.group.group_name == group.group_name
        assert other.features().equal(whole.features())


def _check_matching_of_modules(split: nn.LabeledMemory, whole: nn.LabeledMemory, group: dist.ProcessGroup) -> None:
    weak, strong, _, _, probs = problem(torch.float32)
    rows = shard(B, group)
    expected = whole.instance_matching(weak, strong, probs)
    own = split.instance_matching(weak[rows], strong[rows], probs[rows])
    assert_close(own.loss, expected.loss[rows])
    assert_close(own.pseudo_probs, expected.pseudo_probs[rows])


def check_on_two_split_memory_inside_a_compiled_function(group: dist.ProcessGroup) -> None:
    memory = nn.LabeledMemory(K, D, L, group=group, split=True)
    labels = integers(L, K, seed=6)
    memory.update(torch.arange(K), unit(K, 2, torch.float32), labels)

    def step(weak: Tensor, strong: Tensor, probs: Tensor) -> Tensor:
        return memory.instance_matching(2 * weak, F.normalize(strong, dim=1), probs).loss.mean() + strong.sum()

    weak, strong, _, _, probs = problem(torch.float32)
    rows = shard(B, group, even=True)
    strong = strong[rows].clone().requires_grad_()
    expected, actual = (
        function(weak[rows], strong, probs[rows]) for function in (step, torch.compile(step, backend="aot_eager"))
    )
    assert_close(actual, expected.detach())
    assert_close(*(torch.autograd.grad(value, strong)[0] for value in (actual, expected)))
