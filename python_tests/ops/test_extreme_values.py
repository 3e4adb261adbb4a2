# SPDX-License-Identifier: BSD-3-Clause
"""NaN in, NaN out; numbers of any scale; ties at thresholds. In float64 against the reference, where it is in range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssmkernels import ops
from ssmkernels.reference import memory as memory_reference
from ssmkernels.reference import pairs as pairs_reference
from ssmkernels.reference import ranking as ranking_reference

NAN = float("nan")


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(count: int, classes: int) -> Tensor:
    return torch.arange(count) % classes


def test_memory_update_makes_nan_of_a_slot_and_of_no_other(device: str) -> None:
    bank, fresh = draw(6, 4).to(device), draw(2, 4, seed=1).to(device)
    fresh[0, 1] = NAN
    slot_labels, index = torch.zeros(6, dtype=torch.int64, device=device), torch.tensor([0, 3], device=device)
    expected, expected_labels = bank.clone(), slot_labels.clone()
    ops.memory_update_(bank, slot_labels, index, fresh, torch.ones_like(index))
    memory_reference.memory_update_(expected, expected_labels, index, fresh, torch.ones_like(index))
    assert bank[0].isnan().all()
    torch.testing.assert_close(bank[1:], expected[1:], rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_memory_update_of_any_scale(scale: float, device: str) -> None:
    """A feature of 1e300 has a direction, one of 1e-300 counts as zeros and is divided by 1e-12."""
    bank, fresh = torch.zeros(2, 4, device=device, dtype=torch.float64), draw(1, 4).to(device) * scale
    ops.memory_update_(
        bank,
        torch.zeros(2, dtype=torch.int64, device=device),
        labels(1, 1).to(device),
        fresh,
        labels(1, 1).to(device),
        momentum=0.0,
    )
    expected = fresh[0] / 1e300 if scale > 1 else fresh[0] / 1e-12
    expected = expected / expected.norm() if scale > 1 else expected
    torch.testing.assert_close(bank[0], expected, rtol=1e-14, atol=0)


def test_logits_past_any_finite_stand_in_for_log_zero(device: str) -> None:
    """Slots of a class of probability 0 weigh nothing, whatever their logit."""
    query, bank = torch.full((2, 1), 1e20, device=device), torch.tensor([[1e15], [-1e15], [-2e15]], device=device)
    probs = torch.tensor([[0.0, 1.0], [0.0, 0.5]], device=device)
    unfolded = ops.unfold(query, bank, torch.tensor([0, 1, 1], device=device), probs)
    assert unfolded.tolist() == [[0.0, 1.0, 0.0]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("logit", [3e3, 3e4, 3e5])
def test_parts_of_a_bank_merge_at_large_logits(logit: float, dtype: torch.dtype, device: str) -> None:
    """Eight slots share the largest logit, and their labels are equally likely: the loss is log 8."""
    dim = 16
    query = torch.nn.functional.normalize(draw(1, dim, dtype=dtype), dim=1).repeat(5, 1).to(device)
    bank, bank_labels = torch.cat([query[:1].repeat(8, 1), -query[:1].repeat(8, 1)]), labels(16, 8).to(device)
    probs, temperature = torch.full((5, 8), 1 / 8, dtype=dtype, device=device), 1 / logit
    options = {"temperature_weak": temperature, "temperature_strong": temperature}
    first, *others = (
        ops.instance_matching_partial(query, query, bank[part], bank_labels[part], probs, **options)
        for part in (slice(0, 3), slice(3, 5), slice(5, 16))
    )
    for other in others:
        first = ops.merge_instance_matching(first, other)
    loss = ops.finish_instance_matching(first, query, probs, temperature_strong=temperature).loss
    # A difference of two logits, each with the rounding of a product of dim terms, of its scale and of three mixtures.
    allowed = 2 * (dim + 8) * torch.finfo(dtype).eps / 2 * logit
    assert (loss - math.log(8)).abs().max() <= allowed
    merged_probs, one_pass = first.aggregated, ops.aggregate(query, bank, bank_labels, 8, temperature=temperature)
    torch.testing.assert_close(merged_probs, one_pass, rtol=2 * allowed, atol=0)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("interaction", ["concat", "absdiff", "product"])
def test_a_row_of_nan_in_the_pair_network(interaction: str, listed: bool, device: str) -> None:
    """The logits that are NaN, and all gradients, are the reference's: relu passes a gradient at NaN, |x| does not."""
    features, hidden = 3, 5
    width = 2 * features if interaction == "concat" else features
    inputs = [
        draw(5, features),
        draw(7, features, seed=1),
        draw(hidden, width, seed=2),
        draw(hidden, seed=3),
        draw(hidden, seed=4),
        draw(seed=5),
    ]
    inputs[0][3] = NAN
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(7)).to(device) if listed else None
    results = []
    for library in (ops, pairs_reference):
        arguments = [tensor.to(device).requires_grad_() for tensor in (tensor.clone() for tensor in inputs)]
        logits = library.pair_logits(*arguments, interaction=interaction, pairs=pairs)
        grads = torch.autograd.grad(logits, arguments, draw(*logits.shape, seed=6).to(device))
        results.append([logits.detach(), *grads])
    assert results[0][0].isnan().any() and not results[0][0].isnan().all()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("exponent", [-1000, -600, 600, 1000])
def test_ranking_losses_of_any_scale(exponent: int, device: str) -> None:
    """Rows and margins times a power of two: the loss as many times as large, the same gradients."""
    rows, factor = draw(70, 9).to(device), 2.0**exponent
    classes = labels(70, 7).to(device)

    def loss(scale: float) -> tuple[Tensor, Tensor]:
        scaled = (rows * scale).requires_grad_()
        value = ops.pair_ranking_loss(scaled, classes, negative_margin=3.0 * scale)
        return value.detach() / scale, torch.autograd.grad(value, scaled)[0]

    for ours, expected in zip(loss(factor), loss(1.0), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


def test_similarity_moments_of_large_rows(device: str) -> None:
    rows, classes = draw(40, 6).to(device), labels(40, 4).to(device)
    for ours, expected in zip(
        ops.similarity_moments(rows * 2.0**1000, classes), ops.similarity_moments(rows, classes), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (1.0, -1.0), (0.5, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mined_pairs_of_whole_numbers(dtype: torch.dtype, thresholds: tuple[float, float], device: str) -> None:
    """Cosines of 0, ±½ and ±1 are on both sides of a threshold that is equal to them; those with zeros are 0."""
    draw_whole = torch.Generator().manual_seed(3)
    basis = torch.randint(-2, 3, (60, 3), generator=draw_whole).to(device, dtype)
    basis[0] = 0
    rows = draw(60, 5).to(device, dtype)
    options = {"positive_threshold": thresholds[0], "negative_threshold": thresholds[1], "negative_margin": 3.0}
    ours = ops.mined_pair_ranking_loss(rows, basis, **options)
    expected = ranking_reference.mined_pair_ranking_loss(rows.double(), basis.double(), **options)
    # One pair more or less on a side would change the mean of its 10³ terms or so by 1e-4.
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
