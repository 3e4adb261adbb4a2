# SPDX-License-Identifier: BSD-3-Clause
import itertools
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmkernels import data, graph, metrics
from ssmkernels.trainers import CollectionConfig, MixedLP, MixedLPConfig, RunConfig, train_mixed_lp
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.loop import make_fabric


@pytest.fixture(scope="session")
def collection():
    """The first 30 images of each digit: 120 to train on in 4 classes, 60 to validate, 120 to test."""
    digits = data.load_collection("digits")
    index = np.sort(np.concatenate([np.flatnonzero(digits.labels == label)[:30] for label in range(10)]))
    pixels = np.stack([np.asarray(digits.images.image(i)) for i in index])
    images = data.ArrayImages(pixels, digits.labels[index], 10)
    return data.ImageCollection(
        images, digits.class_names, digits.mean, digits.std, digits.image_size, digits.augmentation
    )


@pytest.fixture
def make_config():
    """A configuration that takes a second: two labelled epochs of 2 steps, two epochs of 8."""

    def make(**settings):
        run = {"log_every": 2, "accelerator": "cpu", "bar": False, **settings.pop("run", {})}
        images = {"name": "digits", "labels_per_class": 5, **settings.pop("data", {})}
        small = {"model": "convnet-small", "freeze_bn": False, "embedding_dim": 8, "k": 10, "batch_size": 16}
        short = {"labeled_epochs": 2, "epochs": 2, "learning_rate": 1e-3}
        return MixedLPConfig(data=CollectionConfig(**images), run=RunConfig(**run), **{**small, **short, **settings})

    return make


