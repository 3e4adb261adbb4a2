# SPDX-License-Identifier: BSD-3-Clause
import json
import os
import runpy
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmkernels import data, metrics, reference
from ssmkernels.trainers import RunConfig, Slade, SladeConfig, SladeDataConfig, slade, train_folds, train_slade
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.cli import config_names, main, parse_config
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.pseudo_labels import cluster
from ssmkernels.trainers.slade import build_network
from ssmkernels.trainers.slade_data import SladeImages

TEACHER, WARM_UP, STUDENT = 4, 3, 5
ROUND = WARM_UP + STUDENT


@pytest.fixture(scope="session")
def collection():
    """The first 20 images of each digit: 3 classes with labels, 2 without, 2 to validate and 3 to test."""
    digits = data.load_collection("digits")
    index = np.sort(np.concatenate([np.flatnonzero(digits.labels == label)[:20] for label in range(10)]))
    pixels = np.stack([np.asarray(digits.images.image(i)) for i in index])
    images = data.ArrayImages(pixels, digits.labels[index], 10)
    return data.ImageCollection(
        images, digits.class_names, digits.mean, digits.std, digits.image_size, digits.augmentation
    )


@pytest.fixture
def make_config():
    """A configuration that takes a second: 4 steps of the teacher, rounds of 3 + 5."""

    def make(**settings):
        run = {"log_every": 2, "accelerator": "cpu", "bar": False, **settings.pop("run", {})}
        images = {"test_fraction": 0.3, "folds": 3, "fold": 1, "labeled_fraction": 0.6, **settings.pop("data", {})}
        small = {
            "model": "convnet-small",
            "embedding_dim": 8,
            "k": 6,
            "batch_size": 16,
            "optimizer": "adamw",
            "learning_rate": 1e-2,
        }
        short = {"teacher_steps": TEACHER, "warm_up_steps": WARM_UP, "student_steps": STUDENT, "rounds": 2}
        return SladeConfig(data=SladeDataConfig(**images), run=RunConfig(**run), **{**small, **short, **settings})

    return make


