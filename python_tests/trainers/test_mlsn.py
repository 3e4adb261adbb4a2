# SPDX-License-Identifier: BSD-3-Clause
import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmkernels import data, reference
from ssmkernels.nn import SimilarityNetwork, sample_pairs
from ssmkernels.trainers import MLSN, DataConfig, MLSNConfig, RampConfig, RunConfig, train_mlsn
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.cli import config_names, main, parse_config
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.mlsn import MLSNNetwork, build_network

CLASSES, DIM, BATCH = 10, 16, 8


def constant(weight):
    return RampConfig(weight, share=0.0)


OFF = constant(0.0)
MEAN_TEACHER = {"lambda_2": OFF, "lambda_3": OFF}
SUPERVISED = {"lambda_1": OFF, **MEAN_TEACHER}


class Backbone(nn.Module):
    """Without batch norm, so that rows are independent; remembers how many it saw."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, DIM)
        self.rows: list[int] = []

    def forward(self, images):
        self.rows.append(len(images))
        return self.linear(images.flatten(1)).tanh()


def plain_network(similarity=True):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = MLSNNetwork(Backbone(), nn.Linear(DIM, CLASSES), None)
        if similarity:
            network.similarity = SimilarityNetwork(DIM, 12)
    for parameter in network.parameters():
        parameter.data *= 2
    return network


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(3)]
    labels = [torch.randint(CLASSES, (BATCH,), generator=generator) for _ in range(2)]
    return data.Batch(images[0], labels[0], torch.arange(BATCH), images[1], images[2], labels[1])


@pytest.fixture
def make_mlsn_config(make_run):
    def make(**settings):
        run = make_run(**settings.pop("run", {}))
        images = {"name": "digits", "labels": 20, **settings.pop("data", {})}
        small = {"model": "wrn-10-1", "batch_size": BATCH, "pairs": 32, "hidden_features": 12, "steps": 8}
        return MLSNConfig(data=DataConfig(**images), run=run, **{**small, **settings})

    return make


@pytest.fixture
def make_trainer(make_mlsn_config, digits):
    def make(**settings):
        config = make_mlsn_config(**settings)
        return MLSN(
            config, digits, make_fabric(RunConfig(accelerator="cpu")), model=plain_network(config.uses_similarity)
        )

    return make


def differ(trainer):
    """Makes the teacher another network than the student, as it is after the first step."""
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.mul_(1.5)


def gradients(trainer, loss):
    parameters = dict(trainer.model.named_parameters())
    return dict(
        zip(
            parameters,
            torch.autograd.grad(loss, parameters.values(), retain_graph=True, allow_unused=True),
            strict=True,
        )
    )


@pytest.mark.parametrize("teacher", ["ema", "student"])
@pytest.mark.parametrize("pair_labels", ["pseudo", "weak"])
def test_losses_and_gradients_are_algorithm_2_1(make_trainer, teacher, pair_labels):
    weights = {"lambda_1": constant(3.0), "lambda_2": constant(5.0), "lambda_3": constant(0.7)}
    trainer, batch = (
        make_trainer(**weights, teacher=teacher, pair_labels=pair_labels, focal_alpha=0.3, focal_gamma=1.0),
        make_batch(),
    )
    differ(trainer)
    losses = trainer.losses(batch, 4)
    model, similarity = trainer.model, trainer.model.similarity

    logits_labeled, h_labeled = model(batch.labeled_weak)
    logits, h = model(batch.unlabeled_weak)
    with torch.no_grad():
        other = trainer.teacher if teacher == "ema" else model
        targets = other(batch.unlabeled_strong)[0].softmax(dim=1)
    expected = F.cross_entropy(logits_labeled, batch.labels)
    expected = expected + 3.0 * ((logits.softmax(dim=1) - targets) ** 2).mean()

    y_hat = targets.argmax(dim=1) if pair_labels == "pseudo" else batch.unlabeled_labels
    pairs = sample_pairs(BATCH, 32, generator=trainer._generator(4, 1))
    features, labels = torch.cat([h_labeled, h]), torch.cat([batch.labels, y_hat])
    total = 0.0
    for i, j in pairs.tolist():
        logit = (
            similarity.w2 @ (similarity.w1 @ torch.cat([features[i], features[j]]) + similarity.b1).relu()
            + similarity.b2
        )
        p, same = logit.sigmoid(), labels[i] == labels[j]
        p_t, alpha_t = (p, 0.3) if same else (1 - p, 0.7)
        total = total - alpha_t * (1 - p_t) * p_t.log()
    expected = expected + 5.0 * total / len(pairs)

    centers = trainer.centers
    assert centers.present.tolist() == [c in batch.labels for c in range(CLASSES)]
    p = torch.zeros(BATCH, CLASSES)
    for c in batch.labels.unique():
        assert (h_labeled[batch.labels == c] == centers.features[c]).all(dim=1).any()
        p[:, c] = similarity.class_probabilities(h.detach(), centers.features)[:, c].detach()
    y_sc = p / p.sum(dim=1, keepdim=True)
    expected = expected - 0.7 * (y_sc * logits.log_softmax(dim=1)).sum(dim=1).mean()

    torch.testing.assert_close(losses["loss"], expected)
    assert not losses["loss_consistency"].isclose(torch.tensor(0.0))
    theirs = gradients(trainer, expected)
    for name, mine in gradients(trainer, losses["loss"]).items():
        torch.testing.assert_close(mine, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
        assert mine.abs().sum() > 0


def test_every_loss_reaches_the_student(make_trainer):
    """A consistency loss that reads the student's prediction from the teacher's pass has no gradient at all."""
    trainer, batch = make_trainer(), make_batch()
    differ(trainer)
    losses = trainer.losses(batch, 4)
    into = {
        "loss_consistency": {"backbone.linear.weight", "classifier.weight"},
        "loss_similarity": {
            "backbone.linear.weight",
            "similarity.w1",
            "similarity.b1",
            "similarity.w2",
            "similarity.b2",
        },
        "loss_cotraining": {"backbone.linear.weight", "classifier.weight"},
    }
    for name, reached in into.items():
        reaching = {
            key
            for key, gradient in gradients(trainer, losses[name]).items()
            if gradient is not None and gradient.abs().max() > 1e-8
        }
        assert {key for key in reaching if not key.endswith("linear.bias") and key != "classifier.bias"} == reached, (
            name
        )
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


def test_weak_labels_tell_relations_and_no_classes(make_trainer):
    batch = make_batch()
    renamed = batch._replace(unlabeled_labels=(batch.unlabeled_labels + 3) % CLASSES)
    moved = batch._replace(unlabeled_labels=batch.unlabeled_labels.flip(0))
    weak = [make_trainer(pair_labels="weak").losses(images, 4) for images in (batch, renamed, moved)]
    assert weak[0]["loss"].equal(weak[1]["loss"])
    assert not weak[0]["loss_similarity"].isclose(weak[2]["loss_similarity"])
    pseudo = [make_trainer().losses(images, 4)["loss"] for images in (batch, moved)]
    assert pseudo[0].equal(pseudo[1])


def test_images_below_the_threshold_take_part_in_no_pair(make_trainer):
    trainer, batch = make_trainer(pair_threshold=1.0), make_batch()
    loss = trainer.losses(batch, 4)["loss_similarity"]
    pairs = sample_pairs(BATCH, 32, generator=trainer._generator(4, 1))
    pairs = pairs[pairs[:, 0] < BATCH]
    _, h = trainer.model(batch.labeled_weak)
    s = trainer.model.similarity
    expected = reference.pair_focal_loss(
        h, h, batch.labels, batch.labels, s.w1, s.b1, s.w2, s.b2, pairs=pairs, alpha=0.5
    )
    torch.testing.assert_close(loss, expected)


def test_weights_ramp_up(make_trainer):
    batch = make_batch()
    for step, gaussian, linear in ((0, 0.0067379, 0.0), (20, 0.2865048, 0.2), (40, 1.0, 0.4), (90, 1.0, 0.9)):
        ramps = {"lambda_2": RampConfig(2.0, "gaussian", 0.4), "lambda_3": RampConfig(3.0, "gaussian", 0.4)}
        losses = make_trainer(steps=100, lambda_1=RampConfig(50.0, "linear", 1.0), **ramps).losses(batch, step)
        expected = losses["loss_labeled"] + 50 * linear * losses["loss_consistency"]
        expected = expected + gaussian * (2 * losses["loss_similarity"] + 3 * losses["loss_cotraining"])
        torch.testing.assert_close(losses["loss"], expected)


def test_mean_teacher_is_a_setting(make_trainer):
    trainer, batch = make_trainer(**MEAN_TEACHER, lambda_1=constant(2.0)), make_batch()
    assert trainer.model.similarity is None
    losses = trainer.losses(batch, 0)
    torch.testing.assert_close(losses["loss"], losses["loss_labeled"] + 2 * losses["loss_consistency"])
    assert trainer.model.backbone.rows == [2 * BATCH]
    assert trainer.teacher.model.backbone.rows == [BATCH]


def test_pi_model_is_a_setting(make_trainer):
    trainer = make_trainer(**MEAN_TEACHER, teacher="student")
    trainer.step(make_batch(), 4)
    assert trainer.model.backbone.rows == [2 * BATCH, BATCH]
    assert trainer.teacher.model.backbone.rows == []


def test_supervised_only_never_loads_unlabeled_images(make_trainer):
    trainer = make_trainer(**SUPERVISED)
    batch = next(iter(trainer.batches(0)))
    assert len(batch.unlabeled_weak) == len(batch.unlabeled_strong) == 0
    assert trainer.step(batch, 0).keys() == {"loss", "loss_labeled"}
    assert trainer.model.backbone.rows == [BATCH]


def test_both_views_are_weak_and_differ(make_trainer):
    trainer = make_trainer()
    batch = next(iter(trainer.batches(0)))
    assert len(batch.unlabeled_weak) == BATCH
    assert not batch.unlabeled_weak.equal(batch.unlabeled_strong)
    darkest = batch.unlabeled_weak.amin()  # what no shift changes, but RandAugment and cutout do
    assert batch.unlabeled_strong.amin() == darkest
    assert trainer.transforms.weak is trainer.batches(0).strong


@pytest.mark.parametrize("buffers", ["copy", "average", "own"])
def test_teacher_follows_parameters_and_buffers(make_mlsn_config, digits, buffers):
    """An average of parameters alone, in eval mode, would keep the batch-norm statistics of the start."""
    config = make_mlsn_config(ema_buffers=buffers, ema_decay=0.9, bn_momentum=0.1)
    trainer = MLSN(config, digits, make_fabric(RunConfig(accelerator="cpu")))
    before = copy.deepcopy(trainer.teacher.model.state_dict())
    trainer.step(next(iter(trainer.batches(0))), 4)
    student, teacher = trainer.model.state_dict(), trainer.teacher.model.state_dict()
    torch.testing.assert_close(
        teacher["classifier.weight"], 0.9 * before["classifier.weight"] + 0.1 * student["classifier.weight"]
    )
    torch.testing.assert_close(teacher["similarity.w1"], 0.9 * before["similarity.w1"] + 0.1 * student["similarity.w1"])
    name = "backbone.bn.running_var"
    assert not teacher[name].equal(before[name])
    if buffers == "average":
        torch.testing.assert_close(teacher[name], 0.9 * before[name] + 0.1 * student[name])
    assert teacher[name].equal(student[name]) == (buffers == "copy")
    assert trainer.teacher.training == (buffers == "own")


def test_rows_have_the_same_network_at_the_start(make_mlsn_config, digits):
    mlsn, supervised = (
        build_network(make_mlsn_config(**settings), digits).state_dict() for settings in ({}, SUPERVISED)
    )
    assert supervised.keys() < mlsn.keys()
    for name, value in supervised.items():
        assert value.equal(mlsn[name])


def test_optimizers(make_trainer):
    trainer, batch = make_trainer(learning_rate=0.01, weight_decay=0.5), make_batch()
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5}
    trainer.step(batch, 7)
    assert trainer.learning_rate == 0.01
    trainer = make_trainer(optimizer="sgd", learning_rate=0.01, weight_decay=0.5, schedule="cosine-7/16")
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for parameter in trainer.model.parameters():
        assert decays[id(parameter)] == (0.5 if parameter.ndim > 1 else 0.0)
    trainer.step(batch, 7)
    assert 0.001 < trainer.learning_rate < 0.01


SETTINGS = [
    {},
    {
        "optimizer": "sgd",
        "schedule": "cosine-7/16",
        "ema_buffers": "own",
        "lambda_2": constant(1.0),
        "lambda_3": constant(1.0),
    },
    {"precision": "bf16-mixed", "pair_labels": "weak", "interaction": "absdiff"},
    {**MEAN_TEACHER, "teacher": "student", "learning_rate": 1e-3},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_stop_and_resume_gives_the_same_bits(make_mlsn_config, digits, tmp_path, settings, monkeypatch):
    whole = train_mlsn(make_mlsn_config(**settings, run={"out": str(tmp_path / "whole")}), splits=digits)
    stopped = make_mlsn_config(**settings, run={"out": str(tmp_path / "stopped")})
    step = MLSN.step

    def interrupted(self, batch, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(MLSN, "step", interrupted)
        assert train_mlsn(stopped, splits=digits).step == 5
    resumed = train_mlsn(stopped, splits=digits, resume=True)

    assert resumed.finished
    assert resumed.history == whole.history
    first, second = (load_checkpoint(tmp_path / name / "checkpoint.pt")["trainer"] for name in ("whole", "stopped"))
    assert first.keys() == second.keys() == {"model", "teacher", "optimizer", "centers"}
    assert bool(first["centers"]) == ("lambda_2" not in settings or settings["lambda_2"].weight > 0)
    for part in first:
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)


def test_weak_labels_teach_digits(make_mlsn_config, digits):
    config = make_mlsn_config(
        model="convnet-small",
        steps=120,
        batch_size=32,
        pairs=512,
        hidden_features=64,
        pair_labels="weak",
        lambda_1=constant(1.0),
        optimizer="sgd",
        learning_rate=0.03,
        weight_decay=5e-4,
        lambda_2=constant(50.0),
        lambda_3=constant(0.3),
        ema_decay=0.9,
        run={"eval_every": 60},
    )
    first, last = train_mlsn(config, splits=digits).history
    assert last["loss_similarity"] < 0.7 * first["loss_similarity"]
    assert last["similarity_label_accuracy"] > 0.5
    assert last["ema_error"] < 0.4


RANKS = """
import sys
import torch
from dataclasses import asdict
from ssmkernels import data
from ssmkernels.trainers import MLSN, DataConfig, MLSNConfig, RunConfig
from ssmkernels.trainers.loop import fit, make_fabric

