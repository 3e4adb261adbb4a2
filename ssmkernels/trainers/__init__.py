# SPDX-License-Identifier: BSD-3-Clause
"""Trainers: each is its paper's algorithm, around the ops and modules of this package."""

from ssmkernels.trainers.loop import RunConfig, RunResult
from ssmkernels.trainers.simmatch import DataConfig, SimMatch, SimMatchConfig, train_simmatch

__all__ = ["DataConfig", "RunConfig", "RunResult", "SimMatch", "SimMatchConfig", "train_simmatch"]
