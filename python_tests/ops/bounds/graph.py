# SPDX-License-Identifier: BSD-3-Clause
"""Bounds of the graph family: conjugate gradients by their residual and the inverse, and weights of edges by a softmax
per edge.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bounds.rounding import EXP, Rounding, softmax


def _rows(crow: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff().long())


def laplacian_solve(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """x − x* = A⁻¹ r: |x − x*|_i ≤ ‖row i of A⁻¹ D‖·‖D⁻¹ r‖, and ‖D⁻¹ r‖ ≤ rtol ‖D⁻¹ b‖ is what the op promises, beside
    the rounding of the residual that it looks at. An iteration that stops within rtol may use all of it: twice rtol is
    allowed, so that a margin of one half says that the promise was kept.

    Gradients: ∂rhs = λ solves A λ = ∂x and has the same bound; ∂w_ij = −Σ_c λ_i (x_i − x_j), ∂dissimilarity_ij = −Σ_c
    λ_i (x_i + x_j) and ∂diagonal_i = −Σ_c λ_i x_i are sums over columns of products of two values with an error.
    """
    rounding = Rounding.of(inputs["rhs"].dtype)
    system = _System(inputs, rounding)
    x, x_error = system.solve(inputs["rhs"].double())
    bounds = {"solution": x_error}
    if "solution" not in grads:
        return bounds
    adjoint, adjoint_error = system.solve(grads["solution"].double())
    rows, col = system.rows, system.col
    sums = rounding.gamma(x.shape[1] + 3)

    def product_error(left: Tensor, left_error: Tensor, right: Tensor, right_error: Tensor, size: Tensor) -> Tensor:
        terms = left_error * (right.abs() + right_error) + left.abs() * right_error
        return (terms + sums * left.abs() * size).sum(1)

    ends, ends_error = x.abs()[rows] + x.abs()[col], x_error[rows] + x_error[col]
    left, left_error = adjoint[rows], adjoint_error[rows]
    gradients = {
        "weight": (
            product_error(left, left_error, x[rows] - x[col], ends_error, ends),
            -(left * (x[rows] - x[col])).sum(1),
        ),
        "dissimilarity": (
            product_error(left, left_error, x[rows] + x[col], ends_error, ends),
            -(left * (x[rows] + x[col])).sum(1),
        ),
        "diagonal": (product_error(adjoint, adjoint_error, x, x_error, x.abs()), -(adjoint * x).sum(1)),
        "rhs": (adjoint_error, adjoint),
    }
    return bounds | {f"grad {name}": rounding.stored(value, error) for name, (error, value) in gradients.items()}


class _System:
    """A, its inverse, and what conjugate gradients promise of a column."""

    def __init__(self, inputs: dict[str, Any], rounding: Rounding) -> None:
        self.rows, self.col = _rows(inputs["crow"]), inputs["col"].long()
        nodes = len(inputs["crow"]) - 1
        weight, diagonal = inputs["weight"].double(), inputs["diagonal"].double()
        similar = weight.new_zeros(nodes, nodes).index_put((self.rows, self.col), weight, accumulate=True)
        self.matrix, self.size = (
            torch.diag(diagonal + similar.sum(1)) - similar,
            torch.diag(diagonal + similar.sum(1)) + similar,
        )
        if inputs.get("dissimilarity") is not None:
            values = inputs["dissimilarity"].double()
            dissimilar = weight.new_zeros(nodes, nodes).index_put((self.rows, self.col), values, accumulate=True)
            self.matrix = self.matrix + torch.diag(dissimilar.sum(1)) + dissimilar
            self.size = self.size + torch.diag(dissimilar.sum(1)) + dissimilar
        self.scale = self.matrix.diagonal()[:, None]
        self.scaled_rows = torch.linalg.vector_norm(torch.linalg.inv(self.matrix) * self.scale.T, dim=1)
        self.rtol = 2 * float(inputs.get("rtol", 1e-6))
        self.rounding = rounding.gamma(int(inputs["crow"].diff().max()) + 8) if nodes else 0.0

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.linalg.solve(self.matrix, rhs)
        terms = self.size @ x.abs() + rhs.abs()
        residual = self.rtol * torch.linalg.vector_norm(rhs / self.scale, dim=0)
        residual = residual + self.rounding * torch.linalg.vector_norm(terms / self.scale, dim=0)
        return x, self.scaled_rows[:, None] * residual


def leave_one_edge_out(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """out = ω ω' (1 − z·z') of the two directions of an edge, ω = 1 − H/log C, H the entropy of z = softmax(λ(D_ii F_i
    − w F_j)).

    A logit has an error of γ(row + 3) of its two terms. Where z becomes z(1 + ρ), with Σ_c z_c ρ_c = 0, H moves by −Σ_c
    z_c ρ_c (log z_c + H) − KL(z(1 + ρ) ‖ z), and the divergence is at most Σ_c z_c ρ_c²: all of it where z is uniform,
    as at a self-loop, whose logits cancel. H rounds as log s − Σ e a/s, a being the logits less their maximum. With G =
    g_e + g_e', the gradient of a logit is G ω' (1 − z·z')·z(log z + H)/log C − G ω ω' z(z' − z·z'); it flows to F_i
    times λ D_ii, to F_j times −λ w, to w_ij as −λ F_j, and to every weight of row i, since D_ii is their sum, as λ F_i.
    """
    edges = _Edges(inputs)
    bounds = {"dissimilarity": edges.value_error}
    if "dissimilarity" in grads:
        bounds |= edges.gradient_errors(grads["dissimilarity"].double())
    return bounds


class _Edges:
    def __init__(self, inputs: dict[str, Any]) -> None:
        self.rounding = rounding = Rounding.of(inputs["propagated"].dtype)
        self.rows, self.col, self.reverse = _rows(inputs["crow"]), inputs["col"].long(), inputs["reverse"].long()
        self.weight, self.labels = inputs["weight"].double(), inputs["propagated"].double()
        self.nodes, self.classes = self.labels.shape
        self.scale = float(inputs.get("logit_scale", 4.0))
        self.longest = int(inputs["crow"].diff().max()) if self.nodes else 0
        self.degree = self.weight.new_zeros(self.nodes).index_add(0, self.rows, self.weight)
        self.degree_error = rounding.gamma(self.longest) * self.degree
        own, other = self.degree[self.rows, None] * self.labels[self.rows], self.weight[:, None] * self.labels[self.col]
        logits = self.scale * (own - other)
        error = (
            self.scale * (rounding.gamma(self.longest + 3) * own.abs() + rounding.gamma(4) * other.abs())
            + rounding.tiny
        )
        self.z = softmax(logits, error, rounding)
        self._entropy(logits)
        self._value()

    def _entropy(self, logits: Tensor) -> None:
        z, unit = self.z, self.rounding.unit
        self.log_z = logits - z.log_normalizer[:, None]
        away = logits.amax(1, keepdim=True) - logits if self.classes else logits
        self.entropy = -(z.probs * self.log_z.clamp_min(-750)).sum(1)
        # z.relative holds the errors of the logits and of e^a; the rounding of Σ e a and of log s comes on top.
        moved = (z.probs * (self.log_z + self.entropy[:, None]).abs() * z.relative.clamp_max(1)).sum(1)
        moved = moved + (z.probs * z.relative.square()).nan_to_num(nan=0.0).sum(1)  # 0·∞ where z vanishes
        rounded = (z.sum_error + self.rounding.gamma(self.classes + 4)) * ((z.probs * away).sum(1) + 1)
        self.log_classes = math.log(self.classes)
        self.entropy_error = moved + rounded + unit * EXP * self.log_classes
        self.omega = 1 - self.entropy / self.log_classes
        self.omega_error = self.entropy_error / self.log_classes + 3 * unit

    def _value(self) -> None:
        z, reverse, unit = self.z, self.reverse, self.rounding.unit
        both = z.probs * z.probs[reverse]
        self.cross = both.sum(1)
        relative = z.relative + z.relative[reverse] + z.relative * z.relative[reverse]
        self.cross_error = (both * relative).sum(1) + (
            self.rounding.gamma(self.classes + 3) + 2 * z.sum_error
        ) * self.cross
        self.cross_error = self.cross_error.clamp_max(1)
        self.apart, self.apart_error = 1 - self.cross, self.cross_error + unit
        omega, omega_error = self.omega.clamp(0, 1), self.omega_error.clamp_max(1)
        back, back_error = omega[reverse], omega_error[reverse]
        self.value_error = (
            omega_error * (back + back_error) * (self.apart + self.apart_error)
            + omega * back_error * (self.apart + self.apart_error)
            + omega * back * self.apart_error
            + self.rounding.gamma(4) * omega * back * self.apart
            + self.rounding.tiny
        )

    def gradient_errors(self, grad: Tensor) -> dict[str, Tensor]:
        rounding, rows, col = self.rounding, self.rows, self.col
        slope, error = self._logit_gradient(grad)
        left, right = self.labels[rows], self.labels[col]
        own, other = self.degree[rows, None], self.weight[:, None]

        def scatter(index: Tensor, values: Tensor) -> Tensor:
            return values.new_zeros(self.nodes, *values.shape[1:]).index_add(0, index, values)

        exact = self.scale * (scatter(rows, own * slope) - scatter(col, other * slope))
        size = scatter(rows, own * slope.abs()) + scatter(col, other * slope.abs())
        moved = scatter(rows, own * error + self.degree_error[rows, None] * slope.abs()) + scatter(col, other * error)
        labels_error = self.scale * (moved + rounding.gamma(2 * self.longest + 6) * size)

        degree_size, degree_error = (scatter(rows, (left.abs() * terms).sum(1))[rows] for terms in (slope.abs(), error))
        weight_size, weight_error = ((right.abs() * terms).sum(1) for terms in (slope.abs(), error))
        weight_exact = self.scale * (scatter(rows, (left * slope).sum(1))[rows] - (right * slope).sum(1))
        sums = rounding.gamma(self.classes + self.longest + 6)
        weights_error = self.scale * (degree_error + weight_error + sums * (degree_size + weight_size))
        return {
            "grad weight": rounding.stored(weight_exact, weights_error),
            "grad propagated": rounding.stored(exact, labels_error),
        }

    def _logit_gradient(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of every logit, and its error."""
        z, reverse, unit = self.z, self.reverse, self.rounding.unit
        both = (grad + grad[reverse]).abs()
        omega, back = self.omega.clamp(0, 1), self.omega[reverse].clamp(0, 1)
        omega_error, back_error = self.omega_error.clamp_max(1), self.omega_error[reverse].clamp_max(1)
        entropy_factor = both * back * self.apart / self.log_classes
        entropy_error = (
            both * (back_error * (self.apart + self.apart_error) + back * self.apart_error) / self.log_classes
        )
        cross_factor = both * omega * back
        cross_error = both * (omega_error * (back + back_error) + omega * back_error)
        sign = torch.sign(grad + grad[reverse])[:, None]

        surprise = self.log_z.clamp_min(-750) + self.entropy[:, None]
        to_entropy = z.probs * surprise
        log_error = (
            z.relative + self.entropy_error[:, None] + unit * (self.log_z.clamp_min(-750).abs() + self.entropy[:, None])
        )
        to_entropy_error = z.error * surprise.abs() + z.probs * (1 + z.relative) * log_error
        other = z.probs[reverse]
        to_cross = z.probs * (other - self.cross[:, None])
        to_cross_error = z.error * (other - self.cross[:, None]).abs() + z.probs * (1 + z.relative) * (
            other * z.relative[reverse] + self.cross_error[:, None] + unit * (other + self.cross[:, None])
        )
        # Where rounding takes ω or 1 − z·z' below 0 it is cut off, and its gradient with it: there the whole term is in
        # doubt, in the reference as in the op.
        cut, cross_cut = (self.omega <= self.omega_error)[:, None], (self.apart <= self.apart_error)[:, None]
        slope = sign * (entropy_factor[:, None] * to_entropy - cross_factor[:, None] * to_cross)
        error = (
            entropy_error[:, None] * (to_entropy.abs() + to_entropy_error)
            + entropy_factor[:, None] * torch.where(cut, 2 * to_entropy.abs() + to_entropy_error, to_entropy_error)
            + cross_error[:, None] * (to_cross.abs() + to_cross_error)
            + cross_factor[:, None] * torch.where(cross_cut, 2 * to_cross.abs() + to_cross_error, to_cross_error)
            + self.rounding.gamma(6)
            * (entropy_factor[:, None] * to_entropy.abs() + cross_factor[:, None] * to_cross.abs())
        )
        return slope, error
