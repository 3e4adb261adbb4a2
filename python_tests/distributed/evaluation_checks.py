# SPDX-License-Identifier: BSD-3-Clause
"""What trainers measure: every rank embeds its run of images and keeps them; the figures are those of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from traffic import counted

from ssmkernels import data, metrics
from ssmkernels.distributed import all_gather_rows
from ssmkernels.trainers.evaluation import embed, retrieval, retrieval_figures

CPU = torch.device("cpu")


class Network(nn.Module):
    """Rows one by one, so that a batch of other images gives the same bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.flatten(1).to(self.dtype)
        return pixels[:, :5], pixels[:, 5:8]


def embedded(count: int, dtype: torch.dtype, rank: int, ranks: int) -> tuple[Tensor, ...]:
    draw = np.random.default_rng(count)
    images = data.ArrayImages(draw.integers(0, 256, (count, 4, 4), dtype=np.uint8), draw.integers(0, 4, count), 4)
    batches = data.evaluation_batches(images, 3, mean=(0.5,), std=(0.2,), rank=rank, world_size=ranks)
    return embed(Network(dtype), batches, device=CPU)


def check_on_four_embedding_of_a_run(group: dist.ProcessGroup) -> None:
    """Uneven runs, and with 3 images one that is empty, which is as wide and of the dtype of the others."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for count in (3, 26):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            run = slice(rank * count // ranks, (rank + 1) * count // ranks)
            own, whole = embedded(count, dtype, rank, ranks), embedded(count, dtype, 0, 1)
            for part, expected in zip(own, whole, strict=True):
                assert part.equal(expected[run])
                assert all_gather_rows(part).equal(expected)
            assert own[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def check_on_four_figures_of_runs(group: dist.ProcessGroup) -> None:
    pytest.importorskip("sklearn")
    rank, ranks, count = dist.get_rank(), dist.get_world_size(), 26
    run = slice(rank * count // ranks, (rank + 1) * count // ranks)
    _, embeddings, labels = embedded(count, torch.float32, rank, ranks)
    _, every_embedding, every_label = embedded(count, torch.float32, 0, 1)
    asked = np.arange(count) % 3 == 0
    expected = retrieval(every_embedding, every_label, asked, group="local")
    with counted() as (_, received):
        assert retrieval(embeddings, labels, asked) == pytest.approx(expected, rel=1e-12)
    assert received["receive"] == int((~asked).sum() - (~asked[run]).sum()) * (4 * 3 + 8)
    expected = retrieval(every_embedding, every_label, group="local")
    expected["NMI"] = metrics.nmi(every_embedding, every_label)
    assert retrieval_figures(embeddings, labels) == pytest.approx(expected, rel=1e-12)
