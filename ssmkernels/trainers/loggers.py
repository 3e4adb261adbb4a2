# SPDX-License-Identifier: BSD-3-Clause
"""Loggers of Lightning Fabric by name."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, Literal

LoggerName = Literal["tensorboard", "csv", "wandb", "none"]


def make_logger(name: LoggerName, folder: Path, *, start: int) -> Any:
    """A Fabric logger that writes in ``folder``; None for "none".

    Args:
        folder: of the run. metrics.jsonl in it has what was logged until ``start``.
        start: steps that are done before; what a logger has of later ones is replaced.

    Raises:
        ImportError: wandb is not installed.
    """
    if name == "none":
        return None
    if name == "wandb":
        return _wandb(folder)
    try:  # slow to import, and not needed by runs that write nothing
        from lightning_fabric import loggers
    except ImportError:
        from lightning.fabric import loggers  # type: ignore[no-redef]
    if name == "tensorboard":
        return loggers.TensorBoardLogger(folder, name="", version="tensorboard", purge_step=start + 1)
    (folder / "csv" / "metrics.csv").unlink(missing_ok=True)  # it cannot go on with one
    logger = loggers.CSVLogger(folder, name="", version="csv", flush_logs_every_n_steps=1)
    earlier = folder / "metrics.jsonl"
    for line in earlier.read_text().splitlines() if earlier.exists() else []:
        record = json.loads(line)
        step, group = record.pop("step"), record.pop("group")
        logger.log_metrics({f"{group}/{metric}": value for metric, value in record.items()}, step)
    return logger


def _wandb(folder: Path) -> Any:
    """The same run of Weights & Biases whenever the folder is the same, so that a resumed one goes on in it."""
    try:
        wandb = importlib.import_module("wandb.integration.lightning.fabric")
    except ImportError as error:
        raise ImportError(f"--run.logger wandb needs wandb ({error}); install it with: pip install wandb") from None
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.WandbLogger(name=folder.name, save_dir=str(folder), project="ssmkernels", id=identity, resume="allow")
