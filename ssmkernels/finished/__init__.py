# SPDX-License-Identifier: BSD-3-Clause
"""What becomes of a finished run: figures, predictions, files to use elsewhere."""

from ssmkernels.finished.run import FinishedRun, load_run

__all__ = ["FinishedRun", "load_run"]
