# SPDX-License-Identifier: BSD-3-Clause
"""What the bounds are made of: unit roundoffs, sums, products of matrices, exponentials and softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Units of roundoff in an exponential or a logarithm: 2 ulp, which is what ex2.approx and lg2.approx of a GPU promise.
EXP = 4
# Terms that a kernel adds in its own precision; sums of more pairs are sums of such blocks.
BLOCK = 1024


@dataclass(frozen=True)
class Rounding:
    """The rounding of an op whose inputs have a dtype: half types are computed in float32, and their gradients rounded
    to them.
    """

    unit: float  # largest relative error of one operation
    tiny: float  # smallest normal number: below it, results may be flushed to 0
    half: float  # unit roundoff of a half type, 0 otherwise
    half_tiny: float  # its spacing about 0
    exact_unit: float  # what the evaluation in float64 itself adds

    @classmethod
    def of(cls, dtype: torch.dtype) -> Rounding:
        computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        is_half = dtype in (torch.bfloat16, torch.float16)
        given = torch.finfo(dtype)
        return cls(
            computed.eps / 2,
            computed.tiny,
            given.eps / 2 if is_half else 0.0,
            given.smallest_normal * given.eps if is_half else 0.0,
            torch.finfo(torch.float64).eps / 2,
        )

    def gamma(self, operations: float) -> float:
        """Largest relative error of ``operations`` roundings on one path: n·u/(1 − n·u). Of a sum of n terms in any
        order: γ_n Σ|terms|.
        """
        share = operations * self.unit
        return share / (1 - share) if share < 0.5 else math.inf

    def exact_gamma(self, operations: float) -> float:
        """The same where a kernel computes in float64, as it does for statistics."""
        return operations * self.exact_unit

    def stored(self, value: Tensor, error: Tensor) -> Tensor:
        """The error of a gradient once it is rounded to the dtype of its input: a half type may be a unit in the last
        place off, not half.
        """
        return error + 2 * self.half * (value.abs() + error) + self.half_tiny + self.tiny


def blocks(terms: int) -> float:
    """Roundings on a path through a sum over pairs: within a block, and over the sums of blocks."""
    return min(terms, BLOCK + terms / BLOCK)


def products(left: Tensor, right: Tensor, rounding: Rounding, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """left·rightᵀ·scale and its error: γ_{D+3} Σ_d |left_d||right_d|·|scale|, 3 for the scale, itself rounded, on
    either factor.
    """
    dim = left.shape[-1]
    error = rounding.gamma(dim + 3) * (left.abs() @ right.abs().mT) + (dim + 1) * rounding.tiny
    return left @ right.mT * scale, error * abs(scale) + rounding.tiny


@dataclass(frozen=True)
class Softmax:
    """Probabilities over the last dimension with their relative errors, and the log-normaliser with its error."""

    probs: Tensor
    relative: Tensor
    log_normalizer: Tensor
    log_error: Tensor
    sum_error: float  # relative error of a sum over the softmax beyond that of its terms
    tiny: float  # probabilities below it may be flushed to 0

    @property
    def error(self) -> Tensor:
        return self.probs * self.relative + self.tiny


def softmax(logits: Tensor, error: Tensor, rounding: Rounding) -> Softmax:
    """A softmax computed in one sweep with a running maximum, of logits with an error.

    Term j is e^{w_j − m}: its relative error is the error of w_j, the rounding of w_j − m and of the change of base
    (each u·|w_j − m|), and EXP roundings. A raised maximum multiplies what was summed by another exponential; the
    raises add up to at most the range of the logits, and there is one per 32 slots at most. The normaliser is a mean of
    the terms' errors, weighted by the probabilities, and a sum of K terms.

    A term may be flushed to 0 three times, over a sum of 1 or more: as an exponential, below e^-87.3 or e^-708, which
    is up to 1.5 times the smallest normal number, as a product with a raised maximum, and as a product with 1 / sum.
    """
    slots = logits.shape[-1]
    finite = torch.where(logits.isfinite(), logits, torch.nan)
    span = (logits.amax(-1, keepdim=True) - finite).nan_to_num(nan=0.0, posinf=torch.inf)
    relative = error + rounding.unit * (2 * span + 4 * span.amax(-1, keepdim=True))
    probs = logits.softmax(-1)
    sum_error = rounding.gamma(slots + EXP * (2 + slots / 32) + 4)
    mean = (probs * relative.nan_to_num(posinf=0.0)).sum(-1, keepdim=True) + sum_error
    normalizer = logits.logsumexp(-1, keepdim=True)
    largest = logits.amax(-1, keepdim=True).abs()
    log_error = mean + rounding.unit * (2 * normalizer.abs() + EXP * math.log(slots + 1) + largest)
    relative = torch.expm1(relative + mean + sum_error)
    return Softmax(probs, relative, normalizer[..., 0], log_error[..., 0], sum_error, 4 * rounding.tiny)
