# SPDX-License-Identifier: BSD-3-Clause
"""Table 3 and Figures 4 and 5 of mixed label propagation (Zhuang and Moulin, CVPR 2023): accuracy over all points,
(36).

Without --data these are images inside packages; with a folder, also those of the paper's ten sets, of 17-flowers and of
CIFAR-10 in it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmkernels import graph
from ssmkernels.experiments import feature_sets
from ssmkernels.experiments.jobs import Job
from ssmkernels.experiments.plots import Points, plot_points
from ssmkernels.experiments.record import Plot
from ssmkernels.experiments.run import Cells, Request, Result, Values, numbers
from ssmkernels.experiments.spec import Cell, Figure, Table
from ssmkernels.graph import comparisons

LABELINGS = {"5 per class": (5,), "2 to 8 per class": (2, 5, 8, 3, 6, 4, 7)}
Predict = Callable[[graph.Graph, Tensor, Tensor], Mapping[str, Tensor]]
"""(graph, labels, true classes) -> predictions by name, or a number."""


def draw_labels(classes: Tensor, seed: int, counts: Sequence[int]) -> Tensor:
    """[N] −1 but for a random draw: counts[c % len(counts)] labels of class c, the order of the counts drawn too."""
    draw = torch.Generator().manual_seed(seed)
    labels, first = torch.full_like(classes, -1), int(torch.randint(len(counts), (1,), generator=draw))
    for c in range(int(classes.max()) + 1):
        members = (classes == c).nonzero()[:, 0]
        chosen = members[torch.randperm(len(members), generator=draw)[: counts[(first + c) % len(counts)]]]
        labels[chosen] = c
    return labels


@functools.lru_cache(maxsize=1)
def load_network(name: str, folder: str | None, cache: Path) -> tuple[graph.Graph, Tensor]:
    """The graph of a set, and its classes."""
    points = feature_sets.load(name, folder, cache)
    return graph.knn_graph(points.features), points.labels


def _accuracies(
    name: str, request: Request, predict: Predict, counts: Sequence[int], seed: int, place: Path
) -> dict[str, float]:
    """Of the methods of ``predict`` on a draw of labels."""
    affinity, classes = load_network(name, request.source.path, request.out / "features")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lpdr: the system is not positive definite")  # the table counts them
        predictions = predict(affinity, draw_labels(classes, seed, counts), classes)
    return {
        method: float((predicted == classes).double().mean()) if predicted.ndim else float(predicted)
        for method, predicted in predictions.items()
    }


def _cells(
    table: Table,
    request: Request,
    predict: Predict,
    rows: Mapping[str, str],
    *,
    sets: Callable[[str, feature_sets.Source], bool] = lambda name, source: True,
    labelings: Iterable[str] = ("5 per class",),
) -> Cells:
    """A cell for each of the methods ``rows`` (row -> name in the predictions), set and labelling; those of a column
    are one job a seed.
    """
    cells = []
    sources = {name: each for name, each in feature_sets.available(request.source.path).items() if sets(name, each)}
    for name, source in sources.items():
        for labeling in labelings:
            column = f"{source.title}, {labeling}"
            run = functools.partial(_accuracies, name, request, predict, LABELINGS[labeling])
            job = functools.partial(
                _job, f"{table.name}-{name}-{labeling.replace(' ', '_')}", f"{table.title}; {column}", run
            )
            for row, key in rows.items():
                figures = (Figure("accuracy", key, unit=""),)
                cells.append(Cell(row, column, figures, numbers(table, request, row, column), job))
    deviations = [*table.deviations]
    if any(source.collection is None for source in sources.values()):
        deviations.append(
            "Small sets stand in for the paper's, or beside them: pixels of digits, EfficientNet-Lite0 features of"
            " photographs."
        )
    if (
        any(source.collection is not None for source in sources.values())
        and feature_sets.network_of(request.source.path) != "bn-inception"
    ):
        deviations.append(
            f"EfficientNet-Lite0 in place of BN-Inception, as {feature_sets.BN_INCEPTION} is not in --data."
        )
    return Cells(replace(table, deviations=deviations), tuple(cells))


def _job(name: str, title: str, run: Callable[[int, Path], Any], seed: int) -> Job:
    return Job(f"{name}-seed{seed}", f"{title}, draw {seed}", functools.partial(run, seed))


METHODS = ("ours", "LGC", "(12)", "(16)", "(16), balanced", "MoM", "Control", "shuffled W_dis", "uniform damping")


def table3(table: Table, request: Request) -> Cells:
    return _cells(table, request, predict_table3, dict(zip(METHODS, METHODS, strict=True)), labelings=LABELINGS)


def predict_table3(affinity: graph.Graph, labels: Tensor, classes: Tensor) -> dict[str, Tensor]:
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


FRACTIONS = (0.05, 0.1, 0.2, 0.5, 1.0)
FIGURE_4_METHODS = ("ours", "ours, random edges", "LPDR")


def figure4(table: Table, request: Request) -> Cells:
    rows = {"without dissimilar edges": "without, 0"}
    rows |= {
        f"{method}, {100 * share:.0f} % of the edges": f"{method}, {share}"
        for method in FIGURE_4_METHODS
        for share in FRACTIONS
    }
    rows |= {f"LPDR's system indefinite, {100 * share:.0f} %": f"LPDR indefinite, {share}" for share in FRACTIONS}
    return _cells(table, request, predict_figure4, rows, sets=lambda name, source: name in ("digits", "flowers17"))


def predict_figure4(affinity: graph.Graph, labels: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Mixed LP and LPDR with true dissimilar edges, and mixed LP with as many random ones."""
    predictions = {"without, 0": graph.label_propagation(affinity, labels).argmax(dim=1)}
    for fraction in FRACTIONS:
        draw = torch.Generator().manual_seed(0)
        oracle = comparisons.oracle_dissimilarity(affinity, classes, fraction, labels=labels, generator=draw)
        anywhere = comparisons.shuffled_dissimilarity(affinity, oracle, draw)
        for name, edges in (("ours", oracle), ("ours, random edges", anywhere)):
            predictions[f"{name}, {fraction}"] = graph.mixed_label_propagation(
                affinity, labels, dissimilarity=edges
            ).pseudo_labels
        other = comparisons.lpdr(affinity, labels, oracle)
        predictions[f"LPDR, {fraction}"] = other.pseudo_labels
        predictions[f"LPDR indefinite, {fraction}"] = torch.tensor(float(other.indefinite))
    return predictions


