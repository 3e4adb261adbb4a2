# SPDX-License-Identifier: BSD-3-Clause
"""Bounds of the pairs family: a network with one hidden layer on pairs of rows, and a loss of its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bounds.rounding import EXP, Rounding, blocks

NETWORK = ("x", "y", "w1", "b1", "w2", "b2")


class _Network:
    """Hidden units a [n, m, h], their largest errors, and the logits [n, m] (listed pairs: n = p and m = 1) with
    theirs.

    a is a sum of d or 2d products and the bias, in any order (for "concat" w1·x and w1·y apart), so its error is γ_{2d
    + 4} of the sum of their magnitudes; |x − y| and x∘y round once more, to the half type where tensor cores take them
    so. A hidden unit within its error of 0 may be on or off. A logit is a sum of h products and the bias; for "concat",
    where a = A_i + B_j, it may be taken as Σ w2 max(A, −B) + (Σ w2 B + b2), so in the magnitudes of A and B, of units
    that are off too.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.rounding = rounding = Rounding.of(inputs["x"].dtype)
        self.x, self.y, self.w1, self.b1, self.w2, self.b2 = (inputs[name].double() for name in NETWORK)
        self.interaction, self.pairs = inputs.get("interaction", "concat"), inputs.get("pairs")
        self.left, self.right = self.x[:, None], self.y[None]
        if self.pairs is not None:
            self.left, self.right = self.x[self.pairs[:, 0], None], self.y[self.pairs[:, 1], None]
        left, right = torch.broadcast_tensors(self.left, self.right)
        self.phi = {
            "concat": lambda: torch.cat([left, right], dim=-1),
            "absdiff": lambda: (left - right).abs(),
            "product": lambda: left * right,
        }[self.interaction]()
        self.size = self.phi.abs() @ self.w1.abs().mT + self.b1.abs()
        self.operand = 0.0 if self.interaction == "concat" else rounding.half  # what a half type adds to φ
        error = (rounding.gamma(2 * self.x.shape[1] + 4) + self.operand) * self.size + rounding.tiny
        self.hidden = hidden = self.phi @ self.w1.mT + self.b1
        self.on, self.maybe = ~(hidden <= 0), hidden.abs() <= error  # PyTorch's gradient of relu passes a NaN
        self.possible = self.on | self.maybe
        units = hidden.relu()
        self.logits = units @ self.w2 + self.b2
        terms = (error * self.possible) @ self.w2.abs()
        sums = self._summed(units) @ self.w2.abs() + self.b2.abs()
        self.error = terms + rounding.gamma(len(self.w2) + 3) * (sums + terms) + rounding.tiny

    def _summed(self, units: Tensor) -> Tensor:
        """What w2 is multiplied with in a sum, by magnitude."""
        if self.interaction != "concat":
            return units
        dim = self.x.shape[1]
        left = self.phi[..., :dim] @ self.w1[:, :dim].mT + self.b1
        right = self.phi[..., dim:] @ self.w1[:, dim:].mT
        return torch.maximum(left, -right).abs() + right.abs()

    def gradients(self, grad: Tensor, grad_error: Tensor) -> dict[str, Tensor]:
        """Of all six arguments, from the gradients of the logits and their errors.

        s = g w2 1[a > 0] has the error of g, may be subnormal, and is all error where the unit may be on or off. Every
        gradient is a sum of s times its own factor; where a sum goes over pairs it is taken in blocks. ∂w2 may be taken
        as Σ A_i U_i + Σ B_j V_j, so in the magnitudes of A and B.
        """
        rounding = self.rounding
        rows, columns, hidden = self.size.shape
        if grad.shape != (rows, columns):
            grad, grad_error = grad.reshape(rows, columns), grad_error.reshape(rows, columns)
        w2 = self.w2.abs()
        s_size = ((grad.abs() + grad_error)[..., None] * self.possible) * w2
        s_error = (grad_error[..., None] * self.possible + grad.abs()[..., None] * self.maybe) * w2
        s_error = s_error + rounding.tiny * (s_size > 0).double()
        if self.operand and grad.numel():  # rounded over the largest
            s_error = s_error + rounding.half_tiny * (grad.abs() + grad_error).max() * self.possible * w2
        s = (grad[..., None] * self.on) * self.w2
        weights, half = self.w1.abs(), 4 * self.operand
        pairs = rows * columns
        errors, exact = {}, {}
        dim = self.x.shape[1]
        slopes = self._slopes()
        for name, index, slope in (("x", 0, slopes[0]), ("y", 1, slopes[1])):
            part = slice(0, dim) if index == 0 or self.interaction != "concat" else slice(dim, None)
            terms = rounding.gamma(blocks(max(rows, columns)) + hidden + 6) + half
            size = (s_size @ weights[:, part]) * slope.abs()
            moved = (s_error @ weights[:, part]) * slope.abs()
            errors[name] = self._per_row(index, moved + terms * size)
            exact[name] = self._per_row(index, (s @ self.w1[:, part]) * slope)
        terms = rounding.gamma(blocks(pairs) + 6)
        flat, phi = s_size.reshape(pairs, hidden), self.phi.reshape(pairs, self.phi.shape[-1])
        phi_error = (rounding.unit + self.operand) * phi.abs()
        moved = s_error.reshape(pairs, hidden).mT @ phi.abs() + flat.mT @ phi_error
        errors["w1"] = moved + (terms + half) * (flat.mT @ phi.abs())
        exact["w1"] = s.reshape(pairs, hidden).mT @ phi
        errors["b1"], exact["b1"] = s_error.sum((0, 1)) + terms * s_size.sum((0, 1)), s.sum((0, 1))
        along = (grad.abs() + grad_error)[..., None] * self.possible * self.size
        moved = grad_error[..., None] * self.possible * self.size
        more = rounding.gamma(blocks(pairs) + 2 * dim + 8) + half
        errors["w2"] = (moved + more * along).sum((0, 1))
        exact["w2"] = (grad[..., None] * (self.hidden * self.on)).sum((0, 1))
        errors["b2"] = grad_error.sum() + terms * (grad.abs() + grad_error).sum()
        exact["b2"] = grad.sum()
        return {f"grad {name}": rounding.stored(exact[name], errors[name]) for name in NETWORK}

    def _slopes(self) -> tuple[Tensor, Tensor]:
        """∂φ/∂x and ∂φ/∂y, but for w1."""
        one = torch.ones_like(self.phi[..., : self.x.shape[1]])
        if self.interaction == "concat":
            return one, one
        if self.interaction == "absdiff":
            sign = torch.sign(self.left - self.right)
            return sign, -sign
        return self.right * one, self.left * one

    def _per_row(self, index: int, values: Tensor) -> Tensor:
        if self.pairs is None:
            return values.sum(1 - index)
        rows = self.x if index == 0 else self.y
        return torch.zeros_like(rows).index_add(0, self.pairs[:, index], values[:, 0])


