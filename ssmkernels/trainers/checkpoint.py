# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints that a crash cannot tear and that loading cannot turn into code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes ``state`` to ``path`` atomically: a reader finds the old file or the new one, whole, now and after
    a crash.
    """
    # In the same folder, as os.replace is atomic only within a file system
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at ``path``, on the CPU. Tensors and plain values only: nothing in the file is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error


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
