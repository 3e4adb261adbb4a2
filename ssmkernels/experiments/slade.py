# SPDX-License-Identifier: BSD-3-Clause
"""The tables and figures of SLADE (Duan et al., CVPR 2021)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from ssmkernels.experiments import self_training
from ssmkernels.experiments.experiment import Cell, Experiment, Figure, Findings, Study, check_images, run_experiment
from ssmkernels.trainers.slade import FIGURES, SELECTED_BY

_SMALL = ("--backbone", "convnet-small", "--freeze_bn", "false", "--embedding_dim", "16")
OFFLINE = (
    *("--data.name", "digits", "--data.unlabeled_name", "null", "--data.image_size", "null"),
    *("--data.test_fraction", "0.3", "--data.folds", "3", "--data.labeled_fraction", "0.6"),
    *_SMALL,
    *("--optimizer", "adamw", "--learning_rate", "0.0002", "--k", "10", "--batch_size", "48", "--per_class", "8"),
    *("--teacher_steps", "60", "--warm_up_steps", "30", "--student_steps", "60", "--run.eval_every", "30"),
)
_RECIPE = (
    "The optimiser, its rates, the length of the training, the margins and the settings of L_SD are not published: they are Musgrave's "
    "where SLADE builds on his code, ours otherwise, as the configurations and the trainer say. A run ends after a number of steps, not by "
    "patience; the network of the best evaluation on the validation classes counts.",
    "--data is one folder with CUB_200_2011 and nabirds, or stanford_cars and CompCars' data, in it. The paper counts 743 categories of "
    "NABirds; 555 of them have images, and many of the species that are tested on are among them. Its filter of CompCars (145 classes, "
    "16,537 images) is not published: all of it is taken.",
    "SwAV is fine-tuned on the training classes and the unlabelled images, the second and fourth pair of rows; its settings are not "
    "published. The paper's other rows are other methods and are not run.",
    "Budget paper trains four folds and concatenates their embeddings of 128, the 512 of the paper; smoke and short train one fold.",
)

_PAPER = {
    "CUB-200": {
        "Contrastive, T1 (ImageNet)": ("25.02", "35.83", "65.28"),
        "SLADE, S1 (ImageNet)": ("29.38", "40.16", "68.92"),
        "MS, T3 (ImageNet)": ("26.38", "37.51", "66.31"),
        "SLADE, S3 (ImageNet)": ("30.90", "41.85", "69.58"),
        "Contrastive, T2 (SwAV)": ("29.29", "39.81", "71.15"),
        "SLADE, S2 (SwAV)": ("33.59", "44.01", "73.19"),
        "MS, T4 (SwAV)": ("29.22", "40.15", "70.81"),
        "SLADE, S4 (SwAV)": ("33.90", "44.36", "74.09"),
    },
    "Cars-196": {
        "Contrastive, T1 (ImageNet)": ("25.97", "36.40", "81.22"),
        "SLADE, S1 (ImageNet)": ("31.38", "40.96", "85.8"),
        "MS, T3 (ImageNet)": ("28.33", "38.29", "85.16"),
        "SLADE, S3 (ImageNet)": ("32.05", "41.50", "87.38"),
        "Contrastive, T2 (SwAV)": ("31.73", "41.15", "88.07"),
        "SLADE, S2 (SwAV)": ("36.24", "44.82", "91.06"),
        "MS, T4 (SwAV)": ("33.42", "42.66", "89.33"),
        "SLADE, S4 (SwAV)": ("37.98", "46.92", "91.53"),
    },
}


def main_table(column: str, config: str, *, budget: str, data: str | None, out: Path) -> Findings:
    """Teachers T1 to T4 and their students S1 to S4. Those that start from SwAV are left out where its weights are not in ``data``."""
    swav, seconds = None, 0.0
    setting = self_training.choose(budget, None)[0] if data is None else self_training.paper_setting(column, budget, Path(data))
    if data is not None:
        check_images("slade", [setting.parse().data])
    if budget == "smoke" if data is None else Path(str(setting.swav_weights)).is_file():
        swav, tuning = self_training.fine_tuned(setting, 1, out)
        seconds = tuning.seconds
    cells = main_cells(column, config, () if data is None else ("--data.unlabeled_root", data), swav, offline=data is None)
    deviations = _RECIPE if swav is not None else (*_RECIPE, f"No {self_training.SWAV_FILE} in --data: the rows of SwAV were left out.")
    experiment = Experiment(
        title=f"SLADE, main table: {column}",
        method="slade",
        cells=cells,
        figures=tuple(Figure(name, f"test_{name}", best=SELECTED_BY) for name in FIGURES),
        budgets=self_training.PAPER_BUDGETS,
        offline=OFFLINE,
        deviations=deviations,
    )
    found = run_experiment(experiment, budget=budget, data=data, out=out)
    return replace(found, seconds=found.seconds + seconds)


def main_cells(column: str, config: str, place: tuple[str, ...], swav: tuple[str, ...] | None, *, offline: bool) -> tuple[Cell, ...]:
    """The rows, those of SwAV only where there are weights to start from."""
    cells = []
    for row, paper in _PAPER[column].items():
        start = swav if "SwAV" in row else ("--weights", "null") if offline else ()
        if start is None:
            continue
        name = f"{config}-ms" if any(each in row for each in ("T3", "T4", "S3", "S4")) else config
        student = self_training.MINING if row.startswith("SLADE") else self_training.TEACHER
        cells.append(Cell(row, config, ("--config", name, *student, *start, *place), paper))
    return tuple(cells)


EXPERIMENTS: dict[str, Experiment | Study] = {
    "slade-cub200-nabirds": Study("SLADE, main table: CUB-200 with NABirds", partial(main_table, "CUB-200", "cub200-nabirds")),
    "slade-cars196-compcars": Study("SLADE, main table: Cars-196 with CompCars", partial(main_table, "Cars-196", "cars196-compcars")),
    "slade-ablation1": Study("SLADE, ablation 1: initial weights", self_training.ablation1),
    "slade-ablation2": Study("SLADE, ablation 2: components of the student", self_training.ablation2),
    "slade-ablation3": Study("SLADE, ablation 3: the loss of the similarities", self_training.ablation3),
    "slade-ablation4": Study("SLADE, ablation 4: the number of clusters", self_training.ablation4),
    "slade-shared-classes": Study("SLADE: unlabelled images of the classes that are tested on", self_training.shared_classes),
    "slade-similarities": Study("SLADE: similarities of positive and negative pairs", self_training.similarities),
}
