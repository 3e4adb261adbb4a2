# SPDX-License-Identifier: BSD-3-Clause
"""SLADE: A Self-Training Framework For Distance Metric Learning (Duan et al., CVPR 2021).

A teacher learns to embed the images of labelled classes. k-means on its embeddings of unlabelled images, of other
classes, gives these pseudo-labels. A student learns from both sets, together with a feature basis W_a, one vector for
every labelled class, whose similarities say which pairs of pseudo-labelled images to believe:

    min over θ^s, W_a of L_rank(D^l; θ^s) + λ1 L_rank(D^u; θ^s) + λ2 (L_CE(D^l) + L_SD(D^u))

with L_Basis in the parentheses, and the pairs of D^u mined: positive from a similarity T1 = μ⁺ on, negative up to T2 =
μ⁻, the running means that L_SD keeps. The student is the teacher of the next round.

The rows of the ablations are settings of the same trainer: ``student`` is "none" for the teacher alone, "pseudo-labels"
for L_rank on the pseudo-labels, "basis" for these and L_Basis, "mining" for all of it; ``similarity_loss`` puts another
loss in the place of L_SD.

Where the paper is silent: a student starts from the weights that the teacher started from, not from the teacher's. It
then owes the teacher its pseudo-labels alone and none of its mistakes, and after ``student_steps`` = ``teacher_steps``,
the default, it has had as many steps as the teacher, so that the rows compare; ``student`` "none" with more
``teacher_steps`` tells what more steps on labelled images would do. W_a, the running moments and the optimiser start
anew with each student. The teacher is the network at the end of its steps. L_rank is one loss in all its places: the
multi-similarity loss too is taken over mined pairs, since sums of different losses, whose sizes differ by orders of
magnitude, would need another λ1. The protocol is that of Musgrave et al. (ECCV 2020), on whose code the paper builds:
the last classes to test on, the others in class-disjoint folds, one to validate on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ssmkernels import data, metrics, models, ops
from ssmkernels._files import write_atomically
from ssmkernels.distributed import Group, all_gather_rows, all_reduce_mean, for_ddp, gather_on_first, gather_rows
from ssmkernels.nn import (
    ContrastiveLoss,
    FeatureBasis,
    GlobalCrossEntropy,
    LocalCrossEntropy,
    MultiSimilarityLoss,
    SimilarityDistributionLoss,
)
from ssmkernels.nn.similarity_distribution import MOMENTS, RunningSimilarityMoments
from ssmkernels.trainers import kept
from ssmkernels.trainers.base import Trainer, channels_last
from ssmkernels.trainers.checkpoint import load_checkpoint, save_checkpoint
from ssmkernels.trainers.evaluation import embed, retrieval
from ssmkernels.trainers.loop import Fabric, RunResult, make_fabric
from ssmkernels.trainers.pseudo_labels import cluster
from ssmkernels.trainers.ranks import this_rank
from ssmkernels.trainers.slade_config import SladeConfig
from ssmkernels.trainers.slade_data import SladeImages, load_images

Stage = Literal["teacher", "warm-up", "joint"]

SELECTED_BY = "final_MAP@R"
"""MAP@R among the validation classes, once the network is trained that the run is for: the last student, or the teacher
where there is none. 0 before.
"""
EVALUATED_EVERY = 200
"""Steps between evaluations, by default: Musgrave's two epochs of 100."""
FIGURES = ("MAP@R", "RP", "P@1")


class SladeBatch(NamedTuple):
    """What one step learns from."""

    labeled: data.CollectionBatch
    pseudo_labeled: data.CollectionBatch | None
    """None for the teacher."""


