# SPDX-License-Identifier: BSD-3-Clause
"""The tables and figures of the papers as named experiments, and the demo."""
