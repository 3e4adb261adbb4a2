# SPDX-License-Identifier: BSD-3-Clause
"""Evaluations: images are loaded once, networks are in eval mode and in the precision of the run."""

import functools

import numpy as np
import pytest
import torch

from ssmkernels import data
from ssmkernels.trainers import RunConfig, SimMatch, base, evaluation
from ssmkernels.trainers.evaluation import EvaluationSet, evaluating, top_k_accuracies
from ssmkernels.trainers.loop import make_fabric

STATISTICS = {"mean": (0.5,), "std": (0.25,)}
CPU = torch.device("cpu")


class Counted(data.ArrayImages):
    """Images that count how often they are asked for."""

    asked = 0

    def image(self, index):
        self.asked += 1
        return super().image(index)


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    return Counted(pixels, np.arange(300) % 3, 3)


@pytest.mark.parametrize("kept", [True, False])
def test_images_are_loaded_once_where_they_may_be_kept(images, kept, monkeypatch):
    # 299 of 300 images of 64 bytes: the set is given up in its second batch.
    monkeypatch.setattr(evaluation, "KEPT_BYTES", 300 * 64 - (not kept))
    batches = EvaluationSet(images, CPU, **STATISTICS)
    expected = list(data.evaluation_batches(images, 256, **STATISTICS))
    images.asked = 0
    for turn in (1, 2):
        for ours, theirs in zip(batches, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert images.asked == 300 * (1 if kept else turn)


def test_a_set_that_is_left_early_is_loaded_again(images):
    batches = EvaluationSet(images, CPU, **STATISTICS)
    next(iter(batches))
    assert sum(len(labels) for _, labels in batches) == 300


class Fixed(torch.nn.Module):
    """Logits that are given by the first pixel."""

    def __init__(self, add):
        super().__init__()
        self.add = add

    def forward(self, images):
        assert not self.training
        return torch.nn.functional.one_hot((images[:, 0, 0, 0].long() + self.add) % 4, 4).float(), None


def test_accuracies_of_several_networks():
    labels = torch.arange(12) % 4
    pixels = labels.view(-1, 1, 1, 1).expand(12, 1, 2, 2)
    networks = {"right": Fixed(0), "wrong": Fixed(1).eval()}
    accuracies = top_k_accuracies(networks, [(pixels[:5], labels[:5]), (pixels[5:], labels[5:])], device=CPU, ks=(1, 4))
    assert accuracies == {"right": [1.0, 1.0], "wrong": [0.0, 1.0]}
    assert networks["right"].training
    assert not networks["wrong"].training
    assert top_k_accuracies(networks, [], device=CPU) == {"right": [0.0], "wrong": [0.0]}


def test_networks_are_evaluated_in_the_precision_of_the_run(make_config, digits):
    config = make_config(precision="bf16-mixed")
    trainer = SimMatch(config, digits, make_fabric(config.run, precision=config.precision))
    kinds = set()
    for network in (trainer.model, trainer.teacher.model):
        network.classifier.register_forward_hook(lambda module, given, logits: kinds.add(logits.dtype))
    trainer.evaluate()
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize(
    ("device", "precision", "fused"),
    [("cuda", "bf16-mixed", True), ("cuda", "16-mixed", False), ("cpu", "32-true", False)],
)
def test_optimisers_are_fused_on_gpus(make_config, digits, device, precision, fused):
    trainer = SimMatch(make_config(), digits, make_fabric(RunConfig(accelerator="cpu")))
    trainer.config.precision, trainer.fabric = precision, type("On", (), {"device": torch.device(device)})
    assert trainer.fused == ({"fused": True} if fused else {})


@pytest.mark.parametrize("deterministic", [True, False])
def test_convolutions_are_deterministic_where_asked(deterministic):
    make_fabric(RunConfig(accelerator="cpu", deterministic=deterministic))
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic


def test_a_compiled_network_learns_the_same(make_config, digits, monkeypatch):
    """Everything but the code of the kernels, which takes a C++ compiler minutes."""
    monkeypatch.setattr(base.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    runs = []
    for compiled in (False, True):
        config = make_config(model="convnet-small", run={"compile": compiled})
        trainer = SimMatch(config, digits, make_fabric(config.run))
        batches = trainer.batches(0)
        losses = [float(trainer.step(batches[step], step)["loss"]) for step in range(3)]
        runs.append((losses, list(trainer.state_dict()["model"]), trainer.evaluate()))
    # Sums of fewer than 2^10 terms in four layers, in another order: 2^12 roundings of 2^-24, over two steps.
    assert runs[1][0] == pytest.approx(runs[0][0], rel=2.0**-10)
    assert runs[1][1] == runs[0][1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_networks_go_on_training_after_an_evaluation_that_fails():
    learning, fixed = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).eval()

    def stopped():
        with evaluating(learning, fixed):
            assert not learning.training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert learning.training and not fixed.training