class Slade(Trainer):
    """Self-training, for :func:`ssmkernels.trainers.loop.fit`.

    Args:
        config: the settings.
        images: the labelled collection; its classes are split here.
        fabric: the device, its precision and the other ranks.
        unlabeled_images: the unlabelled collection where there is one; none is needed for the teacher alone.
        model: x [N, C, H, W] -> (anything, unit embeddings f [N, embedding_dim]), which sees images by their
            collection's mean and deviation; ``config.model`` is built if none is given.
        kept_before: the folder of another run whose list of classes and weights this one begins with.
    """

    def __init__(
        self,
        config: SladeConfig,
        images: data.ImageCollection,
        fabric: Fabric,
        *,
        unlabeled_images: data.ImageCollection | None = None,
        model: nn.Module | None = None,
        kept_before: Path | None = None,
    ) -> None:
        ranks = fabric.world_size
        config.check_multiple(
            "batch_size", config.per_class * ranks, f"per_class, {config.per_class}, times the {ranks} ranks"
        )
        super().__init__(config, fabric)
        self.steps, self.images_per_step = config.steps, config.batch_size * (2 if config.uses_unlabeled else 1)
        self.done = 0
        """Steps."""
        self.skipped = 0
        """Steps that networks had left when they ended early."""
        self.best: dict[str, Any] = {}
        """Of the network that learns: its first step, its best figure, when that was, and what the network was."""
        early = () if config.patience is None else ("skipped", "best")
        self.saved = ("pseudo_labels", "clustering", *early)
        self.kept_before = kept_before
        self.images = SladeImages(config, images, unlabeled_images, native=model is not None, kept_before=kept_before)
        self.seen = self.images.seen(images)
        if config.uses_unlabeled and config.k > len(self.unlabeled):
            raise ValueError(
                f"k is {config.k}; it should be at most {len(self.unlabeled)}, the number of unlabelled images"
            )
        self.labels = torch.as_tensor(self.images.labeled.labels, device=fabric.device)
        self.pseudo_labels = torch.empty(0, dtype=torch.int64, device=fabric.device)  # of the running round
        self.clustering: dict[str, float] = {}
        self.final = False  # whether the last step was one of the network that the run is for

        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = build_network(config, images) if model is None else model
            self.basis = FeatureBasis(config.embedding_dim, self.images.labeled.num_classes).to(fabric.device)
            self.similarity = _similarity_loss(config, self.images.labeled.num_classes).to(fabric.device)
        self.load_weights(model)
        self.rank = _ranking_loss(config)
        self.model = channels_last(model)
        self.network = fabric.setup_module(self.compiled(self.model))
        self.basis_parameters = [*self.basis.parameters(), *self.similarity.parameters()] if config.uses_basis else []
        self.optimizer = fabric.setup_optimizers(_optimizer(config, self.model, self.basis_parameters, **self.fused))
        self.start = deepcopy({name: part.state_dict() for name, part in self.parts().items()})

    def ended(self, step: int) -> bool:
        return step + self.skipped >= self.steps

    @property
    def position(self) -> int:
        """Steps of a run without an early end that are behind this one."""
        return self.done + self.skipped

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "basis": self.basis, "similarity": self.similarity, "optimizer": self.optimizer}

    def labels_text(self) -> str:
        labeled = self.images.labeled
        return data.labels_text(np.arange(len(labeled)), labeled.images, labeled.class_names)

    def load_weights(self, model: nn.Module) -> None:
        """Those of a checkpoint are not enough: every student starts from the weights that the run began with."""
        if self.config.weights is not None:
            own = kept.kept_file(kept.START, self.config, self.kept_before)
            self.take_weights(model, own or self.config.weights)

    def keep_inputs(self, folder: Path) -> None:
        super().keep_inputs(folder)
        if self.config.weights is not None and not kept.has_begun(self.config):
            save_checkpoint(folder / kept.START, models.backbone_state(getattr(self.model, "backbone", self.model)))

    @property
    def unlabeled(self) -> data.ImageCollection:
        if self.images.unlabeled is None:
            raise ValueError(
                f"unlabeled_images is None; it should be the images of {self.config.data.unlabeled_name},"
                " data.unlabeled_name"
            )
        return self.images.unlabeled

    def start_round(self) -> None:
        """The network so far becomes the teacher, whose clusters are the pseudo-labels, and everything that learns
        starts again.
        """
        if self.best:
            self.model.load_state_dict(self.best["model"])
        embeddings, true_labels = (gather_on_first(part) for part in self._embed(self.unlabeled))

        def clustered() -> tuple[Tensor, dict[str, float]]:
            pseudo_labels = cluster(embeddings, self.config.k, seed=self.config.seed)
            nmi = metrics.nmi_of_clusters(true_labels.cpu(), pseudo_labels)  # measured, never learnt from
            return pseudo_labels, {"pseudo_label_NMI": nmi}

        pseudo_labels, self.clustering = self.on_first_rank(clustered)
        self.pseudo_labels = pseudo_labels.to(self.fabric.device)
        for name, part in self.parts().items():
            part.load_state_dict(self.start[name])

    def stage(self, step: int) -> Stage:
        """What ``step`` is for: the first teacher; then, round by round, a warm-up and a student."""
        config = self.config
        if step < config.teacher_steps:
            return "teacher"
        into_round = (step - config.teacher_steps) % config.round_steps
        return "warm-up" if into_round < config.round_steps - config.student_steps else "joint"

    def step(self, batch: SladeBatch, step: int) -> dict[str, Tensor]:
        """One step of any stage."""
        step += self.skipped
        stage = self.stage(step)
        self.model.train(stage != "warm-up")
        self.optimizer.zero_grad()
        losses = self.losses(batch, stage)
        self.fabric.backward(losses["loss"])
        for parameter in self.basis_parameters:
            if parameter.grad is not None:
                parameter.grad = all_reduce_mean(parameter.grad)
        self.optimizer.step()
        self.done += 1
        self.final = self.is_final(step)
        return {name: value.detach() for name, value in losses.items()}

    def is_final(self, step: int) -> bool:
        """Whether ``step`` is one of the network that the run is for."""
        config = self.config
        return step >= config.steps - (config.student_steps if config.uses_unlabeled else config.teacher_steps)

    def losses(self, batch: SladeBatch, stage: Stage) -> dict[str, Tensor]:
        """The losses of a stage, over the pairs of the whole batch, the same on every rank; those that it does not have
        are 0. The mean over ranks of their gradients is that of the whole batch.
        """
        config, labeled, pseudo_labeled = self.config, batch.labeled, batch.pseudo_labeled
        zero = torch.zeros((), device=self.fabric.device)
        losses = {"loss_labeled": zero}
        if config.uses_unlabeled:
            losses["loss_unlabeled"] = zero
        if config.uses_basis:
            losses |= {"loss_cross_entropy": zero, "loss_similarity": zero}
        labels = self.labels[labeled.positions]
        if pseudo_labeled is None:
            losses["loss_labeled"] = for_ddp(self.rank(self.network(labeled.images)[1], labels))
            return {"loss": losses["loss_labeled"], **losses}

        pseudo_labels = self.pseudo_labels[pseudo_labeled.positions]
        with torch.set_grad_enabled(stage == "joint"):
            _, embeddings = self.network(torch.cat([labeled.images, pseudo_labeled.images]))
        rows = [len(labeled.images), len(pseudo_labeled.images)]
        f_l, f_u = embeddings.split(rows)
        loss = zero
        if config.uses_basis:
            losses["loss_cross_entropy"] = _mean_over_ranks(self.basis.cross_entropy(f_l, labels))
            losses["loss_similarity"] = self._similarity_loss(f_u, pseudo_labels)  # sets T1 and T2 first
            loss = config.lambda_2 * (losses["loss_cross_entropy"] + losses["loss_similarity"])
        if stage == "joint":
            losses["loss_labeled"] = for_ddp(self.rank(f_l, labels))
            losses["loss_unlabeled"] = (
                self._mined_rank(f_u) if config.student == "mining" else for_ddp(self.rank(f_u, pseudo_labels))
            )
            loss = losses["loss_labeled"] + config.lambda_1 * losses["loss_unlabeled"] + loss
        return {"loss": loss, **losses}

    def _similarity_loss(self, embeddings: Tensor, pseudo_labels: Tensor) -> Tensor:
        """The similarity-distribution loss has sums over the pairs of all ranks; the two that stand in its place take
        the rows of all.
        """
        if isinstance(self.similarity, SimilarityDistributionLoss):
            return for_ddp(self.similarity(self.basis(embeddings), pseudo_labels))
        return self.similarity(self.basis(gather_rows(embeddings)), all_gather_rows(pseudo_labels))

    def _mined_rank(self, embeddings: Tensor) -> Tensor:
        """L_rank over the pairs with s ≥ T1, as positives, and with s ≤ T2, as negatives."""
        config = self.config
        t_1, t_2 = self.similarity.positive_mean, self.similarity.negative_mean
        if config.ranking_loss == "contrastive":
            loss = ops.mined_pair_ranking_loss(
                embeddings,
                self.basis(embeddings.detach()),
                positive_threshold=t_1,
                negative_threshold=t_2,
                positive_margin=config.positive_margin,
                negative_margin=config.negative_margin,
                group=None,
            )
            return for_ddp(loss)
        embeddings = gather_rows(embeddings)
        similarities = self.basis.similarities(embeddings.detach())
        others = ~torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
        # As long as T1 < T2 a pair can be both, which eq. (1) lets cancel out; a loss of exponentials cannot take it.
        positives, negatives = (
            (similarities >= t_1) & others & (similarities > t_2),
            (similarities <= t_2) & others & (similarities < t_1),
        )
        return _ranking_loss(config, group="local")(
            embeddings, indices_tuple=(*positives.nonzero(as_tuple=True), *negatives.nonzero(as_tuple=True))
        )

    def scalars(self, means: dict[str, float]) -> dict[str, float]:
        """The means, with the figures of the clustering of the running round and the moments of the similarities."""
        moments = {}
        if self.config.uses_basis:
            moments = {f"similarity_{name}": float(getattr(self.similarity, name)) for name in MOMENTS}
        return {**means, **self.clustering, **moments}

    def evaluate(self) -> dict[str, float]:
        """Retrieval with the embeddings, among the validation classes and among the test classes."""
        figures: dict[str, float] = {}
        for name, images in (("validation", self.images.validation), ("test", self.images.test)):
            embeddings, labels = self._embed(images)
            figures |= _retrieval(name, embeddings, labels, images.queries)
        figures[SELECTED_BY] = figures["validation_MAP@R"] if self.final else 0.0
        if self.config.patience is not None:
            self.end_at_plateau(figures["validation_MAP@R"], self.config.patience)
        return figures

    def end_at_plateau(self, figure: float, patience: int) -> None:
        """Remembers the network where it is at its best; where that was more than ``patience`` steps ago, it ends."""
        config = self.config
        if self.stage(self.position - 1) == "warm-up":
            return
        first, end = 0, config.teacher_steps
        if self.position > end:
            rounds = (self.position - 1 - end) // config.round_steps
            first = end + rounds * config.round_steps
            end = first + config.round_steps
        if self.best.get("first") != first or figure > self.best["figure"]:
            model = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.best = {"first": first, "figure": figure, "position": self.position, "model": model}
        elif self.position - self.best["position"] > patience:
            self.skipped += end - self.position

    def epoch_ends(self) -> set[int]:
        """The positions after which to evaluate: every so many steps of a network, and its last."""
        config = self.config
        ends = set(range(EVALUATED_EVERY, config.teacher_steps, EVALUATED_EVERY)) | {config.teacher_steps}
        for end in range(config.teacher_steps + config.round_steps, config.steps + 1, config.round_steps):
            ends |= {*range(end - config.student_steps + EVALUATED_EVERY, end, EVALUATED_EVERY), end}
        return ends

    def batches(self, start_step: int) -> Iterator[SladeBatch]:
        """The batches of every step from ``start_step`` on. A round starts when its first batch is asked for, after the
        last step of the one before; on resuming within a round, with the pseudo-labels of the checkpoint.
        """
        config, labeled_images = self.config, self.images.labeled
        self.done = start_step
        for labeled in self._batches(labeled_images, self.labels, self.position, config.teacher_steps, stream=0):
            yield SladeBatch(labeled, None)
            if self.position >= config.teacher_steps:
                break
        for first in range(config.teacher_steps, config.steps, config.round_steps):
            start, end = self.position, first + config.round_steps
            if start >= end:
                continue
            if start == first:
                self.start_round()
            both = (
                self._batches(labeled_images, self.labels, start, end, stream=0),
                self._batches(self.unlabeled, self.pseudo_labels, start, end, stream=1),
            )
            for labeled, pseudo_labeled in zip(*both, strict=True):
                yield SladeBatch(labeled, pseudo_labeled)
                if self.position >= end:
                    break

    def _batches(
        self, images: data.ImageCollection, labels: Tensor, start_step: int, end: int, *, stream: int
    ) -> Iterator[data.CollectionBatch]:
        batches = self.images.training_batches(
            images, labels, self.fabric, start_step=start_step, end=end, stream=stream
        )
        return iter(batches)

    def _embed(self, images: data.ImageCollection) -> tuple[Tensor, Tensor]:
        """Embeddings and true labels of this rank's run of images."""
        return self.embed(self.model, images.images, self.images.views(images))[1:]


