# SPDX-License-Identifier: BSD-3-Clause
"""Images, labelled splits, augmentation and training batches.

Nothing here keeps the state of a random generator: every draw is a function of (seed, stream, step, position), so a run resumes at any
step, with any number of loading processes and ranks, on the same bits.
"""

from ssmkernels.data import augment
from ssmkernels.data.augment import default_transforms, to_tensor
from ssmkernels.data.batches import Batch, CollectionBatch, CollectionBatches, TrainBatches, evaluation_batches
from ssmkernels.data.images import ArrayImages, FileImages, ImageDataset, ImageSplits
from ssmkernels.data.readers import DATASETS, load_dataset
from ssmkernels.data.retrieval import (
    NORMALIZATIONS,
    ImageCollection,
    ImageSubset,
    RetrievalViews,
    class_subset,
    retrieval_views,
    split_classes,
)
from ssmkernels.data.retrieval_readers import COLLECTIONS, load_collection
from ssmkernels.data.split import split_labels
from ssmkernels.data.streams import IndexStream, Stream, generator

__all__ = [
    "COLLECTIONS",
    "DATASETS",
    "NORMALIZATIONS",
    "ArrayImages",
    "Batch",
    "CollectionBatch",
    "CollectionBatches",
    "FileImages",
    "ImageCollection",
    "ImageDataset",
    "ImageSplits",
    "ImageSubset",
    "IndexStream",
    "RetrievalViews",
    "Stream",
    "TrainBatches",
    "augment",
    "class_subset",
    "default_transforms",
    "evaluation_batches",
    "generator",
    "load_collection",
    "load_dataset",
    "retrieval_views",
    "split_classes",
    "split_labels",
    "to_tensor",
]