class Plain(nn.Module):
    """A network of two linear maps."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(64, 12), nn.Linear(12, 8)

    def forward(self, images):
        maps = self.backbone(images.flatten(1)).tanh()
        return F.normalize(maps), F.normalize(self.head(maps))


@pytest.fixture
def make_trainer(make_config, collection):
    def make(**settings):
        torch.manual_seed(3)
        return Slade(make_config(**settings), collection, make_fabric(RunConfig(accelerator="cpu")), model=Plain())

    return make


def run(trainer, steps):
    """The batches of the first steps, with the state of the trainer before each and after the last."""
    states, batches = [], []
    for step, batch in zip(range(steps), trainer.batches(0), strict=False):
        states.append(copied(trainer.state_dict()))
        trainer.step(batch, step)
        batches.append(batch)
    return batches, [*states, copied(trainer.state_dict())]


def copied(state):
    return {name: value.clone() if isinstance(value, torch.Tensor) else _copied(value) for name, value in state.items()}


def _copied(value):
    return copied(value) if isinstance(value, dict) else value


def same(first, second, *names):
    return all(torch.equal(first[name][key], value) for name in names for key, value in second[name].items())


def pixels_of(images):
    pixels = np.stack([np.asarray(images.images.image(i), dtype=np.float32) for i in range(len(images))])
    return torch.from_numpy((pixels / 255 - images.mean[0]) / images.std[0])[:, None]


def embeddings_of(network, images):
    with torch.no_grad():
        return network(pixels_of(images))[1]


# Images


def test_classes_of_the_four_parts_are_disjoint(make_trainer):
    images = make_trainer().images
    parts = images.labeled, images.unlabeled, images.validation, images.test
    names = [set(part.class_names) for part in parts]
    assert [len(classes) for classes in names] == [3, 2, 2, 3]
    assert len(set.union(*names)) == 10
    assert names[2:] == [{"3", "4"}, {"7", "8", "9"}]
    drawn = {frozenset(make_trainer(seed=seed).images.labeled.class_names) for seed in range(5)}
    assert len(drawn) > 1


def test_folds_are_quarters_of_the_first_half(collection):
    settings = [SladeDataConfig(unlabeled_name="digits", folds=2, fold=fold) for fold in range(2)]
    classes = [SladeImages(SladeConfig(data=of), collection, collection).validation.class_names for of in settings]
    assert classes == [("0", "1", "2"), ("3", "4")]


def test_unlabeled_images_of_the_test_classes_are_not_tested_on(make_config, collection):
    """Nothing else changes: the same classes, all training ones with their labels."""
    parts = SladeImages(make_config(data={"unlabeled_classes": "test"}), collection)
    named = parts.labeled, parts.unlabeled, parts.validation, parts.test
    assert [part.class_names for part in named] == [
        ("0", "1", "2", "5", "6"),
        ("7", "8", "9"),
        ("3", "4"),
        ("7", "8", "9"),
    ]
    seen = [
        {np.asarray(part.images.image(i)).tobytes() for i in range(len(part))} for part in (parts.unlabeled, parts.test)
    ]
    assert [len(part) for part in (parts.unlabeled, parts.test)] == [30, 30] and not seen[0] & seen[1]
    assert np.bincount(parts.unlabeled.labels).tolist() == np.bincount(parts.test.labels).tolist() == [10, 10, 10]
    again, other = (
        SladeImages(make_config(seed=seed, data={"unlabeled_classes": "test"}), collection).test for seed in (1, 2)
    )
    assert again.images.index.tolist() == parts.test.images.index.tolist() != other.images.index.tolist()


def test_an_unlabeled_collection_leaves_all_training_classes_their_labels(make_config, collection):
    other = data.class_subset(collection, range(10))
    config = make_config(data={"unlabeled_name": "digits"}, k=30)
    images = SladeImages(config, collection, other)
    assert images.unlabeled is other
    assert images.labeled.class_names == ("0", "1", "2", "5", "6")
    teacher = make_config(data={"unlabeled_name": "digits"}, student="none")
    fabric = make_fabric(RunConfig(accelerator="cpu"))
    assert len(Slade(teacher, collection, fabric).images.labeled) == 100
    with pytest.raises(
        ValueError, match=r"unlabeled_images is None; it should be the images of digits, data\.unlabeled_name"
    ):
        Slade(config, collection, fabric)


# Stages


def test_stages_are_a_function_of_the_step(make_trainer):
    trainer = make_trainer()
    stages = [trainer.stage(step) for step in range(trainer.config.steps)]
    one = ["warm-up"] * WARM_UP + ["joint"] * STUDENT
    assert stages == ["teacher"] * TEACHER + one + one
    assert trainer.epoch_ends() == {TEACHER, TEACHER + ROUND, TEACHER + 2 * ROUND}
    without = make_trainer(student="pseudo-labels", rounds=1)
    assert [without.stage(step) for step in range(without.config.steps)] == ["teacher"] * TEACHER + ["joint"] * STUDENT
    assert make_trainer(student="none").config.steps == TEACHER


def test_evaluations_fall_on_the_ends_of_networks(make_config, collection):
    config = make_config(teacher_steps=450, student_steps=200, warm_up_steps=30)
    assert Slade(config, collection, make_fabric(RunConfig(accelerator="cpu"))).epoch_ends() == {
        200,
        400,
        450,
        680,
        910,
    }


def test_the_teacher_learns_from_labeled_images_alone(make_trainer):
    trainer = make_trainer()
    batches, states = run(trainer, TEACHER)
    assert all(batch.pseudo_labeled is None for batch in batches)
    assert same(states[0], states[-1], "basis", "similarity")
    assert not same(states[0], states[-1], "model")
    for batch in batches:  # four of each class, in a row
        classes = trainer.labels[batch.labeled.positions].view(4, 4)
        assert (classes == classes[:, :1]).all()


def test_the_warm_up_changes_the_basis_alone(make_trainer):
    _, states = run(make_trainer(), TEACHER + ROUND)
    for step in range(TEACHER, TEACHER + WARM_UP):
        # Before whose batch the student is made
        assert same(states[step], states[step + 1], "model") or step == TEACHER
        assert not same(states[step], states[step + 1], "basis")
    for step in range(TEACHER + WARM_UP, TEACHER + ROUND):
        assert not same(states[step], states[step + 1], "model")
        assert not same(states[step], states[step + 1], "basis")


def test_pseudo_labels_are_the_clusters_of_the_teachers_embeddings(make_trainer):
    trainer = make_trainer()
    run(trainer, TEACHER)
    teacher = embeddings_of(trainer.model, trainer.unlabeled)
    next(trainer.batches(TEACHER))
    assert torch.equal(trainer.pseudo_labels, cluster(teacher, 6, seed=1))
    assert trainer.pseudo_labels.unique().tolist() == list(range(6))
    assert trainer.clustering == {
        "pseudo_label_NMI": metrics.nmi_of_clusters(trainer.unlabeled.labels, trainer.pseudo_labels.numpy())
    }
    assert not torch.equal(embeddings_of(trainer.model, trainer.unlabeled), teacher)


def test_a_student_starts_where_the_teacher_started_and_teaches_the_next(make_trainer):
    trainer, taught = make_trainer(), []
    start_round = trainer.start_round
    start = copied(trainer.state_dict())

    def recorded():
        network = embeddings_of(trainer.model, trainer.unlabeled)
        start_round()
        taught.append((network, trainer.pseudo_labels.clone()))
        state = trainer.state_dict()
        assert same(start, state, "model", "basis", "similarity")
        assert not state["optimizer"]["state"]

    trainer.start_round = recorded
    for step, batch in enumerate(trainer.batches(0)):
        trainer.step(batch, step)
        if step == TEACHER + ROUND - 1:
            first_student = embeddings_of(trainer.model, trainer.unlabeled)
    assert step + 1 == trainer.config.steps
    assert len(taught) == 2
    assert torch.equal(taught[1][0], first_student)
    for network, labels in taught:
        assert torch.equal(labels, cluster(network, 6, seed=1))


def test_pseudo_labeled_batches_are_drawn_by_cluster(make_trainer):
    trainer = make_trainer()
    batches, _ = run(trainer, TEACHER + ROUND)
    for batch in batches[TEACHER:]:
        clusters = trainer.pseudo_labels[batch.pseudo_labeled.positions].view(4, 4)
        assert (clusters == clusters[:, :1]).all()
        assert clusters[:, 0].unique().numel() == 4
    positions = [batch.labeled.positions.tolist() for batch in batches]
    assert len({tuple(position) for position in positions}) == len(positions)


# Losses


def joint_batch(trainer):
    """The first joint step's, with the trainer as it is before it."""
    batches = trainer.batches(0)
    for step in range(TEACHER + WARM_UP):
        trainer.step(next(batches), step)
    return next(batches)


