# SPDX-License-Identifier: BSD-3-Clause
"""``make gpu``: what one short visit to a GPU has to bring back, as independent steps (docs/gpu.md)."""
