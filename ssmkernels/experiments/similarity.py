# SPDX-License-Identifier: BSD-3-Clause
"""What of MLSN (Wu, Feng and Zhou, 2020) is no table of training runs on one set: weak labels, Figures 2 and 3, and digits.

Without --data these run on images that come inside packages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import data as images
from ssmkernels.experiments.experiment import Budget, Findings, entries_of, failure_text, in_a_file
from ssmkernels.experiments.jobs import (
    FOLDER,
    Outcome,
    alone,
    pairs_of,
    results_of,
    run_rows,
    seconds_of,
    this_rank,
    training_job,
    training_name,
)
from ssmkernels.experiments.record import Entry, Plot
from ssmkernels.experiments.report import half_width, markdown_table, mean_and_std
from ssmkernels.nn import draw_class_centers
from ssmkernels.trainers import MLSN, MLSNConfig, RunResult, train_mlsn
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.cli import parse_config
from ssmkernels.trainers.evaluation import embed
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.mlsn import MLSNNetwork

MEAN_TEACHER = ("--lambda_2.weight", "0", "--lambda_3.weight", "0")
PI_MODEL = (*MEAN_TEACHER, "--teacher", "student", "--ema_buffers", "copy")
SUPERVISED = (*MEAN_TEACHER, "--lambda_1.weight", "0", "--ema_buffers", "copy")
SIMILARITY: tuple[str, ...] = ()
WEAK_LABELS = ("--pair_labels", "weak")

TABLE_ROWS = {"Supervised only": SUPERVISED, "Π model": PI_MODEL, "MT": MEAN_TEACHER, "MT + Similarity": SIMILARITY}
DIGITS_ROWS = {**TABLE_ROWS, "MT + Similarity, weak labels": WEAK_LABELS}

SMALL = ("--model", "wrn-10-1", "--bn_momentum", "0.1", "--batch_size", "16", "--hidden_features", "32", "--run.workers", "0")
BUDGETS = {
    "smoke": Budget(1, (*SMALL, "--steps", "12", "--run.eval_every", "6", "--run.log_every", "3")),
    "short": Budget(1, ("--steps", "16384", "--run.eval_every", "512")),
    "paper": Budget(10),
}
DIGITS_BUDGETS = {
    "smoke": Budget(1, ("--steps", "60", "--run.eval_every", "20", "--run.workers", "0")),
    "short": Budget(3),
    "paper": Budget(10),
}

Cloud = tuple[np.ndarray, Any, float]  # places [N, 2], a colour or classes [N], size of the points
Panels = dict[str, list[Cloud]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Images and recipe of a study at a budget."""

    config: str
    title: str
    budget: Budget
    place: tuple[str, ...] = ()
    last: int = 3
    """Evaluations whose median error counts."""

    def parse(self, arguments: Sequence[str], seed: int, out: Path | None = None) -> MLSNConfig:
        where = () if out is None else ("--run.out", str(out))
        everything = ["--config", self.config, *self.budget.arguments, *arguments, *self.place, "--seed", str(seed), *where]
        return parse_config("mlsn", everything)[0]

    def all_labels(self) -> tuple[str, ...]:
        """Arguments for training with the label of every image."""
        config = self.parse((), 1)
        count = len(images.load_dataset(config.data.name, config.data.root).train)
        return (*SUPERVISED, "--data.labels", str(count), "--data.proportional", "true", "--data.labels_in_unlabeled", "true")


def choose(budget: str, data: str | None) -> Setting:
    """CIFAR-10 with 1000 labels where its folder is given, scikit-learn's digits without."""
    if data is None:
        return Setting("digits", "digits of 8x8 pixels, 20 labels", DIGITS_BUDGETS[budget])
    place = ("--data.name", "npz", "--data.root", data) if in_a_file(data) else ("--data.root", data)
    return Setting("cifar10-1000", "CIFAR-10, 1000 labels", BUDGETS[budget], place, last=20)


