# SPDX-License-Identifier: BSD-3-Clause
"""The model card of a run, in Markdown."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ssmkernels import __version__
from ssmkernels.finished.run import FinishedRun

TITLES = {
    "mixed-lp": "mixed label propagation (Zhuang and Moulin, CVPR 2023)",
    "mlsn": "MLSN (Wu, Feng and Zhou, 2020)",
    "simmatch": "SimMatch (Zheng et al., CVPR 2022)",
    "slade": "SLADE (Duan et al., CVPR 2021)",
    "swav": "SwAV (Caron et al., NeurIPS 2020)",
}

CARD = """\
# {model} by {title}

Trained by ssmkernels {version}, `ssmkernels train {method}`, for {step} steps on {data}.

## Files

- `program.pt2`: `torch.export.load("program.pt2").module()`, images [N, {channels}, {size}, {size}] float32 with N ≥ 1
  to {outputs}.
- `weights.pt`: the state_dict of the network, `torch.load("weights.pt", weights_only=True)`. `backbone.` is the
  encoder.{average}

## Images

Shorter side to {resize} pixels (bilinear), the central {size}x{size}, channels {order}, then
(pixel / 255 − mean) / std with

- mean {mean}
- std {std}
{classes}
## Figures

{figures}

## Settings

{settings}
"""


def model_card(run: FinishedRun) -> str:
    images, config = run.images, run.config
    average = " It is the moving average of the student." if "logits" in run.outputs else ""
    classes = ""
    if images.class_names:
        classes = f"\nLogit i is of class i of: {', '.join(images.class_names)}.\n"
    return CARD.format(
        model=config.model,
        title=TITLES[run.method],
        version=__version__,
        method=run.method,
        step=run.step,
        data=config.data.name,
        channels=images.channels,
        size=images.image_size,
        resize=images.resize,
        order=images.channel_order,
        mean=list(images.mean),
        std=list(images.std),
        outputs=" and ".join(run.outputs),
        average=average,
        classes=classes,
        figures=_figures(run.history),
        settings="\n".join(f"- {name}: {value}" for name, value in _flat(asdict(config), "")),
    )


def _figures(history: list[dict[str, float]]) -> str:
    """The last evaluation."""
    if not history:
        return "The run has no evaluation."
    last = history[-1]
    lines = [f"- {name}: {value:.4f}" for name, value in last.items() if name != "step"]
    return f"After step {last['step']}, with the means of the training losses before:\n\n" + "\n".join(lines)


def _flat(settings: dict[str, Any], before: str) -> list[tuple[str, Any]]:
    """Names as on the command line; places of files and what only a machine has to do with are left out."""
    lines: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if before + name == "run" or name in ("root", "unlabeled_root"):
            continue
        lines += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(before + name, value)]
    return lines
