# SPDX-License-Identifier: BSD-3-Clause
"""Images, labelled splits, augmentation and training batches.

Nothing here keeps the state of a random generator: every draw is a function of (seed, stream, step, position), so a run
resumes at any step, with any number of loading processes and ranks, on the same bits.
"""

from ssmkernels.data import augment, batched_augment
from ssmkernels.data.augment import default_transforms, to_tensor
from ssmkernels.data.batched_views import batch_transforms
from ssmkernels.data.batches import Batch, CollectionBatch, CollectionBatches, TrainBatches, evaluation_batches
from ssmkernels.data.class_lists import read_classes
from ssmkernels.data.device_batches import DevicePixels, DeviceTrainBatches
from ssmkernels.data.folds import halves, split_folds
from ssmkernels.data.images import ArrayImages, FileImages, ImageDataset, ImageSplits
from ssmkernels.data.label_lists import labels_text, read_labels
from ssmkernels.data.multi_crop import CropViews, MultiCropBatch, MultiCropBatches, crop_views
from ssmkernels.data.pk import PKBatches
from ssmkernels.data.readers import DATASETS, load_dataset
from ssmkernels.data.retrieval import (
    NORMALIZATIONS,
    ImageCollection,
    ImageSubset,
    RetrievalViews,
    class_subset,
    first_images,
    retrieval_views,
    split_classes,
    take,
)
from ssmkernels.data.retrieval_readers import COLLECTIONS, load_collection
from ssmkernels.data.seen import SeenImages
from ssmkernels.data.split import split_labels
from ssmkernels.data.streams import IndexStream, Stream, generator
from ssmkernels.data.transfer import TransferImages, load_transfer_images
from ssmkernels.data.union import ImageUnion, unite

__all__ = [
    "COLLECTIONS",
    "DATASETS",
    "NORMALIZATIONS",
    "ArrayImages",
    "Batch",
    "CollectionBatch",
    "CollectionBatches",
    "CropViews",
    "DevicePixels",
    "DeviceTrainBatches",
    "FileImages",
    "ImageCollection",
    "ImageDataset",
    "ImageSplits",
    "ImageSubset",
    "ImageUnion",
    "IndexStream",
    "MultiCropBatch",
    "MultiCropBatches",
    "PKBatches",
    "RetrievalViews",
    "SeenImages",
    "Stream",
    "TrainBatches",
    "TransferImages",
    "augment",
    "batch_transforms",
    "batched_augment",
    "class_subset",
    "crop_views",
    "default_transforms",
    "evaluation_batches",
    "first_images",
    "generator",
    "halves",
    "labels_text",
    "load_collection",
    "load_dataset",
    "load_transfer_images",
    "read_classes",
    "read_labels",
    "retrieval_views",
    "split_classes",
    "split_folds",
    "split_labels",
    "take",
    "to_tensor",
    "unite",
]
