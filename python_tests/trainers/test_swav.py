# SPDX-License-Identifier: BSD-3-Clause
import contextlib
import math
import os
import signal

import numpy as np
import pytest
import torch
from lightning_fabric.plugins.precision import MixedPrecision
from PIL import Image

from ssmkernels import data, metrics, models
from ssmkernels.nn import sinkhorn_codes
from ssmkernels.trainers import RunConfig, SwAV, SwAVConfig, SwAVDataConfig, train_swav
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.cli import config_names, main, parse_config
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.swav import larc_, load_images


@pytest.fixture(scope="session")
def collection():
    """The first 30 images of each digit."""
    digits = data.load_collection("digits")
    index = np.sort(np.concatenate([np.flatnonzero(digits.labels == label)[:30] for label in range(10)]))
    pixels = np.stack([np.asarray(digits.images.image(i)) for i in index])
    images = data.ArrayImages(pixels, digits.labels[index], 10)
    return data.ImageCollection(
        images, digits.class_names, digits.mean, digits.std, digits.image_size, digits.augmentation
    )


@pytest.fixture
def make_config():
    """A configuration that takes a second: three epochs of 10 steps, a queue of 4 batches from the second on."""

    def make(**settings):
        run = {"log_every": 2, "accelerator": "cpu", "bar": False, **settings.pop("run", {})}
        small = {
            "model": "convnet-small",
            "hidden_dim": 16,
            "embedding_dim": 8,
            "num_prototypes": 12,
            "batch_size": 30,
            "epochs": 3,
        }
        crops = {
            "small_crops": 2,
            "small_size": 8,
            "crop_scale": (0.7, 1.0),
            "small_crop_scale": (0.5, 0.7),
            "jitter": 0.2,
            "blur": 0.0,
        }
        queue = {"queue_length": 120, "queue_from_epoch": 1}
        return SwAVConfig(run=RunConfig(**run), **{**small, **crops, **queue, "learning_rate": 3.0, **settings})

    return make


@pytest.fixture
def make_trainer(make_config, collection):
    def make(**settings):
        return SwAV(make_config(**settings), collection, collection, make_fabric(RunConfig(accelerator="cpu")))

    return make


def batches_of(trainer, first, last):
    return [batch for batch, _ in zip(trainer.batches(first), range(first, last), strict=False)]


def test_the_loss_is_the_swapped_prediction(make_trainer):
    """As SwAV's authors write it: loops over the codes' crops and the predicting ones."""
    trainer = make_trainer()
    (batch,) = batches_of(trainer, 0, 1)
    losses = trainer.losses(batch, 0)
    _, scores = trainer.network(batch.large, batch.small)
    crops = scores.split(30)
    assert len(crops) == 4
    expected = 0.0
    for i in range(2):
        codes = sinkhorn_codes(crops[i].detach(), epsilon=0.05, iterations=3)
        others = [v for v in range(4) if v != i]
        expected -= sum((codes * (crops[v] / 0.1).log_softmax(dim=1)).sum(dim=1).mean() for v in others) / 3 / 2
    torch.testing.assert_close(losses["loss"], expected)
    weight = trainer.network.backbone[0].weight
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (losses["loss"], expected))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)
    assert 0.9 < losses["code_balance"] <= 1 + 1e-6


def test_two_large_crops_alone(make_trainer):
    trainer = make_trainer(small_crops=0)
    (batch,) = batches_of(trainer, 0, 1)
    loss = trainer.losses(batch, 0)["loss"]
    first, second = trainer.network(batch.large, batch.small)[1].split(30)
    predicted = [(logits / 0.1).log_softmax(dim=1) for logits in (second, first)]
    expected = (
        -sum(
            (sinkhorn_codes(s.detach()) * p).sum(dim=1).mean() for s, p in zip((first, second), predicted, strict=True)
        )
        / 2
    )
    torch.testing.assert_close(loss, expected)


def test_prototypes_are_unit_vectors_and_frozen_for_an_epoch(make_trainer):
    trainer = make_trainer(freeze_prototypes_epochs=1)
    prototypes = trainer.network.head.prototypes.weight
    start, backbone = prototypes.detach().clone(), trainer.network.backbone[0].weight.detach().clone()
    seen = []
    trainer.network.head.register_forward_pre_hook(lambda *_: seen.append(prototypes.norm(dim=1).detach()))
    for step, batch in enumerate(batches_of(trainer, 0, 12)):
        trainer.step(batch, step)
        assert torch.allclose(prototypes, start, atol=1e-6) == (step < 10)
    assert not torch.equal(trainer.network.backbone[0].weight, backbone)
    assert len(seen) == 12
    for norms in seen:
        torch.testing.assert_close(norms, torch.ones(12))


