# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch

from ssmkernels.nn.distribution_alignment import DistributionAlignment


def batches(count: int, rows: int = 6, classes: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, classes, generator=generator).mul(2).softmax(dim=1) for _ in range(count)]


def test_divides_by_the_mean_of_the_last_batches():
    align = DistributionAlignment(4, queue_length=3)
    seen = batches(5)
    for step, probs in enumerate(seen):
        aligned = align(probs)
        average = torch.stack([p.mean(dim=0) for p in seen[max(0, step - 2) : step + 1]]).mean(dim=0)
        expected = probs / average
        torch.testing.assert_close(aligned, expected / expected.sum(dim=1, keepdim=True))


def test_one_batch_is_pulled_to_uniform():
    probs = batches(1, rows=400)[0] * torch.tensor([8.0, 1.0, 1.0, 1.0])
    probs = probs / probs.sum(dim=1, keepdim=True)
    aligned = DistributionAlignment(4)(probs)
    spread = (aligned.mean(dim=0) - 0.25).abs().max()
    assert spread < 0.5 * (probs.mean(dim=0) - 0.25).abs().max()
    torch.testing.assert_close(aligned.sum(dim=1), torch.ones(400))


@pytest.mark.parametrize(
    "probs",
    [torch.eye(4)[[0, 0, 1]], torch.eye(4)[[2]], torch.tensor([[1.0 - 1e-30, 1e-30, 1e-44, 0.0]])],
)
def test_a_class_without_mass_gives_no_nan(probs):
    aligned = DistributionAlignment(4)(probs)
    assert aligned.isfinite().all()
    torch.testing.assert_close(aligned.sum(dim=1), torch.ones(len(probs)))
    assert (aligned[:, probs.sum(dim=0) == 0] == 0).all()


def test_is_detached_and_leaves_its_input_alone():
    probs = batches(1)[0].requires_grad_()
    before = probs.detach().clone()
    assert not DistributionAlignment(4)(probs).requires_grad
    assert torch.equal(probs, before)


def test_eval_reads_without_writing():
    align = DistributionAlignment(4)
    align(batches(1)[0])
    queue = align.queue.clone()
    align.eval()(batches(2)[1])
    assert torch.equal(align.queue, queue)
