# SPDX-License-Identifier: BSD-3-Clause
"""torch.ops.ssmkernels.*, called below the checks of ssmkernels.ops with arguments that are wrong in every way.

An operator raises, or writes all of its results and nothing else. That it reads nothing outside its tensors shows under
AddressSanitizer: ``make asan`` runs this file against such a build, with SSMKERNELS_RAW_EXAMPLES examples of each
operator.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ssmkernels

EXAMPLES = int(os.environ.get("SSMKERNELS_RAW_EXAMPLES", "40"))
SPLIT_ROWS = ("laplacian_rows_", "laplacian_step_", "laplacian_residual")
TILE = 32  # rows by columns of a tile of pairs of the ranking losses
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
ERRORS = (RuntimeError, TypeError, ValueError, NotImplementedError, MemoryError)


def operators() -> list[str]:
    names = (name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names())
    return sorted({name.partition("::")[2] for name in names if name.startswith("ssmkernels::")})


class Arguments:
    """Right arguments of every operator, by their names, for sizes and a dtype that are drawn once."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.torch_rng = torch.Generator().manual_seed(rng.getrandbits(32))
        self.dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.real = self.compute if rng.random() < 0.9 else self.dtype  # what the graph operators take
        self.n, self.m = (rng.choice((0, 1, 2, 5, 33, 70, 140)) for _ in range(2))
        self.d, self.classes, self.hidden = (
            rng.choice((0, 1, 3, 8, 40)),
            rng.choice((1, 2, 5, 17)),
            rng.choice((0, 1, 7, 20)),
        )
        self.interaction, self.listed, self.referenced = rng.randrange(3), rng.random() < 0.5, rng.random() < 0.5
        if self.interaction == 0 and rng.random() < 0.9:
            self.dtype = self.compute  # "concat" takes no half types
        self.pair_count = rng.choice((0, 1, 9, 100))
        ends = torch.randint(max(self.n, 1), (2, rng.choice((0, 3, 60)) if self.n > 1 else 0), generator=self.torch_rng)
        dense = torch.zeros(self.n, self.n)
        dense[ends[0], ends[1]] = dense[ends[1], ends[0]] = 1
        rows, self.col = dense.nonzero(as_tuple=True)
        self.crow = torch.cat([torch.zeros(1), rows.bincount(minlength=self.n).cumsum(0)])
        self.edges = len(self.col)

    def split_rows(self, operator: str) -> dict[str, Callable[[], Any]]:
        """What the operators of a split graph take under names that others have too."""
        n, c = self.n, self.classes
        wide = torch.float64 if operator != "laplacian_rows_" else self.real
        return {
            **{name: lambda: self.real_tensor(n, c, dtype=self.real) for name in ("out", "residual", *"rpsuw")},
            **{name: lambda: self.real_tensor(n, dtype=self.real) for name in ("excess", "inverse", "step")},
            **{name: lambda: self.real_tensor(c, dtype=self.real) for name in ("fresh", "beta", "alpha")},
            "value": lambda: self.real_tensor(self.edges, dtype=self.real),
            "x": lambda: self.real_tensor(n, c, dtype=wide),
        }

    def real_tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.torch_rng, dtype=torch.float64).to(dtype)

    def ids(self, size: int, count: int) -> Tensor:
        return torch.randint(max(size, 1), (count,), generator=self.torch_rng)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.torch_rng)

    def of(self, operator: str, name: str) -> Any:
        n, m, d, c = self.n, self.m, self.d, self.classes
        low, high = self.dtype, self.compute
        columns = m if self.referenced and not operator.startswith("mined") else n
        values = (self.pair_count,) if self.listed else (n, m)
        makers: dict[str, Callable[[], Any]] = {
            **{
                name: lambda: self.real_tensor(n, d, dtype=low)
                for name in ("query", "query_weak", "query_strong", "features", "embeddings", "x")
            },
            **{name: lambda: self.real_tensor(m, d, dtype=low) for name in ("bank", "y")},
            "references": lambda: self.real_tensor(m, d, dtype=low) if self.referenced else None,
            "basis_features": lambda: self.real_tensor(n, self.hidden, dtype=low),
            **{
                name: lambda: self.real_tensor(n, c, dtype=high).abs()
                for name in ("probs", "probs_weak", "aggregated", "grad_aggregated")
            },
            "log_normalizer": lambda: self.real_tensor(n, dtype=high),
            "bank_labels": lambda: self.ids(c, m),
            "index": lambda: self.ids(m, n),
            "labels": lambda: self.ids(c, n).sort().values,
            "order": lambda: self.permutation(n),
            "reference_labels": lambda: self.ids(c, m).sort().values if self.referenced else None,
            "reference_order": lambda: self.permutation(m) if self.referenced else None,
            "x_labels": lambda: self.ids(c, n),
            "y_labels": lambda: self.ids(c, m),
            "pairs": lambda: (
                torch.stack([self.ids(n, self.pair_count), self.ids(m, self.pair_count)], 1) if self.listed else None
            ),
            "w1": lambda: self.real_tensor(self.hidden, 2 * d if self.interaction == 0 else d, dtype=low),
            **{name: lambda: self.real_tensor(self.hidden, dtype=high) for name in ("b1", "w2")},
            **{name: lambda: self.real_tensor(dtype=high) for name in ("b2", "grad_loss")},
            "thresholds": lambda: self.real_tensor(2, dtype=high),
            "weights": lambda: (
                self.real_tensor(n, 3, dtype=self.real).abs()
                if operator == "symmetric_graph"
                else self.real_tensor(2, dtype=high)
            ),
            "rows": lambda: (
                self.permutation(n) if operator == "laplacian_rows_" else self.real_tensor(n, d, dtype=self.real)
            ),
            **(self.split_rows(operator) if operator in SPLIT_ROWS else {}),
            "columns": lambda: self.real_tensor(m, d, dtype=self.real) if self.referenced else None,
            "offsets": lambda: self.real_tensor(columns, dtype=self.real),
            "neighbours": lambda: max(1, min(columns - 1, 5)),
            "ids": lambda: torch.stack([self.permutation(n)] * 3, 1).int(),
            **{name: lambda: self.ids(n, self.pair_count if n else 0) for name in ("left", "right")},
            **{name: lambda: self.real_tensor(4, dtype=high) for name in ("moments", "grad_moments")},
            "active": lambda: torch.randint(
                2, (-(-n // TILE) + 1, -(-columns // TILE) + 1), generator=self.torch_rng, dtype=torch.uint8
            ),
            **{name: lambda: self.real_tensor(*values, dtype=high) for name in ("grad_logits", "grad_losses")},
            "crow": lambda: self.crow.long(),
            "col": lambda: self.col.int(),
            "reverse": lambda: self.permutation(self.edges),
            **{
                name: lambda: self.real_tensor(self.edges, dtype=self.real).abs()
                for name in ("weight", "dissimilarity", "grad_dissimilarity")
            },
            "diagonal": lambda: self.real_tensor(n, dtype=self.real).abs() + 1,
            **{
                name: lambda: self.real_tensor(n, c, dtype=self.real)
                for name in ("rhs", "initial", "grad_rhs", "solution", "propagated")
            },
            "num_classes": lambda: c,
            "interaction": lambda: self.interaction,
            "reduction": lambda: self.rng.randrange(3),
            "ignore_index": lambda: -1,
            "max_iter": lambda: 20,
            "rtol": lambda: 1e-4,
        }
        return makers[name]() if name in makers else NotImplemented

    def any_tensor(self) -> Tensor:
        """For a name without an entry: numbers of a shape that may be right."""
        shape = self.rng.choice(((), (self.n,), (self.d,), (self.n, self.d), (self.m, self.d), (self.n, self.m)))
        return self.real_tensor(*shape, dtype=self.rng.choice((self.dtype, self.compute)))


def scalar(kind: str, rng: random.Random) -> Any:
    """A right value of a number that has no entry above."""
    return {"float": rng.choice((0.1, 0.5, 1.0)), "bool": rng.random() < 0.5}[kind]


def spoiled(value: Any, rng: random.Random) -> Any:
    """The same argument, wrong."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((-1, 0, 1, 3, -(2**62), 2**62))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e300, 1e-300))
    if not isinstance(value, Tensor):
        return rng.choice((None, torch.zeros(3)))
    how = rng.randrange(8)
    if how == 0:
        return value.to(rng.choice(DTYPES))
    if how == 1:
        return rng.choice((value[None], value[..., None], value.flatten(), value.sum()))
    if how == 2 and value.ndim:
        return torch.cat([value, value[:1]]) if rng.random() < 0.5 else value[1:]
    if how == 3 and value.ndim == 2:
        return rng.choice(
            (value.t().contiguous().t(), value.t(), value[:, :0], value[:, :1].expand(value.shape), value[::2])
        )
    if how == 4 and value.ndim:
        return value[:0]
    if how == 5:
        return None
    return hostile(value, rng)


def hostile(value: Tensor, rng: random.Random) -> Tensor:
    """The tensor with some of its values such as no checked call has."""
    out = value.clone(memory_format=torch.contiguous_format)
    flat, size = out.view(-1), out.numel()
    integers = (-1, -(2**63), 2**63 - 1, size, size + 1, 10**6, 2**31, rng.randrange(-5, 200))
    reals = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-40, 0.0, -1.0)
    for _ in range(rng.choice((1, 3, size)) if size else 0):
        if out.dtype == torch.int64:
            flat[rng.randrange(size)] = rng.choice(integers)
        elif out.dtype == torch.int32:
            flat[rng.randrange(size)] = rng.choice((-1, -(2**31), 2**31 - 1, size, rng.randrange(-5, 200)))
        elif out.dtype == torch.uint8:
            flat[rng.randrange(size)] = rng.randrange(256)
        else:
            flat[rng.randrange(size)] = rng.choice(reals)
    return out


def draw(operator: str, rng: random.Random) -> list[Any]:
    schema = getattr(torch.ops.ssmkernels, operator).default._schema
    made = Arguments(rng)
    arguments = []
    for argument in schema.arguments:
        kind = str(argument.type)
        value = made.of(operator, argument.name)
        if value is NotImplemented and "Tensor" in kind:
            value = made.any_tensor()
        elif value is NotImplemented:
            value = scalar(kind.replace("Optional[", "").strip("]"), rng)
        if (
            kind.startswith("Optional")
            and argument.name not in ("references", "reference_order", "reference_labels", "columns")
            and rng.random() < 0.3
        ):
            value = None
        arguments.append(value)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        at = rng.randrange(len(arguments))
        arguments[at] = spoiled(arguments[at], rng)
    return arguments


def run(operator: str, arguments: list[Any]) -> list[Tensor] | str:
    """Its results, or the kind of its error."""
    try:
        results = getattr(torch.ops.ssmkernels, operator).default(*arguments)
    except ERRORS as error:
        return type(error).__name__
    return list(results) if isinstance(results, tuple) else [] if results is None else [results]


@pytest.fixture
def unwritten_is_nan() -> Any:
    """New tensors are filled with NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def copied(argument: Any) -> Any:
    """With the strides of the argument, for which an operator that writes it may refuse it."""
    if not isinstance(argument, Tensor):
        return argument
    storage = argument.untyped_storage().clone()
    return argument.new_empty(0).set_(storage, argument.storage_offset(), argument.size(), argument.stride())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("operator", operators())
@pytest.mark.usefixtures("unwritten_is_nan")
def test_arguments_that_no_checked_call_has(operator: str) -> None:
    for seed in range(EXAMPLES):
        rng = random.Random(f"{operator} {seed}")
        arguments = draw(operator, rng)
        copies = [copied(argument) for argument in arguments]
        others = [copied(argument) for argument in arguments]
        torch.utils.deterministic.fill_uninitialized_memory = True
        first = run(operator, arguments)
        torch.utils.deterministic.fill_uninitialized_memory = False
        second = run(operator, others)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert isinstance(first, str) == isinstance(second, str), f"seed {seed}: {first} and {second}"
        if not operator.endswith("_"):
            for argument, copy in zip(arguments, copies, strict=True):
                if isinstance(argument, Tensor):
                    assert same_bits(argument, copy), f"seed {seed}: an argument was written"
        if isinstance(first, str):
            continue
        for mine, other in zip(first, second, strict=True):
            assert same_bits(mine, other), f"seed {seed}: part of a result was not written"


def test_every_operator_is_drawn() -> None:
    assert ssmkernels.__version__
    assert len(operators()) >= 15


def test_a_tolerance_that_is_no_number_is_refused() -> None:
    """Nothing is below it: as many iterations as there may be would be made."""
    arguments = Arguments(random.Random(0))
    names = [argument.name for argument in torch.ops.ssmkernels.laplacian_solve.default._schema.arguments]
    good = {name: arguments.of("laplacian_solve", name) for name in names[:-3]}
    for rtol in (float("nan"), -1.0):
        with pytest.raises(RuntimeError, match="rtol must be at least 0"):
            torch.ops.ssmkernels.laplacian_solve(*good.values(), rtol, 2**62, True)