def test_the_queue_fills_from_an_epoch_on_and_counts_once_it_is_full(make_trainer, monkeypatch):
    trainer, balanced = make_trainer(queue_length=60, learning_rate=0.0, final_learning_rate=0.0), []

    def recorded(scores, **settings):
        balanced.append(scores)
        return sinkhorn_codes(scores, **settings)

    monkeypatch.setattr("ssmkernels.trainers.swav.sinkhorn_codes", recorded)
    embeddings = []
    for step, batch in enumerate(batches_of(trainer, 8, 14), start=8):
        with torch.no_grad():
            embeddings.append(trainer.network(batch.large, batch.small)[0][:60].reshape(2, 30, 8))
        balanced.clear()
        trainer.step(batch, step)
        assert [len(scores) for scores in balanced] == [30 if step < 12 else 90] * 2
        if step < 10:
            assert (trainer.queue == 0).all()
    torch.testing.assert_close(trainer.queue, torch.cat([embeddings[-1], embeddings[-2]], dim=1), rtol=1e-4, atol=1e-5)
    earlier = torch.cat([embeddings[-2], embeddings[-3]], dim=1)  # what the last step found in the queue
    prototypes = trainer.network.head.prototypes.weight
    torch.testing.assert_close(balanced[1][30:], earlier[1] @ prototypes.t(), rtol=1e-4, atol=1e-5)


def test_without_a_queue_codes_are_those_of_the_batch(make_trainer, monkeypatch):
    trainer, rows = make_trainer(queue_length=0), []
    monkeypatch.setattr(
        "ssmkernels.trainers.swav.sinkhorn_codes", lambda scores, **_: rows.append(len(scores)) or scores.softmax(dim=1)
    )
    trainer.step(batches_of(trainer, 25, 26)[0], 25)
    assert rows == [30, 30]
    assert trainer.queue.numel() == 0


def test_larc_steps_are_in_proportion_to_the_norm():
    draw = torch.Generator().manual_seed(0)
    w, zero, unused = (torch.nn.Parameter(torch.randn(5, 3, generator=draw)) for _ in range(3))
    w.grad, zero.grad = torch.randn(5, 3, generator=draw), torch.randn(5, 3, generator=draw)
    with torch.no_grad():
        zero.zero_()
    before, kept = w.grad.clone(), zero.grad.clone()
    larc_([w, zero, unused], 0.1)
    rate = 0.001 * w.norm() / (before.norm() + 0.1 * w.norm())
    torch.testing.assert_close(w.grad, rate * (before + 0.1 * w))
    assert torch.equal(zero.grad, kept) and unused.grad is None
    w.grad = 1e6 * before
    larc_([w], 0.0)
    torch.testing.assert_close(w.grad.norm(), 0.001 * w.norm())


def test_the_scale_of_half_precision_losses_changes_nothing(make_trainer):
    """LARC comes after the gradients are unscaled."""

    class Scaled(MixedPrecision):
        """Float16's loss scaling around arithmetic in float32, as the CPU has no float16."""

        forward_context = staticmethod(contextlib.nullcontext)
        convert_input = convert_output = staticmethod(lambda value: value)

    plain, scaled = make_trainer(), make_trainer()
    scaled.fabric.strategy.precision = scaled.fabric._precision = Scaled(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10)
    )
    for trainer in (plain, scaled):
        for step, batch in enumerate(batches_of(trainer, 0, 3)):
            trainer.step(batch, step)
    torch.testing.assert_close(scaled.network.state_dict(), plain.network.state_dict(), rtol=1e-4, atol=1e-6)


def test_learning_rates(make_trainer):
    trainer = make_trainer(learning_rate=1.0, final_learning_rate=0.1)
    (batch,) = batches_of(trainer, 0, 1)
    for step in (0, 15, 29):
        trainer.step(batch, step)
        assert trainer.learning_rate == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * step / 30)))


def test_what_is_evaluated(make_trainer, collection):
    trainer = make_trainer()
    images = np.stack([np.asarray(collection.images.image(i), dtype=np.float32) for i in range(len(collection))])
    inputs = torch.from_numpy((images / 255 - collection.mean[0]) / collection.std[0]).float()[:, None]
    trainer.network.eval()
    with torch.no_grad():
        features = trainer.network.backbone(inputs).mean(dim=(2, 3))
    expected = metrics.retrieval(torch.nn.functional.normalize(features), torch.from_numpy(collection.labels))
    figures = trainer.evaluate()
    assert figures.keys() == {f"test_{name}" for name in expected}
    assert figures["test_MAP@R"] == pytest.approx(expected["MAP@R"], abs=1e-3)


def test_learns_digits_without_labels(make_config, collection, tmp_path):
    """The loss falls, codes stay balanced, and features of the same class come closer than a random network's."""
    settings = {
        "epochs": 12,
        "num_prototypes": 30,
        "small_crops": 0,
        "queue_length": 0,
        "hidden_dim": 64,
        "embedding_dim": 32,
    }
    config = make_config(**settings, run={"out": str(tmp_path / "run")})
    trainer = SwAV(config, collection, collection, make_fabric(RunConfig(accelerator="cpu")))
    random = trainer.evaluate()
    result = train_swav(config, images=collection)
    assert result.finished and len(result.history) == 12
    assert result.history[-1]["loss"] < 0.6 * result.history[0]["loss"]
    assert all(record["code_balance"] > 0.85 for record in result.history)
    assert result.history[-1]["test_MAP@R"] > random["test_MAP@R"] + 0.05
    assert result.history[-1]["test_P@1"] > random["test_P@1"] - 0.02

    # backbone.pt is what other trainers start from.
    model = models.build_embedding_model(
        "convnet-small", weights=tmp_path / "run/backbone.pt", in_channels=1, pooling="avg", freeze_bn=False
    )
    model.eval()
    images = torch.stack(
        [data.to_tensor(collection.images.image(i), collection.mean, collection.std) for i in range(len(collection))]
    )
    with torch.no_grad():
        features, _ = model(images)
    loaded = metrics.retrieval(features, torch.from_numpy(collection.labels))
    assert loaded["MAP@R"] == pytest.approx(result.history[-1]["test_MAP@R"], abs=1e-3)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed", "freeze_prototypes_epochs": 0, "small_crops": 1}])
