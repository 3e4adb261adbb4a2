# SPDX-License-Identifier: BSD-3-Clause
"""The tables and figures of SimMatch (Zheng et al., CVPR 2022)."""

from __future__ import annotations

from ssmkernels.experiments.experiment import Budget, Cell, Experiment, Figure

SUPERVISED = ("--lambda_u", "0", "--lambda_in", "0", "--memory", "temporal", "--ema_buffers", "copy")
FIXMATCH = (
    *("--alpha", "1", "--lambda_in", "0", "--memory", "temporal", "--ema_buffers", "copy"),
    *("--alignment_queue", "0", "--hard_pseudo_labels", "true"),
)
SIMMATCH: tuple[str, ...] = ()

_OFFLINE = ("--data.name", "digits", "--data.labels", "40", "--data.proportional", "false", "--model", "wrn-10-1", "--run.workers", "0")
_SMOKE = Budget(
    1, ("--steps", "12", "--batch_size", "8", "--mu", "2", "--first_epoch_steps", "4", "--run.eval_every", "6", "--run.log_every", "3")
)
_CIFAR = {
    "smoke": _SMOKE,
    "short": Budget(1, ("--steps", "16384", "--run.eval_every", "512")),
    "paper": Budget(5),
}
_IMAGENET = {
    "smoke": _SMOKE,
    "short": Budget(1, ("--steps", "39630", "--warm_up_steps", "3963")),  # 10 epochs
    "paper": Budget(1),
}
_IMAGENET_100_EPOCHS = {**_IMAGENET, "paper": Budget(1, ("--steps", "396300"))}

_RECIPE = (
    "FixMatch is our trainer without memory, instance matching and distribution alignment, on argmax pseudo-labels; supervised-only "
    "sees no unlabelled image. Network, augmentation, batches and steps are the same for all rows.",
)
_IMAGENET_RECIPE = (
    *_RECIPE,
    "Labelled images are drawn by our seeded per-class split, not from the published list; batch norm is not shuffled over ranks.",
)


def _table1() -> tuple[Cell, ...]:
    columns = {
        "cifar10-40": ("86.19 ± 3.37", "94.40 ± 1.37"),
        "cifar10-250": ("94.93 ± 0.65", "95.16 ± 0.39"),
        "cifar10-4000": ("95.74 ± 0.05", "96.04 ± 0.01"),
        "cifar100-400": ("51.15 ± 1.75", "62.19 ± 2.21"),
        "cifar100-2500": ("71.71 ± 0.11", "74.93 ± 0.32"),
        "cifar100-10000": ("77.40 ± 0.12", "79.42 ± 0.11"),
    }
    return tuple(
        Cell(row, config, ("--config", config, *arguments), (paper,))
        for config, (fixmatch, simmatch) in columns.items()
        for row, arguments, paper in (("Supervised", SUPERVISED, "-"), ("FixMatch", FIXMATCH, fixmatch), ("SimMatch", SIMMATCH, simmatch))
    )


EXPERIMENTS = {
    "simmatch-table1": Experiment(
        title="SimMatch, Table 1: accuracy on CIFAR-10 and CIFAR-100",
        method="simmatch",
        cells=_table1(),
        figures=(Figure("top-1", "ema_accuracy"),),
        budgets=_CIFAR,
        offline=_OFFLINE,
        deviations=_RECIPE,
    ),
    "simmatch-table2": Experiment(
        title="SimMatch, Table 2: accuracy on ImageNet with 1 % and 10 % of the labels",
        method="simmatch",
        cells=(
            Cell("FixMatch", "imagenet-10", ("--config", "imagenet-10", *FIXMATCH), ("71.5", "89.1")),
            Cell("SimMatch", "imagenet-1", ("--config", "imagenet-1"), ("67.2", "87.1")),
            Cell("SimMatch", "imagenet-10", ("--config", "imagenet-10"), ("74.4", "91.6")),
        ),
        figures=(Figure("top-1", "student_accuracy", median=False), Figure("top-5", "student_top5", median=False)),
        budgets=_IMAGENET,
        offline=_OFFLINE,
        deviations=_IMAGENET_RECIPE,
    ),
    "simmatch-figure4": Experiment(
        title="SimMatch, Figure 4: accuracy of pseudo-labels on ImageNet",
        method="simmatch",
        cells=tuple(
            Cell(row, config, ("--config", config, *arguments), ("-", "-", "-"))
            for config in ("imagenet-1", "imagenet-10")
            for row, arguments in (("FixMatch", FIXMATCH), ("SimMatch", SIMMATCH))
        ),
        figures=(
            Figure("(a) confident pseudo-labels", "confident_accuracy", median=False),
            Figure("(b) all pseudo-labels", "pseudo_label_accuracy", median=False),
            Figure("(c) validation", "student_accuracy", median=False),
        ),
        budgets=_IMAGENET,
        offline=_OFFLINE,
        deviations=(*_IMAGENET_RECIPE, "The paper prints curves, no numbers."),
        curves={
            "(a) confident pseudo-labels": "confident_accuracy",
            "(b) all pseudo-labels": "pseudo_label_accuracy",
            "(c) validation": "student_accuracy",
        },
    ),
    "simmatch-ablation": Experiment(
        title="SimMatch, Table 5: without p̂ and without q̂ (ImageNet 1 %, 100 epochs)",
        method="simmatch",
        cells=(
            Cell("without p̂", "imagenet-1", ("--config", "imagenet-1", "--alpha", "1"), ("59.9",)),
            Cell("without q̂", "imagenet-1", ("--config", "imagenet-1", "--propagate_to_instances", "false"), ("52.3",)),
            Cell("standard", "imagenet-1", ("--config", "imagenet-1"), ("61.7",)),
        ),
        figures=(Figure("top-1", "student_accuracy", median=False),),
        budgets=_IMAGENET_100_EPOCHS,
        offline=_OFFLINE,
        deviations=_IMAGENET_RECIPE,
    ),
}
