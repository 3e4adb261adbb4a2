# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmkernels import reference
from ssmkernels.nn import LabeledMemory

K, D, L, B = 40, 8, 4, 12


def unit(rows, seed):
    return F.normalize(torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def labels_of_slots():
    return torch.randint(0, L, (K,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("known", [False, True], ids=["labels unknown", "labels known"])
@pytest.mark.parametrize("mode", ["temporal", "teacher"])
def test_acts_as_a_plain_bank(mode, known):
    """Whatever order rows have inside, slots and results are those of a plain [K, D] buffer."""
    labels = labels_of_slots()
    memory = LabeledMemory(K, D, L, labels=labels if known else None, mode=mode)
    bank, bank_labels = torch.zeros(K, D), labels.clone() if known else torch.zeros(K, dtype=torch.int64)
    for step in range(6):
        slots = torch.randint(0, K, (B,), generator=torch.Generator().manual_seed(step))
        embeddings = unit(B, step)
        memory.update(slots, embeddings, labels[slots])
        reference.memory_update_(
            bank,
            bank_labels,
            slots,
            embeddings,
            labels[slots],
            momentum=0.7 if mode == "temporal" else 0.0,
        )
    torch.testing.assert_close(memory.features(), bank)
    weak, strong, probs = unit(B, 7), unit(B, 8).requires_grad_(), torch.rand(B, L).softmax(1)
    ours = memory.instance_matching(weak, strong, probs, alpha=0.8)
    expected = reference.instance_matching(weak, strong, bank, bank_labels, probs, alpha=0.8)
    torch.testing.assert_close(ours.pseudo_probs, expected.pseudo_probs)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(*(torch.autograd.grad(out.loss.sum(), strong)[0] for out in (ours, expected)))


def test_known_labels_are_kept_sorted():
    memory = LabeledMemory(K, D, L, labels=labels_of_slots())
    memory.update(torch.arange(K), unit(K, 1), labels_of_slots())
    assert memory.labels.equal(memory.labels.sort().values)
    torch.testing.assert_close(memory.features(), unit(K, 1))


def test_first_update_of_an_empty_slot_is_the_embedding():
    memory = LabeledMemory(K, D, L)
    memory.update(torch.arange(K), unit(K, 2), labels_of_slots())
    torch.testing.assert_close(memory.features(), unit(K, 2))


def test_bad_arguments():
    for arguments, message in [
        ((0, D, L), "num_slots must be at least 1, got 0"),
        ((K, 0, L), "dim must be at least 1, got 0"),
        ((K, D, 0), "num_classes must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LabeledMemory(*arguments)
    with pytest.raises(ValueError, match="mode must be 'temporal' or 'teacher', got 'queue'"):
        LabeledMemory(K, D, L, mode="queue")
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 2"):
        LabeledMemory(K, D, L, momentum=2)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
        LabeledMemory(K, D, L, labels=labels_of_slots() + 1)


def test_bad_updates_write_nothing():
    memory = LabeledMemory(K, D, L, labels=labels_of_slots())
    before = memory.bank.clone()
    slots, fresh = torch.arange(B), torch.zeros(B, dtype=torch.int64)
    for arguments, error, message in [
        ((slots + K, unit(B, 1), fresh), ValueError, r"slots must be in \[0, 40\)"),
        ((slots.int(), unit(B, 1), fresh), TypeError, "slots must be int64"),
        ((slots, unit(B, 1)[:, :3], fresh), ValueError, "embeddings must have dim = 8"),
        ((slots, unit(B, 1), fresh + L), ValueError, r"labels must be in \[0, 4\)"),
        ((slots, unit(B, 1)[:4], fresh), ValueError, "embeddings must have B of slots = 12"),
    ]:
        with pytest.raises(error, match=message):
            memory.update(*arguments)
    assert memory.bank.equal(before)
    with pytest.raises(ValueError, match="probs_weak must have num_classes = 4"):
        memory.instance_matching(unit(B, 1), unit(B, 2), torch.rand(B, L + 1))
