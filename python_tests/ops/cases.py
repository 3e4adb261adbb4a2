# SPDX-License-Identifier: BSD-3-Clause
"""One case per op: how its inputs are drawn, what is differentiable, what is refused, and how far its results may lie
from the exact ones.

test_contract.py asks everything of DESIGN §7 of every case, bench/margins.py measures how much of the bounds is used,
the fuzzer judges by them. A new op is one more case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bounds import graph, memory, pairs, ranking
from torch import Tensor

from ssmkernels import ops, reference

Inputs = dict[str, Any]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """An op, or the composition of ops that is one."""

    name: str
    sizes: tuple[tuple[int, ...], ...]
    """From one element on, odd, and some hundreds or thousands."""
    empty: tuple[tuple[int, ...], ...]
    """Sizes without rows, without pairs, without edges."""
    draw: Callable[..., Inputs]
    """(size, dtype, seed, **variant) -> keyword arguments of the op; drawn in float64 and rounded, so that every dtype
    has nearly the same.
    """
    differentiable: tuple[str, ...]
    outputs: tuple[str, ...]
    bound: Callable[[Inputs, dict[str, Tensor]], dict[str, Tensor]]
    """(inputs, gradients of the outputs) -> largest error of every output, and of "grad x" for every differentiable
    input x.
    """
    run: Callable[[Any, Inputs], tuple[Tensor, ...]]
    """(ssmkernels.ops or ssmkernels.reference, inputs) -> the outputs."""
    smooth: tuple[str, ...] = ()
    """Outputs that have a gradient."""
    variants: tuple[dict[str, Any], ...] = ({},)
    """Options of the op, and of the draw, that take another way through it."""
    batch: dict[str, int] = field(default_factory=dict)
    """The dimension of each input that is a batch: dynamic in an exported program, mapped by vmap."""
    least_batch: int = 1
    bad: tuple[tuple[Callable[[Inputs], Inputs], type[Exception], str], ...] = ()
    """(inputs -> changed inputs, error, message), of inputs of ``bad_size``."""
    bad_size: int = 1
    """Which of the sizes."""
    registered: tuple[str, ...] = ()
    """Operators of torch.ops.ssmkernels that this case calls."""
    calls: tuple[str, ...] = ()
    """Other functions of ssmkernels.ops that it calls."""
    autocast: tuple[str, ...] = ()
    """Inputs that autocast takes in its dtype."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Values of every numeric option, exact in float32."""
    busy: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = ()
    """Sizes and variants with work for several threads."""
    peak: tuple[tuple[int, ...], int] | None = None
    """A size at which the tensor that the op never stores is large, and what it may use in MiB: far less."""
    free: Callable[[Inputs], Inputs] = lambda inputs: inputs
    """Free parameters -> inputs, where entries of an input are tied to each other, as the weights of both directions
    of an edge.
    """

    def given(self, inputs: Inputs) -> tuple[str, ...]:
        """The differentiable arguments that are there."""
        return tuple(name for name in self.differentiable if inputs.get(name) is not None)

    def evaluate(self, module: Any, inputs: Inputs, grads: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Outputs, and with gradients of the outputs those of the inputs, as "grad x"."""
        inputs = {
            name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        wanted = self.given(inputs) if grads is not None else ()
        for name in wanted:
            inputs[name].requires_grad_()
        outputs = dict(zip(self.outputs, self.run(module, inputs), strict=True))
        results = {name: value.detach() for name, value in outputs.items()}
        if wanted:
            smooth = [outputs[name] for name in self.smooth]
            slopes = [grads[name].to(outputs[name]).expand_as(outputs[name]) for name in self.smooth]
            values = torch.autograd.grad(smooth, [inputs[name] for name in wanted], slopes)
            results |= {f"grad {name}": value for name, value in zip(wanted, values, strict=True)}
        return results

    def tensors(self, inputs: Inputs) -> list[str]:
        return [name for name, value in inputs.items() if isinstance(value, Tensor)]

    def floating(self, inputs: Inputs) -> list[str]:
        return [name for name in self.tensors(inputs) if inputs[name].is_floating_point()]

    def unordered(self, inputs: Inputs) -> tuple[str, ...]:
        """Results of torch's own matrix products, whose bits may depend on the number of threads."""
        return ("grad x", "grad y", "grad w1") if inputs.get("interaction") == "concat" else ()

    def grads(self, inputs: Inputs, seed: int = 0) -> dict[str, Tensor] | None:
        """Random gradients of the outputs, exact in float32."""
        if not self.given(inputs):
            return None
        generator = torch.Generator().manual_seed(1000 + seed)
        with torch.no_grad():
            outputs = dict(zip(self.outputs, self.run(ops, dict(inputs)), strict=True))
        return {
            name: torch.randn(outputs[name].shape, generator=generator).to(outputs[name].device, torch.float64)
            for name in self.smooth
        }

    def margins(
        self, results: dict[str, Tensor], exact: dict[str, Tensor], bounds: dict[str, Tensor]
    ) -> dict[str, float]:
        """Largest error over bound of every result. ``exact`` is evaluated in float64, which is as far off: a float64
        result is allowed twice its bound.
        """
        margins = {}
        for name, value in results.items():
            bound = bounds[name].expand(value.shape) * (2 if value.dtype == torch.float64 else 1)
            assert not bound.isnan().any(), f"{self.name}: the bound of {name} is NaN"
            error = (value.double() - exact[name].double()).abs()
            error = torch.where((value == exact[name]) | (value.isnan() & exact[name].isnan()), 0.0, error)
            shares = torch.where(error == 0, 0.0, error / bound)
            margins[name] = shares.nan_to_num(nan=torch.inf).max().item() if shares.numel() else 0.0
        return margins


def problems(case: Case) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Every size as it comes, and every variant at two odd sizes."""
    middle = case.sizes[2:4]
    yield from ((size, case.variants[0]) for size in case.sizes if size not in middle)
    yield from ((size, variant) for size in middle for variant in case.variants)


def double(inputs: Inputs) -> Inputs:
    """The same inputs, exactly, in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def to(inputs: Inputs, device: str) -> Inputs:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def judge(case: Case, inputs: Inputs, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """The results of an op on a device, on the CPU, once they are found to be within their bounds."""
    grads = case.grads(inputs, seed)
    results = case.evaluate(ops, to(inputs, device), None if grads is None else to(grads, device))
    results = {name: value.cpu() for name, value in results.items()}
    exact = case.evaluate(reference, double(inputs), grads)
    for name, margin in case.margins(results, exact, case.bound(inputs, grads or {})).items():
        assert margin <= 1, f"{name} is off by {margin:.2g} times its bound"
    return results


class _Draw:
    """Random numbers of one seed, as tensors of one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=self.generator, dtype=torch.float64)).to(self.dtype)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def unit(self, rows: int, dim: int) -> Tensor:
        return F.normalize(torch.randn(rows, dim, generator=self.generator, dtype=torch.float64), dim=1).to(self.dtype)

    def ids(self, low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=self.generator)

    def probs(self, rows: int, classes: int) -> Tensor:
        """In float32 for half types, which is what the ops take them for."""
        probs = (2 * torch.randn(rows, classes, generator=self.generator, dtype=torch.float64)).softmax(1)
        return probs.to(torch.float64 if self.dtype == torch.float64 else torch.float32)


# Sizes: B, D, K, L.
MEMORY_SIZES = (
    (1, 1, 1, 1),
    (3, 17, 17, 3),
    (17, 3, 123, 10),
    (33, 128, 507, 10),
    (70, 64, 1003, 300),
    (123, 507, 130, 7),
)
MEMORY_EMPTY = ((0, 8, 20, 3),)
MEMORY_BUSY = (((1, 128, 30_000, 10), {}), ((40, 16, 3001, 10), {}), ((700, 8, 300, 5), {}))


def _draw_bank(
    size: tuple[int, ...], dtype: torch.dtype, seed: int, *, sort: bool = False
) -> tuple[_Draw, Tensor, Tensor]:
    _, dim, slots, classes = size
    draw = _Draw(dtype, seed)
    labels = draw.ids(0, classes, slots)
    return draw, draw.unit(slots, dim), labels.sort().values if sort else labels


def draw_instance_matching(
    size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, sort: bool = False, **options: Any
) -> Inputs:
    rows, dim, _, classes = size
    draw, bank, labels = _draw_bank(size, dtype, seed, sort=sort)
    return {
        "query_weak": draw.unit(rows, dim),
        "query_strong": draw.unit(rows, dim),
        "bank": bank,
        "bank_labels": labels,
        "probs_weak": draw.probs(rows, classes),
    } | options


def draw_aggregate(
    size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, sort: bool = False, **options: Any
) -> Inputs:
    draw, bank, labels = _draw_bank(size, dtype, seed, sort=sort)
    return {"query": draw.unit(size[0], size[1]), "bank": bank, "bank_labels": labels, "num_classes": size[3]} | options


def draw_unfold(
    size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, sort: bool = False, **options: Any
) -> Inputs:
    draw, bank, labels = _draw_bank(size, dtype, seed, sort=sort)
    return {
        "query": draw.unit(size[0], size[1]),
        "bank": bank,
        "bank_labels": labels,
        "probs": draw.probs(size[0], size[3]),
    } | options


def draw_memory_update(size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, **options: Any) -> Inputs:
    rows, dim, slots, classes = size
    draw, bank, labels = _draw_bank(size, dtype, seed)
    index, fresh = draw.ids(0, slots, rows), draw.ids(0, classes, rows)
    return {
        "bank": bank,
        "bank_labels": labels,
        "index": index,
        "features": draw.unit(rows, dim),
        "labels": fresh,
    } | options


def _run_memory_update(module: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    changed = inputs | {"bank": inputs["bank"].clone(), "bank_labels": inputs["bank_labels"].clone()}
    module.memory_update_(**changed)
    return changed["bank"], changed["bank_labels"]


def _run_merge(module: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """The bank in two parts, of which one may be empty; for the reference, as it is."""
    options = dict(inputs)
    split, alpha = options.pop("split"), options.pop("alpha", 0.9)
    if module is not ops:
        return tuple(module.instance_matching(**options, alpha=alpha))
    partials = []
    for part in (slice(None, split), slice(split, None)):
        changed = {"bank": options["bank"][part], "bank_labels": options["bank_labels"][part]}
        partials.append(ops.instance_matching_partial(**(options | changed)))
    strong = {name: options[name] for name in ("query_strong", "probs_weak")}
    temperature = options.get("temperature_strong", 0.1)
    return tuple(
        ops.finish_instance_matching(
            ops.merge_instance_matching(*partials), **strong, temperature_strong=temperature, alpha=alpha
        )
    )


MATCHING_BAD = (
    (
        lambda x: {"query_weak": x["query_weak"][:, :-1]},
        ValueError,
        r"query_weak must have D of bank = 17 in dimension 1, got shape \[3, 16\]",
    ),
    (lambda x: {"query_strong": x["query_strong"][:2]}, ValueError, r"query_strong must have B of query_weak = 3"),
    (lambda x: {"query_weak": x["query_weak"][0]}, ValueError, r"query_weak must be \[B, D\], got shape \[17\]"),
    (lambda x: {"query_weak": [[1.0]]}, TypeError, r"query_weak must be a tensor \[B, D\], got list"),
    (
        lambda x: {"bank": x["bank"].long()},
        TypeError,
        r"bank must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    (lambda x: {"bank": x["bank"].double()}, TypeError, r"query_weak is torch.float32 but bank is torch.float64"),
    (lambda x: {"bank_labels": x["bank_labels"].int()}, TypeError, r"bank_labels must be int64, got torch.int32"),
    (lambda x: {"bank_labels": x["bank_labels"][:-1]}, ValueError, r"bank_labels must have K of bank = 1"),
    (
        lambda x: {"bank_labels": x["bank_labels"] + 3},
        ValueError,
        r"bank_labels must be in \[0, 3\), .*; got values from 3 to 5",
    ),
    (lambda x: {"bank_labels": x["bank_labels"] - 1}, ValueError, r"bank_labels must be in \[0, 3\)"),
    (lambda x: {"probs_weak": x["probs_weak"][:, :0]}, ValueError, r"probs_weak must have at least one class"),
    (lambda x: {"probs_weak": x["probs_weak"][:2]}, ValueError, r"probs_weak must have B of the query = 3"),
    (lambda x: {"probs_weak": x["probs_weak"] - 1}, ValueError, r"probs_weak must be finite and >= 0"),
    (lambda x: {"probs_weak": x["probs_weak"] / 0}, ValueError, r"probs_weak must be finite and >= 0"),
    (lambda x: {"probs_weak": x["probs_weak"] * torch.nan}, ValueError, r"probs_weak must be finite and >= 0"),
    (lambda x: {"temperature_weak": float("nan")}, ValueError, r"temperature_weak must be finite and > 0, got nan"),
    (lambda x: {"temperature_strong": 0.0}, ValueError, r"temperature_strong must be finite and > 0, got 0.0"),
    (lambda x: {"temperature_strong": -0.1}, ValueError, r"temperature_strong must be finite and > 0, got -0.1"),
    (lambda x: {"temperature_weak": float("inf")}, ValueError, r"temperature_weak must be finite and > 0, got inf"),
    (lambda x: {"query_weak": x["query_weak"].to("meta")}, ValueError, r"query_weak is on meta but bank is on cpu"),
    (lambda x: {"bank_labels": x["bank_labels"].to("meta")}, ValueError, r"bank_labels is on meta but bank is on cpu"),
)
NO_SLOTS = (
    lambda x: {"bank": x["bank"][:0], "bank_labels": x["bank_labels"][:0]},
    ValueError,
    r"bank must have at least one slot, got shape \[0, 17\]",
)

# Sizes: N nodes, C columns.
GRAPH_SIZES = ((2, 2), (3, 2), (17, 3), (40, 10), (123, 13), (123, 17), (130, 33), (507, 100), (64, 300))
GRAPH_EMPTY = ((0, 3),)


def sparse(matrix: Tensor) -> dict[str, Tensor]:
    """crow, col, reverse and weight of a dense symmetric matrix."""
    rows, col = matrix.nonzero(as_tuple=True)
    crow = torch.zeros(len(matrix) + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(rows, minlength=len(matrix)).cumsum(0)
    position = torch.zeros(matrix.shape, dtype=torch.int64)
    position[rows, col] = torch.arange(len(col))
    return {"crow": crow, "col": col.int(), "reverse": position[col, rows], "weight": matrix[rows, col]}


def draw_graph(nodes: int, dtype: torch.dtype, seed: int, *, isolated: bool = False) -> dict[str, Tensor]:
    """A random graph with rows of very different lengths, in which everything is connected but what is isolated."""
    generator = torch.Generator().manual_seed(seed)
    popular = torch.rand(nodes, 1, generator=generator, dtype=torch.float64) ** 2
    often = popular * popular.mT * min(1.5, 60 / max(nodes, 1)) + 4 / max(nodes, 1)
    linked = torch.rand(nodes, nodes, generator=generator, dtype=torch.float64) < often
    weight = torch.randn(nodes, nodes, generator=generator, dtype=torch.float64).abs().to(dtype).double() * (
        linked | linked.mT
    )
    weight = weight.triu(1) + weight.triu(1).mT
    if isolated and nodes > 2:
        weight[1] = weight[:, 1] = 0
    graph = sparse(weight)
    return graph | {"weight": graph["weight"].to(dtype)}


def tie_directions(inputs: Inputs) -> Inputs:
    """The weights of an edge are those of its earlier entry in both directions."""
    nodes, col = len(inputs["crow"]) - 1, inputs["col"].long()
    rows = torch.repeat_interleave(torch.arange(nodes), inputs["crow"].diff())
    reverse = (rows * nodes + col).argsort()[(col * nodes + rows).argsort().argsort()]
    earlier = torch.arange(len(col)) < reverse
    tied = {name: inputs[name] for name in ("weight", "dissimilarity") if inputs.get(name) is not None}
    return inputs | {name: torch.where(earlier, value, value[reverse]) for name, value in tied.items()}


def draw_laplacian_solve(
    size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, mixed: bool = True, **options: Any
) -> Inputs:
    nodes, columns = size
    draw, graph = _Draw(dtype, seed), draw_graph(nodes, dtype, seed)
    del graph["reverse"]
    dissimilarity = draw.uniform(len(graph["col"]))
    diagonal = torch.zeros(nodes, dtype=dtype)
    diagonal[:: max(1, nodes // 5)] = 0.5
    diagonal += 0.01  # every component has a solution
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    values = {
        "dissimilarity": dissimilarity if mixed else None,
        "diagonal": diagonal,
        "rhs": draw.normal(nodes, columns),
    }
    return tie_directions(graph | values) | {"rtol": rtol} | options


def draw_leave_one_edge_out(
    size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, scale: float = 1.0, **options: Any
) -> Inputs:
    nodes, classes = size
    graph = draw_graph(nodes, dtype, seed, isolated=True)
    return graph | {"propagated": _Draw(dtype, seed).normal(nodes, classes, scale=scale / 5)} | options


# Sizes: n, m, d, h.
PAIR_SIZES = ((1, 1, 1, 1), (3, 5, 7, 2), (17, 130, 16, 33), (123, 64, 24, 17), (65, 200, 3, 40), (5, 1000, 40, 8))
PAIR_EMPTY = ((0, 5, 4, 6), (5, 0, 4, 6), (0, 0, 4, 6))
INTERACTIONS = ("concat", "absdiff", "product")
PAIR_BUSY = tuple(
    ((130, 300, 17, 40), {"interaction": interaction, "listed": listed, "exact": interaction == "concat"})
    for interaction in INTERACTIONS
    for listed in (None, 30_000)
)
PAIRS = torch.tensor([[0, 0], [2, 4], [1, 3]])


def draw_pair_logits(
    size: tuple[int, ...],
    dtype: torch.dtype,
    seed: int = 0,
    *,
    listed: int | None = None,
    scale: float = 1.0,
    exact: bool = False,
    **options: Any,
) -> Inputs:
    """With ``exact``, multiples of 1/4, whose products and sums have no rounding in whatever order."""
    rows, columns, dim, hidden = size
    draw = _Draw(dtype, seed)
    wide = 2 * dim if options.get("interaction", "concat") == "concat" else dim
    inputs = {
        "x": draw.normal(rows, dim),
        "y": draw.normal(columns, dim),
        "w1": draw.normal(hidden, wide, scale=wide**-0.5),
        "b1": draw.normal(hidden, scale=0.25),
        "w2": draw.normal(hidden, scale=scale * hidden**-0.5),
        "b2": draw.normal(),
    }
    if exact:
        inputs = {name: (4 * value).round() / 4 for name, value in inputs.items()}
    if listed is not None:
        inputs["pairs"] = torch.stack([draw.ids(0, count, listed) for count in (rows, columns)], dim=1)
    return inputs | options


def draw_pair_focal_loss(size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, **options: Any) -> Inputs:
    draw = _Draw(dtype, seed + 1)
    return draw_pair_logits(size, dtype, seed, **options) | {
        "x_labels": draw.ids(-1, 4, size[0]),
        "y_labels": draw.ids(-1, 4, size[1]),
    }


# Sizes: n, d.
RANKING_SIZES = ((1, 4), (2, 1), (3, 5), (17, 16), (33, 3), (64, 40), (123, 64), (507, 17), (1001, 24))
RANKING_EMPTY = ((0, 6),)
THRESHOLDS = {"positive_threshold": 0.35, "negative_threshold": -0.05}


def _draw_classes(draw: _Draw, count: int, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Rows around the directions of their classes, and labels."""
    labels = draw.ids(0, len(directions), count)
    values = directions[labels] + torch.randn(count, directions.shape[1], generator=draw.generator, dtype=torch.float64)
    return (F.normalize(values) if directions.shape[1] > 1 else values).to(draw.dtype), 3 * labels - 4


def draw_pair_ranking_loss(
    size: tuple[int, ...],
    dtype: torch.dtype,
    seed: int = 0,
    *,
    others: int | None = None,
    classes: int = 5,
    **options: Any,
) -> Inputs:
    draw = _Draw(dtype, seed)
    directions = torch.randn(classes, size[1], generator=draw.generator, dtype=torch.float64)
    embeddings, labels = _draw_classes(draw, size[0], directions)
    inputs = {"embeddings": embeddings, "labels": labels}
    if others is not None:
        inputs["references"], inputs["reference_labels"] = _draw_classes(draw, others, directions)
    return inputs | options


def draw_mined_pair_ranking_loss(size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, **options: Any) -> Inputs:
    """Cosines of one-hot combinations: no pair is near a threshold, where rounding would move it."""
    embeddings = draw_pair_ranking_loss(size, dtype, seed)["embeddings"]
    draw = _Draw(dtype, seed + 1)
    kinds = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, -1], [-1, 0, 0.5]], dtype=torch.float64)
    basis = kinds[draw.ids(0, 4, size[0])] * torch.rand(size[0], 1, generator=draw.generator, dtype=torch.float64)
    return {"embeddings": embeddings, "basis_features": basis.to(dtype)} | THRESHOLDS | options


