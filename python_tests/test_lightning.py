# SPDX-License-Identifier: BSD-3-Clause
"""The callback for Lightning against the same steps by hand."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from ssmkernels.nn import EMATeacher, LabeledMemory

lightning = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and loggers

ROWS, DIM, CLASSES = 24, 6, 3


class Module(lightning.LightningModule):
    def __init__(self, callback):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Sequential(torch.nn.Linear(8, DIM), torch.nn.BatchNorm1d(DIM))
        self.classifier = torch.nn.Linear(DIM, CLASSES)
        self.callback = callback
        self.banks = []

    def training_step(self, batch, batch_idx):
        images, labels, slots = batch
        self.banks.append(self.callback.memory.bank.clone())
        hidden = self.encoder(images)
        self.callback.remember(slots, F.normalize(hidden), labels)
        return F.cross_entropy(self.classifier(hidden), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(ROWS, 8, generator=generator), torch.arange(ROWS) % CLASSES
    return DataLoader(TensorDataset(images, labels, torch.arange(ROWS)), batch_size=4)


def make():
    from ssmkernels.lightning import MemoryAndTeacher

    return MemoryAndTeacher(LabeledMemory(ROWS, DIM, CLASSES), student="encoder", decay=0.75)


def fit(callback, folder, epochs, checkpoint=None, accumulate=1):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )
    module = Module(callback)
    trainer.fit(module, data(), ckpt_path=checkpoint)
    return trainer, module


@pytest.mark.parametrize("accumulate", [1, 4])
def test_memory_and_teacher_are_those_of_a_loop_by_hand(tmp_path, accumulate):
    callback = make()
    _, fitted = fit(callback, tmp_path, 2, accumulate=accumulate)

    module = Module(None)
    teacher, memory = EMATeacher(module.encoder, decay=0.75), LabeledMemory(ROWS, DIM, CLASSES)
    optimizer, banks = module.configure_optimizers(), []
    for _ in range(2):
        batches = [*data()]
        for index, (images, labels, slots) in enumerate(batches):
            banks.append(memory.bank.clone())
            hidden = module.encoder(images)
            (F.cross_entropy(module.classifier(hidden), labels) / accumulate).backward()
            memory.update(slots, F.normalize(hidden.detach()), labels)
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                optimizer.step()
                optimizer.zero_grad()
                teacher.update(module.encoder)
    assert callback.teacher.updates == teacher.updates
    torch.testing.assert_close(callback.teacher.state_dict(), teacher.state_dict())
    torch.testing.assert_close(callback.memory.state_dict(), memory.state_dict())
    torch.testing.assert_close(fitted.banks, banks)  # each step read what the steps before it wrote


def test_a_resumed_run_has_the_memory_and_the_teacher_of_its_checkpoint(tmp_path):
    whole, first, second = make(), make(), make()
    fit(whole, tmp_path, 3)
    trainer, _ = fit(first, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    fit(second, tmp_path, 3, checkpoint=tmp_path / "first.ckpt")
    for name, state in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], state, rtol=0, atol=0)


def test_a_second_fit_keeps_the_teacher(tmp_path):
    callback = make()
    fit(callback, tmp_path, 1)
    before = copy.deepcopy(callback.teacher)
    fit(callback, tmp_path, 1)
    assert callback.teacher.updates == 2 * before.updates


def test_messages(tmp_path):
    from ssmkernels.lightning import MemoryAndTeacher

    with pytest.raises(ValueError, match="decay must be below 1"):
        MemoryAndTeacher(student="encoder", decay=1)
    memory = LabeledMemory(ROWS, DIM, CLASSES)
    with pytest.raises(ValueError, match="student is 'backbone', which is no module of Module"):
        fit(MemoryAndTeacher(memory, student="backbone"), tmp_path, 1)
    with pytest.raises(ValueError, match="there is no memory to remember anything in"):
        MemoryAndTeacher().remember(torch.arange(2), torch.zeros(2, DIM), torch.zeros(2, dtype=torch.int64))


def test_message_without_lightning():
    program = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
try:
    import ssmkernels.lightning
except ModuleNotFoundError as error:
    assert 'pip install "ssmkernels[lightning]"' in str(error)
else:
    raise SystemExit("imported")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