def pair_logits(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and the gradients of the network."""
    network = _Network(inputs)
    shape = network.error if network.pairs is None else network.error[:, 0]
    bounds = {"logits": shape}
    if "logits" in grads:
        grad = grads["logits"].double()
        bounds |= network.gradients(grad, torch.zeros_like(grad))
    return bounds


def pair_focal_loss(inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """FL of a logit with an error: FL falls as the signed logit rises, so it moves by no more than its values at both
    ends.

    Evaluated with an exponential and a logarithm, a loss has a relative error of (4 EXP + 8)u and of 2u·γ(softplus(s) +
    |s|), the exponent of (1 − p_t)^γ. The gradient moves by |FL''| ≤ γ²q^γ p² L + γ q^{γ+1} p L + (2γ + 1) q^{γ+1} p
    times the error of the logit (q = 1 − p, L = −log p), each factor changing by at most e^{error}. Where that error is
    above 1, no slope down to the lower end l of the logit exceeds (2γ + 2) min(1, 2q(l))^{γ+1}.
    """
    network = _Network(inputs)
    rounding, gamma = network.rounding, float(inputs.get("gamma", 2.0))
    signed, weight = _signed(inputs, network)
    error = network.error
    loss = weight * _focal(signed, gamma)
    moved = weight * torch.maximum(
        _focal(signed - error, gamma) - _focal(signed, gamma), _focal(signed, gamma) - _focal(signed + error, gamma)
    )
    evaluated = rounding.unit * (4 * EXP + 8 + 2 * gamma * (F.softplus(signed) + signed.abs()) + 2 * signed.abs())
    loss_error = moved + evaluated.clamp_max(1) * (loss + moved) + weight * rounding.tiny
    q, p, log = torch.sigmoid(-signed), torch.sigmoid(signed), F.softplus(-signed)
    power = q**gamma
    bend = (
        power
        * (gamma**2 * p * p * log + gamma * q * p * log + (2 * gamma + 1) * q * p)
        * ((gamma + 3) * error).clamp_max(50).exp()
    )
    slope = power * (gamma * p * log + q)
    steepest = 2 * (gamma + 1) * (2 * torch.sigmoid(error - signed)).clamp_max(1) ** (gamma + 1)
    slope_moved = torch.where(error > 1, steepest, (bend * error).clamp_max(2 * (gamma + 1)))
    slope_error = slope_moved + evaluated.clamp_max(1) * slope + rounding.tiny
    slope, slope_error = weight * slope, weight * slope_error

    reduction, counted = inputs.get("reduction", "mean"), (_counted(inputs, network)).sum().clamp_min(1)
    scale = 1.0 if reduction != "mean" else 1 / counted
    if reduction == "none":
        bounds = {"loss": loss_error if network.pairs is None else loss_error[:, 0]}
    else:
        total = loss_error.sum() + rounding.gamma(blocks(loss.numel()) + 3) * (loss + loss_error).sum()
        bounds = {"loss": total * scale + rounding.tiny}
    if "loss" in grads:
        grad = grads["loss"].double()
        grad = (grad.reshape(slope.shape) if reduction == "none" else grad.expand_as(slope)) * scale
        bounds |= network.gradients(
            -torch.sign(_sign(inputs, network)) * grad * slope, grad.abs() * (slope_error + 3 * rounding.unit * slope)
        )
    return bounds


def _focal(signed: Tensor, gamma: float) -> Tensor:
    return (-gamma * F.softplus(signed)).exp() * F.softplus(-signed)


def _labels(inputs: dict[str, Any], network: _Network) -> tuple[Tensor, Tensor]:
    if network.pairs is None:
        return inputs["x_labels"][:, None], inputs["y_labels"][None]
    return inputs["x_labels"][network.pairs[:, 0], None], inputs["y_labels"][network.pairs[:, 1], None]


def _counted(inputs: dict[str, Any], network: _Network) -> Tensor:
    """Which pairs count."""
    left, right = _labels(inputs, network)
    ignored = inputs.get("ignore_index", -1)
    return (left != ignored) & (right != ignored)


def _sign(inputs: dict[str, Any], network: _Network) -> Tensor:
    left, right = _labels(inputs, network)
    return torch.where(left == right, 1.0, -1.0).double()


def _signed(inputs: dict[str, Any], network: _Network) -> tuple[Tensor, Tensor]:
    """The logits, negated where labels differ, and α_t, 0 for pairs that do not count."""
    sign, alpha = _sign(inputs, network), inputs.get("alpha", 0.25)
    weight = torch.ones_like(sign) if alpha is None else torch.where(sign > 0, alpha, 1 - alpha).double()
    return network.logits * sign, weight * _counted(inputs, network)
