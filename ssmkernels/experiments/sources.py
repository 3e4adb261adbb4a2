# SPDX-License-Identifier: BSD-3-Clause
"""What ``--data`` says: images inside packages, a file that stands for one set, or a folder with sets in it; and
which cells it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmkernels import data
from ssmkernels.experiments.jobs import EXPECTED
from ssmkernels.trainers.slade_data import load_images

EMBEDDED = "embedded"
INSIDE_PACKAGES = ("digits", "mnist5k")
SWAV_FILE = "swav_800ep_pretrain.pth.tar"
"""ResNet-50 of SwAV's authors, which SLADE starts its fine-tuning from."""


@dataclass(frozen=True)
class Source:
    """Where images come from."""

    path: str | None
    """None for images inside packages; a file (.npz), named after the set that it holds; or a folder."""

    @property
    def kind(self) -> str:
        if self.path is None:
            return EMBEDDED
        return "file" if self.path.endswith(".npz") else "folder"

    @property
    def label(self) -> str:
        """What --data was, without the folders of a machine."""
        return {EMBEDDED: EMBEDDED, "file": Path(self.path or "").name, "folder": "DIR"}[self.kind]

    @property
    def arguments(self) -> tuple[str, ...]:
        """For a trainer."""
        if self.path is None:
            return ()
        if self.kind == "folder" or Path(self.path).stem == "glyphs":
            return ("--data.root", self.path)
        return ("--data.name", "npz", "--data.root", self.path)

    def swav_weights(self) -> Path | None:
        """The file that SwAV is fine-tuned from, where it is there."""
        path = Path(self.path or "") / SWAV_FILE
        return path if self.kind == "folder" and path.is_file() else None

    def problem(self, method: str, name: str, config: Any) -> Exception | None:
        """Why the training that ``config`` describes cannot have its images here; None where it can.

        Args:
            name: of the set that the cell is about, of which a file stands in for one alone.
        """
        if self.path is not None and name in INSIDE_PACKAGES:
            return ValueError(f"--data is {self.path}; {name} comes inside packages, and it should be left out")
        if self.kind == "file" and name not in ("folder", Path(self.path or "").stem):
            return ValueError(
                f"--data is {self.path}, the images of {Path(self.path or '').stem} by its name; this needs {name}"
            )
        if method == "slade":
            return error_of(load_images, config)
        return error_of(data.load_collection if method == "mixed-lp" else data.load_dataset, config.name, config.root)


def error_of(load: Callable[..., Any], *arguments: Any) -> Exception | None:
    """What keeps images from being loaded, which are not looked at here."""
    try:
        load(*arguments)
    except EXPECTED as error:
        return error
    return None