def plot_figure4(table: Table, request: Request, cells: Sequence[Cell], values: Values) -> Result:
    keys = {
        method: {0.0: "without, 0", **{share: f"{method}, {share}" for share in FRACTIONS}}
        for method in FIGURE_4_METHODS
    }
    panels = {column: _lines(values, column, keys) for column in dict.fromkeys(cell.column for cell in cells)}
    words = "Accuracy of Ours rises with the share of the edges that an oracle gives, far above that of LPDR."
    labels = {"xlabel": "share of the true dissimilar edges", "ylabel": "accuracy"}
    return _plotted(
        request.place(table.name) / "figure4.png", "Mixed label propagation, Figure 4", words, panels, labels
    )


def _lines(values: Values, column: str, keys: Mapping[str, Mapping[float, str]]) -> dict[str, dict[float, list[float]]]:
    """By line and x the accuracies that finished draws have under ``keys``, in a column."""
    done = {
        outcome.name: outcome.value
        for (cell, _), outcome in values.items()
        if cell.column == column and outcome.finished
    }
    return (
        {
            label: {x: [value[key] for value in done.values()] for x, key in points.items()}
            for label, points in keys.items()
        }
        if done
        else {}
    )


def _plotted(path: Path, title: str, words: str, panels: Points, labels: Mapping[str, Any]) -> Result:
    panels = {panel: lines for panel, lines in panels.items() if lines}
    if not panels:
        return Result()
    alt = plot_points(path, panels, **labels)
    return Result(plots=(Plot(title, path.name, words, alt),))


BETAS, SCALES = (0.01, 0.1, 1.0, 3.0, 10.0), (1.0, 4.0, 16.0, 64.0, 128.0)
FIGURE_5_SETS = ("cub200", "cars196", "dogs")
"""Of the paper; of its other sets figure 5 has none."""
_SENSITIVITY = {"β": {beta: f"β, {beta}" for beta in BETAS}, "λ": {scale: f"λ, {scale}" for scale in SCALES}}


def figure5(table: Table, request: Request) -> Cells:
    rows = {f"{symbol} = {x:g}": key for symbol, keys in _SENSITIVITY.items() for x, key in keys.items()}
    return _cells(
        table,
        request,
        predict_figure5,
        rows,
        sets=lambda name, source: source.collection is None or name in FIGURE_5_SETS,
    )


def predict_figure5(affinity: graph.Graph, labels: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """β with λ = 4, and λ with β = 1."""
    settings = {**{f"β, {beta}": (beta, 4.0) for beta in BETAS}, **{f"λ, {scale}": (1.0, scale) for scale in SCALES}}
    return {
        name: graph.mixed_label_propagation(affinity, labels, beta=beta, logit_scale=scale).pseudo_labels
        for name, (beta, scale) in settings.items()
    }


def plot_figure5(table: Table, request: Request, cells: Sequence[Cell], values: Values) -> Result:
    plots: list[Plot] = []
    columns = list(dict.fromkeys(cell.column for cell in cells))
    for letter, (symbol, keys) in zip("ab", _SENSITIVITY.items(), strict=True):
        lines = {column: found["all"] for column in columns if (found := _lines(values, column, {"all": keys}))}
        words = "Hardly any sensitivity to β." if symbol == "β" else "A marked sensitivity to λ."
        title = f"sensitivity to {symbol}"
        path = request.place(table.name) / f"figure5{letter}.png"
        labels = {"xlabel": symbol, "ylabel": "accuracy", "log": True}
        plots += _plotted(
            path, f"Mixed label propagation, Figure 5{letter}: {title}", words, {title: lines}, labels
        ).plots
    return Result(plots=tuple(plots))