class Plain(nn.Module):
    """A network of two linear maps."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(64, 12), nn.Linear(12, 8)

    def forward(self, images):
        maps = self.backbone(images.flatten(1))
        return F.normalize(maps), F.normalize(self.head(maps))


@pytest.fixture
def make_trainer(make_config, collection):
    def make(**settings):
        torch.manual_seed(3)
        return MixedLP(make_config(**settings), collection, make_fabric(RunConfig(accelerator="cpu")), model=Plain())

    return make


def test_some_images_of_each_class(make_trainer):
    trainer = make_trainer(data={"images_per_class": 12})
    assert np.bincount(trainer.train.labels).tolist() == [12] * trainer.train.num_classes
    assert (len(trainer.validation), len(trainer.test)) == (
        12 * trainer.validation.num_classes,
        12 * trainer.test.num_classes,
    )


def batches_of(trainer, first, last):
    return [batch for batch, _ in zip(trainer.batches(first), range(first, last), strict=False)]


def all_features(trainer):
    """v of the training images as they are, without any help from the trainer."""
    images = np.stack([np.asarray(trainer.train.images.image(i), dtype=np.float32) for i in range(len(trainer.train))])
    mean, std = trainer.train.mean[0], trainer.train.std[0]
    with torch.no_grad():
        return trainer.network(torch.from_numpy((images / 255 - mean) / std)[:, None])[0]


def test_classes_are_disjoint_and_five_of_each_training_class_have_labels(make_trainer, collection):
    trainer = make_trainer()
    names = [set(images.class_names) for images in (trainer.train, trainer.validation, trainer.test)]
    assert [len(part) for part in names] == [4, 2, 4]
    assert set.union(*names) == set(collection.class_names)
    given = trainer.given_labels[trainer.given_labels >= 0]
    assert given.bincount().tolist() == [5, 5, 5, 5]
    assert (trainer.given_labels >= 0).nonzero()[:, 0].tolist() == trainer.labeled_index.tolist()
    other = make_trainer(seed=2)
    assert set(other.train.class_names) != names[0] or other.labeled_index.tolist() != trainer.labeled_index.tolist()


def test_a_step_is_the_proxy_loss_of_the_labels_and_confidences_of_its_images(make_trainer):
    trainer = make_trainer(warm_up_epochs=0, learning_rate=0.0)
    (batch,) = batches_of(trainer, 4, 5)
    loss = trainer.step(batch, 4)["loss"]
    _, embeddings = trainer.network(batch.images)
    expected = trainer.proxies(embeddings, trainer.labels[batch.positions], trainer.confidence[batch.positions])
    torch.testing.assert_close(loss, expected.detach())
    expected_gradient = torch.autograd.grad(expected, trainer.network.head.weight)[0]
    torch.testing.assert_close(trainer.network.head.weight.grad, expected_gradient.clamp(-10, 10))
    assert (trainer.confidence[batch.positions] < 1).any()


def test_labeled_epochs_see_labeled_images_alone_with_weight_one(make_trainer):
    trainer = make_trainer()
    assert (trainer.labeled_steps, trainer.epoch_steps, trainer.steps) == (4, 8, 20)
    given = set(trainer.labeled_index.tolist())
    seen = [set(batch.positions.tolist()) for batch in batches_of(trainer, 0, 20)]
    assert len(seen) == 20
    assert set.union(*seen[:4]) == given
    assert set.union(*seen[4:]) == set(range(120))
    batch = batches_of(trainer, 0, 1)[0]
    trainer.step(batch, 0)
    assert torch.equal(trainer.labels, trainer.given_labels)
    assert (trainer.confidence == 1).all()
    assert trainer.propagation == {}


@pytest.mark.parametrize("pseudo_labels", ["mixed-lp", "lp", "dssml"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pseudo_labels_come_from_the_graph_of_the_features(make_trainer, pseudo_labels, normalize):
    trainer = make_trainer(
        pseudo_labels=pseudo_labels, normalize_confidence=normalize, gamma=2.0, beta=0.5, logit_scale=3.0, mu=0.05
    )
    trainer.propagate_labels()
    neighbours = graph.knn_graph(all_features(trainer), 10, gamma=2.0)
    if pseudo_labels == "dssml":
        neighbours = neighbours.mutual_neighbours()
    plain = None if pseudo_labels == "mixed-lp" else torch.zeros_like(neighbours.weight)
    result = graph.mixed_label_propagation(
        neighbours,
        trainer.given_labels,
        num_classes=4,
        beta=0.5,
        logit_scale=3.0,
        mu=0.05,
        dissimilarity=plain,
        normalize_confidence=normalize,
    )
    if pseudo_labels == "lp":
        propagated = graph.label_propagation(neighbours, trainer.given_labels, num_classes=4, mu=0.05)
        assert (result.pseudo_labels == propagated.argmax(dim=1)).float().mean() > 0.99
    unlabeled = trainer.given_labels < 0
    assert torch.equal(trainer.labels[unlabeled], result.pseudo_labels[unlabeled])
    torch.testing.assert_close(trainer.confidence[unlabeled], result.confidence[unlabeled], rtol=1e-3, atol=1e-5)
    assert torch.equal(trainer.labels[~unlabeled], trainer.given_labels[~unlabeled])
    assert (trainer.confidence[~unlabeled] == trainer.confidence.max()).all()
    if normalize:
        assert trainer.confidence.max() == pytest.approx(1)
    correct = (trainer.labels == trainer.true_labels)[unlabeled].float().mean()
    assert trainer.propagation["pseudo_label_accuracy"] == pytest.approx(correct.item())
    assert correct > 0.5
    assert trainer.propagation["pseudo_label_confidence"] == pytest.approx(trainer.confidence[unlabeled].mean().item())
    assert trainer.propagation["undecided"] == (result.pseudo_labels < 0).float().mean()
    assert trainer.propagation["cg_iterations"] > 0


def test_the_graph_is_rebuilt_at_the_start_of_every_epoch(make_trainer, monkeypatch):
    trainer, built = make_trainer(), []
    knn_graph = graph.knn_graph

    def counted(features, *arguments, **settings):
        built.append((step, features))
        return knn_graph(features, *arguments, **settings)

    monkeypatch.setattr(graph, "knn_graph", counted)
    for step, batch in enumerate(trainer.batches(0)):
        trainer.step(batch, step)
    assert [step for step, _ in built] == [4, 12]
    assert not torch.equal(built[0][1], built[1][1])


def test_the_proxy_only_baseline_takes_as_many_steps_and_no_unlabeled_image(make_trainer, monkeypatch):
    trainer, full = make_trainer(pseudo_labels="none"), make_trainer()
    monkeypatch.setattr(graph, "knn_graph", None)
    assert trainer.steps == full.steps == 20
    given = set(trainer.labeled_index.tolist())
    for step, batch in enumerate(trainer.batches(0)):
        assert set(batch.positions.tolist()) <= given
        trainer.step(batch, step)
    assert step == 19
    assert trainer.scalars({"loss": 1.0}) == {"loss": 1.0}


def test_undecided_images_teach_nothing(make_trainer):
    trainer = make_trainer(warm_up_epochs=0, labeled_epochs=0)
    batch = batches_of(trainer, 1, 2)[0]
    trainer.labels = torch.full_like(trainer.labels, -1)
    assert trainer.step(batch, 1)["loss"] == 0
    assert (trainer.network.head.weight.grad == 0).all()


@pytest.mark.parametrize(("images", "epochs", "steps"), [("labeled", 1, 2), ("all", 1, 8), ("labeled", 3, 12)])
def test_warm_up_takes_epochs_of_all_images_or_of_this_method(make_trainer, images, epochs, steps):
    """Two epochs of 2 steps on the labelled images, then epochs of 8 on all of them."""
    assert make_trainer(warm_up_epochs=epochs, warm_up_images=images).warm_up_steps == steps


def test_affine_maps_of_frozen_batch_norm_learn_after_the_warm_up(make_config, collection):
    """As Proxy-Anchor's train.py runs: statistics stay, the affine part learns once the warm-up is over."""

    def learnt(**settings):
        config = make_config(freeze_bn=True, warm_up_epochs=1, warm_up_images="labeled", **settings)
        trainer = MixedLP(config, collection, make_fabric(RunConfig(accelerator="cpu")))
        states = [{name: value.clone() for name, value in trainer.network.state_dict().items()}]
        for step, batch in enumerate(batches_of(trainer, 0, 4)):
            trainer.step(batch, step)
            states.append({name: value.clone() for name, value in trainer.network.state_dict().items()})
        names = [name for name in states[0] if name.startswith("backbone.1.")]
        return [
            [name.rpartition(".")[2] for name in names if not torch.equal(state[name], later[name])]
            for state, later in itertools.pairwise(states)
        ]

    assert learnt() == [[], [], ["weight", "bias"], ["weight", "bias"]]
    assert learnt(learn_bn_affine=False) == [[], [], [], []]


