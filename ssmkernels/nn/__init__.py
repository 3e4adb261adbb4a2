# SPDX-License-Identifier: BSD-3-Clause
"""Modules: state around the ops."""

from ssmkernels.nn.distribution_alignment import DistributionAlignment
from ssmkernels.nn.ema_teacher import EMATeacher
from ssmkernels.nn.labeled_memory import LabeledMemory
from ssmkernels.nn.proxy_loss import ProxyLoss

__all__ = ["DistributionAlignment", "EMATeacher", "LabeledMemory", "ProxyLoss"]
