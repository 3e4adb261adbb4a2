# SPDX-License-Identifier: BSD-3-Clause
"""What becomes of a finished run of any trainer: figures, predictions, files to use elsewhere."""

from ssmkernels.finished.evaluate import evaluate, evaluate_folds
from ssmkernels.finished.export import export
from ssmkernels.finished.predict import Predictions, predict
from ssmkernels.finished.run import FinishedRun, load_run

__all__ = ["FinishedRun", "Predictions", "evaluate", "evaluate_folds", "export", "load_run", "predict"]
