# SPDX-License-Identifier: BSD-3-Clause
"""The ablations and the similarity histograms of SLADE (Duan et al., CVPR 2021): on the paper's images, or in miniature on smaller ones.

Without --data they run on digits that come inside packages; with a folder of class folders, on its images; with a folder that has
CUB_200_2011 and nabirds in it, or stanford_cars and CompCars' data, on those.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmkernels import data as images
from ssmkernels import metrics, models
from ssmkernels.experiments.experiment import Budget, Findings, entries_of, failure_text, in_a_file
from ssmkernels.experiments.jobs import (
    FOLDER,
    Job,
    Outcome,
    pairs_of,
    results_of,
    run_jobs,
    run_rows,
    seconds_of,
    this_rank,
    training_job,
    training_name,
)
from ssmkernels.experiments.record import Entry, Plot
from ssmkernels.experiments.report import half_width, markdown_table, mean_and_std
from ssmkernels.trainers import RunResult, Slade, SladeConfig, SladeDataConfig, train_slade, train_swav
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.cli import parse_config
from ssmkernels.trainers.evaluation import embed
from ssmkernels.trainers.loop import fit, make_fabric
from ssmkernels.trainers.slade import FIGURES, SELECTED_BY, build_network
from ssmkernels.trainers.slade_data import load_images, make_views, split_images

TEACHER = ("--student", "none")
PSEUDO_LABELS = ("--student", "pseudo-labels")
BASIS = ("--student", "basis")
MINING = ("--student", "mining")

SWAV_FILE = "swav_800ep_pretrain.pth.tar"
"""ResNet-50 of SwAV's authors, which the paper starts its fine-tuning from."""

_FEW_STEPS = (
    *("--teacher_steps", "6", "--warm_up_steps", "3", "--student_steps", "6", "--k", "8"),
    *("--batch_size", "16", "--per_class", "4", "--run.log_every", "3", "--run.workers", "0"),
)
_FEW_EPOCHS = ("--epochs", "1", "--num_prototypes", "8", "--queue_length", "0", "--batch_size", "64")
_MINIATURE = (
    *("--teacher_steps", "20", "--warm_up_steps", "10", "--student_steps", "20"),
    *("--run.eval_every", "20", "--run.log_every", "10", "--run.workers", "0"),
)
SMALL_BUDGETS = {"smoke": Budget(1, _MINIATURE), "short": Budget(3), "paper": Budget(10)}
PAPER_BUDGETS = {
    "smoke": Budget(1, (*_FEW_STEPS, "--data.fold", "0")),
    "short": Budget(1, ("--teacher_steps", "400", "--student_steps", "400", "--data.fold", "0")),
    "paper": Budget(1, ("--data.fold", "null")),
}

Rows = Mapping[str, Sequence[str]]
Outcomes = Mapping[str, Sequence[Outcome]]


@dataclass(frozen=True)
class Setting:
    """Images, recipe and budget of an ablation.

    Args:
        config: of ``ssmkernels train slade``.
        title: of the images.
        budget: how much of the training is done.
        swav: arguments of ``ssmkernels train swav`` that fine-tune the backbone, for ablation 1.
        place: arguments that say where the images are.
        paper: column of the paper's tables whose images these are.
        swav_weights: what SwAV is fine-tuned from; None for what the configuration says.
        smoke: whether fine-tuning is cut short as well.
    """

    config: str
    title: str
    budget: Budget
    swav: tuple[str, ...] = ()
    place: tuple[str, ...] = ()
    paper: str | None = None
    swav_weights: str | None = None
    smoke: bool = False

    def parse(self, arguments: Sequence[str] = (), seed: int = 1, out: Path | None = None) -> SladeConfig:
        where = () if out is None else ("--run.out", str(out))
        everything = ["--config", self.config, *self.budget.arguments, *arguments, *self.place, "--seed", str(seed), *where]
        return parse_config("slade", everything)[0]