def draw_similarity_moments(
    size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, classes: int = 5, **options: Any
) -> Inputs:
    drawn = draw_pair_ranking_loss(size, dtype, seed, classes=classes)
    return {"features": drawn["embeddings"], "labels": drawn["labels"]} | options


REDUCTIONS = ({"reduction": "mean_nonzero"}, {"reduction": "mean"}, {"reduction": "sum"})
RANKING_BAD = (
    (lambda x: {"embeddings": x["embeddings"][0]}, ValueError, r"embeddings must be \[n, d\], got shape \[5\]"),
    (lambda x: {"embeddings": [[1.0]]}, TypeError, r"embeddings must be a tensor \[n, d\], got list"),
    (
        lambda x: {"embeddings": x["embeddings"].long()},
        TypeError,
        r"embeddings must be float32, float64, bfloat16 or float16, got",
    ),
    (lambda x: {"reduction": "none"}, ValueError, r"reduction must be 'mean_nonzero', 'mean' or 'sum', got 'none'"),
    (lambda x: {"positive_margin": "0"}, TypeError, r"positive_margin must be a number, got str"),
    (lambda x: {"negative_margin": float("inf")}, ValueError, r"negative_margin must be finite and >= 0, got inf"),
    (lambda x: {"negative_margin": True}, TypeError, r"negative_margin must be a number, got bool"),
    (lambda x: {"negative_margin": None}, TypeError, r"negative_margin must be a number, got NoneType"),
)


