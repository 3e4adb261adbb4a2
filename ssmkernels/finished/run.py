# SPDX-License-Identifier: BSD-3-Clause
"""A run from its folder, wherever that lies now: its settings, its network, and how that sees images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from torch import nn

from ssmkernels import data
from ssmkernels.trainers import (
    MixedLPConfig,
    MLSNConfig,
    SimMatchConfig,
    SladeConfig,
    SwAVConfig,
    mixed_lp,
    mlsn,
    simmatch,
    slade,
    swav,
)
from ssmkernels.trainers.base import channels_last
from ssmkernels.trainers.checkpoint import latest_checkpoint, load_checkpoint, one_line

NEEDED = ("config", "images", "step", "history", "trainer")


class Method(NamedTuple):
    """What the network of a trainer is."""

    config: type
    build: Callable[[Any, Any], nn.Module]
    """Settings, images -> the network."""
    part: str
    """Its name in the state of the trainer."""
    prefix: str
    """What the names of its tensors begin with there."""
    outputs: tuple[str, ...]
    """What it gives for images."""


METHODS = {
    "mixed-lp": Method(MixedLPConfig, mixed_lp.build_network, "model", "", ("features", "embeddings")),
    "mlsn": Method(MLSNConfig, mlsn.build_network, "teacher", "model.", ("logits", "features")),
    "simmatch": Method(SimMatchConfig, simmatch.build_network, "teacher", "model.", ("logits", "embeddings")),
    "slade": Method(SladeConfig, slade.build_network, "model", "", ("features", "embeddings")),
    "swav": Method(SwAVConfig, swav.build_network, "model", "", ("features", "embeddings")),
}


@dataclass
class FinishedRun:
    """A run, and the network that it is for: of classifiers the moving average of the student."""

    folder: Path
    method: str
    config: Any
    step: int
    history: list[dict[str, float]]
    """One record per evaluation."""
    images: data.SeenImages
    network: nn.Module
    """images [N, C, H, W] -> two tensors [N, …], by the names ``outputs``; in eval mode, on the CPU."""
    trainer: dict[str, Any]
    """The state of the trainer."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return METHODS[self.method].outputs


def load_run(folder: str | Path, *, best: bool = False) -> FinishedRun:
    """The run in ``folder``, from its checkpoint alone: no image is read.

    Args:
        best: take the network of best.pt, which was best on the validation classes, instead of the last one.

    Raises:
        FileNotFoundError: there is no checkpoint.pt, or no best.pt.
        ValueError: one is damaged, or of no method of this version; the message names it.
    """
    folder = Path(folder)
    path = latest_checkpoint(folder) if folder.is_dir() else None
    if path is None:
        raise FileNotFoundError(no_checkpoint(folder))
    state = load_checkpoint(path)
    missing = [name for name in NEEDED if name not in state]
    if missing:
        raise ValueError(f"{path} is not the checkpoint of a run of this version: it lacks {', '.join(missing)}")
    method = _method_of(state["config"], path)
    try:
        config = _settings(METHODS[method].config, state["config"])
        images = data.SeenImages(**state["images"])
        network = METHODS[method].build(config, images)
        network.load_state_dict(_weights(state, METHODS[method], folder if best else None))
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit the network of its settings: {one_line(error)}") from error
    config.run.out = str(folder)
    if isinstance(network, swav.SwAVNetwork):
        network = swav.UnitFeatures(network)
    channels_last(network).eval()  # as the trainer has it, for the same bits
    return FinishedRun(folder, method, config, state["step"], state["history"], images, network, state["trainer"])


def fold_names(folder: Path) -> list[str]:
    """The folders of the folds of a run, where it has a network for each."""
    if latest_checkpoint(folder) is not None:
        return []
    return sorted(path.name for path in folder.glob("fold*") if latest_checkpoint(path) is not None)


def no_checkpoint(folder: Path) -> str:
    folds = fold_names(folder)
    if folds:
        return f"{folder} has a network for each of its folds; give one of {', '.join(folds)} in it"
    return f"{folder} has no checkpoint.pt; it should be the folder of a run, --run.out of ssmkernels train"


def _method_of(config: Mapping[str, Any], path: Path) -> str:
    """The method whose settings these are."""
    for name, method in METHODS.items():
        if {field.name for field in fields(method.config)} == set(config):
            return name
    raise ValueError(f"{path} has settings of no method of this version: {', '.join(config)}")


def _settings(kind: type, values: Mapping[str, Any]) -> Any:
    """The settings that ``dataclasses.asdict`` made ``values`` of."""
    hints = get_type_hints(kind)
    return kind(
        **{
            name: _settings(hints[name], value) if is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


def _weights(state: Mapping[str, Any], method: Method, folder_of_best: Path | None) -> dict[str, Any]:
    """The tensors of the network by their names in it."""
    if folder_of_best is not None:
        if method.part != "model" or not (folder_of_best / "best.pt").is_file():
            raise FileNotFoundError(f"{folder_of_best} has no best.pt; only mixed-lp and slade keep one")
        return load_checkpoint(folder_of_best / "best.pt")["model"]
    weights = state["trainer"][method.part]
    return {
        name.removeprefix(method.prefix): value for name, value in weights.items() if name.startswith(method.prefix)
    }
