# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch

from ssmkernels.nn import PrototypeHead, sinkhorn_codes


def published_codes(scores, epsilon, iterations):
    """As SwAV's authors write it, with all its factors."""
    q = torch.exp(scores / epsilon).t()
    prototypes, rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / prototypes
        q = q / q.sum(dim=0, keepdim=True) / rows
    return (q * rows).t()


def cosines(rows, prototypes, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    z, c = (torch.nn.functional.normalize(torch.randn(n, 16, generator=draw, dtype=dtype)) for n in (rows, prototypes))
    return z @ c.t()


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize(
    ("rows", "prototypes", "epsilon"),
    [(64, 30, 0.05), (7, 50, 0.05), (1, 3, 0.2), (100, 1, 0.05)],
)
def test_codes_are_the_published_ones(rows, prototypes, epsilon, iterations):
    scores = cosines(rows, prototypes)
    expected = published_codes(scores, epsilon, iterations)
    torch.testing.assert_close(
        sinkhorn_codes(scores, epsilon=epsilon, iterations=iterations),
        expected,
        rtol=1e-10,
        atol=1e-14,
    )
    torch.testing.assert_close(
        sinkhorn_codes(scores.float(), epsilon=epsilon, iterations=iterations), expected.float(), rtol=1e-4, atol=1e-7
    )


def test_prototypes_become_equally_heavy():
    scores = cosines(400, 20)
    scores[:, 3] += 0.8  # every row's favourite
    assert (scores.argmax(dim=1) == 3).float().mean() > 0.8
    codes = sinkhorn_codes(scores, iterations=3)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(400, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((20,), 20.0, dtype=torch.float64), rtol=0.3, atol=0)
    many = sinkhorn_codes(scores, iterations=60)
    torch.testing.assert_close(many.sum(dim=0), torch.full((20,), 20.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_extreme_scores_stay_finite():
    scores = 1e4 * cosines(20, 5, torch.float32)
    codes = sinkhorn_codes(scores, epsilon=1e-3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(20))


def test_codes_have_no_gradient_and_half_scores_float32():
    codes = sinkhorn_codes(cosines(8, 4, torch.float32).requires_grad_())
    assert not codes.requires_grad
    assert sinkhorn_codes(cosines(8, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (torch.zeros(3), {}, ValueError, r"scores must be \[N, K\], got shape \[3\]"),
        (torch.zeros(0, 3), {}, ValueError, r"scores must be \[N, K\] with N, K > 0, got shape \[0, 3\]"),
        (torch.zeros(3, 3, dtype=torch.int64), {}, TypeError, "scores must be float32"),
        (torch.zeros(3, 3), {"epsilon": 0.0}, ValueError, r"epsilon must be in \[1e-18, 1e\+18\], got 0"),
        (torch.zeros(3, 3), {"epsilon": 1e-300}, ValueError, r"epsilon must be in \[1e-18, 1e\+18\], got 1e-300"),
        (torch.zeros(3, 3), {"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
    ],
)
def test_bad_scores(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        sinkhorn_codes(arguments, **settings)


def test_head():
    torch.manual_seed(0)
    head = PrototypeHead(12, 20, 6, 9).eval()
    features = torch.randn(5, 12)
    z, scores = head(features)
    assert (z.shape, scores.shape) == ((5, 6), (5, 9))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(head.prototypes.weight.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(scores, z @ head.prototypes.weight.t())
    linear, norm, _, last = head.projection
    expected = torch.nn.functional.normalize(last(norm(linear(features)).relu()))
    torch.testing.assert_close(z, expected)
    with torch.no_grad():
        head.prototypes.weight.mul_(3)
    head.normalize_prototypes_()
    torch.testing.assert_close(head(features)[1], scores)
