# SPDX-License-Identifier: BSD-3-Clause
"""What is done with finished cells, and cells that are no training runs; tables name these functions."""