def choose(budget: str, data: str | None) -> list[Setting]:
    """The settings for the images in the folder or file (.npz) ``data``, or inside packages without one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has neither the paper's images nor folders of classes.
    """
    smoke = budget == "smoke"
    if data is None:
        return [
            Setting("digits", "scikit-learn's digits, 8x8 pixels", SMALL_BUDGETS[budget], ("--config", "digits"), smoke=smoke),
            Setting(
                "mnist5k", "MNIST-5k, 28x28 pixels", SMALL_BUDGETS[budget], ("--config", "digits", "--data.name", "mnist5k"), smoke=smoke
            ),
        ]
    folder = Path(data)
    if in_a_file(data):
        return [_small_photographs(budget, ("--data.name", "npz", "--data.root", data), folder.name)]
    if not folder.is_dir():
        raise FileNotFoundError(f"--data is {data}, which is no folder; it should be that of the images")
    found = [paper_setting(column, budget, folder) for column, marker in _MARKERS.items() if (folder / marker).is_dir()]
    if found:
        return found
    if not any(each.is_dir() for each in folder.iterdir()):
        raise ValueError(
            f"--data is {data}, which has no folders in it; it should have a folder of images for each class, or the paper's images: "
            "CUB_200_2011 and nabirds, stanford_cars and CompCars' data; ssmkernels.data.load_collection says where to get them"
        )
    return [_small_photographs(budget, ("--data.root", data), folder.name)]


def _small_photographs(budget: str, place: tuple[str, ...], name: str) -> Setting:
    swav = ("--config", "flowers17", *place)
    return Setting("flowers17", f"images of {name}", SMALL_BUDGETS[budget], swav, place, smoke=budget == "smoke")


_MARKERS = {"CUB-200": "CUB_200_2011", "Cars-196": "stanford_cars"}
_CONFIGS = {"CUB-200": "cub200-nabirds", "Cars-196": "cars196-compcars"}
_SWAV = {"CUB-200": (), "Cars-196": ("--data.name", "cars196", "--data.unlabeled_name", "compcars")}


def paper_setting(column: str, budget: str, folder: Path) -> Setting:
    """Contrastive loss on the images of a column of the paper's tables, labelled and unlabelled ones both in ``folder``."""
    place = ("--data.root", str(folder), "--data.unlabeled_root", str(folder))
    return Setting(
        _CONFIGS[column],
        f"{column} and its unlabelled images",
        PAPER_BUDGETS[budget],
        ("--config", "cub200", *_SWAV[column], *place),
        place,
        paper=column,
        swav_weights=str(folder / SWAV_FILE),
        smoke=budget == "smoke",
    )


def fine_tuned(setting: Setting, seed: int, out: Path) -> tuple[tuple[str, ...], Outcome]:
    """The argument that starts from a backbone which SwAV has fine-tuned on all training images without their labels, kept beside ``out``,
    and how the fine-tuning ended.

    Raises:
        KeyboardInterrupt: the fine-tuning was stopped; its checkpoint is kept.
    """
    split = setting.parse().data
    arguments = [*setting.swav, "--data.test_fraction", str(split.test_fraction)]
    if setting.swav_weights is not None:
        arguments += ["--weights", setting.swav_weights]
    if setting.smoke:
        arguments += _FEW_EPOCHS
    config, _ = parse_config("swav", [*arguments, "--seed", str(seed)])
    job = training_job("swav", config, train_swav, f"{setting.title}: fine-tuning by SwAV, seed {seed}")
    outcome = run_jobs(out.parent / FOLDER, [job])[job.name]
    return ("--weights", str(out.parent / FOLDER / job.name / "backbone.pt")), outcome


def train_rows(setting: Setting, rows: Rows, *, out: Path | None, seeds: Sequence[int]) -> dict[str, list[Outcome]]:
    """How every row with every seed ended, seed by seed; from what an earlier call left beside ``out``.

    Raises:
        KeyboardInterrupt: a run was stopped; its checkpoint is kept.
    """
    labeled, unlabeled = load_images(setting.parse().data)
    train = functools.partial(train_slade, images=labeled, unlabeled_images=unlabeled)
    jobs = {
        (row, seed): training_job("slade", setting.parse(arguments, seed), train, f"{setting.title}: {row}, seed {seed}")
        for seed in seeds
        for row, arguments in rows.items()
    }
    return run_rows(out, jobs)