class _EpochEnds:
    """The steps after which the networks of a run are to be evaluated, wherever they end."""

    def __init__(self, trainer: Slade) -> None:
        self.trainer, self.ends = trainer, trainer.epoch_ends()

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and step + self.trainer.skipped in self.ends


def train_slade(
    config: SladeConfig,
    *,
    resume: bool = False,
    images: data.ImageCollection | None = None,
    unlabeled_images: data.ImageCollection | None = None,
    model: nn.Module | None = None,
) -> RunResult:
    """Trains as ``config`` says, from its checkpoint if ``resume``; on every rank under ``torchrun``.

    ``result.best("final_MAP@R")`` is the evaluation of the last student (of the teacher, where ``student`` is "none")
    that is best on the validation classes, and ``run.out``/best.pt has the weights of its network. With ``data.fold``
    None this is :func:`train_folds`.

    Args:
        images: the labelled collection, such as your own, see :class:`ssmkernels.data.ImageCollection`; ``config.data``
            is loaded if none is given.
        unlabeled_images: the unlabelled collection, if ``config.data`` has one; loaded where no ``images`` are given.
        model: a network of your own, such as a :class:`ssmkernels.models.EmbeddingModel` of your backbone, see
            :class:`Slade`; ``config.model`` is built if none is given. With several folds it is copied for each.
    """
    if images is None:
        images, unlabeled_images = load_images(config.data, unlabeled=config.uses_unlabeled)
    if config.data.fold is None:
        return train_folds(config, resume=resume, images=images, unlabeled_images=unlabeled_images, model=model)
    return _train_network(config, images, unlabeled_images, model, resume)


