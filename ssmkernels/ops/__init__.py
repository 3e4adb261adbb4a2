# SPDX-License-Identifier: BSD-3-Clause
"""The ops: C++ and CUDA kernels behind plain functions, each with its reference of the same name in
:mod:`ssmkernels.reference`.
"""

from ssmkernels.ops import graph, memory, pairs, ranking
from ssmkernels.ops.graph import *
from ssmkernels.ops.memory import *
from ssmkernels.ops.pairs import *
from ssmkernels.ops.ranking import *

__all__ = []
__all__ += graph.__all__
__all__ += memory.__all__
__all__ += pairs.__all__
__all__ += ranking.__all__
