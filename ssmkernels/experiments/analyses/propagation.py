# SPDX-License-Identifier: BSD-3-Clause
"""Table 3 and Figures 4 and 5 of mixed label propagation (Zhuang and Moulin, CVPR 2023): accuracy over all points,
(36).

Without --data these are images inside packages; with a folder, also those of the paper's ten sets, of 17-flowers,
CIFAR-10 and glyphs in it. A table's columns name the sets; a row's argument is the key of its accuracy in what a job
leaves, which has all rows of a column.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ssmkernels import graph
from ssmkernels.experiments.analyses import feature_sets
from ssmkernels.experiments.analyses.feature_sets import ARCHIVES, BN_INCEPTION, GLYPHS
from ssmkernels.experiments.jobs import Job
from ssmkernels.experiments.run import Cells, Request, numbers
from ssmkernels.experiments.sources import INSIDE_PACKAGES
from ssmkernels.experiments.spec import Cell, Figure, Table
from ssmkernels.graph import comparisons

LABELINGS = {"5 per class": (5,), "2 to 8 per class": (2, 5, 8, 3, 6, 4, 7)}
Predict = Callable[[graph.Graph, Tensor, Tensor, Sequence[str]], Mapping[str, Tensor]]
"""(graph, labels, true classes, keys of the rows) -> predictions by key, or a number."""


def _cells(table: Table, request: Request, predict: Predict, labelings: Iterable[str] = ("5 per class",)) -> Cells:
    """A cell for each row, set that can be had, and labelling; those of a column are one job a seed."""
    folder = request.source.path
    sets = {name: title for title, name in table.columns.items()}
    names = feature_sets.available(sets, folder)
    keys = tuple(map(str, table.rows.values()))
    cells = []
    for name, labeling in itertools.product(names, labelings):
        column = f"{sets[name]}, {labeling}"
        run = functools.partial(_accuracies, name, request, predict, keys, labeling)
        job_name = f"{table.name}-{name}-{labeling.replace(' ', '_')}"
        job = functools.partial(_job, job_name, f"{table.title}; {column}", run)
        for row, key in table.rows.items():
            figures = (Figure("accuracy", str(key), unit=""),)
            cells.append(Cell(row, column, figures, numbers(table, request, row, column), job))
    deviations = [*table.deviations]
    others = {*INSIDE_PACKAGES, *ARCHIVES, *GLYPHS}
    if others & {*names}:
        deviations.append(
            "Other sets stand in for the paper's, or beside them: pixels of digits, principal components of glyphs,"
            " EfficientNet-Lite0 features of photographs."
        )
    if {*names} - others and feature_sets.network_of(folder) != "bn-inception":
        deviations.append(f"EfficientNet-Lite0 in place of BN-Inception, as {BN_INCEPTION} is not in --data.")
    return Cells(replace(table, deviations=deviations), tuple(cells))


def _job(name: str, title: str, run: Callable[[int, Path], Mapping[str, float]], seed: int) -> Job:
    return Job(f"{name}-seed{seed}", f"{title}, draw {seed}", functools.partial(run, seed))


def _accuracies(
    name: str, request: Request, predict: Predict, keys: Sequence[str], labeling: str, seed: int, folder: Path
) -> dict[str, float]:
    """Of the methods of ``predict`` on a draw of labels."""
    affinity, classes = load_network(name, request.source.path, request.out / "features")
    labels = draw_labels(classes, seed, LABELINGS[labeling])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lpdr: the system is not positive definite")  # the table counts them
        predictions = predict(affinity, labels, classes, keys)
    return {
        method: float((predicted == classes).double().mean()) if predicted.ndim else float(predicted)
        for method, predicted in predictions.items()
    }


@functools.lru_cache(maxsize=1)
def load_network(name: str, folder: str | None, cache: Path) -> tuple[graph.Graph, Tensor]:
    """The graph of a set, and its classes."""
    points = feature_sets.load(name, folder, cache)
    return graph.knn_graph(points.features), points.labels


def draw_labels(classes: Tensor, seed: int, counts: Sequence[int]) -> Tensor:
    """[N] −1 but for a random draw: counts[c % len(counts)] labels of class c, the order of the counts drawn too."""
    draw = torch.Generator().manual_seed(seed)
    labels, first = torch.full_like(classes, -1), int(torch.randint(len(counts), (1,), generator=draw))
    for c in range(int(classes.max()) + 1):
        members = (classes == c).nonzero()[:, 0]
        chosen = members[torch.randperm(len(members), generator=draw)[: counts[(first + c) % len(counts)]]]
        labels[chosen] = c
    return labels


def predict_table3(affinity: graph.Graph, labels: Tensor, classes: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
    """The pseudo-labels of every row of the table."""
    ours = graph.mixed_label_propagation(affinity, labels)
    shuffled = comparisons.shuffled_dissimilarity(affinity, ours.dissimilarity, torch.Generator().manual_seed(0))

    def mixed(dissimilarity: Tensor) -> Tensor:
        return graph.mixed_label_propagation(affinity, labels, dissimilarity=dissimilarity).pseudo_labels

    return {
        "LGC": comparisons.learning_with_local_and_global_consistency(affinity, labels).argmax(dim=1),
        "(12)": graph.label_propagation(affinity, labels, balance=False, mu_unlabeled=1 / 99).argmax(dim=1),
        "(16)": graph.label_propagation(affinity, labels, balance=False).argmax(dim=1),
        "(16), balanced": graph.label_propagation(affinity, labels).argmax(dim=1),
        "MoM": mixed(comparisons.mutual_neighbour_dissimilarity(affinity)),
        "Control": mixed(comparisons.control_dissimilarity(affinity, labels)),
        "ours": ours.pseudo_labels,
        "shuffled W_dis": mixed(shuffled),
        "uniform damping": comparisons.uniform_damping(affinity, labels, ours.dissimilarity).pseudo_labels,
    }


def predict_figure4(affinity: graph.Graph, labels: Tensor, classes: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
    """Mixed LP and LPDR with the share of the true dissimilar edges that a key ends in, and mixed LP with as many
    random ones.
    """
    predictions = {"without, 0": graph.label_propagation(affinity, labels).argmax(dim=1)}
    for share in sorted({float(key.rpartition(", ")[2]) for key in keys} - {0.0}):
        draw = torch.Generator().manual_seed(0)
        oracle = comparisons.oracle_dissimilarity(affinity, classes, share, labels=labels, generator=draw)
        anywhere = comparisons.shuffled_dissimilarity(affinity, oracle, draw)
        for method, edges in (("ours", oracle), ("ours, random edges", anywhere)):
            mixed = graph.mixed_label_propagation(affinity, labels, dissimilarity=edges)
            predictions[f"{method}, {share}"] = mixed.pseudo_labels
        other = comparisons.lpdr(affinity, labels, oracle)
        predictions[f"LPDR, {share}"] = other.pseudo_labels
        predictions[f"LPDR indefinite, {share}"] = torch.tensor(float(other.indefinite))
    return predictions


def predict_figure5(affinity: graph.Graph, labels: Tensor, classes: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
    """With β or λ as the keys say, the other as usual: "β, 0.1"."""
    predictions = {}
    for key in keys:
        symbol, _, value = key.partition(", ")
        beta, scale = (float(value), 4.0) if symbol == "β" else (1.0, float(value))
        mixed = graph.mixed_label_propagation(affinity, labels, beta=beta, logit_scale=scale)
        predictions[key] = mixed.pseudo_labels
    return predictions


table3 = functools.partial(_cells, predict=predict_table3, labelings=LABELINGS)
figure4 = functools.partial(_cells, predict=predict_figure4)
figure5 = functools.partial(_cells, predict=predict_figure5)
