# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled library once. What keeps it from loading is kept, and raised when an op is first called."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ssmkernels import info

if TYPE_CHECKING:
    import torch

_C: ModuleType | None = None
_error: Exception | None = None
try:
    importlib.import_module("torch")  # first: it brings the libraries that _C is linked to
    _C = importlib.import_module("ssmkernels._C")
except Exception as error:  # missing, undefined symbol, ops registered by another copy; a broken torch raises anything
    _error = error

_cuda_built = _C is not None and _C.build_info()["cuda"] is not None
_checked_devices: set[int] = set()


def load() -> bool:
    """Whether the compiled library is here and its ops are registered."""
    return _C is not None


def library() -> ModuleType:
    """The module ``ssmkernels._C``.

    Raises:
        RuntimeError: it did not load; the message says what was built, what is here and the command that fixes it.
    """
    if _C is None:
        raise RuntimeError(
            _failure(f"its compiled library did not load: {type(_error).__name__}: {_error}")
        ) from _error
    return _C


def require(tensor: torch.Tensor) -> None:
    """Raises unless the library is loaded and was built for the device of ``tensor``.

    Raises:
        RuntimeError: what was built, what is here and the command that fixes it.
    """
    if _C is None:
        library()
    if getattr(tensor, "is_cuda", False):
        _require_cuda(tensor)


def _require_cuda(tensor: torch.Tensor) -> None:
    if not _cuda_built:
        raise RuntimeError(
            _failure("a CUDA tensor was given to a build without CUDA", info.install_command("FORCE_CUDA=1"))
        )
    if tensor.device.index in _checked_devices:
        return
    import torch

    if torch.compiler.is_compiling():  # nothing runs while a graph is traced
        return
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if not info.covers(library().build_info()["cuda_architectures"], (major, minor)):
        name = torch.cuda.get_device_name(tensor.device)
        fix = info.install_command(f'TORCH_CUDA_ARCH_LIST="{major}.{minor}"')
        raise RuntimeError(_failure(f"it has no code for {name} (compute capability {major}.{minor})", fix))
    _checked_devices.add(tensor.device.index)


def _failure(problem: str, fix: str | None = None) -> str:
    report = info.collect()
    fix = fix or next((entry["fix"] for entry in report["problems"]), info.install_command())
    return (
        f"ssmkernels cannot run: {problem}\nbuilt: {info.describe_build(report)}\n"
        f"here:  {info.describe_machine(report)}\nfix:   {fix}\nmore:  python -m ssmkernels info"
    )