def train_rows(setting: Setting, rows: Mapping[str, Sequence[str]], *, out: Path | None, seeds: Sequence[int]) -> dict[str, list[Outcome]]:
    """How every row with every seed ended, seed by seed; from what an earlier call left beside ``out``.

    Raises:
        KeyboardInterrupt: a run was stopped; its checkpoint is kept.
    """
    place = setting.parse((), seeds[0]).data
    train = functools.partial(train_mlsn, images=images.load_dataset(place.name, place.root))
    jobs = {
        (row, seed): training_job("mlsn", setting.parse(arguments, seed), train, f"{setting.title}: {row}, seed {seed}")
        for seed in seeds
        for row, arguments in rows.items()
    }
    return run_rows(out, jobs)


def errors(outcomes: Sequence[Outcome], last: int, name: str = "ema_error") -> list[float]:
    """Test errors in percent, one per finished run: medians of the ``last`` evaluations."""
    return [_error(result, last, name) for result in results_of(outcomes)]


def _error(result: RunResult, last: int, name: str = "ema_error") -> float:
    return 100 * result.median(name, last=last)


def error_table(outcomes: Mapping[str, Sequence[Outcome]], last: int) -> str:
    rows = []
    for row, each in outcomes.items():
        averaged, student = errors(each, last), errors(each, last, "student_error")
        if averaged:
            by_seed = ", ".join(f"{error:.1f}" for error in averaged)
            rows.append([row, mean_and_std(averaged, digits=1), mean_and_std(student, digits=1), by_seed])
        else:
            rows.append([row, "failed", "failed", "-"])
    return markdown_table(["method", "test error, %, averaged weights", "student", "averaged weights, by seed"], rows)


def entries(outcomes: Mapping[str, Sequence[Outcome]], column: str, last: int, paper: Mapping[str, str]) -> tuple[Entry, ...]:
    """The errors of the averaged weights, beside the paper's by row, and those of the student."""
    figures = {
        "error, averaged weights": lambda result: _error(result, last),
        "error, student": lambda result: _error(result, last, "student_error"),
    }
    return entries_of(outcomes, column, figures, {row: (text, "-") for row, text in paper.items()})


def verdict(outcomes: Mapping[str, Sequence[Outcome]], better: str, worse: str, last: int) -> str:
    """The paired difference of two rows with its 95 % interval, in words."""
    differences = [_error(a, last) - _error(b, last) for a, b in pairs_of(outcomes[better], outcomes[worse])]
    if not differences:
        return f"{better} − {worse}: no seed finished both."
    mean, half = float(np.mean(differences)), half_width(differences)
    seeds = len(differences)
    if seeds == 1:
        return f"{better} − {worse}: {mean:+.1f} points with one seed, which says nothing about the next."
    words = "lower" if mean < -half else "higher" if mean > half else "not told apart"
    return f"{better} − {worse}: {mean:+.1f} ± {half:.1f} points (95 % interval over {seeds} paired seeds): {words}."


def digits(*, budget: str, data: str | None, out: Path) -> Findings:
    """The rows of Tables 1 and 2 and weak labels, on two sets of digits."""
    if data is not None:
        raise ValueError(f"--data is {data}; these digits come inside packages, and it should be left out")
    extent = DIGITS_BUDGETS[budget]
    parts, notes, seconds = [], [], 0.0
    found: list[Entry] = []
    for config, title in (("digits", "scikit-learn's digits, 8x8 pixels"), ("mnist5k", "MNIST-5k, 28x28 pixels")):
        setting = Setting(config, title, extent)
        labels = setting.parse((), 1).data.labels
        outcomes = train_rows(setting, DIGITS_ROWS, out=out, seeds=range(1, extent.seeds + 1))
        said = verdict(outcomes, "MT + Similarity", "MT", setting.last)
        parts.append(f"{title}, {labels} labels:\n\n{error_table(outcomes, setting.last)}\n\n{said}\n")
        notes.append(f"{title}: {said}\n")
        found += entries(outcomes, f"{title}, {labels} labels", setting.last, {})
        seconds += seconds_of(outcomes)
    return Findings(
        text=_said(extent, budget, seeds=extent.seeds) + failure_text(found) + "\n".join(parts),
        data="digits, mnist5k (inside packages)",
        seeds=tuple(range(1, extent.seeds + 1)),
        entries=tuple(found),
        seconds=seconds,
        deviations=("Not in the paper.", *_deviations(extent, budget, seeds=extent.seeds)),
        notes="\n".join(notes),
    )