def test_warm_up_keeps_the_backbone(make_trainer):
    trainer = make_trainer(warm_up_epochs=1, warm_up_images="labeled")  # of 2 steps
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    proxies = trainer.proxies.proxies.detach().clone()
    for step, batch in enumerate(batches_of(trainer, 0, 3)):
        trainer.step(batch, step)
        after = trainer.network.state_dict()
        assert torch.equal(after["backbone.weight"], before["backbone.weight"]) == (step < 2)
        assert not torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(trainer.proxies.proxies, proxies)


def test_learning_rates_and_weight_decay(make_trainer):
    trainer = make_trainer(
        learning_rate=1e-3, decay_every=2, decay=0.1, proxy_learning_rate_scale=50.0, weight_decay=0.02
    )
    trainer.propagate_labels()
    rates = []
    for step, batch in enumerate(batches_of(trainer, 0, 13)):
        trainer.step(batch, step)
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    assert rates[3] == pytest.approx([1e-3, 5e-2])  # epochs 0 and 1
    assert rates[4] == rates[12] == pytest.approx([1e-4, 5e-3])  # 2 and 3
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.02, 0.02]
    assert trainer.learning_rate == pytest.approx(1e-4)


def test_gradients_are_clipped_by_value(make_trainer):
    trainer = make_trainer(clip_value=1e-3)
    trainer.step(batches_of(trainer, 0, 1)[0], 0)
    for parameter in (trainer.network.head.weight, trainer.proxies.proxies):
        assert parameter.grad.abs().max() == pytest.approx(1e-3)