def expected_terms(trainer, batch):
    """Embeddings and labels of both sets, basis features and moments after the batch, without the trainer's help."""
    config, moments = trainer.config, trainer.similarity
    f_l, f_u = trainer.model(batch.labeled.images)[1], trainer.model(batch.pseudo_labeled.images)[1]
    labels, clusters = trainer.labels[batch.labeled.positions], trainer.pseudo_labels[batch.pseudo_labeled.positions]
    r_l, r_u = f_l @ trainer.basis.weight.t(), f_u @ trainer.basis.weight.t()
    now = reference.similarity_moments(r_u, labels=clusters)
    beta = config.moment_momentum
    running = {name: (1 - beta) * getattr(now, name) + beta * getattr(moments, name).clone() for name in now._fields}
    return f_l, f_u, labels, clusters, r_l, r_u, running


def rank(config, embeddings, labels):
    return reference.pair_ranking_loss(
        embeddings, labels, positive_margin=config.positive_margin, negative_margin=config.negative_margin
    )


def test_the_joint_loss_is_the_papers(make_trainer):
    trainer = make_trainer(
        moment_gradient="momentum", lambda_1=0.7, lambda_2=0.3, sd_variance_weight=2.0, moment_momentum=0.6
    )
    config, batch = trainer.config, joint_batch(trainer)
    f_l, f_u, labels, _, r_l, r_u, running = expected_terms(trainer, batch)
    mined = reference.mined_pair_ranking_loss(
        f_u,
        r_u,
        positive_threshold=running["positive_mean"].detach(),
        negative_threshold=running["negative_mean"].detach(),
        positive_margin=config.positive_margin,
        negative_margin=config.negative_margin,
    )
    distributions = (running["negative_mean"] - running["positive_mean"] + 0.5).relu()
    distributions = distributions + 2 * (running["positive_var"] + running["negative_var"])
    expected = rank(config, f_l, labels) + 0.7 * mined + 0.3 * (F.cross_entropy(r_l, labels) + distributions)
    parameters = [trainer.model.head.weight, trainer.model.backbone.weight, trainer.basis.weight]
    gradients = torch.autograd.grad(expected, parameters)
    losses = trainer.step(batch, TEACHER + WARM_UP)
    torch.testing.assert_close(losses["loss"], expected.detach())
    torch.testing.assert_close(losses["loss_unlabeled"], mined.detach())
    assert mined > 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    for name, value in running.items():
        torch.testing.assert_close(getattr(trainer.similarity, name), value.detach())


def test_the_warm_up_loss_is_that_of_the_basis(make_trainer):
    trainer = make_trainer()
    batches = trainer.batches(0)
    for step in range(TEACHER):
        trainer.step(next(batches), step)
    batch = next(batches)
    f_l, f_u, labels, clusters, *_ = expected_terms(trainer, batch)
    moments = reference.similarity_moments(f_u @ trainer.basis.weight.t(), clusters)
    distributions = (
        (moments.negative_mean - moments.positive_mean + 0.5).relu() + moments.positive_var + moments.negative_var
    )
    expected = 0.25 * (F.cross_entropy(f_l @ trainer.basis.weight.t(), labels) + distributions)
    losses = trainer.step(batch, TEACHER)
    torch.testing.assert_close(losses["loss"], expected.detach())
    assert losses["loss_labeled"] == losses["loss_unlabeled"] == 0
    assert trainer.model.head.weight.grad is None