def _call(name: str) -> Callable[[Any, Inputs], tuple[Tensor, ...]]:
    """The op of that name; a single output as a tuple of one."""

    def run(module: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        out = getattr(module, name)(**inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    return run


CASES = {
    case.name: case
    for case in (
        Case(
            name="instance_matching",
            sizes=MEMORY_SIZES,
            empty=MEMORY_EMPTY,
            draw=draw_instance_matching,
            run=_call("instance_matching"),
            differentiable=("query_strong",),
            outputs=("pseudo_probs", "loss"),
            smooth=("loss",),
            bound=memory.instance_matching,
            variants=({}, {"sort": True}, {"temperature_weak": 0.02, "temperature_strong": 1.0, "alpha": 0.3}),
            batch={"query_weak": 0, "query_strong": 0, "probs_weak": 0},
            bad=(
                *MATCHING_BAD,
                NO_SLOTS,
                (lambda x: {"temperature_weak": "0.1"}, TypeError, r"temperature_weak must be a number, got str"),
                (lambda x: {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
                (lambda x: {"alpha": float("nan")}, ValueError, r"alpha must be in \[0, 1\], got nan"),
            ),
            registered=("instance_matching",),
            autocast=("query_weak", "query_strong", "bank"),
            numbers={"temperature_weak": 0.25, "temperature_strong": 0.5, "alpha": 0.75},
            busy=MEMORY_BUSY,
            peak=((256, 32, 131072, 100), 24),  # a [B, K] float32 matrix is 128 MiB, B·(L + D) 0.13 MiB
        ),
        Case(
            name="instance_matching_partial",
            sizes=MEMORY_SIZES,
            empty=MEMORY_EMPTY,
            draw=draw_instance_matching,
            run=_call("instance_matching_partial"),
            differentiable=(),
            outputs=(
                "log_weak",
                "log_target",
                "log_strong",
                "aggregated",
                "target_logit",
                "target_mean",
                "strong_mean",
            ),
            bound=memory.instance_matching_partial,
            variants=({}, {"sort": True}),
            batch={"query_weak": 0, "query_strong": 0, "probs_weak": 0},
            bad=MATCHING_BAD,
            registered=("instance_matching_partial",),
            autocast=("query_weak", "query_strong", "bank"),
            numbers={"temperature_weak": 0.25, "temperature_strong": 0.5},
            busy=MEMORY_BUSY,
            peak=((256, 32, 131072, 100), 24),
        ),
        Case(
            name="merge_instance_matching",
            sizes=MEMORY_SIZES,
            empty=MEMORY_EMPTY,
            draw=partial(draw_instance_matching, split=7),
            run=_run_merge,
            differentiable=("query_strong",),
            outputs=("pseudo_probs", "loss"),
            smooth=("loss",),
            bound=memory.merge_instance_matching,
            variants=(
                {"split": 0},
                {"split": 1},
                {"split": 200},
                {"split": 11, "temperature_weak": 0.001, "temperature_strong": 0.001},
            ),
            batch={"query_weak": 0, "query_strong": 0, "probs_weak": 0},
            bad=MATCHING_BAD,
            registered=("instance_matching_partial",),
            calls=("instance_matching_partial", "finish_instance_matching"),
            autocast=("query_weak", "query_strong", "bank"),
            numbers={"temperature_weak": 0.25, "temperature_strong": 0.5, "alpha": 0.75},
            busy=tuple((size, {"split": 100}) for size, _ in MEMORY_BUSY),
        ),
        Case(
            name="aggregate",
            sizes=MEMORY_SIZES,
            empty=MEMORY_EMPTY,
            draw=draw_aggregate,
            run=_call("aggregate"),
            differentiable=("query",),
            outputs=("aggregated",),
            smooth=("aggregated",),
            bound=memory.aggregate,
            variants=({}, {"sort": True}, {"temperature": 0.02}, {"temperature": 1.0}),
            batch={"query": 0},
            bad=(
                NO_SLOTS,
                (lambda x: {"num_classes": 0}, ValueError, r"num_classes must be at least 1, got 0"),
                (lambda x: {"num_classes": 4.0}, TypeError, r"num_classes must be an int, got float"),
                (lambda x: {"bank_labels": x["bank_labels"] + 3}, ValueError, r"bank_labels must be in \[0, 3\)"),
                (lambda x: {"temperature": float("nan")}, ValueError, r"temperature must be finite and > 0, got nan"),
                (lambda x: {"query": x["query"][:, :3]}, ValueError, r"query must have D of bank = 17"),
            ),
            registered=("aggregate", "aggregate_backward"),
            autocast=("query", "bank"),
            numbers={"temperature": 0.25, "num_classes": 3},
            busy=MEMORY_BUSY,
            peak=((256, 32, 131072, 100), 24),
        ),
        Case(
            name="unfold",
            sizes=MEMORY_SIZES,
            empty=MEMORY_EMPTY,
            draw=draw_unfold,
            run=_call("unfold"),
            differentiable=(),
            outputs=("unfolded",),
            bound=memory.unfold,
            variants=({}, {"sort": True}, {"temperature": 0.02}, {"temperature": 1.0}),
            batch={"query": 0, "probs": 0},
            bad=(
                NO_SLOTS,
                (lambda x: {"query": x["query"][:, :3]}, ValueError, r"query must have D of bank = 17"),
                (lambda x: {"probs": x["probs"][:1]}, ValueError, r"probs must have B of the query = 3"),
                (lambda x: {"probs": x["probs"] - 1}, ValueError, r"probs must be finite and >= 0"),
                (lambda x: {"temperature": 0}, ValueError, r"temperature must be finite and > 0, got 0"),
            ),
            registered=("unfold",),
            autocast=("query", "bank"),
            numbers={"temperature": 0.25},
            busy=MEMORY_BUSY,
        ),
        Case(
            name="memory_update_",
            sizes=MEMORY_SIZES,
            empty=MEMORY_EMPTY,
            draw=draw_memory_update,
            run=_run_memory_update,
            differentiable=(),
            outputs=("bank", "bank_labels"),
            bound=memory.memory_update_,
            variants=({}, {"momentum": 0.0}, {"momentum": 1.0}),
            batch={"index": 0, "features": 0, "labels": 0},
            bad=(
                (
                    lambda x: {"index": x["index"] + 17},
                    ValueError,
                    r"index must be in \[0, 17\), the slots of bank; got values from",
                ),
                (lambda x: {"index": x["index"] - 17}, ValueError, r"index must be in \[0, 17\)"),
                (lambda x: {"index": x["index"].int()}, TypeError, r"index must be int64, got torch.int32"),
                (lambda x: {"labels": x["labels"] * 0 - 1}, ValueError, r"labels must be >= 0, got -1"),
                (lambda x: {"labels": x["labels"][:2]}, ValueError, r"labels must have B of index = 3"),
                (
                    lambda x: {"features": x["features"].double()},
                    TypeError,
                    r"features is torch.float64 but bank is torch.float32",
                ),
                (lambda x: {"features": x["features"][:, :2]}, ValueError, r"features must have D of bank = 17"),
                (lambda x: {"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\], got 1.1"),
            ),
            registered=("memory_update_",),
            numbers={"momentum": 0.75},
            busy=(((3000, 64, 500, 4), {}),),
        ),
        Case(
            name="laplacian_solve",
            sizes=GRAPH_SIZES,
            empty=GRAPH_EMPTY,
            draw=draw_laplacian_solve,
            run=lambda module, inputs: (module.laplacian_solve(**inputs).solution,),
            differentiable=("weight", "dissimilarity", "diagonal", "rhs"),
            outputs=("solution",),
            smooth=("solution",),
            bound=graph.laplacian_solve,
            variants=({}, {"mixed": False}, {"preconditioner": "none"}),
            batch={"rhs": 1},
            bad=(
                (lambda x: {"rtol": 0.0}, ValueError, r"rtol must be finite and > 0, got 0.0"),
                (lambda x: {"rtol": -1e-6}, ValueError, r"rtol must be finite and > 0"),
                (lambda x: {"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
                (lambda x: {"max_iter": 2.5}, TypeError, r"max_iter must be an int, got float"),
                (
                    lambda x: {"preconditioner": "ilu"},
                    ValueError,
                    r"preconditioner must be 'jacobi' or 'none', got 'ilu'",
                ),
                (lambda x: {"weight": -x["weight"]}, ValueError, r"weight must be finite and >= 0, got values from -"),
                (lambda x: {"weight": x["weight"] * torch.nan}, ValueError, r"weight must be finite and >= 0"),
                (lambda x: {"weight": x["weight"][:-1]}, ValueError, r"weight must have E of col"),
                (lambda x: {"dissimilarity": -x["weight"]}, ValueError, r"dissimilarity must be finite and >= 0"),
                (lambda x: {"dissimilarity": x["weight"][:3]}, ValueError, r"dissimilarity must have E of col"),
                (lambda x: {"diagonal": x["diagonal"] - 1}, ValueError, r"diagonal must be finite and >= 0"),
                (lambda x: {"diagonal": x["diagonal"][:-1]}, ValueError, r"diagonal must have N of crow = 17"),
                (lambda x: {"rhs": x["rhs"][:-1]}, ValueError, r"rhs must have N of crow = 17"),
                (lambda x: {"rhs": x["rhs"][:, 0]}, ValueError, r"rhs must be \[N, C\], got shape \[17\]"),
                (lambda x: {"rhs": x["rhs"] / 0}, ValueError, r"rhs must be finite"),
                (lambda x: {"rhs": x["rhs"].double()}, TypeError, r"rhs is torch.float64 but weight is torch.float32"),
                (
                    lambda x: {"rhs": x["rhs"].long()},
                    TypeError,
                    r"rhs must be float32, float64, bfloat16 or float16, got torch.int64",
                ),
                (lambda x: {"initial": x["rhs"][:, :2]}, ValueError, r"initial must have C of rhs = 3"),
                (lambda x: {"crow": x["crow"][:-1]}, ValueError, r"diagonal must have N of crow = 16"),
                (lambda x: {"crow": x["crow"].flip(0)}, ValueError, r"crow must ascend from 0 to E"),
                (lambda x: {"crow": x["crow"].float()}, TypeError, r"crow must be int32 or int64, got torch.float32"),
                (
                    lambda x: {"col": x["col"] + 1},
                    ValueError,
                    r"col must be in \[0, 17\), the nodes of crow; got values from 1 to 17",
                ),
                (lambda x: {"col": x["col"].to("meta")}, ValueError, r"col is on meta but crow is on cpu"),
            ),
            registered=("laplacian_solve", "laplacian_solve_backward"),
            numbers={"rtol": 2.0**-20, "max_iter": 500},
            busy=(((700, 10), {}), ((400, 50), {})),
            free=tie_directions,
            bad_size=2,
        ),
        Case(
            name="leave_one_edge_out",
            sizes=GRAPH_SIZES,
            empty=GRAPH_EMPTY,
            draw=draw_leave_one_edge_out,
            run=_call("leave_one_edge_out"),
            differentiable=("weight", "propagated"),
            outputs=("dissimilarity",),
            smooth=("dissimilarity",),
            bound=graph.leave_one_edge_out,
            variants=({}, {"scale": 0.05}, {"scale": 30.0}, {"scale": 500.0, "logit_scale": 0.01}),
            batch={"propagated": 1},
            least_batch=2,  # a single class has no entropy
            bad=(
                (
                    lambda x: {"logit_scale": 1e300},
                    ValueError,
                    r"logit_scale must be at most 3.4e\+38, as torch.float32",
                ),
                (lambda x: {"logit_scale": 0}, ValueError, r"logit_scale must be finite and > 0, got 0"),
                (lambda x: {"reverse": x["reverse"] + 1}, ValueError, r"reverse must be in \[0, "),
                (lambda x: {"reverse": x["reverse"][1:]}, ValueError, r"reverse must have E of col"),
                (
                    lambda x: {"propagated": x["propagated"][:, :1]},
                    ValueError,
                    r"propagated must have at least 2 classes",
                ),
                (lambda x: {"propagated": x["propagated"][:5]}, ValueError, r"propagated must have N of crow = 17"),
                (lambda x: {"propagated": x["propagated"] * torch.inf}, ValueError, r"propagated must be finite"),
                (lambda x: {"weight": -x["weight"]}, ValueError, r"weight must be finite and >= 0"),
                (lambda x: {"propagated": [[1.0]]}, TypeError, r"propagated must be a tensor \[N, C\], got list"),
                (
                    lambda x: {"propagated": x["propagated"].to("meta")},
                    ValueError,
                    r"propagated is on meta but weight is on cpu",
                ),
            ),
            registered=("leave_one_edge_out", "leave_one_edge_out_backward"),
            numbers={"logit_scale": 2.0},
            bad_size=2,
            busy=(((700, 10), {}), ((400, 50), {})),
        ),
        Case(
            name="pair_logits",
            sizes=PAIR_SIZES,
            empty=PAIR_EMPTY,
            draw=draw_pair_logits,
            run=_call("pair_logits"),
            differentiable=pairs.NETWORK,
            outputs=("logits",),
            smooth=("logits",),
            bound=pairs.pair_logits,
            variants=tuple(
                {"interaction": interaction, "listed": listed}
                for interaction in INTERACTIONS
                for listed in (None, 1, 777)
            ),
            batch={"x": 0},
            bad=(
                (
                    lambda x: {"interaction": "sum"},
                    ValueError,
                    r"interaction must be 'concat', 'absdiff' or 'product', got 'sum'",
                ),
                (lambda x: {"x": x["x"][0]}, ValueError, r"x must be \[n, d\], got shape \[7\]"),
                (lambda x: {"y": x["y"][:, :3]}, ValueError, r"y must have d of x = 7"),
            ),
            registered=("pair_logits", "pair_logits_backward"),
            autocast=("x", "y", "w1"),
            busy=PAIR_BUSY,
            peak=((1024, 1024, 32, 64), 24),  # an [n, m, d] tensor is 128 MiB, [n, m] 4
        ),
        Case(
            name="pair_focal_loss",
            sizes=PAIR_SIZES,
            empty=PAIR_EMPTY,
            draw=draw_pair_focal_loss,
            run=_call("pair_focal_loss"),
            differentiable=pairs.NETWORK,
            outputs=("loss",),
            smooth=("loss",),
            bound=pairs.pair_focal_loss,
            variants=(
                *(
                    {"interaction": interaction, "listed": listed}
                    for interaction in INTERACTIONS
                    for listed in (None, 777)
                ),
                *({"reduction": reduction, "gamma": 0.5} for reduction in ("sum", "none")),
                {"reduction": "none", "interaction": "product", "gamma": 3.7, "alpha": None, "ignore_index": 2},
                {"gamma": 0.0, "alpha": 1.0},
            ),
            batch={"x": 0, "x_labels": 0},
            bad=(
                (lambda x: {"x": x["x"][0]}, ValueError, r"x must be \[n, d\], got shape \[7\]"),
                (lambda x: {"x": [[1.0]]}, TypeError, r"x must be a tensor \[n, d\], got list"),
                (
                    lambda x: {"y": x["y"][:, :3]},
                    ValueError,
                    r"y must have d of x = 7 in dimension 1, got shape \[5, 3\]",
                ),
                (lambda x: {"y": x["y"].double()}, TypeError, r"y is torch.float64 but x is torch.float32"),
                (
                    lambda x: {"w1": x["w1"][:, :6]},
                    ValueError,
                    r"w1 must have 2d of x = 14 in dimension 1, got shape \[2, 6\]",
                ),
                (
                    lambda x: {"interaction": "absdiff"},
                    ValueError,
                    r"w1 must have d of x = 7 in dimension 1, got shape \[2, 14\]",
                ),
                (
                    lambda x: {"w1": x["w1"].long()},
                    TypeError,
                    r"w1 must be float32, float64, bfloat16 or float16, got torch.int64",
                ),
                (
                    lambda x: {"b1": x["b1"][:1]},
                    ValueError,
                    r"b1 must have h of w1 = 2 in dimension 0, got shape \[1\]",
                ),
                (lambda x: {"w2": x["w2"][None]}, ValueError, r"w2 must be \[h\], got shape \[1, 2\]"),
                (
                    lambda x: {"w2": x["w2"][:1]},
                    ValueError,
                    r"w2 must have h of w1 = 2 in dimension 0, got shape \[1\]",
                ),
                (lambda x: {"b2": x["b2"][None]}, ValueError, r"b2 must be \[\], got shape \[1\]"),
                (lambda x: {"b2": 0.0}, TypeError, r"b2 must be a tensor \[\], got float"),
                (lambda x: {"x_labels": x["x_labels"].int()}, TypeError, r"x_labels must be int64, got torch.int32"),
                (
                    lambda x: {"x_labels": x["x_labels"][:2]},
                    ValueError,
                    r"x_labels must have n of x = 3 in dimension 0, got shape \[2\]",
                ),
                (
                    lambda x: {"y_labels": x["y_labels"][:2]},
                    ValueError,
                    r"y_labels must have m of y = 5 in dimension 0, got shape \[2\]",
                ),
                (lambda x: {"y_labels": None}, TypeError, r"y_labels must be a tensor \[m\], got NoneType"),
                (
                    lambda x: {"pairs": PAIRS.t()},
                    ValueError,
                    r"pairs must have two rows = 2 in dimension 1, got shape \[2, 3\]",
                ),
                (lambda x: {"pairs": PAIRS[0]}, ValueError, r"pairs must be \[p, 2\], got shape \[2\]"),
                (lambda x: {"pairs": PAIRS.int()}, TypeError, r"pairs must be int64, got torch.int32"),
                (
                    lambda x: {"pairs": PAIRS + 1},
                    ValueError,
                    r"pairs\[:, 0\] must be in \[0, 3\), the rows of x; got values",
                ),
                (
                    lambda x: {"pairs": PAIRS - torch.tensor([0, 1])},
                    ValueError,
                    r"pairs\[:, 1\] must be in \[0, 5\), the rows of y; got values",
                ),
                (lambda x: {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
                (lambda x: {"alpha": "0.5"}, TypeError, r"alpha must be a number, got str"),
                (lambda x: {"gamma": -1.0}, ValueError, r"gamma must be finite and >= 0, got -1.0"),
                (lambda x: {"gamma": float("nan")}, ValueError, r"gamma must be finite and >= 0, got nan"),
                (lambda x: {"gamma": None}, TypeError, r"gamma must be a number, got NoneType"),
                (lambda x: {"ignore_index": 0.5}, TypeError, r"ignore_index must be an int, got float"),
                (
                    lambda x: {"reduction": "average"},
                    ValueError,
                    r"reduction must be 'mean', 'sum' or 'none', got 'average'",
                ),
                (lambda x: {"y": x["y"].to("meta")}, ValueError, r"y is on meta but x is on cpu"),
                (lambda x: {"x_labels": x["x_labels"].to("meta")}, ValueError, r"x_labels is on meta but x is on cpu"),
                (lambda x: {"pairs": PAIRS.to("meta")}, ValueError, r"pairs is on meta but x is on cpu"),
            ),
            registered=("pair_focal_loss", "pair_focal_loss_backward", "pair_focal_loss_sum"),
            autocast=("x", "y", "w1"),
            numbers={"alpha": 0.75, "gamma": 1.5, "ignore_index": 2},
            busy=PAIR_BUSY,
            peak=((1024, 1024, 32, 64), 24),
        ),
        Case(
            name="pair_ranking_loss",
            sizes=RANKING_SIZES,
            empty=RANKING_EMPTY,
            draw=draw_pair_ranking_loss,
            run=_call("pair_ranking_loss"),
            differentiable=("embeddings", "references"),
            outputs=("loss",),
            smooth=("loss",),
            bound=ranking.pair_ranking_loss,
            variants=(
                *(reduction | {"negative_margin": margin} for reduction in REDUCTIONS for margin in (0.5, 1.3)),
                {"others": 57, "negative_margin": 1.3},
                {"others": 1, "reduction": "mean", "positive_margin": 0.3},
            ),
            batch={"embeddings": 0, "labels": 0},
            bad=(
                *RANKING_BAD,
                (
                    lambda x: {"labels": x["labels"][:2]},
                    ValueError,
                    r"labels must have n of embeddings = 3 in dimension 0, got shape \[2\]",
                ),
                (lambda x: {"labels": x["labels"].int()}, TypeError, r"labels must be int64, got torch.int32"),
                (lambda x: {"labels": x["labels"][None]}, ValueError, r"labels must be \[n\], got shape \[1, 3\]"),
                (lambda x: {"labels": [0] * 3}, TypeError, r"labels must be a tensor \[n\], got list"),
                (
                    lambda x: {"labels": x["labels"].to("meta")},
                    ValueError,
                    r"labels is on meta but embeddings is on cpu",
                ),
                (lambda x: {"references": x["embeddings"]}, ValueError, r"reference_labels must be given too"),
                (lambda x: {"reference_labels": x["labels"]}, ValueError, r"references must be given too"),
                (
                    lambda x: {"references": x["embeddings"][:, :3], "reference_labels": x["labels"]},
                    ValueError,
                    r"references must have d of embeddings = 5 in dimension 1, got shape \[3, 3\]",
                ),
                (
                    lambda x: {"references": x["embeddings"][:2], "reference_labels": x["labels"]},
                    ValueError,
                    r"reference_labels must have m of references = 2 in dimension 0, got shape \[3\]",
                ),
                (
                    lambda x: {"references": x["embeddings"].to("meta"), "reference_labels": x["labels"]},
                    ValueError,
                    r"references is on meta but embeddings is on cpu",
                ),
            ),
            registered=("pair_ranking_loss", "pair_ranking_loss_backward"),
            bad_size=2,
            numbers={"positive_margin": 0.25, "negative_margin": 1.5},
            busy=(((700, 50), {"negative_margin": 1.2}), ((700, 50), {"negative_margin": 1.2, "others": 210})),
            peak=((8192, 64), 24),  # an [n, n] matrix is 256 MiB, n·d 2
        ),
        Case(
            name="mined_pair_ranking_loss",
            sizes=RANKING_SIZES,
            empty=RANKING_EMPTY,
            draw=draw_mined_pair_ranking_loss,
            run=_call("mined_pair_ranking_loss"),
            differentiable=("embeddings",),
            outputs=("loss",),
            smooth=("loss",),
            bound=ranking.mined_pair_ranking_loss,
            variants=tuple(
                reduction | {"negative_margin": margin} for reduction in REDUCTIONS for margin in (0.5, 1.3)
            ),
            batch={"embeddings": 0, "basis_features": 0},
            bad=(
                *RANKING_BAD,
                (lambda x: {"embeddings": None}, TypeError, r"embeddings must be a tensor \[n, d\], got NoneType"),
                (
                    lambda x: {"basis_features": x["basis_features"][:2]},
                    ValueError,
                    r"basis_features must have n of embeddings = 3 in dimension 0, got",
                ),
                (
                    lambda x: {"basis_features": x["basis_features"][0]},
                    ValueError,
                    r"basis_features must be \[n, k\], got shape \[3\]",
                ),
                (
                    lambda x: {"basis_features": x["basis_features"].to("meta")},
                    ValueError,
                    r"basis_features is on meta but embeddings is on cpu",
                ),
                (
                    lambda x: {"positive_threshold": None},
                    TypeError,
                    r"positive_threshold must be a number or a scalar tensor, got NoneType",
                ),
                (lambda x: {"negative_threshold": float("nan")}, ValueError, r"negative_threshold must not be NaN"),
                (
                    lambda x: {"positive_threshold": x["basis_features"][0]},
                    ValueError,
                    r"positive_threshold must be \[\], got shape \[3\]",
                ),
                (
                    lambda x: {"positive_threshold": torch.tensor(1)},
                    TypeError,
                    r"positive_threshold must be float32, float64",
                ),
                (
                    lambda x: {"positive_threshold": torch.tensor(0.1, device="meta")},
                    ValueError,
                    r"positive_threshold is on meta but embeddings",
                ),
            ),
            registered=("mined_pair_ranking_loss", "mined_pair_ranking_loss_backward"),
            bad_size=2,
            numbers={
                "positive_threshold": 0.5,
                "negative_threshold": 0.25,
                "positive_margin": 0.25,
                "negative_margin": 1.5,
            },
            busy=(((700, 50), {"negative_margin": 1.2, "reduction": "mean"}),),
            peak=((8192, 64), 24),
        ),
        Case(
            name="similarity_moments",
            sizes=(*RANKING_SIZES, (300, 90), (600, 130)),
            empty=RANKING_EMPTY,
            draw=draw_similarity_moments,
            run=_call("similarity_moments"),
            differentiable=("features",),
            outputs=ranking.MOMENTS,
            smooth=ranking.MOMENTS,
            bound=ranking.similarity_moments,
            variants=({}, {"classes": 1}, {"classes": 40}, {"classes": 5000}),
            batch={"features": 0, "labels": 0},
            bad=(
                (
                    lambda x: {"features": x["features"].long()},
                    TypeError,
                    r"features must be float32, float64, bfloat16 or float16, got",
                ),
                (lambda x: {"features": x["features"][0]}, ValueError, r"features must be \[n, d\], got shape \[5\]"),
                (
                    lambda x: {"labels": x["labels"][:2]},
                    ValueError,
                    r"labels must have n of features = 3 in dimension 0, got shape \[2\]",
                ),
                (lambda x: {"labels": x["labels"].float()}, TypeError, r"labels must be int64, got torch.float32"),
            ),
            registered=("similarity_moments", "similarity_moments_backward"),
            bad_size=2,
            busy=(((700, 50), {}), ((250, 100), {}), ((700, 50), {"classes": 1})),
            peak=((8192, 64), 24),
        ),
    )
}