def _train_network(
    config: SladeConfig,
    images: data.ImageCollection,
    unlabeled_images: data.ImageCollection | None,
    model: nn.Module | None,
    resume: bool,
    kept_before: Path | None = None,
) -> RunResult:
    fabric = make_fabric(config.run, precision=config.precision)
    trainer = Slade(config, images, fabric, unlabeled_images=unlabeled_images, model=model, kept_before=kept_before)
    return trainer.run(resume=resume, epoch_ends=_EpochEnds(trainer), best=SELECTED_BY)


def train_folds(
    config: SladeConfig,
    *,
    resume: bool = False,
    images: data.ImageCollection | None = None,
    unlabeled_images: data.ImageCollection | None = None,
    model: nn.Module | None = None,
) -> RunResult:
    """Trains a network for every fold, in ``run.out``/fold0, fold1, …, and tests their embeddings together: Musgrave's
    protocol.

    The history of a finished result is one record: ``test_MAP@R`` and so on of the concatenated embeddings (4 folds of
    128 are the "512" of the tables), ``separate_test_MAP@R`` and so on the mean over the networks by themselves (the
    "128"), and the mean over the folds of their best validation figures. It is in ``run.out``/metrics.jsonl too.

    Args:
        resume: go on with the folds that are not finished.
        images, unlabeled_images, model: of :func:`train_slade`.

    Raises:
        ValueError: ``run.out`` is None.
    """
    if config.run.out is None:
        raise ValueError("run.out is None; it should be a folder, for the weights of the folds")
    if images is None:
        images, unlabeled_images = load_images(config.data, unlabeled=config.uses_unlabeled)
    results: list[RunResult] = []
    kept_before = None
    for of_fold in _of_folds(config):
        results.append(_train_network(of_fold, images, unlabeled_images, deepcopy(model), resume, kept_before))
        kept_before = Path(config.run.out, "fold0")
        if not results[-1].finished:
            break
    done = RunResult(
        finished=results[-1].finished,
        step=sum(result.step for result in results),
        steps=config.data.folds * config.steps,
        stopped_by=results[-1].stopped_by,
    )
    if done.finished:
        done.history.append({"step": done.step, **evaluate_folds(config, images, model)})
        if this_rank()[0] == 0:
            line = json.dumps({"step": done.step, "group": "test", **done.history[0]})
            write_atomically(Path(config.run.out, "metrics.jsonl"), line + "\n")
    return done


