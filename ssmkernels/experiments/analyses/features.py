# SPDX-License-Identifier: BSD-3-Clause
"""Figures 2 and 3 of MLSN (Wu, Feng and Zhou, 2020): features of trained networks, drawn by t-SNE and in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import data as images
from ssmkernels._plots import PALETTE, colour, draw_panels, label_axes
from ssmkernels.experiments.record import Entry, Plot
from ssmkernels.experiments.run import Request, Result, Values
from ssmkernels.experiments.spec import Cell, Table
from ssmkernels.nn import draw_class_centers
from ssmkernels.trainers import MLSN, MLSNConfig
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.evaluation import embed
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.mlsn import MLSNNetwork

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cloud = tuple[np.ndarray, Any, float, str]  # places [N, 2], a colour or classes [N], size of the points, what they are
Panels = dict[str, list[Cloud]]

POINTS = 1500  # t-SNE of many more takes minutes
CENTER_DRAWS = 10
SHARES = (0.25, 0.5, 0.75, 1.0)


def pseudo_labels(table: Table, request: Request, cells: Sequence[Cell], values: Values) -> Result:
    """Figure 2: where labelled images lie, and where those with the most confident pseudo-labels of either kind do."""
    entries, plots = [], []
    for cell, trainer in finished(request, cells, values).items():
        panels, figures = confident(trainer)
        for (kind, share), (accuracy, distance) in figures.items():
            row = f"{kind}, most confident {100 * share:.0f} %"
            entries.append(Entry(row, cell.column, "accuracy of the pseudo-labels", "%", "-", (accuracy,), (), (1,)))
            entries.append(Entry(row, cell.column, "distance", "", "-", (distance,), (), (1,)))
        plots.append(plot_clouds(table, request, panels))
    return Result(tuple(entries), tuple(plots))


def confident(trainer: MLSN) -> tuple[Panels, dict[tuple[str, float], tuple[float, float]]]:
    """Figure 2's panels; and by kind of pseudo-label and share of the most confident ones their accuracy, in
    percent, and distance.
    """
    train = trainer.splits.train
    unlabeled_index = np.setdiff1d(np.arange(len(train)), trainer.labeled_index)
    unlabeled_index = np.random.default_rng(0).permutation(unlabeled_index)[:POINTS]
    _, labeled, labels = averaged_features(trainer, train, trainer.labeled_index)
    logits, unlabeled, truth = averaged_features(trainer, train, unlabeled_index)
    similarity = similarity_probs(trainer, unlabeled, labeled, labels)
    nearest = 1 - (F.normalize(unlabeled) @ F.normalize(labeled).t()).max(dim=1).values

    figures, chosen = {}, {}
    for kind, probs in (("self-training", logits.softmax(dim=1)), ("similarity", similarity)):
        confidence, guesses = probs.max(dim=1)
        order = confidence.argsort(descending=True, stable=True)
        correct = (guesses == truth).float()
        for share in SHARES:
            top = order[: max(1, round(share * len(order)))]
            figures[kind, share] = (100 * float(correct[top].mean()), float(nearest[top].mean()))
        chosen[kind] = order[: len(order) // 2].cpu().numpy()
    places = tsne(torch.cat([labeled, unlabeled]))
    known, others = places[: len(labeled)], places[len(labeled) :]
    ground: Cloud = (places, "gainsboro", 2.0, "all images")
    marked: Cloud = (known, PALETTE[1], 10.0, "(b), (c) labelled")
    panels: Panels = {
        f"(a) the {len(labeled)} labelled images": [ground, (known, labels.cpu().numpy(), 14.0, "labelled, by class")],
    }
    for title, kind, shade in (("(b)", "self-training", "black"), ("(c)", "similarity", PALETTE[0])):
        confident_half: Cloud = (others[chosen[kind]], shade, 4.0, f"{title} confident")
        panels[f"{title} {kind}, confident half"] = [ground, confident_half, marked]
    return panels, figures


def separation(table: Table, request: Request, cells: Sequence[Cell], values: Values) -> Result:
    """Figure 3: features of test images, and how far apart the classes lie."""
    from sklearn.metrics import silhouette_score  # slow to import

    entries: list[Entry] = []
    panels: Panels = {}
    for cell, trainer in finished(request, cells, values).items():
        test = trainer.splits.test
        index = np.random.default_rng(0).permutation(len(test))[:POINTS]
        _, features, labels = averaged_features(trainer, test, index)
        score = silhouette_score(features.cpu().numpy(), labels.cpu().numpy(), metric="cosine")
        entries.append(Entry(cell.row, cell.column, "silhouette", "", "-", (float(score),), (), (1,)))
        panels[cell.row] = [(tsne(features), labels.cpu().numpy(), 4.0, "test images, by class")]
    if not panels:
        return Result()
    return Result(tuple(entries), (plot_clouds(table, request, panels),))


def finished(request: Request, cells: Sequence[Cell], values: Values) -> dict[Cell, MLSN]:
    """The trainers of the cells whose first seed is finished, at its end."""
    done = [cell for cell in cells if (cell, 1) in values and values[cell, 1].finished]
    return {cell: trained(cell.config, request.jobs / cell.job(1).name) for cell in done}


def trained(config: MLSNConfig, folder: Path) -> MLSN:
    """A trainer at the end of a finished run, from the checkpoint in ``folder``."""
    splits = images.load_dataset(config.data.name, config.data.root)
    trainer = MLSN(config, splits, make_fabric(config.run, precision=config.precision))
    trainer.load_state_dict(load_checkpoint(folder / "checkpoint.pt")["trainer"])
    return trainer


def averaged_features(trainer: MLSN, dataset: images.ImageDataset, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, K], features h [N, d] and true labels [N] of the images ``index``, by the averaged weights."""
    splits = trainer.splits
    subset = images.ImageSubset(dataset, index, dataset.labels[index], dataset.num_classes)
    transform = trainer.transforms.evaluation
    batches = images.evaluation_batches(subset, 256, mean=splits.mean, std=splits.std, transform=transform)
    logits, features, labels = embed(trainer.teacher.model, batches, device=trainer.fabric.device)
    return logits.float(), features.float(), labels


