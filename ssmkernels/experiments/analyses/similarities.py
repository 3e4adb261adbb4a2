# SPDX-License-Identifier: BSD-3-Clause
"""What of SLADE (Duan et al., CVPR 2021) is read from trained networks: similarities of pairs, and retrieval among
unlabelled classes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmkernels import data as images
from ssmkernels import metrics
from ssmkernels._files import checksummed_archive, is_whole, set_aside, verify_checksum
from ssmkernels._plots import colour, draw_panels, label_axes
from ssmkernels.distributed import all_gather_rows
from ssmkernels.experiments.jobs import Job, training_name
from ssmkernels.experiments.record import Plot
from ssmkernels.experiments.run import Cells, Request, Result, Values, cells_of_columns, configure, training_cells
from ssmkernels.experiments.spec import Cell, Figure, Table
from ssmkernels.trainers import Slade, SladeConfig
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.evaluation import embed
from ssmkernels.trainers.loop import fit, make_fabric
from ssmkernels.trainers.slade import build_network
from ssmkernels.trainers.slade_data import SladeImages, load_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 2000  # images at most whose pairs are looked at
BINS = 50
STAGES = ("before", "after")


def on_unlabeled_classes(table: Table, request: Request) -> Cells:
    """The rows of the table, and the same networks among the unlabelled images themselves, by their true labels: these
    classes are seen in training, without labels, as many of the paper's test species are in NABirds.
    """
    trained = training_cells(table, request)
    figures = (Figure("MAP@R, unlabelled classes", "MAP@R", unit=""),)
    more = [
        replace(cell, figures=figures, paper=("-",), job=functools.partial(_unlabeled_job, cell, request))
        for cell in trained.cells
    ]
    return trained._replace(cells=(*trained.cells, *more))


def _unlabeled_job(cell: Cell, request: Request, seed: int) -> Job:
    training = cell.job(seed)
    run = functools.partial(unlabeled_map, training.config, request.jobs / training.name / "best.pt")
    return Job(f"unlabeled-{training.name}", f"{training.title}, among the unlabelled classes", run, (training,))


@torch.no_grad()
def unlabeled_map(config: SladeConfig, best: Path, folder: Path) -> float:
    """MAP@R in percent, among the unlabelled images of a finished run, of its best network."""
    labeled, _ = load_images(config.data)
    parts = SladeImages(config, labeled)
    assert parts.unlabeled is not None
    network = build_network(replace(config, weights=None), labeled)
    network.load_state_dict(load_checkpoint(best)["model"])
    fabric = make_fabric(config.run)
    batches = parts.evaluation_batches(parts.unlabeled, fabric)
    _, embeddings, labels = embed(network.to(fabric.device), batches, device=fabric.device)
    return 100 * metrics.retrieval(embeddings, labels, recall_at=(), precision_at=(), group=None)["MAP@R"]


class Similarities(NamedTuple):
    """The pairs of unlabelled images, by their true labels."""

    positives: np.ndarray
    """s_ij of the pairs of one class, float32."""
    negatives: np.ndarray
    """s_ij of the others."""
    mined: np.ndarray
    """Share of the pairs with s ≥ T1 that are of one class, and of those with s ≤ T2 that are not."""
    clustered: np.ndarray
    """Share of the pairs within a cluster that are of one class, and of the other pairs that are not."""

    @property
    def ranking(self) -> float:
        """The probability that a positive pair has the higher similarity, half of it where both are equal."""
        order = np.sort(self.negatives)
        below = np.searchsorted(order, self.positives, "left") + np.searchsorted(order, self.positives, "right")
        return float(below.mean() / 2 / len(order))


FIGURES: dict[str, Callable[[Similarities], float]] = {
    "mean of positives": lambda pairs: pairs.positives.mean(),
    "mean of negatives": lambda pairs: pairs.negatives.mean(),
    "variance of positives": lambda pairs: pairs.positives.var(),
    "variance of negatives": lambda pairs: pairs.negatives.var(),
    "P": lambda pairs: pairs.ranking,
    "right positives": lambda pairs: pairs.mined[0],
    "right negatives": lambda pairs: pairs.mined[1],
    "right positives by clusters": lambda pairs: pairs.clustered[0],
    "right negatives by clusters": lambda pairs: pairs.clustered[1],
}


def before_and_after(table: Table, request: Request) -> Cells:
    """s_ij after the warm-up of W_a and at the end of the training, in every column."""
    configs = {column: configure(table, request, column, "--student mining")[0] for column in table.columns}

    def cells_of(column: str) -> Iterator[Cell]:
        job = functools.partial(_stages_job, configs[column], f"{table.title}; {column}")
        for stage in STAGES:
            figures = tuple(Figure(name, f"{stage}, {name}", unit="") for name in FIGURES)
            yield Cell(stage, column, figures, ("-",) * len(figures), job, configs[column])

    def problem(column: str) -> Exception | None:
        return request.source.problem("slade", configs[column].data.name, configs[column].data)

    return cells_of_columns(table, table.columns, request, problem, cells_of)


def _stages_job(config: SladeConfig, title: str, seed: int) -> Job:
    config = replace(config, seed=seed, patience=None)  # its stages end at steps that are known before
    return Job(f"pairs-{training_name('slade', config)}", title, functools.partial(look_before_and_after, config))


def look_before_and_after(config: SladeConfig, folder: Path) -> dict[str, float]:
    """Trains as ``config`` says and looks after the warm-up of W_a and at the end; from where an earlier call stopped.
    Returns the figures of both stages, as "stage, figure".

    Raises:
        KeyboardInterrupt: the run was stopped; its checkpoint is kept.
    """
    config.run.out = str(folder)
    labeled, unlabeled = load_images(config.data)
    fabric = make_fabric(config.run, precision=config.precision)
    trainer = Slade(config, labeled, fabric, unlabeled_images=unlabeled)
    train = functools.partial(fit, trainer, fabric=fabric, run=config.run, config=asdict(config), resume=True)
    for stage, steps in zip(STAGES, (config.teacher_steps + config.warm_up_steps, config.steps), strict=True):
        kept, checkpoint = folder / f"{stage}.npz", folder / "checkpoint.pt"
        if not is_whole(kept):
            if checkpoint.exists() and load_checkpoint(checkpoint)["step"] > steps:
                set_aside(checkpoint)  # the run is past this stage, which was lost: it comes by here again
            if not train(steps=steps, epoch_ends=trainer.epoch_ends()).finished:
                raise KeyboardInterrupt
            trainer.load_state_dict(load_checkpoint(checkpoint)["trainer"])
            with checksummed_archive(kept) as file:
                np.savez(file, **pair_similarities(trainer)._asdict())
    return {
        f"{stage}, {name}": float(figure(pairs))
        for stage, pairs in read_stages(folder).items()
        for name, figure in FIGURES.items()
    }


def read_stages(folder: Path) -> dict[str, Similarities]:
    """What :func:`look_before_and_after` has left in ``folder``.

    Raises:
        DamagedFile: a file is not what was left.
    """
    stages = {}
    for stage in STAGES:
        verify_checksum(folder / f"{stage}.npz")
        with np.load(folder / f"{stage}.npz") as arrays:
            stages[stage] = Similarities(**arrays)
    return stages


def histograms(table: Table, request: Request, cells: Sequence[Cell], values: Values) -> Result:
    """The similarities of every column whose job is finished."""
    plots = {}
    for (cell, seed), outcome in values.items():
        if outcome.finished and cell.column not in plots:
            file = f"similarities_{re.sub(r'[^a-z0-9]+', '_', cell.column.lower()).strip('_')}.png"
            stages = read_stages(request.jobs / cell.job(seed).name)
            alt = plot_similarities(request.place(table.name) / file, stages, title=cell.column)
            words = "The paper's histograms: positive and negative pairs lie further apart with L_SD."
            plots[cell.column] = Plot(f"{cell.column}: similarities", file, words, alt)
    return Result(plots=tuple(plots.values()))


@torch.no_grad()
def pair_similarities(trainer: Slade) -> Similarities:
    """The similarities of the pairs i < j of unlabelled images, or of a sample of the images."""
    unlabeled = trainer.unlabeled
    index = np.sort(np.random.default_rng(0).permutation(len(unlabeled))[:POINTS])
    sample = images.ImageSubset(unlabeled.images, index, unlabeled.labels[index], unlabeled.num_classes)
    batches = trainer.images.evaluation_batches(replace(unlabeled, images=sample), trainer.fabric)
    embedded = embed(trainer.model, batches, device=trainer.fabric.device)
    _, embeddings, labels = (all_gather_rows(part) for part in embedded)
    cosines: Tensor = trainer.basis.similarities(embeddings)
    clusters = trainer.pseudo_labels[torch.as_tensor(index, device=labels.device)]
    pairs = torch.ones_like(cosines, dtype=torch.bool).triu(diagonal=1)
    same, together = labels[:, None] == labels, clusters[:, None] == clusters
    likely, unlikely = cosines >= trainer.similarity.positive_mean, cosines <= trainer.similarity.negative_mean

    def right(positives: Tensor, negatives: Tensor) -> np.ndarray:
        shares = [same[pairs & positives].float().mean(), 1 - same[pairs & negatives].float().mean()]
        return torch.stack(shares).cpu().numpy()

    return Similarities(
        positives=cosines[pairs & same].cpu().numpy(),
        negatives=cosines[pairs & ~same].cpu().numpy(),
        mined=right(likely, unlikely),
        clustered=right(together, ~together),
    )


def plot_similarities(path: Path, stages: Mapping[str, Similarities], *, title: str) -> str:
    """A panel for each stage with two histograms, their means as dashed lines. Returns what is seen, in words."""

    def draw_histograms(axes: Axes, stage: str, pairs: Similarities) -> str:
        for number, (name, values) in enumerate((("positive", pairs.positives), ("negative", pairs.negatives))):
            label, color = f"{name} pairs", colour(number)
            axes.hist(values, bins=BINS, range=(-1, 1), density=True, alpha=0.5, color=color, label=label)
            axes.axvline(values.mean(), color=color, linestyle="--", linewidth=1.2)
        label_axes(
            axes, title=stage, xlabel="similarity $s_{ij}$ of a pair", ylabel="density", xticks=(-1, -0.5, 0, 0.5, 1)
        )
        means = f"{pairs.positives.mean():.2f} and {pairs.negatives.mean():.2f}"
        return f"the means of positive and negative pairs are {means}"

    return draw_panels(path, stages, draw_histograms, title=title, sharey=True)
