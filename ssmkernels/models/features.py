# SPDX-License-Identifier: BSD-3-Clause
"""Features of many images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.models.embedding import build_embedding_model


@torch.no_grad()
def extract_features(
    model: nn.Module | str,
    batches: Iterable[Tensor | Sequence[Any]],
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Tensor:
    """The features v of all images, [N, d] float32 of norm 1, on the CPU.

    Args:
        model: images [B, C, H, W] -> (features [B, d], anything), moved to ``device`` and in eval mode for the time; or
            the name of a backbone, see :func:`ssmkernels.models.build_embedding_model`, taken with its ImageNet weights
            and average pooling.
        batches: images [B, C, H, W], or tuples that start with them, as :func:`ssmkernels.data.evaluation_batches`
            yields.
        device: where the model runs.
        progress: show a progress bar.
    """
    if isinstance(model, str):
        model = build_embedding_model(model, 1, weights="imagenet", pooling="avg").to(memory_format=torch.channels_last)
    from tqdm import tqdm  # optional: nothing else here needs it

    model.to(device)
    training = model.training
    model.eval()
    features = []
    for batch in tqdm(batches, desc="features", unit="batch", disable=not progress, leave=False):
        images = batch if isinstance(batch, Tensor) else batch[0]
        features.append(model(images.to(device))[0].float().cpu())
    model.train(training)
    if not features:
        raise ValueError("batches is empty; it should hold at least one batch")
    return torch.cat(features)
