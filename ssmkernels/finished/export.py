# SPDX-License-Identifier: BSD-3-Clause
"""Exports the network of a finished run for use without ssmkernels.

Leaves weights.pt, a plain state_dict of encoder and head; program.pt2, a torch.export program that takes any number of
images from 1 on; and README.md, the model card: how images are prepared, what comes out, what the run measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmkernels._files import atomic_file, check_folder, checksummed_archive, write_atomically
from ssmkernels.finished.arguments import add_best, parser_of, run_command
from ssmkernels.finished.card import model_card
from ssmkernels.finished.run import FinishedRun, load_run
from ssmkernels.trainers.ranks import this_rank
from ssmkernels.trainers.swav import UnitFeatures

FILES = ("weights.pt", "program.pt2", "README.md")


def export(run: FinishedRun, out: Path) -> None:
    """Writes :data:`FILES` into the folder ``out``, made if need be.

    Raises:
        FileExistsError: one of them is there.
        ValueError: the folder cannot be written.
    """
    check_folder(out, "--out")
    for name in FILES:
        if (out / name).exists():
            raise FileExistsError(f"{out / name} exists; give another folder with --out")
    program = exported_program(run)
    with checksummed_archive(out / "weights.pt") as file:
        torch.save(weights(run), file)
    with atomic_file(out / "program.pt2") as file:
        torch.export.save(program, file)
    write_atomically(out / "README.md", model_card(run))


def weights(run: FinishedRun) -> dict[str, Tensor]:
    """The state_dict of the network, on the CPU, its tensors contiguous."""
    network = run.network.network if isinstance(run.network, UnitFeatures) else run.network
    return {name: value.cpu().contiguous() for name, value in network.state_dict().items()}


def exported_program(run: FinishedRun) -> torch.export.ExportedProgram:
    """images [N, C, H, W] float32, N ≥ 1 -> the run's ``outputs``."""
    images = run.images
    example = torch.zeros(2, images.channels, images.image_size, images.image_size)
    batch = torch.export.Dim("batch", min=1)
    network = deepcopy(run.network).to(memory_format=torch.contiguous_format)
    return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def main(argv: Sequence[str]) -> int:
    parser = parser_of("export", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of the run, --run.out of ssmkernels train")
    parser.add_argument("--out", metavar="DIR", help="folder to write to; default: export in that of the run")
    add_best(parser)
    return run_command(parser, argv, _export)


def _export(options: Any) -> None:
    if this_rank()[0] > 0:  # torchrun's first rank writes for all
        return
    run = load_run(options.run, best=options.best)
    out = Path(options.run, "export") if options.out is None else Path(options.out)
    export(run, out)
    print(f"wrote {', '.join(FILES)} in {out}")