@pytest.mark.parametrize("ranking_loss", ["contrastive", "multi-similarity"])
def test_rows_of_the_ablation(make_trainer, ranking_loss):
    """Of three trainers with the same weights: pseudo-labels, + basis, + mining."""
    settings = {"ranking_loss": ranking_loss, "warm_up_steps": 0, "ms_alpha": 2.0}
    losses = {}
    for student in ("pseudo-labels", "basis", "mining"):
        trainer = make_trainer(student=student, **settings)
        batches = trainer.batches(0)
        for step in range(TEACHER):
            trainer.step(next(batches), step)
        batch = next(batches)
        f_l, f_u, labels, clusters, _, _, _ = expected_terms(trainer, batch)
        on_clusters = trainer.rank(f_u, clusters)
        losses[student] = {name: value.item() for name, value in trainer.step(batch, TEACHER).items()}
        assert losses[student]["loss_labeled"] == pytest.approx(trainer.rank(f_l, labels).item(), rel=1e-5)
    plain, basis, mining = losses.values()
    assert plain.keys() == {"loss", "loss_labeled", "loss_unlabeled"}
    assert plain["loss"] == pytest.approx(plain["loss_labeled"] + plain["loss_unlabeled"])
    assert plain["loss_unlabeled"] == pytest.approx(on_clusters.item(), rel=1e-5) == basis["loss_unlabeled"]
    assert basis["loss"] == pytest.approx(
        plain["loss"] + 0.25 * (basis["loss_cross_entropy"] + basis["loss_similarity"]), rel=1e-5
    )
    assert mining["loss_unlabeled"] != pytest.approx(basis["loss_unlabeled"], rel=1e-3)
    assert mining["loss_similarity"] == pytest.approx(basis["loss_similarity"])