def evaluate_folds(
    config: SladeConfig, images: data.ImageCollection, model: nn.Module | None = None
) -> dict[str, float]:
    """The record of :func:`train_folds` again, from the best.pt of every fold; arguments as of
    :func:`concatenated_retrieval`.
    """
    fabric = make_fabric(config.run, precision=config.precision)
    figures = []
    for of_fold, network in _best_networks(config, images, model):
        parts = SladeImages(of_fold, images, native=model is not None)
        batches = parts.evaluation_batches(parts.validation, fabric)
        _, embeddings, labels = embed(
            network.to(fabric.device), batches, device=fabric.device, autocast=fabric.autocast
        )
        figures.append(_retrieval("validation", embeddings, labels, parts.validation.queries))
    means = {name: statistics.fmean(of_fold[name] for of_fold in figures) for name in figures[0]}
    return {SELECTED_BY: means["validation_MAP@R"], **means, **concatenated_retrieval(config, images, model)}


def concatenated_retrieval(
    config: SladeConfig, images: data.ImageCollection, model: nn.Module | None = None
) -> dict[str, float]:
    """Retrieval among the test classes with the networks of all folds, each with its best.pt in ``run.out``/fold0,
    fold1, ….

    Args:
        config, model: what :func:`train_folds` was called with.
        images: the labelled collection.

    Returns:
        ``test_*`` of the embeddings side by side, each of norm 1, and ``separate_test_*``, the mean over the networks
        by themselves, for MAP@R, RP and P@1.
    """
    fabric = make_fabric(config.run, precision=config.precision)
    embeddings, apart = [], []
    for of_fold, network in _best_networks(config, images, model):
        parts = SladeImages(of_fold, images, native=model is not None)
        batches = parts.evaluation_batches(parts.test, fabric)
        _, of_network, labels = embed(
            network.to(fabric.device), batches, device=fabric.device, autocast=fabric.autocast
        )
        embeddings.append(of_network)
        apart.append(_retrieval("separate_test", of_network, labels, parts.test.queries))
    means = {name: statistics.fmean(figures[name] for figures in apart) for name in apart[0]}
    return {**_retrieval("test", torch.cat(embeddings, dim=1), labels, parts.test.queries), **means}


