# SPDX-License-Identifier: BSD-3-Clause
"""Accuracy of a classifier on a test set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ssmkernels.distributed import all_reduce_sum


@torch.no_grad()
def top_k_accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, ks: tuple[int, ...] = (1,)
) -> list[float]:
    """The share of images whose class is among the k with the highest logits, for each k, over the batches of all ranks.

    Args:
        model: images [N, C, H, W] -> (logits [N, L], anything); it is put in eval mode for the time.
        batches: (images, labels [N]) of this rank.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(len(ks) + 1, device=device, dtype=torch.float64)
    for images, labels in batches:
        logits, _ = model(images.to(device))
        hits = logits.topk(max(ks), dim=1).indices == labels.to(device)[:, None]
        counts += torch.stack([*(hits[:, :k].sum() for k in ks), torch.tensor(len(labels), device=device)])
    model.train(training)
    *correct, total = all_reduce_sum(counts).tolist()
    return [each / max(total, 1) for each in correct]
