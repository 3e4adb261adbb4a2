# SPDX-License-Identifier: BSD-3-Clause
"""Distribution alignment: predictions divided by their running mean (Berthelot et al., ReMixMatch; SimMatch, DA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmkernels.distributed import all_reduce_mean


class DistributionAlignment(nn.Module):
    """DA(p) = Normalize(p / p_avg), with p_avg the mean of the last ``queue_length`` batches, the current one included.

    The target distribution is uniform. The queue is a buffer that starts at zeros: until it is full p_avg is too small by a
    factor, which the normalisation cancels. Under ``torch.distributed`` a batch is that of all ranks together.

    Args:
        num_classes: number of classes L.
        queue_length: batches remembered; the papers' code uses 32 on CIFAR and 256 on ImageNet.
    """

    queue: Tensor
    position: Tensor

    def __init__(self, num_classes: int, queue_length: int = 32) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("queue_length", queue_length)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it should be at least 1")
        self.register_buffer("queue", torch.zeros(queue_length, num_classes))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, probs: Tensor) -> Tensor:
        """Aligned probabilities [B, L] of ``probs`` [B, L], detached, float32. In eval mode the queue is read, not written.

        A class that has had no probability at all keeps none.
        """
        if probs.ndim != 2 or probs.shape[1] != self.queue.shape[1]:
            raise ValueError(f"probs has shape {tuple(probs.shape)}; it should be [B, {self.queue.shape[1]}]")
        probs = probs.float()
        if self.training:
            mean = all_reduce_mean(probs.sum(dim=0) / max(probs.shape[0], 1))
            self.queue.index_copy_(0, self.position, mean[None])
            self.position.add_(1).remainder_(self.queue.shape[0])
        tiny = torch.finfo(probs.dtype).tiny  # 0 / tiny = 0 where a class has no mass
        aligned = probs / self.queue.sum(dim=0).clamp_min(tiny)
        return aligned / aligned.sum(dim=1, keepdim=True).clamp_min(tiny)

    def extra_repr(self) -> str:
        return f"num_classes={self.queue.shape[1]}, queue_length={self.queue.shape[0]}"
