# SPDX-License-Identifier: BSD-3-Clause
"""Predicts the classes of the images in a folder by a finished run, or embeds them where the run learnt embeddings.

Leaves predictions.csv: of a classifier with path, label and confidence of every image, the highest softmax of its
logits. Of a metric-learning run it has the paths alone, and row i of embeddings.npy, float32 of norm 1, is the
embedding of image i. Paths start from the folder. Images may have any size; they are resized and cropped as the run's
test images are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ssmkernels import data
from ssmkernels._files import atomic_file, check_folder, write_atomically
from ssmkernels.distributed import all_gather_rows, split_rows
from ssmkernels.finished.arguments import add_best, add_run, parser_of, run_command
from ssmkernels.finished.run import FinishedRun, load_run
from ssmkernels.trainers.loop import Accelerator, RunConfig, make_fabric
from ssmkernels.trainers.ranks import this_rank

BATCH = 256


class Predictions(NamedTuple):
    """Of N images, in the order of their paths."""

    paths: tuple[str, ...]
    probs: Tensor | None
    """[N, L], None of embeddings."""
    embeddings: Tensor | None
    """[N, δ], None of classes."""


def predict(run: FinishedRun, folder: str | Path, *, accelerator: Accelerator = "auto") -> Predictions:
    """What the network of ``run`` says of every image in ``folder`` and the folders in it. Under ``torchrun`` the ranks
    share the images out, and each gets all predictions.

    Raises:
        FileNotFoundError: there is no folder, or no image in it.
        ValueError: a file cannot be read as an image; the message names it.
    """
    folder = Path(folder)
    paths = image_files(folder)
    device = make_fabric(RunConfig(accelerator=accelerator)).device
    network = run.network.to(device)
    name = "logits" if "logits" in run.outputs else "embeddings"
    own = split_rows(-(-len(paths) // BATCH), *this_rank())  # whole batches, which have the bits of a process alone
    own_paths = paths[own.start * BATCH : own.stop * BATCH]

    def of_network(images: Tensor) -> Tensor:
        outputs = dict(zip(run.outputs, network(images.to(device)), strict=True))
        return outputs[name].float()

    with torch.inference_mode():
        batches = tqdm(
            _batches(run.images, folder, own_paths), total=own.stop - own.start, unit="batch", leave=False, disable=None
        )
        rows = [of_network(images).cpu() for images in batches]
        if not rows:  # of no batch, but as wide as the others'
            rows = [of_network(torch.zeros(1, run.images.channels, *[run.images.image_size] * 2))[:0].cpu()]
        values = all_gather_rows(torch.cat(rows).to(device)).cpu()
    if name == "logits":
        return Predictions(paths, values.softmax(dim=1), None)
    return Predictions(paths, None, values)


def image_files(folder: Path) -> tuple[str, ...]:
    """The paths of all images below ``folder``, from there, sorted; those that begin with a dot are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--data is {folder}, which is no folder; it should be one of images")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    names = sorted(path.as_posix() for path in paths if not path.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"--data is {folder}, which has no images")
    return tuple(names)


def _batches(images: data.SeenImages, folder: Path, paths: Sequence[str]) -> Iterator[Tensor]:
    """[n, C, H, W] float32 of ``BATCH`` images, and of fewer at the end."""
    for first in range(0, len(paths), BATCH):
        views = [images.transform(_read(folder / path)) for path in paths[first : first + BATCH]]
        yield data.augment.to_tensors(views, images.mean, images.std)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is not readable as an image ({error}); repair it, or take it away") from error


def new_files(run: FinishedRun, out: Path) -> list[Path]:
    """The files of predictions by ``run`` in the folder ``out``.

    Raises:
        FileExistsError: one of them is there.
        ValueError: the folder cannot be written.
    """
    check_folder(out, "--out")
    names = ["predictions.csv"] if "logits" in run.outputs else ["predictions.csv", "embeddings.npy"]
    for name in names:
        if (out / name).exists():
            raise FileExistsError(f"{out / name} exists; give another folder with --out")
    return [out / name for name in names]


def _csv(predictions: Predictions, class_names: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if predictions.probs is None:
        writer.writerow(["path"])
        writer.writerows([path] for path in predictions.paths)
        return text.getvalue()
    confidence, labels = predictions.probs.max(dim=1)
    writer.writerow(["path", "label", "confidence"])
    for path, label, value in zip(predictions.paths, labels.tolist(), confidence.tolist(), strict=True):
        writer.writerow([path, class_names[label], f"{value:.6f}"])
    return text.getvalue()


def main(argv: Sequence[str]) -> int:
    parser = parser_of("predict", __doc__)
    add_run(parser)
    parser.add_argument("--data", metavar="DIR", required=True, help="folder of images, in folders of their own or not")
    parser.add_argument("--out", metavar="DIR", default=".", help="folder to write to; default: this one")
    add_best(parser)
    return run_command(parser, argv, _predict)


def _predict(options: Any) -> None:
    run = load_run(options.run, best=options.best)
    files = new_files(run, Path(options.out))
    predictions = predict(run, options.data, accelerator=options.accelerator)
    if this_rank()[0] > 0:  # torchrun's first rank writes for all
        return
    if predictions.embeddings is not None:
        with atomic_file(files[1]) as file:
            np.save(file, predictions.embeddings.numpy())
    write_atomically(files[0], _csv(predictions, run.images.class_names))
    print(f"{len(predictions.paths)} images: wrote {' and '.join(map(str, files))}")
