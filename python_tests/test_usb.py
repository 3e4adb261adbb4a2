# SPDX-License-Identifier: BSD-3-Clause
"""examples/usb/simmatch_kernels.py on a stand-in for the parts of USB that it uses, which are named as there."""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ssmkernels import reference

FILE = Path(__file__).resolve().parent.parent / "examples" / "usb" / "simmatch_kernels.py"
CLASSES, DIM, SLOTS = 5, 8, 20


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.fc, self.proj = (torch.nn.Linear(12, n) for n in (16, CLASSES, DIM))

    def forward(self, x):
        return {"logits": self.fc(x), "feat": F.normalize(self.proj(x))}


class SimMatch:
    """What USB's base classes give an algorithm."""

    def __init__(self, use_cat=True, use_ema_teacher=False, epoch=1):
        torch.manual_seed(0)
        self.model, self.num_classes = Network().double(), CLASSES
        self.use_cat, self.use_ema_teacher, self.epoch, self.ema_bank = use_cat, use_ema_teacher, epoch, 0.7
        self.gpu, self.distributed, self.world_size = None, False, 1
        self.amp_cm = contextlib.nullcontext
        self.lambda_u, self.lambda_in = 2.0, 3.0
        self.ema = SimpleNamespace(apply_shadow=lambda: None, restore=lambda: None)
        self.init(T=0.2, p_cutoff=0.5, proj_size=DIM, K=SLOTS, smoothing_alpha=0.9)

    def ce_loss(self, logits, targets, reduction):
        return F.cross_entropy(logits, targets, reduction=reduction)

    def consistency_loss(self, logits, targets, name, mask):
        assert name == "ce"
        return (mask * F.cross_entropy(logits, targets, reduction="none")).mean()

    def call_hook(self, function, hook, **arguments):
        if (function, hook) == ("dist_align", "DistAlignHook"):
            return arguments["probs_x_ulb"]
        assert (function, hook, arguments["softmax_x_ulb"]) == ("masking", "MaskingHook", False)
        return (arguments["logits_x_ulb"].amax(dim=1) > 0.25).double()

    def process_out_dict(self, **entries):
        return entries

    def process_log_dict(self, **entries):
        return {f"train/{name}": value for name, value in entries.items()}


@pytest.fixture
def algorithm(monkeypatch):
    """The class of the example, as USB's registry has it."""
    registered = {}

    def register(name):
        return lambda cls: registered.setdefault(name, cls)

    names = ["algorithms", "algorithms.simmatch", "algorithms.simmatch.simmatch", "algorithms.utils", "core"]
    for name in ["semilearn", *(f"semilearn.{name}" for name in [*names, "core.utils"])]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["semilearn.algorithms.simmatch.simmatch"].SimMatch = SimMatch
    sys.modules["semilearn.algorithms.utils"].concat_all_gather = None  # one process
    sys.modules["semilearn.core.utils"].ALGORITHMS = SimpleNamespace(register=register)
    runpy.run_path(str(FILE))
    return registered["simmatch_kernels"]


def batch():
    generator = torch.Generator().manual_seed(1)
    x_lb, x_ulb_w, x_ulb_s = (torch.randn(n, 12, generator=generator).double() for n in (4, 6, 6))
    return torch.tensor([3, 7, 1, 9]), x_lb, torch.tensor([0, 4, 2, 2]), x_ulb_w, x_ulb_s


@pytest.mark.parametrize("use_cat", [False, True])
@pytest.mark.parametrize("use_ema_teacher", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_step_is_that_of_the_paper(algorithm, use_cat, use_ema_teacher, epoch):
    usb = algorithm(use_cat, use_ema_teacher, epoch)
    usb.bank = F.normalize(torch.randn(SLOTS, DIM, dtype=torch.float64))
    usb.labels_bank = torch.arange(SLOTS) % CLASSES
    bank, labels = usb.bank.clone(), usb.labels_bank.clone()
    slots, x_lb, y_lb, x_ulb_w, x_ulb_s = batch()
    out, log = usb.train_step(slots, x_lb, y_lb, x_ulb_w, x_ulb_s)

    labelled, weak, strong = (usb.model(x) for x in (x_lb, x_ulb_w, x_ulb_s))
    probs = weak["logits"].detach().softmax(dim=1)
    pseudo, losses = reference.instance_matching(
        weak["feat"].detach(), strong["feat"], bank, labels, probs, temperature_weak=0.2, temperature_strong=0.2
    )
    if epoch == 0:
        pseudo, losses = probs, 0 * losses
    mask = (pseudo.amax(dim=1) > 0.25).double()
    unsupervised = (mask * F.cross_entropy(strong["logits"], pseudo, reduction="none")).mean()
    expected = F.cross_entropy(labelled["logits"], y_lb) + 2 * unsupervised + 3 * losses.mean()
    parameters = [usb.model.fc.weight, usb.model.proj.weight]
    torch.testing.assert_close(out["loss"], expected)
    actual_gradients, gradients = (torch.autograd.grad(loss, parameters) for loss in (out["loss"], expected))
    torch.testing.assert_close(actual_gradients, gradients)
    assert log["train/total_loss"] == out["loss"].item() and log["train/util_ratio"] == mask.float().mean().item()

    momentum = 0.0 if use_ema_teacher else 0.7
    keys = labelled["feat"].detach()
    bank[slots] = F.normalize(momentum * bank[slots] + (1 - momentum) * keys)
    labels[slots] = y_lb
    torch.testing.assert_close(usb.bank, bank)
    assert torch.equal(usb.labels_bank, labels)


def test_the_bank_is_saved_as_there(algorithm):
    usb = algorithm()
    saved = usb.mem_bank.clone()
    assert saved.shape == (DIM, SLOTS)
    usb.mem_bank = saved + 1
    assert usb.bank.is_contiguous()
    torch.testing.assert_close(usb.bank, saved.t() + 1)
