# SPDX-License-Identifier: BSD-3-Clause
"""``python -m ssmkernels``."""

import sys

from ssmkernels.cli import main

sys.exit(main())