def test_evaluation_is_of_the_embeddings(make_trainer):
    trainer = make_trainer()
    figures = trainer.evaluate()
    for name, images in (("validation", trainer.validation), ("test", trainer.test)):
        pixels = np.stack([np.asarray(images.images.image(i), dtype=np.float32) for i in range(len(images))])
        with torch.no_grad():
            _, embeddings = trainer.network(torch.from_numpy((pixels / 255 - images.mean[0]) / images.std[0])[:, None])
        expected = {**metrics.retrieval(embeddings, images.labels), "NMI": metrics.nmi(embeddings, images.labels)}
        assert {key: figures[f"{name}_{key}"] for key in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"pseudo_labels": "dssml", "precision": "bf16-mixed"}, {"pseudo_labels": "none"}]
)
def test_stop_in_the_middle_of_an_epoch_and_resume_gives_the_same_bits(
    make_config, collection, tmp_path, settings, monkeypatch
):
    whole = train_mixed_lp(make_config(**settings, run={"out": str(tmp_path / "whole")}), images=collection)

    stopped = make_config(**settings, run={"out": str(tmp_path / "stopped")})
    step = MixedLP.step

    def interrupted(self, batch, number):
        if number == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(MixedLP, "step", interrupted)
        assert train_mixed_lp(stopped, images=collection).step == 15
    resumed = train_mixed_lp(stopped, images=collection, resume=True)

    assert resumed.finished
    assert resumed.history == whole.history
    assert [record["step"] for record in whole.history] == [12, 20]
    for name in ("checkpoint.pt", "best.pt"):
        first, second = (load_checkpoint(tmp_path / run / name) for run in ("whole", "stopped"))
        first.pop("config", None), second.pop("config", None)
        assert first.pop("images", None) == second.pop("images", None)
        assert first.keys() == second.keys()
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_best_weights_are_kept(make_config, collection, tmp_path):
    config = make_config(epochs=4, run={"out": str(tmp_path)})
    result = train_mixed_lp(config, images=collection)
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["evaluation"] == result.best("validation_P@8")
    assert best["evaluation"]["validation_P@8"] == max(record["validation_P@8"] for record in result.history)
    trainer = MixedLP(config, collection, make_fabric(RunConfig(accelerator="cpu")))
    trainer.network.load_state_dict(best["model"])
    figures = trainer.evaluate()
    assert figures == {name: best["evaluation"][name] for name in figures}


def test_every_evaluation_reports_the_propagation(make_config, collection):
    result = train_mixed_lp(make_config(), images=collection)
    assert result.steps == 20
    for record in result.history:
        assert 0.25 < record["pseudo_label_accuracy"] <= 1
        assert 0 < record["pseudo_label_confidence"] < 1
        assert {"loss", "undecided", "cg_iterations", "test_NMI", "test_R@1", "validation_P@8"} <= record.keys()


def test_learns_to_retrieve_unseen_digits(make_config, collection):
    untrained = MixedLP(make_config(), collection, make_fabric(RunConfig(accelerator="cpu"))).evaluate()
    result = train_mixed_lp(
        make_config(epochs=5, labeled_epochs=10, warm_up_epochs=0, embedding_dim=32), images=collection
    )
    assert result.history[-1]["test_P@8"] > untrained["test_P@8"] + 0.03
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it should be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"mu": 0.0}, r"mu is 0\.0; it should be positive"),
        ({"pseudo_labels": "mom"}, "pseudo_labels is 'mom'; it should be one of mixed-lp, lp, dssml, none"),
        ({"labeled_epochs": 0, "epochs": 0}, "labeled_epochs and epochs are 0"),
        ({"data": {"labels_per_class": 0}}, r"data\.labels_per_class is 0; it should be at least 1"),
        (
            {"data": {"images_per_class": 0}},
            r"data\.images_per_class is 0; it should be at least 1, or null",
        ),
    ],
)
def test_bad_settings(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


def test_settings_that_do_not_fit_the_images(make_trainer):
    with pytest.raises(ValueError, match="k is 120; it should be below 120, the number of training images"):
        make_trainer(k=120)
    assert make_trainer(k=120, pseudo_labels="none").steps == 20
    with pytest.raises(ValueError, match="num_labeled"):
        make_trainer(data={"labels_per_class": 31})
    with pytest.raises(ValueError, match="fractions"):
        make_trainer(data={"fractions": (0.5, 0.5, 0.5)})