def build_network(config: SladeConfig, images: data.ImageCollection | data.SeenImages) -> nn.Module:
    """The network of ``config`` for these images, from random weights."""
    return models.build_embedding_model(
        config.model,
        config.embedding_dim,
        pooling=config.pooling,
        freeze_bn=config.freeze_bn,
        in_channels=images.channels if models.preprocessing(config.model) == "native" else 3,
        image_size=config.data.image_size or images.image_size,
    )


def _best_networks(
    config: SladeConfig, images: data.ImageCollection, model: nn.Module | None
) -> Iterator[tuple[SladeConfig, nn.Module]]:
    """The settings of every fold, and its network."""
    for of_fold in _of_folds(config):
        network = build_network(of_fold, images) if model is None else deepcopy(model)
        network.load_state_dict(load_checkpoint(Path(str(of_fold.run.out), "best.pt"))["model"])
        yield of_fold, channels_last(network)


def _of_folds(config: SladeConfig) -> Iterator[SladeConfig]:
    for fold in range(config.data.folds):
        run = replace(config.run, out=str(Path(str(config.run.out), f"fold{fold}")))
        yield replace(config, data=replace(config.data, fold=fold), run=run)


def _retrieval(name: str, embeddings: Tensor, labels: Tensor, queries: np.ndarray | None) -> dict[str, float]:
    figures = retrieval(embeddings, labels, queries, recall_at=(), precision_at=())
    return {f"{name}_{figure}": figures[figure] for figure in FIGURES}


def _mean_over_ranks(mean: Tensor) -> Tensor:
    """The mean of what ranks with as many rows have, with the gradient of the own one."""
    return mean - mean.detach() + all_reduce_mean(mean.detach())


def _ranking_loss(config: SladeConfig, group: Group = None) -> nn.Module:
    if config.ranking_loss == "contrastive":
        return ContrastiveLoss(config.positive_margin, config.negative_margin, group=group)
    return MultiSimilarityLoss(config.ms_alpha, config.ms_beta, config.ms_base, group=group)


def _similarity_loss(config: SladeConfig, num_basis: int) -> RunningSimilarityMoments:
    if config.similarity_loss == "local-ce":
        return LocalCrossEntropy(momentum=config.moment_momentum)
    if config.similarity_loss == "global-ce":
        return GlobalCrossEntropy(num_basis, config.k, momentum=config.moment_momentum)
    return SimilarityDistributionLoss(
        config.sd_margin, config.sd_variance_weight, config.moment_momentum, config.moment_gradient, group=None
    )


def _optimizer(
    config: SladeConfig, network: nn.Module, basis_parameters: list[nn.Parameter], **fused: Any
) -> torch.optim.Optimizer:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "lr": config.learning_rate}]
    if basis_parameters:
        groups.append({"params": basis_parameters, "lr": config.basis_learning_rate})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay, **fused)
    return torch.optim.RMSprop(groups, momentum=0.9, weight_decay=config.weight_decay)