FULLY_SUPERVISED = "all labels, supervised"
WEAK = "MT + Similarity, weak labels"


def weak_labels(*, budget: str, data: str | None, out: Path) -> Findings:
    """1000 labels and the relations of all pairs, against 1000 labels alone and against all labels."""
    setting = choose(budget, data)
    rows = {"MT": MEAN_TEACHER, "MT + Similarity": SIMILARITY, WEAK: WEAK_LABELS, FULLY_SUPERVISED: setting.all_labels()}
    seeds = setting.budget.seeds
    outcomes = train_rows(setting, rows, out=out, seeds=range(1, seeds + 1))
    paper = {WEAK: "5.3"} if data is not None else {}
    found = entries(outcomes, setting.title, setting.last, paper)
    notes = (
        f"{verdict(outcomes, WEAK, FULLY_SUPERVISED, setting.last)}\n\n"
        'The paper (CIFAR-10, 1000 labels and all weak labels) has an error of 5.3 %, "slightly better than fully supervised learning", '
        "whose error it does not print. Weak labels are used for the pairs of unlabelled images within a batch, as many as are sampled.\n"
    )
    table = error_table(outcomes, setting.last)
    return Findings(
        text=f"{setting.title}. {_said(setting.budget, budget, seeds=seeds)}{failure_text(found)}{table}\n\n{notes}",
        data=_place(setting, data),
        seeds=tuple(range(1, seeds + 1)),
        entries=found,
        seconds=seconds_of(outcomes),
        deviations=_deviations(setting.budget, budget, seeds=seeds),
        notes=notes,
    )


def trained(config: MLSNConfig, folder: Path) -> MLSN:
    """A trainer at the end of a finished run, from the checkpoint in ``folder``."""
    splits = images.load_dataset(config.data.name, config.data.root)
    trainer = MLSN(config, splits, make_fabric(precision=config.precision, accelerator=config.run.accelerator))
    trainer.load_state_dict(load_checkpoint(folder / "checkpoint.pt")["trainer"])
    return trainer


