# SPDX-License-Identifier: BSD-3-Clause
"""No step waits for its device: it neither reads a value nor asks for a shape that depends on values.

On a processor there are two exceptions, which the test turns into what a GPU does: the ops check the values of their
arguments, and the optimiser is not fused.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssmkernels import data
from ssmkernels.ops import _checks
from ssmkernels.trainers import (
    MLSN,
    CollectionConfig,
    DataConfig,
    MixedLP,
    MixedLPConfig,
    MLSNConfig,
    RunConfig,
    SimMatch,
    SimMatchConfig,
    Slade,
    SladeConfig,
    SladeDataConfig,
    SwAV,
    SwAVConfig,
)
from ssmkernels.trainers.base import Trainer
from ssmkernels.trainers.loop import make_fabric

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
}

INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
"""They count what is true of a mask."""


class Waits(TorchDispatchMode):
    """Counts the operators for which the host waits for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func in WAITING or masked:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


RUN = RunConfig(accelerator="cpu", bar=False)
LABELS = DataConfig(labels=20)


def simmatch(**settings):
    small = {"model": "convnet-small", "batch_size": 8, "mu": 2, "steps": 3, "first_epoch_steps": 1}
    config = SimMatchConfig(data=LABELS, run=RUN, **small, **settings)
    return SimMatch(config, data.load_dataset("digits"), make_fabric(RUN))


def mlsn():
    config = MLSNConfig(data=LABELS, model="wrn-10-1", batch_size=8, pairs=32, hidden_features=12, steps=3, run=RUN)
    return MLSN(config, data.load_dataset("digits"), make_fabric(RUN))


def mixed_lp():
    collection = CollectionConfig(images_per_class=12)
    config = MixedLPConfig(
        data=collection, model="convnet-small", embedding_dim=8, k=10, batch_size=16, epochs=1, run=RUN
    )
    return MixedLP(config, data.load_collection("digits"), make_fabric(RUN))


def slade():
    images = SladeDataConfig(test_fraction=0.3, folds=3, fold=1, labeled_fraction=0.6)
    config = SladeConfig(data=images, model="convnet-small", embedding_dim=8, k=6, batch_size=16, run=RUN)
    return Slade(config, data.load_collection("digits"), make_fabric(RUN))


def swav():
    config = SwAVConfig(model="convnet-small", num_prototypes=12, batch_size=30, small_size=8, queue_length=60, run=RUN)
    digits = data.first_images(data.load_collection("digits"), 9)
    return SwAV(config, digits, digits, make_fabric(RUN))


TRAINERS = {
    "simmatch": simmatch,
    "simmatch-adamw": lambda: simmatch(optimizer="adamw"),
    "simmatch-teacher": lambda: simmatch(memory="teacher", accumulate=2),
    "mlsn": mlsn,
    "mixed-lp": mixed_lp,
    "slade": slade,
    "swav": swav,
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_reads_nothing(name, monkeypatch):
    monkeypatch.setattr(_checks, "values_are_checked", lambda *tensors: False)
    monkeypatch.setattr(Trainer, "fused", property(lambda trainer: {"fused": True}))
    trainer = TRAINERS[name]()
    batches = iter(trainer.batches(0))
    trainer.step(next(batches), 0)  # makes the state of the optimiser
    batch = next(batches)
    with Waits() as waits:
        trainer.step(batch, 1)
    assert waits.seen == []


def test_reads_are_seen():
    with Waits() as waits:
        torch.ones(3).sum().item()
        torch.arange(3)[torch.tensor([True, False, True])]
    assert waits.seen == [torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor]