def test_multi_similarity_takes_the_mined_pairs(make_trainer):
    trainer = make_trainer(
        ranking_loss="multi-similarity", ms_alpha=2.0, ms_beta=20.0, ms_base=0.4, moment_momentum=0.5
    )
    batch = joint_batch(trainer)
    _, f_u, _, _, _, r_u, running = expected_terms(trainer, batch)
    cosines, believed = f_u @ f_u.t(), F.normalize(r_u) @ F.normalize(r_u).t()
    others = ~torch.eye(len(f_u), dtype=torch.bool)
    positive, negative = (
        (believed >= running["positive_mean"]) & others,
        (believed <= running["negative_mean"]) & others,
    )
    positive, negative = positive & ~negative, negative & ~positive
    assert positive.any()
    assert negative.any()
    expected = torch.log1p((positive * torch.exp(-2 * (cosines - 0.4))).sum(1)) / 2
    expected = expected + torch.log1p((negative * torch.exp(20 * (cosines - 0.4))).sum(1)) / 20
    torch.testing.assert_close(
        trainer.step(batch, TEACHER + WARM_UP)["loss_unlabeled"], expected.mean().detach(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("similarity_loss", ["local-ce", "global-ce"])
def test_other_similarity_losses_train_and_mine(make_trainer, similarity_loss):
    trainer = make_trainer(similarity_loss=similarity_loss)
    before = copied(trainer.similarity.state_dict())
    run(trainer, TEACHER + ROUND)
    assert trainer.similarity.positive_mean != trainer.similarity.negative_mean
    if similarity_loss == "global-ce":
        assert not torch.equal(trainer.similarity.prototypes, before["prototypes"])


def test_optimizers(make_trainer):
    settings = {"learning_rate": 1e-3, "basis_learning_rate": 1e-2, "weight_decay": 0.02}
    for optimizer, kind in (("rmsprop", torch.optim.RMSprop), ("adamw", torch.optim.AdamW)):
        made = make_trainer(optimizer=optimizer, **settings).optimizer.optimizer
        assert isinstance(made, kind)
        assert [(group["lr"], group["weight_decay"]) for group in made.param_groups] == [(1e-3, 0.02), (1e-2, 0.02)]
    assert made.param_groups[1]["params"][0].shape == (3, 8)
    assert len(make_trainer(student="pseudo-labels").optimizer.optimizer.param_groups) == 1


# Runs


def test_evaluation_is_of_the_embeddings(make_trainer):
    trainer = make_trainer()
    figures = trainer.evaluate()
    assert figures["final_MAP@R"] == 0
    for name, images in (("validation", trainer.images.validation), ("test", trainer.images.test)):
        expected = metrics.retrieval(embeddings_of(trainer.model, images), images.labels)
        for figure in ("MAP@R", "RP", "P@1"):
            assert figures[f"{name}_{figure}"] == pytest.approx(expected[figure], abs=1e-6)


def test_a_run_keeps_the_best_weights_of_the_last_student(make_config, collection, tmp_path):
    config = make_config(run={"out": str(tmp_path), "eval_every": 2})
    result = train_slade(config, images=collection)
    assert (result.finished, result.step) == (True, TEACHER + 2 * ROUND)
    last = [record for record in result.history if record["step"] > TEACHER + ROUND + WARM_UP]
    assert [record["final_MAP@R"] for record in last] == [record["validation_MAP@R"] for record in last]
    assert all(record["final_MAP@R"] == 0 for record in result.history if record not in last)
    assert {"loss", "loss_unlabeled", "pseudo_label_NMI", "similarity_positive_mean", "test_P@1"} <= last[0].keys()
    assert "pseudo_label_NMI" not in result.history[0]
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["evaluation"] == result.best("final_MAP@R") in last
    trainer = Slade(config, collection, make_fabric(RunConfig(accelerator="cpu")))
    trainer.model.load_state_dict(best["model"])
    figures = trainer.evaluate()
    assert {figures[name] == best["evaluation"][name] for name in figures if name != "final_MAP@R"} == {True}


def test_the_teacher_alone_can_be_trained_for_as_long(make_config, collection):
    student = make_config()
    teacher = make_config(student="none", teacher_steps=student.steps)
    assert student.steps == teacher.steps == TEACHER + 2 * ROUND
    result = train_slade(teacher, images=collection)
    assert result.history[-1]["step"] == teacher.steps
    assert result.history[-1]["final_MAP@R"] == result.history[-1]["validation_MAP@R"] > 0


def train_and_stop(config, collection, step, monkeypatch):
    """Trains until SIGTERM comes in a step; the number of steps that were done."""
    original = Slade.step

    def interrupted(self, batch, number):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Slade, "step", interrupted)
        return train_slade(config, images=collection).step


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (2, {}),  # in the middle of the teacher
        (TEACHER - 1, {}),  # at its end
        (TEACHER + 1, {"similarity_loss": "global-ce"}),  # in a warm-up
        (TEACHER + WARM_UP + 2, {"freeze_bn": False}),  # among the steps of a student
        (TEACHER + ROUND - 1, {"optimizer": "rmsprop"}),  # at the end of a round
        (TEACHER + ROUND + 5, {"ranking_loss": "multi-similarity", "precision": "bf16-mixed"}),
    ],
)
def test_stop_in_any_stage_and_resume_gives_the_same_bits(
    make_config, collection, tmp_path, step, settings, monkeypatch
):
    whole = train_slade(make_config(**settings, run={"out": str(tmp_path / "whole")}), images=collection)
    stopped = make_config(**settings, run={"out": str(tmp_path / "stopped")})
    assert train_and_stop(stopped, collection, step, monkeypatch) == step + 1
    resumed = train_slade(stopped, images=collection, resume=True)
    assert resumed.finished
    assert resumed.history == whole.history
    for name in ("checkpoint.pt", "best.pt"):
        first, second = (load_checkpoint(tmp_path / which / name) for which in ("whole", "stopped"))
        first.pop("config", None), second.pop("config", None)
        assert first.pop("images", None) == second.pop("images", None)
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_teacher_and_student_learn_to_tell_the_labeled_classes_apart(make_config, collection):
    config = make_config(
        teacher_steps=60, student_steps=60, rounds=1, freeze_bn=False, learning_rate=1e-3, embedding_dim=32
    )
    trainer, evaluations = Slade(config, collection, make_fabric(RunConfig(accelerator="cpu"))), []
    for step, batch in enumerate(trainer.batches(0)):
        if step in (0, 60, 60 + WARM_UP):
            evaluations.append(
                metrics.retrieval(
                    embeddings_of(trainer.model.eval(), trainer.images.labeled), trainer.images.labeled.labels
                )
            )
        trainer.step(batch, step)
    evaluations.append(
        metrics.retrieval(embeddings_of(trainer.model.eval(), trainer.images.labeled), trainer.images.labeled.labels)
    )
    untrained, start, warm, student = (evaluation["MAP@R"] for evaluation in evaluations)
    assert untrained == start == warm < student
    assert student > 0.9
    assert trainer.clustering["pseudo_label_NMI"] > 0.3


# Folds