fabric = make_fabric(RunConfig(accelerator="cpu"))
splits = data.load_dataset("digits")
results = {}
for teacher in ("ema", "student"):
    config = MLSNConfig(
        data=DataConfig(name="digits", labels=20), model="wrn-10-1", batch_size=8, pairs=32,
        hidden_features=12, steps=3, teacher=teacher,
        run=RunConfig(out=f"{sys.argv[1]}/{teacher}", eval_every=2, log_every=1, accelerator="cpu", bar=False),
    )
    trainer = MLSN(config, splits, fabric)
    result = fit(trainer, fabric=fabric, steps=config.steps, run=config.run, config=asdict(config))
    results[teacher] = {"state": trainer.state_dict(), "history": result.history}
torch.save(results, f"{sys.argv[1]}/rank{fabric.global_rank}.pt")
"""


def test_ranks_agree_on_everything(two_ranks, tmp_path):
    """Each rank has pairs of its own: the similarity networks agree only if their gradients are averaged."""
    first, second = two_ranks(RANKS, tmp_path)
    for teacher in ("ema", "student"):
        torch.testing.assert_close(first[teacher]["state"], second[teacher]["state"], rtol=0, atol=0)
        assert first[teacher]["history"] == second[teacher]["history"]
        assert first[teacher]["state"]["centers"]["present"].all()


def test_every_shipped_configuration_is_valid():
    names = config_names("mlsn")
    tables = {f"svhn-{k}" for k in (250, 500, 1000)} | {f"cifar10-{k}" for k in (1000, 2000, 4000)}
    assert {*tables, *(f"{name}-tuned" for name in tables), "digits", "mnist5k"} <= set(names)
    for name in tables:
        base, _ = parse_config("mlsn", ["--config", name])
        tuned, _ = parse_config("mlsn", ["--config", f"{name}-tuned"])
        for config in (base, tuned):
            assert f"{config.data.name}-{config.data.labels}" == name
            assert (config.model, config.batch_size, config.ema_decay, config.steps) == ("wrn-28-2", 64, 0.999, 2**20)
            assert (config.pairs, config.focal_alpha, config.focal_gamma, config.interaction) == (
                512,
                0.5,
                2.0,
                "concat",
            )
            assert (config.lambda_2, config.lambda_3) == (
                RampConfig(20.0, "gaussian", 0.4),
                RampConfig(0.1, "gaussian", 1.0),
            )
        assert (base.optimizer, base.learning_rate, base.weight_decay, base.schedule) == (
            "adamw",
            0.002,
            0.02,
            "constant",
        )
        assert (tuned.optimizer, tuned.learning_rate, tuned.weight_decay, tuned.schedule) == (
            "sgd",
            0.03,
            5e-4,
            "cosine-7/16",
        )
        assert base.lambda_1 == RampConfig(75.0, "linear", 1.0)
        assert tuned.lambda_1 == RampConfig(50.0, "linear", 0.4)


def test_a_part_of_a_weight_can_be_given():
    config, _ = parse_config("mlsn", ["--lambda_1.weight", "5", "--lambda_2.share", "0.1"])
    assert config.lambda_1 == RampConfig(5.0, "linear", 1.0)
    assert config.lambda_2 == RampConfig(20.0, "gaussian", 0.1)


def test_the_command_trains_and_reports_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [
        "--model",
        "wrn-10-1",
        "--batch_size",
        "4",
        "--steps",
        "2",
        "--run.accelerator",
        "cpu",
        "--run.bar",
        "false",
    ]
    assert main(["mlsn", "--config", "digits", *small, "--lambda_1.weight", "5", "--focal_alpha", "null"]) == 0
    printed = capsys.readouterr().out
    assert "ema_error: 0." in printed
    assert "student_error: 0." in printed
    assert (tmp_path / "runs" / "mlsn" / "digits-seed1" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs is 0; it should be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"focal_alpha": 1.5}, r"focal_alpha is 1\.5; it should be in \[0, 1\], or null"),
        ({"pair_threshold": -0.1}, r"pair_threshold is -0\.1; it should be in \[0, 1\]"),
        ({"teacher": "mean"}, "teacher is 'mean'; it should be one of ema, student"),
        ({"lambda_2": OFF}, r"lambda_3\.weight is positive and lambda_2\.weight 0"),
        ({"ema_buffers": "own", "teacher": "student"}, 'ema_buffers is "own"'),
    ],
)
def test_bad_settings(make_mlsn_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_mlsn_config(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, r"weight is -1\.0; it should be at least 0"),
        ({"share": 1.5}, r"share is 1\.5; it should be in \[0, 1\]"),
        ({"ramp": "steep"}, "ramp is 'steep'; it should be one of linear, gaussian"),
    ],
)
def test_bad_ramps(arguments, message):
    with pytest.raises(ValueError, match=message):
        RampConfig(**{"weight": 1.0, **arguments})