def test_figure(result: RunResult, figure: str) -> float:
    """In percent, of the network that is best on the validation classes."""
    return 100 * result.best(SELECTED_BY)[f"test_{figure}"]


def table(outcomes: Outcomes, paper: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """Means and deviations of every row beside the paper's numbers, which stand under ``columns``."""
    rows = []
    for row, each in outcomes.items():
        runs = results_of(each)
        figures = [mean_and_std([test_figure(run, figure) for run in runs], digits=1) if runs else "failed" for figure in FIGURES]
        by_seed = ", ".join(f"{test_figure(run, 'MAP@R'):.1f}" for run in runs)
        rows.append([row, *figures, by_seed, *paper.get(row, ("-",) * len(columns))])
    return markdown_table(["%", *FIGURES, "MAP@R by seed", *columns], rows)


def claim(outcomes: Outcomes, better: str, worse: str) -> str:
    """One row against another in MAP@R, seed by seed."""
    pairs = pairs_of(outcomes[better], outcomes[worse])
    return compared(
        better, worse, *([test_figure(run, "MAP@R") for run in runs] for runs in ([a for a, _ in pairs], [b for _, b in pairs]))
    )


def compared(better: str, worse: str, higher: Sequence[float], lower: Sequence[float]) -> str:
    """In how many seeds ``better`` is higher, and the paired difference with its 95 % interval."""
    differences = [a - b for a, b in zip(higher, lower, strict=True)]
    if not differences:
        return f"- {better} − {worse}: no seed finished both."
    mean, half, seeds = float(np.mean(differences)), half_width(differences), len(differences)
    if seeds == 1:
        return f"- {better} − {worse}: {mean:+.1f} points with one seed, which says nothing about the next."
    words = "holds" if mean > half else "the opposite holds" if mean < -half else "not told apart"
    wins = sum(each > 0 for each in differences)
    return f"- {better} − {worse}: higher in {wins} of {seeds} seeds, {mean:+.1f} ± {half:.1f} points: {words}."


PROTOCOL = (
    "MAP@R, RP and P@1 among the test classes at the evaluation with the best MAP@R among the validation classes; mean ± standard "
    "deviation over seeds. A seed also draws the training classes that keep their labels, where the unlabelled images are no set of "
    "their own. Differences are of MAP@R, paired by seed, with their 95 % interval."
)


INITIAL, LONG_TEACHER = "Initial weights", "Teacher, as many steps as all"
MINING_LOCAL, MINING_LOOSE = "+ Basis + Mining, Local-CE", "+ Basis + Mining, λ_v = .1"


def ablation2_rows(setting: Setting) -> dict[str, tuple[str, ...]]:
    """The components of the student, and teachers with none of the training and with as many steps."""
    config = setting.parse(MINING)
    return {
        INITIAL: (*TEACHER, "--teacher_steps", "1", "--learning_rate", "0"),
        "Teacher (contrastive)": TEACHER,
        LONG_TEACHER: (*TEACHER, "--teacher_steps", str(config.steps)),
        "Student (pseudo-labels)": PSEUDO_LABELS,
        "+ Basis": BASIS,
        "+ Basis + Mining": MINING,
    }


CLAIMS_2 = (
    ("Student (pseudo-labels)", "Teacher (contrastive)"),
    ("+ Basis", "Student (pseudo-labels)"),
    ("+ Basis + Mining", "+ Basis"),
    ("+ Basis + Mining", "Teacher (contrastive)"),
    ("+ Basis + Mining", LONG_TEACHER),
)
PAPER_2 = {
    "CUB-200": {
        "Teacher (contrastive)": "29.29",
        "Student (pseudo-labels)": "30.81",
        "+ Basis": "32.45",
        "+ Basis + Mining": "33.59",
    },
    "Cars-196": {
        "Teacher (contrastive)": "31.73",
        "Student (pseudo-labels)": "31.99",
        "+ Basis": "35.78",
        "+ Basis + Mining": "36.24",
    },
}


def ablation2(*, budget: str, data: str | None, out: Path) -> Findings:
    """What each component of the student adds."""
    parts = []
    for setting in choose(budget, data):
        start = _start(setting, out)
        rows = {row: (*start, *arguments) for row, arguments in ablation2_rows(setting).items()}
        paper = {row: (number, "-", "-") for row, number in PAPER_2.get(setting.paper or "", {}).items()}
        part = _section(setting, rows, out, CLAIMS_2, *_columns(PAPER_2), paper)
        if setting.parse().data.unlabeled_name is None:
            part = part.with_text(_on_unlabeled_classes(setting, rows, out))
        parts.append(part)
    return _findings(parts, budget, data)


def _on_unlabeled_classes(setting: Setting, rows: Rows, out: Path) -> str:
    """MAP@R among the classes that the students see without labels: what the paper's test species are to NABirds."""
    seeds = range(1, setting.budget.seeds + 1)
    jobs = {(row, seed): _unlabeled_job(setting, row, rows[row], seed, out) for row in rows for seed in seeds}
    outcomes = run_rows(out, jobs)
    lines = []
    for row, each in outcomes.items():
        values = [outcome.value for outcome in each if outcome.error is None]
        by_seed = ", ".join(f"{value:.1f}" for value in values)
        lines.append([row, mean_and_std(values, digits=1) if values else "failed", by_seed])
    said = []
    for better, worse in CLAIMS_2:
        pairs = [(a.value, b.value) for a, b in zip(outcomes[better], outcomes[worse], strict=True) if a.error is None and b.error is None]
        said.append(compared(better, worse, [a for a, _ in pairs], [b for _, b in pairs]))
    return (
        "The same networks among the unlabelled images themselves, by their true labels. These classes are seen in training, without "
        f"labels, as many of the paper's test species are in NABirds:\n\n{markdown_table(['%', 'MAP@R', 'by seed'], lines)}\n\n"
        + "\n".join(said)
        + "\n"
    )


def _unlabeled_job(setting: Setting, row: str, arguments: Sequence[str], seed: int, out: Path) -> Job:
    name = training_name("slade", setting.parse(arguments, seed))
    title = f"{setting.title}: {row}, seed {seed}, among the unlabelled classes"
    return Job(f"unlabeled-{name}", title, lambda folder: unlabeled_map(setting, arguments, seed, out))


@torch.no_grad()
def unlabeled_map(setting: Setting, arguments: Sequence[str], seed: int, out: Path) -> float:
    """MAP@R in percent, among the unlabelled images of a finished run of :func:`train_rows`, of its best network."""
    config = setting.parse(arguments, seed)
    labeled, _ = load_images(config.data)
    unlabeled = split_images(config.data, labeled, None, seed=seed).unlabeled
    assert unlabeled is not None
    network = build_network(replace(config, weights=None), labeled)
    network.load_state_dict(load_checkpoint(out.parent / FOLDER / training_name("slade", config) / "best.pt")["model"])
    device = make_fabric(accelerator=config.run.accelerator).device
    _, embeddings, labels = embed(network.to(device), _evaluation_batches(config, unlabeled), device=device)
    return 100 * metrics.retrieval(embeddings, labels, recall_at=(), precision_at=())["MAP@R"]


def _evaluation_batches(config: SladeConfig, collection: images.ImageCollection) -> Iterable[tuple[Tensor, Tensor]]:
    views = make_views(config.data, collection, models.preprocessing(config.backbone))
    return images.evaluation_batches(collection.images, 256, mean=views.mean, std=views.std, transform=views.evaluation)


def shared_classes(*, budget: str, data: str | None, out: Path) -> Findings:
    """Ablation 2 with unlabelled images of the classes that are tested on, as NABirds has CUB-200's; in miniature only."""
    said = (
        "The unlabelled images are half of those of the test classes, drawn by the seed; the others are tested on. All training classes "
        "keep their labels. This is the paper's situation, many of the species that CUB-200 tests being in NABirds; the miniatures of "
        "ablation 2 have unlabelled images of other classes instead."
    )
    parts = []
    for each in choose(budget, data):
        if each.paper is not None:
            continue
        setting = replace(each, place=(*each.place, "--data.unlabeled_classes", "test"))
        rows = ablation2_rows(setting) | {
            MINING_LOCAL: (*MINING, "--similarity_loss", "local-ce"),
            MINING_LOOSE: (*MINING, "--sd_variance_weight", "0.1"),
        }
        claims = (*CLAIMS_2, ("Student (pseudo-labels)", LONG_TEACHER), ("+ Basis", LONG_TEACHER), (MINING_LOCAL, LONG_TEACHER))
        parts.append(_section(setting, rows, out, claims, {}, ()))
    if not parts:
        raise ValueError(f"--data is {data}, which has the paper's own images; this takes a folder of class folders, or images in packages")
    return _findings(parts, budget, data, (said,))


PAPER_3 = {"Local-CE": ("32.69", "43.20", "72.64"), "Global-CE": ("32.23", "42.68", "72.45"), "SD": ("33.59", "44.01", "73.19")}
_CUB_COLUMNS = tuple(f"paper {figure}, CUB-200" for figure in FIGURES)


def ablation3(*, budget: str, data: str | None, out: Path) -> Findings:
    """L_SD against cross-entropies on the pairs."""
    rows = {
        "Local-CE": ("--similarity_loss", "local-ce"),
        "Global-CE": ("--similarity_loss", "global-ce"),
        "SD": ("--similarity_loss", "sd"),
    }
    parts = []
    for setting in choose(budget, data):
        start = _start(setting, out)
        here = {row: (*start, *arguments) for row, arguments in rows.items()}
        paper = PAPER_3 if setting.paper == "CUB-200" else {}
        parts.append(_section(setting, here, out, (("SD", "Local-CE"), ("SD", "Global-CE")), PAPER_3, _CUB_COLUMNS, paper))
    return _findings(parts, budget, data)


PAPER_4 = {
    "k = 100": ("31.83", "42.25", "72.19"),
    "k = 200": ("32.61", "43.02", "72.75"),
    "k = 300": ("32.81", "43.18", "72.21"),
    "k = 400": ("33.59", "44.01", "73.19"),
    "k = 500": ("33.26", "43.69", "73.26"),
}


def ablation4(*, budget: str, data: str | None, out: Path) -> Findings:
    """The number of clusters: the paper's on its images, quarters to fourfold of the configuration's elsewhere."""
    parts = []
    for setting in choose(budget, data):
        usual = setting.parse().k
        ks = [usual // 4, usual // 2, usual, 2 * usual, 4 * usual]
        if setting.paper is not None and not setting.smoke:
            ks = [100, 200, 300, 400, 500]
        start = _start(setting, out)
        rows = {f"k = {k}": (*start, "--k", str(k)) for k in ks}
        claims = tuple((f"k = {usual}", f"k = {k}") for k in ks if k != usual and usual in ks)
        columns = (PAPER_4, _CUB_COLUMNS) if setting.paper is not None else ({}, ())
        parts.append(_section(setting, rows, out, claims, *columns, PAPER_4 if setting.paper == "CUB-200" else {}))
    if not any(setting.paper for setting in choose(budget, data)):
        header = ["paper, NABirds (555 classes with images, 48,000 images)", *FIGURES]
        parts[-1] = parts[-1].with_text(markdown_table(header, [[row, *figures] for row, figures in PAPER_4.items()]) + "\n")
    return _findings(parts, budget, data)


PAPER_1 = {
    "CUB-200": {"ImageNet": "29.38", "SwAV": "32.79", "SwAV, fine-tuned": "33.59"},
    "Cars-196": {"ImageNet": "31.38", "SwAV": "35.54", "SwAV, fine-tuned": "36.24"},
}


def ablation1(*, budget: str, data: str | None, out: Path) -> Findings:
    """What teacher and student start from: random or ImageNet's weights, SwAV's, and SwAV's fine-tuned on the images at hand."""
    parts = []
    for setting in choose(budget, data):
        trained = setting.parse().weights is not None
        rows: dict[str, tuple[str, ...]] = {"random": ("--weights", "null", "--freeze_bn", "false")}
        if trained:
            rows["ImageNet"] = ()
        if setting.swav_weights is not None and Path(setting.swav_weights).is_file():
            rows["SwAV"] = ("--weights", setting.swav_weights)
        tuned = "SwAV, fine-tuned" if "SwAV" in rows else f"{'ImageNet' if trained else 'random'}, then SwAV"
        seconds = 0.0
        if setting.paper is None or "SwAV" in rows:
            rows[tuned], tuning = fine_tuned(setting, 1, out)
            seconds = tuning.seconds
        names = list(rows)
        claims = list(zip(names[1:], names[:-1], strict=True))
        paper = {row: (number, "-", "-") for row, number in PAPER_1.get(setting.paper or "", {}).items()}
        part = _section(setting, rows, out, claims, *_columns(PAPER_1), paper)
        if setting.paper is not None and "SwAV" not in rows:
            part = part.with_text(f"Left out: the rows of SwAV, for want of {SWAV_FILE} in --data.\n")
        parts.append(replace(part, seconds=part.seconds + seconds))
    return _findings(parts, budget, data)


POINTS = 2000  # images at most whose pairs are looked at
BINS = 50
STAGES = ("before", "after")


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


def similarities(*, budget: str, data: str | None, out: Path) -> Findings:
    """Histograms of s_ij after the warm-up of W_a and at the end of the training, and how many of the mined pairs are right."""
    said = (
        "s_ij, the cosine of W_a f_i and W_a f_j, over pairs of unlabelled images, positive where their true labels agree: before, with "
        "W_a warmed up on the network that the student starts from, and after the student's training. P is the probability that a "
        "positive pair is more similar than a negative one. The last two columns are the share of mined pairs that their true labels "
        "agree with, s ≥ T1 as positive and s ≤ T2 as negative; in brackets that of the pseudo-labels. One seed."
    )
    settings = choose(budget, data)
    jobs = []
    for setting in settings:
        config = setting.parse((*MINING, *(() if setting.paper is None else ("--data.fold", "0"))), 1)
        name = f"similarities-{training_name('slade', config)}"
        jobs.append(Job(name, f"{setting.title}: similarities", functools.partial(_look, config)))
    outcomes = run_jobs(out.parent / FOLDER, jobs)
    parts = [_histograms(setting, out, outcomes[job.name]) for setting, job in zip(settings, jobs, strict=True)]
    return replace(_findings(parts, budget, data, (said,), protocol=False), seeds=(1,))


def _look(config: SladeConfig, folder: Path) -> list[str]:
    config.run.out = str(folder)
    return list(before_and_after(config))


def _histograms(setting: Setting, out: Path, outcome: Outcome) -> Part:
    """The two stages of a setting, from the job that looked at them."""
    entries, rows = [], []
    plots: tuple[Plot, ...] = ()
    stages = _stages(out.parent / FOLDER / outcome.name) if outcome.error is None else {}
    for stage, found in stages.items():
        means = {"mean of positives": found.positives.mean(), "mean of negatives": found.negatives.mean()}
        spreads = {"variance of positives": found.positives.var(), "variance of negatives": found.negatives.var()}
        numbers = {**means, **spreads, "P": found.ranking}
        entries += [Entry(stage, setting.title, name, "", "-", (float(value),)) for name, value in numbers.items()]
        shares = zip(found.mined, found.clustered, strict=True)
        rows.append([stage, *(f"{value:.3f}" for value in numbers.values()), *(f"{100 * a:.0f} % ({100 * b:.0f} %)" for a, b in shares)])
    if outcome.error is not None:
        entries = [Entry("before and after", setting.title, "similarities", "", "-", (), (outcome.error,))]
        return Part(f"{setting.title}: failed, {outcome.error}\n", "", setting, tuple(entries), outcome.seconds)
    header = [
        "s_ij",
        "mean of positives",
        "of negatives",
        "variance of positives",
        "of negatives",
        "P",
        "right positives",
        "right negatives",
    ]
    text = f"{setting.title}:\n\n{markdown_table(header, rows)}\n"
    if this_rank()[0] == 0:
        picture = f"similarities_{setting.config}.png"
        plot_similarities(out / picture, stages, title=setting.title)
        words = "The paper's histograms: positive and negative pairs lie further apart with L_SD."
        plots = (Plot(f"{setting.title}: similarities", picture, words),)
    return Part(f"{text}{_pictures(plots)}", text, setting, tuple(entries), outcome.seconds, plots)


def _stages(folder: Path) -> dict[str, Similarities]:
    """What :func:`before_and_after` has left in ``folder``."""
    found = {}
    for stage in STAGES:
        with np.load(folder / f"{stage}.npz") as arrays:
            found[stage] = Similarities(**arrays)
    return found


def before_and_after(config: SladeConfig) -> dict[str, Similarities]:
    """Trains as ``config`` says and looks after the warm-up of W_a and at the end; from where an earlier call stopped.

    Raises:
        KeyboardInterrupt: the run was stopped; its checkpoint is kept.
    """
    assert config.run.out is not None
    place = Path(config.run.out)
    labeled, unlabeled = load_images(config.data)
    fabric = make_fabric(precision=config.precision, accelerator=config.run.accelerator)
    trainer = Slade(config, labeled, fabric, unlabeled_images=unlabeled)
    settings = asdict(config)
    del settings["data"]["unlabeled_root"]  # as data.root, it may differ on resuming
    for stage, steps in zip(STAGES, (config.teacher_steps + config.warm_up_steps, config.steps), strict=True):
        kept = place / f"{stage}.npz"
        if not kept.exists():
            done = fit(trainer, fabric=fabric, steps=steps, run=config.run, config=settings, resume=True, epoch_ends=trainer.epoch_ends())
            if not done.finished:
                raise KeyboardInterrupt
            trainer.load_state_dict(load_checkpoint(place / "checkpoint.pt")["trainer"])
            np.savez(kept, **pair_similarities(trainer)._asdict())
    return _stages(place)


@torch.no_grad()
def pair_similarities(trainer: Slade) -> Similarities:
    """The similarities of the pairs i < j of unlabelled images, or of a sample of the images."""
    unlabeled = trainer.unlabeled
    index = np.sort(np.random.default_rng(0).permutation(len(unlabeled))[:POINTS])
    sample = images.ImageSubset(unlabeled.images, index, unlabeled.labels[index], unlabeled.num_classes)
    batches = _evaluation_batches(trainer.config, replace(unlabeled, images=sample))
    _, embeddings, labels = embed(trainer.model, batches, device=trainer.fabric.device)
    cosines: Tensor = trainer.basis.similarities(embeddings)
    clusters = trainer.pseudo_labels[torch.as_tensor(index, device=labels.device)]
    pairs = torch.ones_like(cosines, dtype=torch.bool).triu(diagonal=1)
    same, together = labels[:, None] == labels, clusters[:, None] == clusters
    likely, unlikely = cosines >= trainer.similarity.positive_mean, cosines <= trainer.similarity.negative_mean

    def right(positives: Tensor, negatives: Tensor) -> np.ndarray:
        return torch.stack([same[pairs & positives].float().mean(), 1 - same[pairs & negatives].float().mean()]).cpu().numpy()

    return Similarities(
        positives=cosines[pairs & same].cpu().numpy(),
        negatives=cosines[pairs & ~same].cpu().numpy(),
        mined=right(likely, unlikely),
        clustered=right(together, ~together),
    )


def plot_similarities(path: Path, stages: Mapping[str, Similarities], *, title: str) -> None:
    """A panel for each stage with the two histograms, and their means as dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(stages), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    for axes, (stage, found) in zip(panels, stages.items(), strict=True):
        for name, values, colour in (("positive pairs", found.positives, "tab:blue"), ("negative pairs", found.negatives, "tab:red")):
            axes.hist(values, bins=BINS, range=(-1, 1), density=True, alpha=0.5, color=colour, label=name)
            axes.axvline(values.mean(), color=colour, linestyle="--", linewidth=1.2)
        axes.set(title=stage, xlabel="$s_{ij}$", xticks=(-1, -0.5, 0, 0.5, 1))
        axes.legend(fontsize="small")
    panels[0].set_ylabel("density")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


@dataclass(frozen=True)
class Part:
    """One set of images: what is said of it, of which ``notes`` are what its entries and plots do not say."""

    text: str
    notes: str
    setting: Setting
    entries: tuple[Entry, ...]
    seconds: float
    plots: tuple[Plot, ...] = ()

    def with_text(self, more: str) -> Part:
        return replace(self, text=f"{self.text}\n{more}", notes=f"{self.notes}\n{more}")


def _start(setting: Setting, out: Path) -> tuple[str, ...]:
    """The paper's ablations start from fine-tuned SwAV: so do those on its images, where SwAV's weights are there."""
    if setting.swav_weights is not None and Path(setting.swav_weights).is_file():
        return fine_tuned(setting, 1, out)[0]
    return ()


def _columns(paper: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """MAP@R by column and row of the paper, as :func:`table` wants it."""
    rows = dict.fromkeys(row for column in paper.values() for row in column)
    return {row: tuple(column.get(row, "-") for column in paper.values()) for row in rows}, tuple(f"paper MAP@R, {name}" for name in paper)


def _section(
    setting: Setting,
    rows: Rows,
    out: Path,
    claims: Sequence[tuple[str, str]],
    paper: Mapping[str, Sequence[str]],
    columns: Sequence[str],
    entries_paper: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Part:
    """One set of images: its table and its claims.

    Args:
        paper, columns: numbers of the paper that stand in the table, by row, be they of these images or of others.
        entries_paper: those of these images, one for each of the figures.
    """
    outcomes = train_rows(setting, rows, out=out, seeds=range(1, setting.budget.seeds + 1))
    figures = {figure: functools.partial(test_figure, figure=figure) for figure in FIGURES}
    entries = entries_of(outcomes, setting.paper or setting.title, figures, entries_paper)
    notes = f"{described(setting)}\n\n" + "\n".join(claim(outcomes, *each) for each in claims) + "\n"
    text = f"{described(setting)}\n\n{failure_text(entries)}{table(outcomes, paper, columns)}\n\n{notes.partition(chr(10) * 2)[2]}"
    return Part(text, notes, setting, entries, seconds_of(outcomes))


def _findings(parts: Sequence[Part], budget: str, data: str | None, said: tuple[str, ...] = (), *, protocol: bool = True) -> Findings:
    """All sets of images together."""
    deviations = _deviations(budget, data)
    opening = [" ".join(deviations), *said, *([PROTOCOL] if protocol else [])]
    return Findings(
        text=_paragraphs([*opening, *(part.text for part in parts)]),
        data=", ".join(part.setting.title for part in parts) + (" (inside packages)" if data is None else ""),
        seeds=tuple(range(1, max(part.setting.budget.seeds for part in parts) + 1)),
        entries=tuple(entry for part in parts for entry in part.entries),
        seconds=sum(part.seconds for part in parts),
        plots=tuple(plot for part in parts for plot in part.plots),
        deviations=deviations,
        notes=_paragraphs([*said, *([PROTOCOL] if protocol else []), *(part.notes for part in parts)]),
    )


def described(setting: Setting) -> str:
    """Images, network and steps, in words."""
    config = setting.parse()
    arguments = f"; {' '.join(setting.budget.arguments)}" if setting.budget.arguments else ""
    return (
        f"{setting.title}: {_split(config.data)}{config.backbone}, weights {config.weights or 'random'}, {config.teacher_steps} steps of "
        f"the teacher, {config.warm_up_steps} of W_a, {config.student_steps} of the student, {config.batch_size} images a step of either "
        f"kind, k = {config.k}, {setting.budget.seeds} seed(s){arguments}."
    )


def _split(config: SladeDataConfig) -> str:
    """Classes and images by what they are for, with the first seed's draw of classes."""
    if config.unlabeled_name is not None:
        return ""
    parts = split_images(config, load_images(config)[0], None, seed=1)
    uses = ("with labels", "without", "to validate", "to test")
    said = [f"{part.num_classes} classes ({len(part)} images) {use}" for use, part in zip(uses, parts, strict=True) if part is not None]
    return f"{', '.join(said)}; "


def _deviations(budget: str, data: str | None) -> tuple[str, ...]:
    said = [f"Budget {budget}."]
    if budget == "smoke":
        said.append("This shows that it runs, not what it reaches.")
    if data is None:
        said.append("No folder of images was given: they come inside packages, and the paper's numbers are of others.")
    return tuple(said)


def _paragraphs(parts: Sequence[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _pictures(plots: Sequence[Plot]) -> str:
    return "".join(f"\n![{plot.title}]({plot.file})\n" for plot in plots)
