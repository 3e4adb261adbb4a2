# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints that a crash cannot tear, whose damage is noticed, and that loading cannot turn into code."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ssmkernels._files import checksummed_archive, verify_checksum
from ssmkernels.trainers import sharded

FILE = "checkpoint.pt"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes ``state`` to ``path`` by :func:`ssmkernels._files.checksummed_archive`. ``torch.load`` reads it too.

    Raises:
        WriteError: it cannot be written; the file that was there is kept.
    """
    with checksummed_archive(path) as file:
        torch.save(dict(state), file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at ``path``, on the CPU; in a folder, by :mod:`ssmkernels.trainers.sharded`. Tensors and plain
    values only: nothing in the file is executed.

    Raises:
        DamagedFile: it is not what was written.
        FileNotFoundError: there is none.
        ValueError: it holds something else.
    """
    if path.is_dir():
        return sharded.load(path)
    verify_checksum(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {one_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}; it should be a dict")
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the run in ``folder``, a file or the folder of a sharded one; None where there is none."""
    forms = [folder / FILE, sharded.latest(folder / sharded.FOLDER)]
    there = [path for path in forms if path is not None and path.exists()]
    return max(there, key=lambda path: path.stat().st_mtime_ns, default=None)


def one_line(error: Exception) -> str:
    """What PyTorch says over many lines, in one, cut after the first mistakes."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(text, 300, placeholder=" …")


def check_same_config(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, ignore: tuple[str, ...], path: Path
) -> None:
    """Raises a ``ValueError`` that lists every setting in which a run differs from the checkpoint it wants to continue.

    ``ignore`` names settings, or whole groups of them, that may differ.
    """
    before, now = dict(_flatten(saved)), dict(_flatten(current))
    changed = [
        f"  {key}: {before.get(key, 'absent')!r} in the checkpoint, {now.get(key, 'absent')!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(name + ".") for name in ignore)
    ]
    if changed:
        raise ValueError(
            "\n".join([f"{path} was made with other settings; restore them or start in another folder:", *changed])
        )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