def averaged_features(trainer: MLSN, dataset: images.ImageDataset, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, K], features h [N, d] and true labels [N] of the images ``index``, by the averaged weights."""
    splits = trainer.splits
    batches = images.evaluation_batches(
        images.ImageSubset(dataset, index, dataset.labels[index], dataset.num_classes),
        256,
        mean=splits.mean,
        std=splits.std,
        transform=trainer.transforms.evaluation,
    )
    logits, features, labels = embed(trainer.teacher.model, batches, device=trainer.fabric.device)
    return logits.float(), features.float(), labels


POINTS = 1500  # t-SNE of many more takes minutes
CENTER_DRAWS = 10
SHARES = (0.25, 0.5, 0.75, 1.0)


def figure2(*, budget: str, data: str | None, out: Path) -> Findings:
    """Where labelled images lie, and where those with the most confident pseudo-labels of either kind do."""
    setting = choose(budget, data)
    row = "MT + Similarity"
    outcomes = train_rows(setting, {row: SIMILARITY}, out=out, seeds=(1,))
    found = entries(outcomes, setting.title, setting.last, {})
    text = ""
    plots: tuple[Plot, ...] = ()
    if results_of(outcomes[row]) and this_rank()[0] == 0:
        with alone():
            config = setting.parse(SIMILARITY, 1)
            text = _pseudo_labels(trained(config, out.parent / FOLDER / training_name("mlsn", config)), out / "figure2.png")
        plots = (Plot("MLSN, Figure 2", "figure2.png", "Confident pseudo-labels of either kind beside the labelled images, by t-SNE."),)
    return Findings(
        text=f"{setting.title}. {_said(setting.budget, budget)}{failure_text(found)}{text}{_pictures(plots)}",
        data=_place(setting, data),
        seeds=(1,),
        entries=found,
        seconds=seconds_of(outcomes),
        plots=plots,
        deviations=_deviations(setting.budget, budget),
        notes=text,
    )


def _pseudo_labels(trainer: MLSN, picture: Path) -> str:
    """Figure 2 in ``picture``, and what it shows in numbers."""
    train = trainer.splits.train
    unlabeled_index = np.setdiff1d(np.arange(len(train)), trainer.labeled_index)
    unlabeled_index = np.random.default_rng(0).permutation(unlabeled_index)[:POINTS]
    _, labeled, labels = averaged_features(trainer, train, trainer.labeled_index)
    logits, unlabeled, truth = averaged_features(trainer, train, unlabeled_index)
    similarity = similarity_probs(trainer, unlabeled, labeled, labels)
    nearest = 1 - (F.normalize(unlabeled) @ F.normalize(labeled).t()).max(dim=1).values

    rows, chosen = [], {}
    for name, probs in (("self-training", logits.softmax(dim=1)), ("similarity", similarity)):
        confidence, pseudo_labels = probs.max(dim=1)
        order = confidence.argsort(descending=True, stable=True)
        correct = (pseudo_labels == truth).float()
        for share in SHARES:
            top = order[: max(1, round(share * len(order)))]
            accuracy, distance = 100 * float(correct[top].mean()), float(nearest[top].mean())
            rows.append([f"{100 * share:.0f} %", name, f"{accuracy:.1f}", f"{distance:.4f}"])
        chosen[name] = order[: len(order) // 2].cpu().numpy()
    rows.sort(key=lambda row: int(row[0].split()[0]))
    places = tsne(torch.cat([labeled, unlabeled]))
    ours, others = places[: len(labeled)], places[len(labeled) :]
    ground: Cloud = (places, "gainsboro", 2.0)
    panels: Panels = {
        f"(a) the {len(labeled)} labelled images": [ground, (ours, labels.cpu().numpy(), 14.0)],
        "(b) self-training, confident half": [ground, (others[chosen["self-training"]], "black", 4.0), (ours, "red", 10.0)],
        "(c) similarity, confident half": [ground, (others[chosen["similarity"]], "tab:blue", 4.0), (ours, "red", 10.0)],
    }
    plot_clouds(picture, panels)
    header = ["most confident", "pseudo-label", "accuracy, %", "mean cosine distance to the nearest labelled image"]
    return (
        f"MT + Similarity, averaged weights; test error {test_error(trainer):.1f} %. {len(unlabeled)} of the unlabelled images get "
        "pseudo-labels from the classifier (self-training) and from the similarity network (y_sc, the mean of "
        f"{CENTER_DRAWS} draws of centers). The paper says that those of the similarity network lie further from the labelled images; the "
        "last column measures that for equally many of both, as the two confidences have different scales.\n\n"
        f"{markdown_table(header, rows)}\n"
    )


def figure3(*, budget: str, data: str | None, out: Path) -> Findings:
    """Features of test images after training with few labels, with few labels and all weak ones, and with all labels."""
    setting = choose(budget, data)
    rows = {"MT": MEAN_TEACHER, WEAK: WEAK_LABELS, FULLY_SUPERVISED: setting.all_labels()}
    outcomes = train_rows(setting, rows, out=out, seeds=(1,))
    found = entries(outcomes, setting.title, setting.last, {WEAK: "5.3"} if data is not None else {})
    text = ""
    plots: tuple[Plot, ...] = ()
    if this_rank()[0] == 0:
        finished = {row: setting.parse(arguments, 1) for row, arguments in rows.items() if results_of(outcomes[row])}
        with alone():
            trainers = {row: trained(config, out.parent / FOLDER / training_name("mlsn", config)) for row, config in finished.items()}
            text = _separation(trainers, out / "figure3.png") if trainers else ""
        words = "All labels beside 1000 labels with all weak labels, by t-SNE: the latter is said to be more separable."
        plots = (Plot("MLSN, Figure 3", "figure3.png", words),) if trainers else ()
    return Findings(
        text=f"{setting.title}. {_said(setting.budget, budget)}{failure_text(found)}{text}{_pictures(plots)}",
        data=_place(setting, data),
        seeds=(1,),
        entries=found,
        seconds=seconds_of(outcomes),
        plots=plots,
        deviations=_deviations(setting.budget, budget),
        notes=text,
    )


def _separation(trainers: Mapping[str, MLSN], picture: Path) -> str:
    """Figure 3 in ``picture``, and how far apart the classes lie."""
    from sklearn.metrics import silhouette_score  # slow to import

    table: list[list[str]] = []
    panels: Panels = {}
    for row, trainer in trainers.items():
        test = trainer.splits.test
        index = np.random.default_rng(0).permutation(len(test))[:POINTS]
        _, features, labels = averaged_features(trainer, test, index)
        separation = silhouette_score(features.cpu().numpy(), labels.cpu().numpy(), metric="cosine")
        table.append([row, f"{test_error(trainer):.1f}", f"{separation:.3f}"])
        panels[row] = [(tsne(features), labels.cpu().numpy(), 4.0)]
    plot_clouds(picture, panels)
    return (
        "Averaged weights. The silhouette is that of the true classes by cosine distance: 1 for tight classes far apart, 0 for "
        "touching ones. The paper shows all labels beside 1000 labels with all weak labels, and gives an error of 5.3 % for the latter.\n\n"
        f"{markdown_table(['training', 'test error, %', 'silhouette'], table)}\n"
    )


@torch.no_grad()
def similarity_probs(trainer: MLSN, features: Tensor, labeled: Tensor, labels: Tensor) -> Tensor:
    """y_sc [n, K] of features [n, d] by the averaged similarity network, the mean over draws of centers among the labelled features."""
    network = trainer.teacher.model
    assert isinstance(network, MLSNNetwork) and network.similarity is not None
    draw = torch.Generator().manual_seed(0)
    centers = [draw_class_centers(labeled, labels, trainer.splits.num_classes, generator=draw).features for _ in range(CENTER_DRAWS)]
    probs = torch.stack([network.similarity.class_probabilities(features, each) for each in centers])
    return F.normalize(probs, p=1, dim=2).mean(dim=0)


def test_error(trainer: MLSN) -> float:
    """Test error of the averaged weights, in percent."""
    return 100 * trainer.evaluate()["ema_error"]


def tsne(features: Tensor) -> np.ndarray:
    """[N, d] -> [N, 2], the same for the same features."""
    from sklearn.manifold import TSNE  # slow to import

    return TSNE(perplexity=min(30.0, (len(features) - 1) / 3), init="pca", random_state=0).fit_transform(features.cpu().numpy())


def plot_clouds(path: Path, panels: Panels) -> None:
    """One panel per entry, its clouds over one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, clouds) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for places, colour, size in clouds:
            axes.scatter(*places.T, c=colour, s=size, cmap=None if isinstance(colour, str) else "tab10", linewidths=0)
        axes.set(title=title, xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _said(extent: Budget, budget: str, *, seeds: int = 1) -> str:
    return " ".join(_deviations(extent, budget, seeds=seeds)) + "\n\n"


def _deviations(extent: Budget, budget: str, *, seeds: int = 1) -> tuple[str, ...]:
    arguments = f", {' '.join(extent.arguments)}" if extent.arguments else ""
    said = f"Budget {budget}: {seeds} seed(s){arguments}."
    return (said, "This shows that it runs, not what it reaches.") if budget == "smoke" else (said,)


def _place(setting: Setting, data: str | None) -> str:
    return f"{setting.title}{' (inside packages)' if data is None else ''}"


def _pictures(plots: Sequence[Plot]) -> str:
    return "".join(f"\n![{plot.title}]({plot.file})\n" for plot in plots)