def test_folds_are_tested_by_their_concatenated_embeddings(make_config, collection, tmp_path):
    config = make_config(rounds=1, data={"fold": None, "folds": 2}, run={"out": str(tmp_path)})
    result = train_slade(config, images=collection)
    assert (result.finished, result.step, result.steps) == (True, 2 * (TEACHER + ROUND), 2 * (TEACHER + ROUND))
    test = data.class_subset(collection, [7, 8, 9])
    parts, records = [], []
    for fold in range(2):
        best = load_checkpoint(tmp_path / f"fold{fold}" / "best.pt")
        network = build_network(config, collection)
        network.load_state_dict(best["model"])
        parts.append(embeddings_of(network.eval(), test))
        records.append(best["evaluation"])
    together = metrics.retrieval(torch.cat(parts, dim=1), test.labels)
    (record,) = result.history
    for name in ("MAP@R", "RP", "P@1"):
        assert record[f"test_{name}"] == pytest.approx(together[name], abs=1e-6)
        assert record[f"separate_test_{name}"] == pytest.approx(
            np.mean([fold[f"test_{name}"] for fold in records]), abs=1e-6
        )
        assert record[f"validation_{name}"] == pytest.approx(np.mean([fold[f"validation_{name}"] for fold in records]))
    assert result.best("final_MAP@R") is record
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["test_MAP@R"] == record["test_MAP@R"]


def test_folds_resume_where_they_stopped(make_config, collection, tmp_path, monkeypatch):
    config = make_config(rounds=1, data={"fold": None, "folds": 2}, run={"out": str(tmp_path)})
    original, calls = Slade.step, []

    def interrupted(self, batch, number):
        calls.append(number)
        if len(calls) == config.steps + 6:  # in the second fold
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, number)

    monkeypatch.setattr(Slade, "step", interrupted)
    stopped = train_folds(config, images=collection)
    assert (stopped.finished, stopped.step, stopped.steps) == (False, config.steps + 6, 2 * config.steps)
    with pytest.raises(ValueError, match="exists; go on from it with --resume"):
        train_folds(config, images=collection)
    resumed = train_folds(config, images=collection, resume=True)
    assert resumed.finished
    assert len(calls) == 2 * config.steps
    assert len(resumed.history) == 1


# Clusters


@pytest.mark.parametrize("backend", ["_faiss_clusters", "_sklearn_clusters"])
def test_k_means_finds_separate_clusters(backend):
    pytest.importorskip("faiss" if "faiss" in backend else "sklearn")
    from ssmkernels.trainers import pseudo_labels

    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(5, 16, generator=generator)
    labels = torch.arange(5).repeat(20)
    features = centers[labels] + torch.randn(100, 16, generator=generator)
    clusters = getattr(pseudo_labels, backend)(features, 5, 3)
    assert clusters.dtype == torch.int64
    assert metrics.nmi_of_clusters(labels, clusters) == pytest.approx(1)
    assert torch.equal(clusters, getattr(pseudo_labels, backend)(features, 5, 3))


def test_clusters_have_no_gaps():
    assert cluster(torch.ones(6, 4), 3, seed=0).tolist() == [0] * 6
    with pytest.raises(ValueError, match="k is 7; it should be from 1 to 6, the number of features"):
        cluster(torch.ones(6, 4), 7, seed=0)


# Ranks


RANKS = """
import sys
import torch
from dataclasses import asdict
from ssmkernels import data
from ssmkernels.distributed import gather_rows
from ssmkernels.trainers import RunConfig, Slade, SladeConfig, SladeDataConfig
from ssmkernels.trainers import slade
from ssmkernels.trainers.loop import fit, make_fabric

out, ranking_loss, similarity_loss = sys.argv[1:]
if (ranking_loss, similarity_loss) == ("contrastive", "sd"):
    slade.gather_rows = slade.all_gather_rows = None  # the rows of other ranks come round in blocks
config = SladeConfig(
    data=SladeDataConfig(test_fraction=0.3, folds=3, fold=1, labeled_fraction=0.6),
    model="convnet-small", embedding_dim=8, k=6, ranking_loss=ranking_loss, similarity_loss=similarity_loss,
    batch_size=16, optimizer="rmsprop", learning_rate=1e-5, teacher_steps=2, warm_up_steps=2, student_steps=3,
    run=RunConfig(eval_every=4, log_every=1, accelerator="cpu", bar=False),
)
fabric = make_fabric(RunConfig(accelerator="cpu"))
trainer = Slade(config, data.load_collection("digits"), fabric)
gradients = []
step = trainer.step
def recorded(batch, number):
    losses = step(batch, number)
    weights = (trainer.model.head.weight, trainer.basis.weight)
    gradients.append([None if weight.grad is None else weight.grad.clone() for weight in weights])
    return losses
trainer.step = recorded
result = fit(trainer, fabric=fabric, steps=config.steps, run=config.run, config=asdict(config))

rows = torch.arange(6.0).view(3, 2)[: 3 - fabric.global_rank].clone().requires_grad_()
gathered = gather_rows(rows)
gathered.square().sum().backward()
state = {name: part for name, part in trainer.state_dict().items() if name != "optimizer"}
torch.save({"state": state, "history": result.history, "gradients": gradients, "gathered": gathered.detach(),
            "rows": rows.grad},
           f"{out}/rank{fabric.global_rank}.pt")
"""


