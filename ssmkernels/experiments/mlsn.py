# SPDX-License-Identifier: BSD-3-Clause
"""The tables and figures of MLSN (Wu, Feng and Zhou, Metric Learning by Similarity Network, 2020)."""

from __future__ import annotations

from collections.abc import Mapping

from ssmkernels.experiments import similarity
from ssmkernels.experiments.experiment import Budget, Cell, Experiment, Figure, Study

_OFFLINE = (
    *("--data.name", "digits", "--data.labels", "40", "--data.labels_in_unlabeled", "true", "--model", "convnet-small"),
    *("--steps", "80", "--batch_size", "32", "--hidden_features", "64", "--ema_decay", "0.95"),
    *("--run.eval_every", "20", "--run.log_every", "10"),
)
_RECIPE = (
    "No code of the paper is public. A setting without -tuned is the base that it most likely used, MixMatch-pytorch of August 2019 "
    "(AdamW, λ1 = 75 in a linear ramp over the whole run); -tuned is Mean Teacher as in the code of FixMatch (SGD, λ1 = 50, a teacher with "
    "batch norm of its own).",
    "λ2, λ3, their ramps, m, the hidden units and the α and γ of the focal loss are not published; ours are in the configurations.",
    "The paper's number stands beside the averaged weights, but for Supervised Only and the Π model, which have none; those two rows the "
    "paper takes from other works. Bad GAN and Triple GAN are other methods and are not run.",
    "An error is the median of the last 20 evaluations; no images are held out for validation.",
)


def _table(settings: Mapping[str, tuple[str, str, str, str]]) -> tuple[Cell, ...]:
    """Every row on both bases; the paper's numbers in the order of the rows."""
    cells = []
    for setting, numbers in settings.items():
        for config in (setting, f"{setting}-tuned"):
            for (row, arguments), number in zip(similarity.TABLE_ROWS.items(), numbers, strict=True):
                averaged = row.startswith("MT")
                paper = (number, "-") if averaged else ("-", number)
                cells.append(Cell(row, config, ("--config", config, *arguments), paper))
    return tuple(cells)


_SMALL_ROWS = {row: arguments for row, arguments in similarity.TABLE_ROWS.items() if row != "Π model"}
_SMALL = (
    *("--config", "mnist5k", "--data.name", "cifar10", "--data.labels", "1000", "--model", "wrn-10-1", "--bn_momentum", "0.1"),
    *("--steps", "600", "--run.eval_every", "200"),
)

_FIGURES = (Figure("error, averaged weights", "ema_error"), Figure("error, student", "student_error"))

EXPERIMENTS: dict[str, Experiment | Study] = {
    "mlsn-table1": Experiment(
        title="MLSN, Table 1: test error on SVHN",
        method="mlsn",
        cells=_table(
            {
                "svhn-250": ("42.65 ± 2.68", "9.93 ± 1.15", "40.92 ± 1.13", "15.2 ± 0.82"),
                "svhn-500": ("22.08 ± 0.73", "6.65 ± 0.53", "6.8 ± 0.42", "5.6 ± 0.21"),
                "svhn-1000": ("14.46 ± 0.71", "4.82 ± 0.17", "5.12 ± 0.08", "4.63 ± 0.04"),
            }
        ),
        figures=_FIGURES,
        budgets=similarity.BUDGETS,
        offline=_OFFLINE,
        deviations=_RECIPE,
    ),
    "mlsn-table2": Experiment(
        title="MLSN, Table 2: test error on CIFAR-10",
        method="mlsn",
        cells=_table(
            {
                "cifar10-1000": ("46.43 ± 1.21", "27.36 ± 1.20", "22.90 ± 0.93", "18.87 ± 0.92"),
                "cifar10-2000": ("33.94 ± 0.73", "18.02 ± 0.60", "18.20 ± 0.62", "15.28 ± 0.20"),
                "cifar10-4000": ("20.66 ± 0.57", "13.20 ± 0.27", "13.30 ± 0.30", "11.20 ± 0.17"),
            }
        ),
        figures=_FIGURES,
        budgets=similarity.BUDGETS,
        offline=_OFFLINE,
        deviations=_RECIPE,
    ),
    "mlsn-cifar10-small": Experiment(
        title="MLSN on CIFAR-10 with 1000 labels, small enough for a CPU (not in the paper)",
        method="mlsn",
        cells=tuple(Cell(row, "1000 labels", (*_SMALL, *arguments), ("-", "-")) for row, arguments in _SMALL_ROWS.items()),
        figures=(Figure("error, averaged weights", "ema_error", median=False), Figure("error, student", "student_error", median=False)),
        budgets={
            "smoke": similarity.BUDGETS["smoke"],
            "short": Budget(3),
            "paper": Budget(5, ("--steps", "3000", "--run.eval_every", "500")),
        },
        offline=_OFFLINE,
        deviations=(
            "WRN-10-1, 32 + 32 images a step and 600 steps (3,000 with budget paper), in place of WRN-28-2 and 2^20; the other settings "
            "are those found on digits.",
            "An error is that of the last evaluation; no images are held out for validation.",
        ),
    ),
    "mlsn-weak-labels": Study("MLSN, section 3.2: 1000 labels and all weak labels against all labels", similarity.weak_labels),
    "mlsn-figure2": Study("MLSN, Figure 2: where confident pseudo-labels lie in the space of features", similarity.figure2),
    "mlsn-figure3": Study("MLSN, Figure 3: features after training with few labels, weak labels and all labels", similarity.figure3),
    "mlsn-mnist": Study("MLSN on digits inside packages, with few labels (not in the paper)", similarity.digits),
}
