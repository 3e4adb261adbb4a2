# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of the gradients, in plain PyTorch, tile by tile: nothing of the size of all pairs is stored.

A gradient is a function dx = G(grad, x). Each function here takes the cotangents of the gradient's outputs, written v,
and gives the gradients of ⟨v, G(grad, x)⟩: that of ``grad`` is the derivative of the op along v. The formulas are
differentiable, so that derivatives of any order are right; only while they are recorded do the tiles stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ELEMENTS = 1 << 18  # of the largest tensor of a tile


def tiles(count: int, elements: int) -> Iterator[slice]:
    """Slices of ``count`` items of so many elements each."""
    step = max(TILE_ELEMENTS // max(elements, 1), 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _sum_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """[count, c], row i being the sum of the rows [p, c] whose index [p] is i; added in a fixed order, unlike
    index_add on CUDA.
    """
    return torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False)


def aggregate(
    v: Tensor, grad: Tensor, query: Tensor, bank: Tensor, bank_labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of the gradient of aggregate, dq_b = Σ_j q_j (g_j − ḡ) bank_j/t with g_j = grad[b, y_j] and ḡ = Σ_j q_j g_j.

    With s_j = v_b·bank_j/t and means under q: ∂grad[b, c] = Σ_{j: y_j = c} q_j (s_j − s̄), and
    ∂query_b = Σ_j q_j ((g_j − ḡ)(s_j − s̄) − cov(g, s)) bank_j/t.

    Args:
        v: [B, D], dtype of grad.
        grad: [B, L].
        query: [B, D].
        bank: [K, D].
        bank_labels: [K] in [0, L).
        temperature: t.

    Returns:
        Gradients of grad [B, L] and of query [B, D], dtype of grad.
    """
    dtype = grad.dtype
    query, v = query.to(dtype) / temperature, v / temperature

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        for tile in tiles(bank.shape[0], max(query.shape)):
            features = bank[tile].to(dtype)
            yield features, bank_labels[tile], query @ features.t(), v @ features.t()

    log_normalizer = torch.stack([logits.logsumexp(dim=1) for _, _, logits, _ in parts()]).logsumexp(dim=0)
    mean_grad = mean_slope = mean_product = grad.new_zeros(grad.shape[0])
    aggregated = moved = torch.zeros_like(grad)
    for _, labels, logits, slopes in parts():
        q, g = (logits - log_normalizer[:, None]).exp(), grad.index_select(1, labels)
        mean_grad = mean_grad + (q * g).sum(dim=1)
        mean_slope = mean_slope + (q * slopes).sum(dim=1)
        mean_product = mean_product + (q * g * slopes).sum(dim=1)
        aggregated = aggregated + _sum_rows(q.t(), labels, grad.shape[1]).t()
        moved = moved + _sum_rows((q * slopes).t(), labels, grad.shape[1]).t()
    covariance = mean_product - mean_grad * mean_slope
    grad_query = torch.zeros_like(query)
    for features, labels, logits, slopes in parts():
        q, g = (logits - log_normalizer[:, None]).exp(), grad.index_select(1, labels)
        products = (g - mean_grad[:, None]) * (slopes - mean_slope[:, None])
        grad_query = grad_query + (q * (products - covariance[:, None])) @ features
    return moved - aggregated * mean_slope[:, None], grad_query / temperature


Coefficients = Callable[[slice, slice, Tensor], Tensor]


def pair_ranking_loss(
    v: Tensor,
    v_references: Tensor | None,
    grad: Tensor,
    rows: Tensor,
    references: Tensor | None,
    coefficients: Coefficients,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of the gradient of a ranking loss, de_i = g Σ_j c_ij (e_i − r_j)/d_ij and dr_j = −g Σ_i c_ij (e_i − r_j)/d_ij.

    With u_ij = v_i − v'_j and p_ij = u_ij·(e_i − r_j): ∂g = Σ_ij c_ij p_ij/d_ij, and, with r_j likewise and the other
    sign, ∂e_i = g Σ_j c_ij (u_ij/d_ij − p_ij (e_i − r_j)/d_ij³). A pair at distance 0 has no part in it, as in the
    gradient.

    Args:
        v, v_references: [n, d] and [m, d], cotangents of de and dr.
        grad: [] g, the gradient of the loss.
        rows: e [n, d].
        references: r [m, d], or None: the pairs of the rows, where c_ij = 0 for i = j, and v_references means nothing.
        coefficients: (rows, columns, distances of them) -> c of the tile: w₊ on positive pairs with a loss, −w₋ on
            negative ones, else 0.

    Returns:
        Gradients of grad, rows and references (None without).
    """
    others = rows if references is None else references
    v_others = v if references is None or v_references is None else v_references
    column_tiles = list(tiles(others.shape[0], rows.shape[1]))
    width = max((tile.stop - tile.start for tile in column_tiles), default=1)
    grad_grad, row_parts = torch.zeros_like(grad), []
    column_parts = [torch.zeros_like(others[tile]) for tile in column_tiles]
    for row_tile in tiles(rows.shape[0], width * rows.shape[1]):
        row_part = torch.zeros_like(rows[row_tile])
        for place, column_tile in enumerate(column_tiles):
            differences = rows[row_tile, None] - others[None, column_tile]
            moves = v[row_tile, None] - v_others[None, column_tile]
            squares = differences.square().sum(dim=2)
            apart = squares != 0
            distances = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
            per_distance = coefficients(row_tile, column_tile, distances) / torch.where(apart, distances, torch.inf)
            along = per_distance * (moves * differences).sum(dim=2)
            per_square = torch.where(apart, along / torch.where(apart, squares, 1), 0)
            terms = grad * (per_distance[:, :, None] * moves - per_square[:, :, None] * differences)
            grad_grad = grad_grad + along.sum()
            row_part = row_part + terms.sum(dim=1)
            column_parts[place] = column_parts[place] - terms.sum(dim=0)
        row_parts.append(row_part)
    grad_rows = torch.cat(row_parts) if row_parts else torch.zeros_like(rows)
    grad_others = torch.cat(column_parts) if column_parts else torch.zeros_like(others)
    if references is None:
        return grad_grad, grad_rows + grad_others, None
    return grad_grad, grad_rows, grad_others


def similarity_moments(v: Tensor, grad: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the gradient of the moments μ₊, σ₊², μ₋, σ₋² of the cosines s_ij = r_i·r_j, r_i = f_i/‖f_i‖, over ordered
    pairs i ≠ j.

    With G_ij = ∂L/∂s_ij = (g_μ + 2 g_σ (s_ij − μ))/P of the pair's part and q_i = 2 Σ_j G_ij r_j, df_i = (q_i − r_i
    (r_i·q_i))/‖f_i‖. Along v, with a dot for the derivative: ṙ_i = (v_i − r_i (r_i·v_i))/‖f_i‖, ṡ_ij = ṙ_i·r_j +
    r_i·ṙ_j, μ̇ = Σ ṡ/P, (σ²)˙ = 2 Σ (s − μ) ṡ/P, which are the gradient of g, and Ġ_ij = 2 g_σ (ṡ_ij − μ̇)/P. The
    Hessian is symmetric, so that the derivative of df along v is the gradient of f.

    Args:
        v: [n, d].
        grad: [4] gradient of the moments.
        features: f [n, d], dtype of grad.
        labels: [n].

    Returns:
        Gradients of grad [4] and of features [n, d].
    """
    squares = features.square().sum(dim=1, keepdim=True)
    present = squares.detach().sqrt() >= 1e-12  # below, a row has no direction
    present |= squares.isnan()
    inverse = torch.where(present, torch.where(present, squares, 1).rsqrt(), 0)
    unit = features * inverse
    stretch = (unit * v).sum(dim=1, keepdim=True) * inverse
    turn = v * inverse - unit * stretch

    def parts() -> Iterator[tuple[slice, tuple[Tensor, Tensor], Tensor, Tensor]]:
        for tile in tiles(len(features), len(features)):
            same = labels[tile, None] == labels
            other = (
                torch.arange(len(features), device=labels.device)
                != torch.arange(len(features), device=labels.device)[tile, None]
            )
            cosines = unit[tile] @ unit.t()
            changes = turn[tile] @ unit.t() + unit[tile] @ turn.t()
            yield tile, ((same & other).to(unit.dtype), (~same).to(unit.dtype)), cosines, changes

    count, total, change = grad.new_zeros(2), grad.new_zeros(2), grad.new_zeros(2)
    for _, masks, cosines, changes in parts():
        count = count + torch.stack([mask.sum() for mask in masks])
        total = total + torch.stack([(mask * cosines).sum() for mask in masks])
        change = change + torch.stack([(mask * changes).sum() for mask in masks])
    count = count.clamp_min(1)
    mean, change = total / count, change / count
    weights, slopes = grad[0::2] / count, 2 * grad[1::2] / count
    spread_change, sums, zero = grad.new_zeros(2), [], grad.new_zeros(())
    for tile, masks, cosines, changes in parts():
        pull = sum((mask * (weights[k] + slopes[k] * (cosines - mean[k])) for k, mask in enumerate(masks)), zero)
        pull_change = sum((mask * slopes[k] * (changes - change[k]) for k, mask in enumerate(masks)), zero)
        products = [(mask * (cosines - mean[k]) * changes).sum() for k, mask in enumerate(masks)]
        spread_change = spread_change + 2 * torch.stack(products) / count
        sums.append((2 * pull @ unit, 2 * (pull_change @ unit + pull @ turn), tile))
    grad_grad = torch.stack([change, spread_change], dim=1).flatten()
    if not sums:
        return grad_grad, torch.zeros_like(features)
    q, q_change = torch.cat([parts[0] for parts in sums]), torch.cat([parts[1] for parts in sums])
    along = (unit * q).sum(dim=1, keepdim=True)
    along_change = (turn * q + unit * q_change).sum(dim=1, keepdim=True)
    return grad_grad, (q_change - turn * along - unit * along_change - stretch * (q - unit * along)) * inverse


def pair_logits(
    v: tuple[Tensor, ...], grad: Tensor, network: tuple[Tensor, ...], pairs: Tensor | None, interaction: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of the gradient of the logits l = w2·relu(z) + b2, z = w1·φ(x_i, y_j) + b1, with active units m = [z > 0].

    Along v, with a dot for the derivative: l̇ = Σ_h m (v_w2 z + w2 ż) + v_b2, the gradient of grad. The others are
    those of Σ grad·l̇, by way of ∂z = grad·m·v_w2 and ∂ż = grad·m·w2 of each pair.

    Args:
        v: cotangents of the gradients of x, y, w1, b1, w2 and b2, of their shapes, dtype of grad.
        grad: [n, m], or [p] with pairs.
        network: x [n, d], y [m, d], w1 [h, 2d] or [h, d], b1 [h], w2 [h], b2 [].
        pairs: [p, 2], or None for all pairs.
        interaction: "concat", "absdiff" or "product".

    Returns:
        Gradients of grad, and of x, y, w1, b1, w2 and b2, dtype of grad.
    """
    network = tuple(parameter.to(grad.dtype) for parameter in network)
    if interaction == "concat":
        changes, grads = _concat_logits(v, grad.flatten(), network, pairs)
    else:
        changes, grads = _interacting_logits(v, grad.flatten(), network, pairs, interaction)
    return (changes + v[5]).reshape(grad.shape), (*grads, torch.zeros_like(network[5]))


def _pair_tiles(
    count: int, columns: int, elements: int, pairs: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pairs in tiles: their places among all, and their rows of x and of y."""
    for tile in tiles(count, elements):
        if pairs is None:
            place = torch.arange(tile.start, tile.stop, device=device)
            yield tile, place // columns, place % columns
        else:
            rows_of_x, rows_of_y = pairs[tile].unbind(dim=1)
            yield tile, rows_of_x, rows_of_y


def _concat_logits(
    v: tuple[Tensor, ...], grad: Tensor, network: tuple[Tensor, ...], pairs: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`pair_logits` for z_ij = left_i + right_j, left = x·w_leftᵀ + b1 and right = y·w_rightᵀ: O(h) a pair."""
    x, y, w1, b1, w2, _ = network
    v_x, v_y, v_w1, v_b1, v_w2, _ = v
    (w_left, w_right), (v_left, v_right) = w1.chunk(2, dim=1), v_w1.chunk(2, dim=1)
    left = torch.cat([x @ w_left.t() + b1, v_x @ w_left.t() + x @ v_left.t() + v_b1], dim=1)  # z and ż side by side
    right = torch.cat([y @ w_right.t(), v_y @ w_right.t() + y @ v_right.t()], dim=1)
    grad_left, grad_right, grad_w2, changes = (
        torch.zeros_like(left),
        torch.zeros_like(right),
        torch.zeros_like(w2),
        [grad[:0]],
    )
    for tile, rows, columns in _pair_tiles(len(grad), len(y), 2 * len(w2), pairs, grad.device):
        z, z_change = (F.embedding(rows, left) + F.embedding(columns, right)).chunk(2, dim=1)
        active = (z > 0).to(z.dtype)
        changes.append((active * (v_w2 * z + w2 * z_change)).sum(dim=1))
        weights = grad[tile, None] * active
        grad_w2 = grad_w2 + (weights * z_change).sum(dim=0)
        grad_z = torch.cat([weights * v_w2, weights * w2], dim=1)
        grad_left = grad_left + _sum_rows(grad_z, rows, len(x))
        grad_right = grad_right + _sum_rows(grad_z, columns, len(y))
    (of_left, of_left_change), (of_right, of_right_change) = grad_left.chunk(2, dim=1), grad_right.chunk(2, dim=1)
    grad_x = of_left @ w_left + of_left_change @ v_left
    grad_y = of_right @ w_right + of_right_change @ v_right
    grad_w_left = of_left.t() @ x + of_left_change.t() @ v_x
    grad_w_right = of_right.t() @ y + of_right_change.t() @ v_y
    grad_w1 = torch.cat([grad_w_left, grad_w_right], dim=1)
    return torch.cat(changes), (grad_x, grad_y, grad_w1, of_left.sum(dim=0), grad_w2)


def _interacting_logits(
    v: tuple[Tensor, ...], grad: Tensor, network: tuple[Tensor, ...], pairs: Tensor | None, interaction: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`pair_logits` for φ = ``|x_i − y_j|`` or x_i∘y_j: a matrix product for the pairs of a tile."""
    x, y, w1, b1, w2, _ = network
    v_x, v_y, v_w1, v_b1, v_w2, _ = v
    grad_x, grad_y, grad_w1, grad_b1, grad_w2 = map(torch.zeros_like, network[:5])
    changes = [grad[:0]]
    for tile, rows, columns in _pair_tiles(len(grad), len(y), x.shape[1] + len(w2), pairs, grad.device):
        a, b = F.embedding(rows, x), F.embedding(columns, y)
        a_change, b_change = F.embedding(rows, v_x), F.embedding(columns, v_y)
        if interaction == "absdiff":
            sign = (a - b).sign()
            phi, phi_change = sign * (a - b), sign * (a_change - b_change)
        else:
            phi, phi_change = a * b, a_change * b + a * b_change
        z, z_change = phi @ w1.t() + b1, phi_change @ w1.t() + phi @ v_w1.t() + v_b1
        active = (z > 0).to(z.dtype)
        changes.append((active * (v_w2 * z + w2 * z_change)).sum(dim=1))
        weights = grad[tile, None] * active
        grad_z, grad_z_change = weights * v_w2, weights * w2
        grad_w1 = grad_w1 + grad_z.t() @ phi + grad_z_change.t() @ phi_change
        grad_b1 = grad_b1 + grad_z.sum(dim=0)
        grad_w2 = grad_w2 + (weights * z_change).sum(dim=0)
        grad_phi, grad_phi_change = grad_z @ w1 + grad_z_change @ v_w1, grad_z_change @ w1
        if interaction == "absdiff":
            grad_a = sign * grad_phi
            grad_b = -grad_a
        else:
            grad_a, grad_b = grad_phi * b + grad_phi_change * b_change, grad_phi * a + grad_phi_change * a_change
        grad_x = grad_x + _sum_rows(grad_a, rows, len(x))
        grad_y = grad_y + _sum_rows(grad_b, columns, len(y))
    return torch.cat(changes), (grad_x, grad_y, grad_w1, grad_b1, grad_w2)


def laplacian_solve(
    v_weight: Tensor,
    v_dissimilarity: Tensor,
    v_diagonal: Tensor,
    crow: Tensor,
    col: Tensor,
    grad_rhs: Tensor,
    solution: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of the gradients of the entries, dw_ij = −g_i·(x_i − x_j), dw^dis_ij = −g_i·(x_i + x_j) and ddiag_i = −g_i·x_i.

    All are bilinear in g = grad_rhs and x = solution, by way of A = diag(s) − V with V_ij = v_w − v_dis of the entry
    and s_i = v_diag + the row sum of v_w + v_dis: ∂g = −A x and ∂x = −Aᵀ g.

    Args:
        v_weight, v_dissimilarity: [E] cotangents of dw and dw^dis.
        v_diagonal: [N].
        crow, col: [N + 1] and [E].
        grad_rhs, solution: [N, C].

    Returns:
        Gradients of grad_rhs and of solution, [N, C].
    """
    nodes, entries = len(grad_rhs), len(col)
    rows = torch.repeat_interleave(torch.arange(nodes, device=col.device), crow.diff(), output_size=entries)
    columns, off = col.long(), (v_weight - v_dissimilarity)[:, None]
    diagonal = v_diagonal[:, None] + _sum_rows((v_weight + v_dissimilarity)[:, None], rows, nodes)
    of_grad, of_solution = [grad_rhs[:, :0]], [solution[:, :0]]
    for tile in tiles(grad_rhs.shape[1], entries):
        g, x = grad_rhs[:, tile], solution[:, tile]
        of_grad.append(_sum_rows(off * F.embedding(columns, x), rows, nodes) - diagonal * x)
        of_solution.append(_sum_rows(off * F.embedding(rows, g), columns, nodes) - diagonal * g)
    return torch.cat(of_grad, dim=1), torch.cat(of_solution, dim=1)