@torch.no_grad()
def similarity_probs(trainer: MLSN, features: Tensor, labeled: Tensor, labels: Tensor) -> Tensor:
    """y_sc [n, K] of features [n, d] by the averaged similarity network, the mean over draws of centers among the
    labelled features.
    """
    network = trainer.teacher.model
    assert isinstance(network, MLSNNetwork) and network.similarity is not None
    draw = torch.Generator().manual_seed(0)
    probs = []
    for _ in range(CENTER_DRAWS):
        centers = draw_class_centers(labeled, labels, trainer.splits.num_classes, generator=draw).features
        probs.append(F.normalize(network.similarity.class_probabilities(features, centers), p=1, dim=1))
    return torch.stack(probs).mean(dim=0)


def tsne(features: Tensor) -> np.ndarray:
    """[N, d] -> [N, 2], the same for the same features."""
    from sklearn.manifold import TSNE  # slow to import

    return TSNE(perplexity=min(30.0, (len(features) - 1) / 3), init="pca", random_state=0).fit_transform(
        features.cpu().numpy()
    )


def draw_cloud(axes: Axes, places: np.ndarray, shade: Any, size: float, label: str) -> None:
    """Points of one colour; or of the colour of each one's class, with the classes in the legend."""
    if isinstance(shade, str):
        axes.scatter(places[:, 0], places[:, 1], color=shade, s=size, linewidths=0, label=label)
        return
    for number in np.unique(shade):
        chosen = places[shade == number]
        axes.scatter(chosen[:, 0], chosen[:, 1], color=colour(number), s=size, linewidths=0, label=f"class {number}")


def plot_clouds(table: Table, request: Request, panels: Panels) -> Plot:
    """One panel per entry, its clouds over one another."""

    def draw_clouds(axes: Axes, title: str, clouds: Sequence[Cloud]) -> str:
        for places, shade, size, label in clouds:
            draw_cloud(axes, places, shade, size, label)
        names = {"xlabel": "t-SNE, 1st dimension", "ylabel": "t-SNE, 2nd dimension"}
        label_axes(axes, title=title, **names, xticks=[], yticks=[])  # only distances mean something
        return ", ".join(f"{len(places)} points ({label})" for places, _, _, label in clouds)

    plot = table.plot
    alt = draw_panels(request.place(table.name) / plot["file"], panels, draw_clouds)
    return Plot(plot["title"], plot["file"], plot["paper"], alt)
