# SPDX-License-Identifier: BSD-3-Clause
"""Images, labelled splits, augmentation and training batches.

Nothing here keeps the state of a random generator: every draw is a function of (seed, stream, step, position), so a run resumes at any
step, with any number of loading processes and ranks, on the same bits.
"""

from ssmkernels.data import augment
from ssmkernels.data.augment import default_transforms, to_tensor
from ssmkernels.data.batches import Batch, TrainBatches, evaluation_batches
from ssmkernels.data.images import ArrayImages, FileImages, ImageDataset, ImageSplits
from ssmkernels.data.readers import DATASETS, load_dataset
from ssmkernels.data.split import split_labels
from ssmkernels.data.streams import IndexStream, Stream, generator

__all__ = [
    "DATASETS",
    "ArrayImages",
    "Batch",
    "FileImages",
    "ImageDataset",
    "ImageSplits",
    "IndexStream",
    "Stream",
    "TrainBatches",
    "augment",
    "default_transforms",
    "evaluation_batches",
    "generator",
    "load_dataset",
    "split_labels",
    "to_tensor",
]
