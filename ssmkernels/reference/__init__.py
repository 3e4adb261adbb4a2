# SPDX-License-Identifier: BSD-3-Clause
"""The ops in plain PyTorch, same names and signatures as :mod:`ssmkernels.ops`: the definition of right.

Tests, benchmarks and docs import these. They store every intermediate and run anywhere torch runs.
"""

from ssmkernels.reference import graph, memory, pairs, ranking
from ssmkernels.reference.graph import *
from ssmkernels.reference.memory import *
from ssmkernels.reference.pairs import *
from ssmkernels.reference.ranking import *

__all__ = []
__all__ += graph.__all__
__all__ += memory.__all__
__all__ += pairs.__all__
__all__ += ranking.__all__
