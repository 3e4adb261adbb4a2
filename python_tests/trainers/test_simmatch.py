# SPDX-License-Identifier: BSD-3-Clause
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmkernels import data
from ssmkernels.trainers import RunConfig, SimMatch, train_simmatch
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.loop import make_fabric

CLASSES, SLOTS = 10, 20


class Plain(nn.Module):
    """A network without batch norm, so that its rows are independent; remembers how many it saw."""

    def __init__(self, features: int = 64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.classify, self.project = nn.Linear(features, CLASSES), nn.Linear(features, 16)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.rows: list[int] = []

    def forward(self, images):
        self.rows.append(len(images))
        features = images.flatten(1)
        return self.classify(features), F.normalize(self.project(features))


def make_batch(labeled=8, unlabeled=16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def images(count):
        return torch.randn(count, 1, 8, 8, generator=generator)

    def integers(high, count):
        return torch.randint(high, (count,), generator=generator)

    return data.Batch(
        labeled_weak=images(labeled),
        labels=integers(CLASSES, labeled),
        slots=torch.arange(labeled),
        unlabeled_weak=images(unlabeled),
        unlabeled_strong=images(unlabeled),
        unlabeled_labels=integers(CLASSES, unlabeled),
    )


@pytest.fixture
def make_trainer(make_config, digits):
    def make(model=None, **settings):
        return SimMatch(
            make_config(**settings), digits, make_fabric(RunConfig(accelerator="cpu")), model=model or Plain()
        )

    return make


def fill(memory, seed=5):
    """Every slot of ``memory`` in use, as after the first epoch."""
    embeddings = torch.randn(SLOTS, 16, generator=torch.Generator().manual_seed(seed))
    by_row = torch.empty(SLOTS, dtype=torch.int64)
    by_row[memory.rows] = torch.arange(SLOTS)
    memory.update(torch.arange(SLOTS), F.normalize(embeddings), memory.labels[memory.rows])


def algorithm_1(weak, strong, batch, bank, classes_of_bank, *, threshold, lambda_u, lambda_in, alpha=0.9, t=0.1):
    """Losses as the paper prints them, image by image; ``weak`` makes the weak views of the unlabelled images."""
    logits_labeled, _ = strong(batch.labeled_weak)
    logits_weak, z_weak = weak(batch.unlabeled_weak)
    logits_strong, z_strong = strong(batch.unlabeled_strong)
    p_weak = logits_weak.softmax(dim=1)
    p_weak = p_weak / p_weak.mean(dim=0)
    p_weak = p_weak / p_weak.sum(dim=1, keepdim=True)  # DA, first batch
    loss_u = loss_in = 0.0
    for row in range(len(p_weak)):
        q_weak = (bank @ z_weak[row] / t).softmax(dim=0)
        q_strong = (bank @ z_strong[row] / t).softmax(dim=0)
        unfolded = p_weak[row][classes_of_bank]
        q_hat = q_weak * unfolded / (q_weak * unfolded).sum()
        aggregated = torch.stack([q_weak[classes_of_bank == c].sum() for c in range(CLASSES)])
        p_hat = (alpha * p_weak[row] + (1 - alpha) * aggregated).detach()
        if p_hat.max() >= threshold:
            loss_u = loss_u - (p_hat * logits_strong[row].log_softmax(dim=0)).sum()
        loss_in = loss_in - (q_hat.detach() * q_strong.log()).sum()
    loss_s = F.cross_entropy(logits_labeled, batch.labels)
    return loss_s + lambda_u * loss_u / len(p_weak) + lambda_in * loss_in / len(p_weak)


@pytest.mark.parametrize("memory", ["temporal", "teacher"])
def test_losses_and_gradients_are_algorithm_1(make_trainer, memory):
    trainer, batch = make_trainer(threshold=0.4, lambda_u=2.0, lambda_in=3.0, memory=memory), make_batch()
    fill(trainer.memory)
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():  # the teacher is another network than the student
            parameter.mul_(1.5)
    losses, _ = trainer.losses(batch, first_epoch=False)
    losses["loss"].backward()
    ours = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.model.zero_grad()

    weak = trainer.teacher if memory == "teacher" else trainer.model
    bank, classes = trainer.memory.features(), trainer.memory.labels[trainer.memory.rows]
    expected = algorithm_1(weak, trainer.model, batch, bank, classes, threshold=0.4, lambda_u=2.0, lambda_in=3.0)
    expected.backward()
    assert 0 < losses["mask_rate"] < 1
    torch.testing.assert_close(losses["loss"], expected)
    for mine, parameter in zip(ours, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_first_epoch_has_neither_instance_loss_nor_smoothing(make_trainer):
    trainer, batch = make_trainer(threshold=0.0), make_batch()
    fill(trainer.memory)
    losses, _ = trainer.losses(batch, first_epoch=True)
    torch.testing.assert_close(losses["loss"], losses["loss_labeled"] + losses["loss_unlabeled"])
    fixmatch = make_trainer(threshold=0.0, alpha=1.0, lambda_in=0.0)
    torch.testing.assert_close(losses["loss_unlabeled"], fixmatch.losses(batch, first_epoch=False)[0]["loss_unlabeled"])


def test_memory_is_read_before_it_is_written(make_trainer):
    trainer, batch = make_trainer(first_epoch_steps=0, learning_rate=0.0), make_batch()
    fill(trainer.memory)
    twin = make_trainer(first_epoch_steps=0)
    fill(twin.memory)
    expected, embeddings = twin.losses(batch, first_epoch=False)
    metrics = trainer.step(batch, 0)
    torch.testing.assert_close(metrics["loss_instance"], expected["loss_instance"])
    before = twin.memory.features()
    twin.memory.update(batch.slots, embeddings, batch.labels)
    assert not torch.equal(trainer.memory.features(), before)
    torch.testing.assert_close(trainer.memory.features(), twin.memory.features())
    after, _ = trainer.losses(batch, first_epoch=False)
    assert not torch.allclose(after["loss_instance"], metrics["loss_instance"])


def test_teacher_mode_remembers_the_teachers_embeddings(make_trainer):
    trainer, batch = make_trainer(memory="teacher"), make_batch()
    with torch.no_grad():
        trainer.teacher.model.project.weight.neg_()
    _, embeddings = trainer.losses(batch, first_epoch=False)
    torch.testing.assert_close(embeddings, trainer.teacher(batch.labeled_weak)[1])


def test_without_q_hat_the_target_is_q_weak_and_p_hat_stays(make_trainer):
    batch = make_batch()
    standard, ablated = make_trainer(threshold=0.4), make_trainer(threshold=0.4, propagate_to_instances=False)
    fill(standard.memory)
    fill(ablated.memory)
    ours, theirs = ablated.losses(batch, first_epoch=False)[0], standard.losses(batch, first_epoch=False)[0]
    torch.testing.assert_close(ours["loss_unlabeled"], theirs["loss_unlabeled"])
    bank = ablated.memory.features()
    q_weak, log_q_strong = (
        ablated.model(images)[1] @ bank.t() / 0.1 for images in (batch.unlabeled_weak, batch.unlabeled_strong)
    )
    expected = -(q_weak.softmax(dim=1) * log_q_strong.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(ours["loss_instance"], expected)
    assert not torch.allclose(ours["loss_instance"], theirs["loss_instance"])


def test_fixmatch_is_a_setting(make_trainer):
    batch = make_batch()
    trainer = make_trainer(alpha=1.0, lambda_in=0.0, alignment_queue=0, hard_pseudo_labels=True, threshold=0.5)
    assert trainer.memory is None
    losses, _ = trainer.losses(batch, first_epoch=False)
    confidence, pseudo_labels = trainer.model(batch.unlabeled_weak)[0].softmax(dim=1).max(dim=1)
    per_image = F.cross_entropy(trainer.model(batch.unlabeled_strong)[0], pseudo_labels, reduction="none")
    torch.testing.assert_close(losses["loss_unlabeled"], (per_image * (confidence >= 0.5)).mean())
    torch.testing.assert_close(
        losses["pseudo_label_accuracy"], (pseudo_labels == batch.unlabeled_labels).float().mean()
    )
    trainer.step(batch, 0)


def test_supervised_only_never_sees_unlabeled_images(make_trainer):
    trainer = make_trainer(lambda_u=0.0, lambda_in=0.0)
    metrics = trainer.step(make_batch(), 0)
    assert trainer.model.rows == [8]
    assert trainer.memory is None
    assert set(metrics) == {"loss", "loss_labeled"}


def test_one_forward_pass_for_all_views(make_trainer):
    trainer = make_trainer()
    trainer.step(make_batch(), 0)
    assert trainer.model.rows == [8 + 16 + 16]


@pytest.mark.parametrize("settings", [{"alignment_queue": 0}, {"memory": "teacher", "alignment_queue": 32}])
def test_accumulation_gives_the_gradient_of_the_whole_batch(make_trainer, settings):
    """And moves the memory once, as it does the alignment where the teacher makes the weak views."""
    batch = make_batch()
    whole, pieces = (make_trainer(accumulate=count, threshold=0.3, first_epoch_steps=0, **settings) for count in (1, 4))
    for trainer in (whole, pieces):
        fill(trainer.memory)
    first, second = whole.step(batch, 0), pieces.step(batch, 0)
    assert pieces.model.rows == [2 + (4 if "memory" in settings else 8)] * 4
    torch.testing.assert_close(first["loss"], second["loss"])
    for a, b in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole.memory.bank, pieces.memory.bank)
    torch.testing.assert_close(whole.align.state_dict(), pieces.align.state_dict())


def test_scalars_give_the_accuracy_of_confident_labels(make_trainer):
    trainer = make_trainer()
    assert trainer.scalars({"loss": 1.0, "mask_rate": 0.5, "confident_and_correct": 0.4}) == {
        "loss": 1.0,
        "mask_rate": 0.5,
        "confident_accuracy": 0.8,
    }
    assert "confident_accuracy" not in trainer.scalars({"loss": 1.0, "mask_rate": 0.0, "confident_and_correct": 0.0})


@pytest.mark.parametrize(("decay_all", "exempt"), [(False, True), (True, False)])
def test_weight_decay_exemptions(make_config, digits, decay_all, exempt):
    trainer = SimMatch(
        make_config(decay_all=decay_all, weight_decay=0.1), digits, make_fabric(RunConfig(accelerator="cpu"))
    )
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for parameter in trainer.model.parameters():
        assert decay[id(parameter)] == (0.0 if exempt and parameter.ndim <= 1 else 0.1)


def test_learning_rates(make_trainer):
    trainer, batch = make_trainer(steps=100), make_batch()
    trainer.step(batch, 50)
    assert trainer.learning_rate == pytest.approx(0.03 * math.cos(7 * math.pi * 50 / 1600))
    trainer = make_trainer(steps=100, schedule="half-cosine", warm_up_steps=10)
    trainer.step(batch, 4)
    assert trainer.learning_rate == pytest.approx(0.015)


@pytest.mark.parametrize(
    "settings", [{}, {"memory": "teacher", "ema_buffers": "own"}, {"precision": "bf16-mixed", "accumulate": 2}]
)
def test_stop_and_resume_gives_the_same_bits(make_config, digits, tmp_path, settings, monkeypatch):
    run = {"eval_every": 4}
    whole = train_simmatch(make_config(**settings, run={**run, "out": str(tmp_path / "whole")}), splits=digits)

    stopped = make_config(**settings, run={**run, "out": str(tmp_path / "stopped")})
    step = SimMatch.step

    def interrupted(self, batch, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(SimMatch, "step", interrupted)
        assert train_simmatch(stopped, splits=digits).step == 5
    resumed = train_simmatch(stopped, splits=digits, resume=True)

    assert resumed.finished
    assert resumed.history == whole.history
    first, second = (load_checkpoint(tmp_path / name / "checkpoint.pt")["trainer"] for name in ("whole", "stopped"))
    assert first.keys() == second.keys() == {"model", "teacher", "alignment", "optimizer", "memory"}
    for part in first:
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)


def test_learns_digits(make_config, digits):
    config = make_config(
        steps=80, batch_size=16, mu=3, first_epoch_steps=10, bn_momentum=0.1, ema_decay=0.9, run={"eval_every": 20}
    )
    history = train_simmatch(config, splits=digits).history
    assert history[-1]["loss_labeled"] < 0.5 * history[0]["loss_labeled"]
    assert history[-1]["student_accuracy"] > 0.4


def test_nan_stops_with_the_step(make_config, digits, monkeypatch):
    losses = SimMatch.losses

    def broken(self, batch, **settings):
        result, embeddings = losses(self, batch, **settings)
        if self.teacher.updates == 5:
            result["loss"] = result["loss"] * float("nan")
        return result, embeddings

    monkeypatch.setattr(SimMatch, "losses", broken)
    with pytest.raises(FloatingPointError, match="the loss of step 6 is nan"):
        train_simmatch(make_config(), splits=digits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it should be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"threshold": 1.5}, r"threshold is 1\.5; it should be in \[0, 1\]"),
        ({"temperature": 0.0}, r"temperature is 0\.0; it should be positive"),
        ({"ema_buffers": "own"}, 'ema_buffers is "own"'),
    ],
)
def test_bad_settings(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


def test_pieces_must_be_whole(make_trainer):
    with pytest.raises(
        ValueError, match=r"batch_size is 8; it should be a multiple of 1 rank\(s\) times accumulate, 3"
    ):
        make_trainer(accumulate=3)


@pytest.mark.parametrize("augment", ["batched", "pil"])
def test_settings_of_short_runs(make_config, digits, augment):
    """AdamW in one cycle on views that are shifted and not mirrored."""
    config = make_config(
        optimizer="adamw", schedule="one-cycle", steps=10, data={"augment": augment, "flip": False, "shift": 2}
    )
    trainer = SimMatch(config, digits, make_fabric(config.run))
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    weak = trainer.batches(0).dataset.weak if augment == "pil" else trainer.batches(0).weak.settings
    assert (weak.padding, weak.flip) == (2, False)
    batch = next(iter(trainer.batches(0)))
    assert torch.isfinite(trainer.step(batch, 2)["loss"])
    assert trainer.learning_rate == config.learning_rate  # the top of the cycle is after 30 % of the steps