def test_stop_and_resume_gives_the_same_bits(make_config, collection, tmp_path, settings, monkeypatch):
    whole = train_swav(make_config(**settings, run={"out": str(tmp_path / "whole")}), images=collection)

    stopped = make_config(**settings, run={"out": str(tmp_path / "stopped")})
    step = SwAV.step

    def interrupted(self, batch, number):
        if number == 16:  # the queue is full by now
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(SwAV, "step", interrupted)
        assert train_swav(stopped, images=collection).step == 17
    assert not (tmp_path / "stopped/backbone.pt").exists()
    resumed = train_swav(stopped, images=collection, resume=True)

    assert resumed.finished
    assert resumed.history == whole.history
    first, second = (load_checkpoint(tmp_path / name / "checkpoint.pt")["trainer"] for name in ("whole", "stopped"))
    assert first.keys() == second.keys() == {"model", "optimizer", "queue"}
    assert first["queue"].abs().sum() > 0
    for part in first:
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    first, second = (load_checkpoint(tmp_path / name / "backbone.pt") for name in ("whole", "stopped"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_images_of_a_run(tmp_path):
    learnt, measured = load_images(SwAVConfig(SwAVDataConfig(name="digits", test_fraction=0.3)))
    assert learnt.class_names == tuple("0123456") and measured.class_names == tuple("789")
    for root, names in (("first", "abcde"), ("second", "ac")):
        for value, name in enumerate(names, start=1):
            (tmp_path / root / name).mkdir(parents=True)
            Image.new("RGB", (9, 9), (40 * value, 0, 0)).save(tmp_path / root / name / "1.png")
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    chosen = SwAVDataConfig(name="folder", root=first, unlabeled_name="folder", unlabeled_root=second)
    learnt, measured = load_images(SwAVConfig(chosen))
    assert (learnt.class_names, measured.class_names) == (("a", "b", "a", "c"), ("c", "d", "e"))
    assert [learnt.images.image(i).getpixel((0, 0))[0] for i in range(4)] == [40, 80, 40, 80]


def test_bad_images(make_config, collection):
    with pytest.raises(ValueError, match="evaluation_images are given without images"):
        train_swav(make_config(), evaluation_images=collection)
    with pytest.raises(ValueError, match=r"data.test_fraction is 0\.99; of 10 classes it should leave one"):
        load_images(SwAVConfig(SwAVDataConfig(name="digits", test_fraction=0.99)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it should be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"epsilon": 0.0}, r"epsilon is 0\.0; it should be positive"),
        ({"queue_length": 100}, "queue_length is 100; it should be a multiple of batch_size, 30, or 0"),
        ({"small_crops": -1}, "small_crops is -1"),
    ],
)
def test_bad_settings(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


def test_bad_data_settings():
    with pytest.raises(ValueError, match=r"data.test_fraction is 1\.0; it should be between 0 and 1"):
        SwAVDataConfig(test_fraction=1.0)
    with pytest.raises(ValueError, match="unlabeled_root is 'x' without"):
        SwAVDataConfig(unlabeled_root="x")


def test_shipped_configurations():
    names = config_names("swav")
    assert set(names) == {"digits", "flowers17", "cub200", "cub200-bf16"}
    for name in names:
        config, _ = parse_config("swav", ["--config", name])
        assert (config.temperature, config.epsilon, config.sinkhorn_iterations) == (0.1, 0.05, 3)
    assert (config.data.name, config.model, config.weights) == ("folder", "efficientnet-lite0", "imagenet")
    defaults = SwAVConfig()
    assert (defaults.batch_size, defaults.learning_rate, defaults.final_learning_rate, defaults.weight_decay) == (
        256,
        0.6,
        0.0006,
        1e-6,
    )
    assert (defaults.queue_length, defaults.queue_from_epoch, defaults.small_crops) == (3840, 15, 6)
    assert (defaults.crop_scale, defaults.small_crop_scale) == ((0.14, 1.0), (0.05, 0.14))


def test_command(tmp_path, capsys):
    settings = ["--epochs", "1", "--run.accelerator", "cpu", "--run.bar", "false", "--run.out", str(tmp_path / "out")]
    assert main(["swav", "--config", "digits", *settings]) == 0
    assert "test_MAP@R: " in capsys.readouterr().out
    assert (tmp_path / "out/backbone.pt").exists()
