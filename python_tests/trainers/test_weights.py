# SPDX-License-Identifier: BSD-3-Clause
"""Every trainer takes --model and --weights, a network and images of the caller's own, and a network of timm."""

import numpy as np
import pytest
import torch
from torch import nn

from ssmkernels import data, models
from ssmkernels.nn import PrototypeHead, SimilarityNetwork
from ssmkernels.trainers import (
    CollectionConfig,
    DataConfig,
    MixedLPConfig,
    MLSNConfig,
    RunConfig,
    SimMatchConfig,
    SladeConfig,
    SladeDataConfig,
    SwAVConfig,
    train_mixed_lp,
    train_mlsn,
    train_simmatch,
    train_slade,
    train_swav,
)
from ssmkernels.trainers.cli import METHODS, main
from ssmkernels.trainers.mlsn import MLSNNetwork
from ssmkernels.trainers.swav import SwAVNetwork

CPU = ["--run.accelerator", "cpu", "--run.bar", "false"]
FEW = ["--data.images_per_class", "6", "--data.labels_per_class", "2", "--k", "4", "--labeled_epochs", "1"]
CROPS = ["--hidden_dim", "8", "--num_prototypes", "8", "--queue_length", "0", "--small_crops", "0"]
SHORT = {
    "simmatch": ["--data.labels", "20", "--batch_size", "4", "--mu", "1", "--steps", "1"],
    "mlsn": ["--data.labels", "20", "--batch_size", "4", "--pairs", "8", "--hidden_features", "8", "--steps", "1"],
    "mixed-lp": [*FEW, "--epochs", "1", "--batch_size", "24", "--freeze_bn", "false"],
    "slade": ["--student", "none", "--teacher_steps", "1", "--batch_size", "8", "--freeze_bn", "false"],
    "swav": [*CROPS, "--epochs", "1", "--batch_size", "400"],
}
AT_REST = {"slade": ["--optimizer", "adamw"], "swav": ["--final_learning_rate", "0"]}
"""With a rate of 0 too: the network stays what it was."""


def run(method, folder, *arguments):
    return main([method, *SHORT[method], *arguments, *CPU, "--run.out", str(folder)])


def backbone_of(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["trainer"]["model"]
    return {name.partition(".")[2]: value for name, value in state.items() if name.startswith("backbone.")}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "simmatch"
    assert run("simmatch", folder, "--model", "convnet-small") == 0
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_trainer_starts_from_a_run(tmp_path, capsys, finished_run, method):
    weights = ["--model", "convnet-small", "--weights", str(finished_run / "checkpoint.pt")]
    at_rest = ["--learning_rate", "0", "--weight_decay", "0", *AT_REST.get(method, [])]
    assert run(method, tmp_path / "run", *weights, *at_rest) == 0
    report = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weights: ")]
    assert len(report) == 1
    assert f"tensors of {finished_run / 'checkpoint.pt'} from backbone" in report[0]
    assert report[0].endswith("left out: classifier (2), projection (4)")
    kept = {name.removeprefix("layers."): value for name, value in backbone_of(finished_run).items()}
    for name, value in backbone_of(tmp_path / "run").items():
        if name.endswith("weight"):
            assert torch.equal(value, kept[name.removeprefix("layers.")]), name


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_another_network_are_one_line(tmp_path, capsys, method):
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "w.pth")
    assert run(method, tmp_path / "run", "--model", "convnet-small", "--weights", str(tmp_path / "w.pth")) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"ssmkernels train: weights, {tmp_path / 'w.pth'}, are not those of convnet-small")
    assert not (tmp_path / "run").exists()


class Folders(data.ArrayImages):
    """Colour images of the caller's own, four classes of noise around a mean."""

    def __init__(self, seed, side=16):
        draw, labels = np.random.default_rng(seed), np.arange(48) % 8
        noise = draw.integers(0, 60, (48, side, side, 3)) + 20 * labels[:, None, None, None]
        super().__init__(noise.astype(np.uint8), labels, 8)


def splits(side=16):
    half = (0.5, 0.5, 0.5)
    return data.ImageSplits(Folders(0, side), Folders(1, side), 8, tuple("abcdefgh"), half, half, side, "crop")


def collection(side=16):
    half = (0.5, 0.5, 0.5)
    return data.ImageCollection(Folders(0, side), tuple("abcdefgh"), half, half, side, "crop")


class Backbone(nn.Module):
    feature_dim = 12

    def __init__(self, maps):
        super().__init__()
        self.conv, self.maps = nn.Conv2d(3, 12, 3, stride=2), maps

    def forward(self, images):
        maps = self.conv(images).relu()
        return maps if self.maps else maps.mean(dim=(2, 3))


def train(method, model, images, name="convnet-small", **settings):
    """One short run on images of 16 pixels, by Python."""
    settings["run"] = RunConfig(accelerator="cpu", bar=False)
    small = {"batch_size": 8, "model": name, **settings}
    if method == "simmatch":
        config = SimMatchConfig(data=DataConfig(labels=16), steps=2, mu=1, projection_dim=6, **small)
        return train_simmatch(config, splits=images, model=model)
    if method == "mlsn":
        config = MLSNConfig(data=DataConfig(labels=16), steps=2, pairs=8, **small)
        return train_mlsn(config, splits=images, model=model)
    if method == "mixed-lp":
        chosen = CollectionConfig(labels_per_class=2)
        config = MixedLPConfig(chosen, k=4, labeled_epochs=1, epochs=1, embedding_dim=6, freeze_bn=False, **small)
        return train_mixed_lp(config, images=images, model=model)
    if method == "slade":
        chosen = SladeDataConfig(test_fraction=0.25, folds=2, labeled_fraction=0.7)
        steps = {"teacher_steps": 1, "warm_up_steps": 1, "student_steps": 1, "k": 2, "embedding_dim": 6}
        config = SladeConfig(chosen, freeze_bn=False, **steps, **small)
        return train_slade(config, images=images, model=model)
    heads = {"hidden_dim": 8, "embedding_dim": 6, "num_prototypes": 5}
    config = SwAVConfig(epochs=1, queue_length=0, small_crops=1, small_size=images.image_size, **heads, **small)
    return train_swav(config, images=images, model=model)


OWN = {
    "simmatch": lambda: models.ProjectionModel(Backbone(False), 8, 6),
    "mlsn": lambda: MLSNNetwork(Backbone(False), nn.Linear(12, 8), SimilarityNetwork(12, 8)),
    "mixed-lp": lambda: models.EmbeddingModel(Backbone(True), 12, 6),
    "slade": lambda: models.EmbeddingModel(Backbone(True), 12, 6),
    "swav": lambda: SwAVNetwork(Backbone(True), PrototypeHead(12, 8, 6, 5)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_network_and_images_of_the_callers_own(method):
    """The network that was given is the one that has learnt."""
    torch.manual_seed(0)
    model = OWN[method]()
    before = model.backbone.conv.weight.detach().clone()
    result = train(method, model, splits() if method in ("simmatch", "mlsn") else collection(), learning_rate=0.1)
    assert result.finished
    assert result.history
    assert not torch.equal(model.backbone.conv.weight.detach(), before)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_small_patch16_224"])
@pytest.mark.parametrize("method", METHODS)
def test_networks_of_timm(method, name):
    pytest.importorskip("timm")
    images = splits(32) if method in ("simmatch", "mlsn") else collection(32)
    result = train(method, None, images, name)
    assert result.finished
    assert all(np.isfinite(value) for value in result.history[-1].values())
