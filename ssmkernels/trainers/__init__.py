# SPDX-License-Identifier: BSD-3-Clause
"""Trainers: each is its paper's algorithm, around the ops and modules of this package."""

from ssmkernels.trainers.classifier import DataConfig
from ssmkernels.trainers.loop import RunConfig, RunResult
from ssmkernels.trainers.mixed_lp import CollectionConfig, MixedLP, MixedLPConfig, train_mixed_lp
from ssmkernels.trainers.mlsn import MLSN, MLSNConfig, RampConfig, train_mlsn
from ssmkernels.trainers.simmatch import SimMatch, SimMatchConfig, train_simmatch
from ssmkernels.trainers.slade import Slade, concatenated_retrieval, train_folds, train_slade
from ssmkernels.trainers.slade_config import SladeConfig, SladeDataConfig
from ssmkernels.trainers.swav import SwAV, SwAVConfig, SwAVDataConfig, train_swav

__all__ = [
    "MLSN",
    "CollectionConfig",
    "DataConfig",
    "MLSNConfig",
    "MixedLP",
    "MixedLPConfig",
    "RampConfig",
    "RunConfig",
    "RunResult",
    "SimMatch",
    "SimMatchConfig",
    "Slade",
    "SladeConfig",
    "SladeDataConfig",
    "SwAV",
    "SwAVConfig",
    "SwAVDataConfig",
    "concatenated_retrieval",
    "train_folds",
    "train_mixed_lp",
    "train_mlsn",
    "train_simmatch",
    "train_slade",
    "train_swav",
]