@pytest.mark.parametrize("losses", [("contrastive", "sd"), ("multi-similarity", "global-ce")])
def test_two_ranks_have_the_losses_and_gradients_of_one(two_ranks, tmp_path, monkeypatch, losses):
    first, second = two_ranks(RANKS, tmp_path, *losses)
    (tmp_path / "alone").mkdir()
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "alone"), *losses])
    for name in ("gather_rows", "all_gather_rows"):  # which the script takes away
        monkeypatch.setattr(slade, name, getattr(slade, name))
    runpy.run_path(str(tmp_path / "script.py"))
    alone = torch.load(tmp_path / "alone" / "rank0.pt", weights_only=True)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    torch.testing.assert_close(first["gradients"], second["gradients"], rtol=0, atol=0)
    assert first["history"] == second["history"]

    assert torch.equal(first["state"]["pseudo_labels"], alone["state"]["pseudo_labels"])
    assert len(alone["gradients"]) == 7
    for two, one in zip(first["gradients"], alone["gradients"], strict=True):
        assert [gradient is None for gradient in two] == [gradient is None for gradient in one]
        for a, b in zip(two, one, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert first["history"][0]["loss"] == pytest.approx(alone["history"][0]["loss"], rel=1e-4)

    assert torch.equal(first["gathered"], torch.tensor([[0.0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]))
    assert torch.equal(first["rows"], 2 * 2 * torch.arange(6.0).view(3, 2))  # both ranks send back 2 x
    assert torch.equal(second["rows"], 2 * 2 * torch.arange(4.0).view(2, 2))
    assert torch.equal(alone["rows"], 2 * torch.arange(6.0).view(3, 2))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 18}, "batch_size is 18; it should be a multiple of per_class, 4, of two or more classes"),
        ({"batch_size": 4}, "batch_size is 4; it should be a multiple of per_class, 4, of two or more classes"),
        ({"teacher_steps": 0}, "teacher_steps is 0; it should be at least 1"),
        ({"k": 1}, "k is 1; it should be at least 2"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"ms_beta": 0.0}, r"ms_beta is 0\.0; it should be positive"),
        ({"moment_momentum": 1.0}, r"moment_momentum is 1\.0; it should be in \[0, 1\)"),
        (
            {"data": {"unlabeled_classes": "all"}},
            r"data\.unlabeled_classes is 'all'; it should be one of training, test",
        ),
        ({"student": "all"}, "student is 'all'; it should be one of none, pseudo-labels, basis, mining"),
        ({"similarity_loss": "ce"}, "similarity_loss is 'ce'; it should be one of sd, local-ce, global-ce"),
        ({"ranking_loss": "triplet"}, "ranking_loss is 'triplet'; it should be one of contrastive, multi-similarity"),
        ({"moment_gradient": "none"}, "moment_gradient is 'none'; it should be one of batch, momentum"),
        ({"data": {"folds": 1}}, r"data\.folds is 1; it should be at least 2"),
        ({"data": {"fold": 3}}, r"data\.fold is 3; it should be in \[0, 3\), one of data\.folds, or null for all"),
        ({"data": {"test_fraction": 1.0}}, r"data\.test_fraction is 1\.0; it should be between 0 and 1"),
        ({"data": {"unlabeled_root": "D"}}, r"data\.unlabeled_root is 'D' without data\.unlabeled_name"),
    ],
)
def test_bad_settings(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


def test_settings_that_do_not_fit_the_images(make_config, make_trainer, collection):
    with pytest.raises(ValueError, match="k is 41; it should be at most 40, the number of unlabelled images"):
        make_trainer(k=41)
    with pytest.raises(ValueError, match=r"data\.test_fraction is 0\.7, which splits 10 classes into 3 and 7"):
        make_trainer(data={"test_fraction": 0.7})
    with pytest.raises(ValueError, match=r"data\.labeled_fraction is 0\.2, 1 of 5 training classes"):
        make_trainer(data={"labeled_fraction": 0.2})
    with pytest.raises(ValueError, match=r"data\.fold is None; it should be the number of a fold"):
        make_trainer(data={"fold": None})
    with pytest.raises(ValueError, match=r"run\.out is None; it should be a folder, for the weights of the folds"):
        train_slade(make_config(data={"fold": None}), images=collection)


def test_shipped_configurations():
    names = config_names("slade")
    paper = {"cub200-nabirds", "cub200-nabirds-ms", "cars196-compcars", "cars196-compcars-ms", "inshop-fashion200k"}
    assert set(names) == paper | {"cub200-nabirds-bf16", "digits", "mnist5k", "flowers17", "glyphs"}
    for name in names:
        config, _ = parse_config("slade", ["--config", name])
        assert (config.student, config.similarity_loss, config.lambda_1, config.lambda_2) == ("mining", "sd", 1, 0.25)
        if name in paper:
            assert (config.model, config.embedding_dim, config.freeze_bn) == ("resnet50", 128, True)
            assert (config.batch_size, config.per_class, config.moment_momentum) == (32, 4, 0.99)
            assert (config.optimizer, config.learning_rate, config.weight_decay) == ("rmsprop", 1e-6, 1e-4)
            assert (config.data.image_size, config.data.folds) == (227, 4)
            assert config.data.test_fraction == (0.49924 if name == "inshop-fashion200k" else 0.5)
            assert f"{config.data.name}-{config.data.unlabeled_name}" == name.removesuffix("-ms")
            assert (config.ranking_loss == "multi-similarity") == name.endswith("-ms")


def test_command_line(tmp_path, capsys):
    short = [
        "--teacher_steps",
        "2",
        "--student_steps",
        "2",
        "--warm_up_steps",
        "1",
        "--run.accelerator",
        "cpu",
        "--run.bar",
        "false",
    ]
    arguments = [
        "slade",
        "--config",
        "digits",
        *short,
        "--run.out",
        str(tmp_path / "run"),
        "--data.fold",
        "null",
        "--data.folds",
        "2",
    ]
    assert main(arguments) == 0
    assert "final_MAP@R: " in (printed := capsys.readouterr().out)
    assert "test_MAP@R: " in printed
    assert main(arguments) == 1
    assert "exists; go on from it with --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0


AT_REST = {"rounds": 1, "teacher_steps": 40, "warm_up_steps": 2, "student_steps": 20, "patience": 6}
"""With a rate of 0 no evaluation is better than the first, after 2 steps: 8 steps later a network ends."""


def test_networks_end_at_a_plateau(make_config, collection, tmp_path):
    config = make_config(**AT_REST, learning_rate=0.0, run={"out": str(tmp_path), "eval_every": 2})
    result = train_slade(config, images=collection)
    assert (result.finished, result.step) == (True, 10 + 2 + 10)
    assert [record["step"] for record in result.history] == list(range(2, 23, 2))
    kinds = ["pseudo_label_NMI" in record for record in result.history]
    assert kinds == [False] * 5 + [True] * 6
    assert [record["final_MAP@R"] > 0 for record in result.history] == [False] * 6 + [True] * 5
    again = train_slade(config, images=collection, resume=True)
    assert (again.finished, again.step, again.history) == (True, 22, result.history)


@pytest.mark.parametrize("step", [4, 6, 11])
def test_a_run_that_ends_early_resumes_on_the_same_bits(make_config, collection, tmp_path, step, monkeypatch):
    settings = {**AT_REST, "patience": 2, "learning_rate": 0.01}
    whole = train_slade(
        make_config(**settings, run={"out": str(tmp_path / "whole"), "eval_every": 2}), images=collection
    )
    stopped = make_config(**settings, run={"out": str(tmp_path / "stopped"), "eval_every": 2})
    assert whole.step < 62
    train_and_stop(stopped, collection, step, monkeypatch)
    resumed = train_slade(stopped, images=collection, resume=True)
    assert resumed.history == whole.history
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt")["trainer"]["model"] for name in ("whole", "stopped")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_teacher_is_the_network_at_its_best(make_trainer, monkeypatch):
    trainer = make_trainer(teacher_steps=40, patience=2)
    kept = trainer.model.head.weight.detach().clone()
    trainer.done = 2
    trainer.end_at_plateau(0.5, 2)
    with torch.no_grad():
        trainer.model.head.weight.add_(1)
    trainer.done = 4
    trainer.end_at_plateau(0.5, 2)
    assert trainer.skipped == 0
    trainer.done = 6
    trainer.end_at_plateau(0.4, 2)
    assert (trainer.skipped, trainer.position) == (34, 40)
    heads, embed = [], trainer._embed

    def seen(images):
        heads.append(trainer.model.head.weight.detach().clone())
        return embed(images)

    monkeypatch.setattr(trainer, "_embed", seen)
    trainer.start_round()
    assert torch.equal(heads[0], kept)


def test_classes_of_a_list(make_config, collection, tmp_path):
    """With and without classes to validate on: these then take the place of a fold."""
    lines = ["9 train", "0 train", "3 test", "1 test", "2\ttrain", "5 train", "6 train"]
    (tmp_path / "classes.txt").write_text("\n".join(lines) + "\n")
    config = make_config(data={"classes_file": str(tmp_path / "classes.txt"), "folds": 4, "fold": 0})
    images = SladeImages(config, collection, collection)
    assert images.test.class_names == ("1", "3")
    assert images.validation.class_names == ("0", "2")
    (tmp_path / "classes.txt").write_text("\n".join([*lines, "7 val"]) + "\n")
    assert SladeImages(config, collection, collection).validation.class_names == ("7",)
