# SPDX-License-Identifier: BSD-3-Clause
"""Distribution alignment: predictions divided by their running mean (Berthelot et al., ReMixMatch; SimMatch, DA)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.distributed import all_reduce_mean
from ssmkernels.nn._precision import RunningStatistics
from ssmkernels.ops import _checks as check


class DistributionAlignment(RunningStatistics):
    """DA(p) = Normalize(p / p_avg), with p_avg the mean of the last ``queue_length`` batches, the current one included.

    The target distribution is uniform. The queue is a buffer that starts at zeros: until it is full p_avg is too small
    by a factor, which the normalisation cancels. It stays at least float32 whatever the module is converted to. Under
    ``torch.distributed`` a batch is that of all ranks together.

    Args:
        num_classes: number of classes L ≥ 1.
        queue_length: batches remembered, at least 1; the papers' code uses 32 on CIFAR and 256 on ImageNet.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    statistics = ("queue",)
    queue: Tensor
    position: Tensor

    def __init__(self, num_classes: int, queue_length: int = 32) -> None:
        super().__init__()
        num_classes, queue_length = (
            check.check_count("num_classes", num_classes),
            check.check_count("queue_length", queue_length),
        )
        self.register_buffer("queue", torch.zeros(queue_length, num_classes))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, probs: Tensor) -> Tensor:
        """Aligned probabilities [B, L] of ``probs`` [B, L], floating point; detached, float32 (float64 for float64
        probabilities).

        A class that has had no probability at all keeps none. In eval mode the queue is read, not written.

        Raises:
            ValueError, TypeError: ``probs`` is not as said above.
        """
        check.check_tensor("probs", probs, "[B, L]", 2)
        check.check_floating("probs", probs)
        check.check_size("probs", probs, 1, self.queue.shape[1], "num_classes")
        check.check_same_device("probs", probs, "queue", self.queue)
        probs = probs.to(check.compute_dtype(probs.dtype))
        if self.training:
            mean = all_reduce_mean(probs.sum(dim=0) / max(probs.shape[0], 1))
            self.queue.index_copy_(0, self.position, mean[None].to(self.queue.dtype))
            self.position.add_(1).remainder_(self.queue.shape[0])
        tiny = torch.finfo(probs.dtype).tiny  # 0 / tiny = 0 where a class has no mass
        aligned = probs / self.queue.sum(dim=0).to(probs.dtype).clamp_min(tiny)
        return aligned / aligned.sum(dim=1, keepdim=True).clamp_min(tiny)

    def extra_repr(self) -> str:
        return f"num_classes={self.queue.shape[1]}, queue_length={self.queue.shape[0]}"
