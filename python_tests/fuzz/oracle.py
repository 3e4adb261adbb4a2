# SPDX-License-Identifier: BSD-3-Clause
"""What a call has to show: the value and the gradient of the reference in float64, or an error that names the
argument.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cases import CASES, Case
from fuzz.values import Draw, Number
from torch import Tensor

Tensors = dict[str, Tensor]
SHIFTS = 4  # evaluations near the arguments
SHIFT = 2.0**-22  # relative, far above the rounding of float64


class Finding(AssertionError):
    """A call that did something else than its documentation says."""


class Undecided(Exception):
    """Raised by a call that says itself that its result is not exact, such as an iteration that did not converge."""


@dataclass(frozen=True)
class Target:
    """A public function, and how it is fuzzed.

    Args:
        draw: arguments by name that have to be accepted.
        call: the function.
        exact: the same in float64, with plain numbers; None where nothing is known of the value.
        numbers: what its scalar arguments may be.
        words: what its arguments that are strings may be.
        gradient: arguments that it is differentiable in.
        writes: arguments that it writes.
        undefined: arguments without which nothing is promised: wrong, they are refused or the value means nothing.
        flush: whether products of numbers that are tiny for the dtype may vanish.
        case: of python_tests/ops/cases.py, whose bounds then hold; else errors are judged by shifting the arguments.
        lists: arguments that the bounds of the case allow to be empty; where another one is, they do not apply.
    """

    draw: Callable[[Draw], dict[str, Any]]
    call: Callable[..., Any]
    exact: Callable[..., Any] | None = None
    numbers: dict[str, Number] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gradient: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    undefined: tuple[str, ...] = ()
    flush: bool = True
    case: str | None = None
    lists: tuple[str, ...] = ()


def check(target: Target, arguments: dict[str, Any], wrong: str | None = None, ones: bool = True) -> bool:
    """Makes the call; ``wrong`` names the argument that is not as it should be. Returns whether it was accepted.

    Raises:
        Finding: saying what is wrong with the call.
    """
    kept = {name: _bytes(value) for name, value in arguments.items()}
    before = {name: _copied(value) for name, value in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _evaluated(target.call, arguments, target, ones)
    except (TypeError, ValueError) as error:
        if wrong is None:
            raise Finding(f"refused, though nothing is wrong: {type(error).__name__}: {error}") from error
        if not re.search(rf"\b{wrong}\b", str(error)):
            raise Finding(f"the error does not name {wrong}: {type(error).__name__}: {error}") from error
        _check_unchanged(arguments, kept)
        return False
    except Undecided:
        return True
    except Finding:
        raise
    except Exception as error:
        raise Finding(f"{type(error).__name__} instead of TypeError or ValueError: {error}") from error
    _check_unchanged(arguments, {name: bits for name, bits in kept.items() if name not in target.writes})
    if wrong in target.numbers and target.numbers[wrong].accepts(before[wrong]) is False:
        raise Finding(f"{wrong} = {before[wrong]!r} was accepted")
    if target.exact is not None and wrong not in target.undefined:
        with contextlib.suppress(Undecided):
            _check_values(target, before, found, ones)
    return True


def _check_unchanged(arguments: dict[str, Any], kept: dict[str, list[bytes]]) -> None:
    for name, bits in kept.items():
        if _bytes(arguments[name]) != bits:
            raise Finding(f"{name} was written")


def _check_values(target: Target, arguments: dict[str, Any], found: Tensors, ones: bool) -> None:
    exact_arguments = {
        name: _double(target.numbers[name].meant(v) if name in target.numbers else v) for name, v in arguments.items()
    }
    inputs = [value for each in arguments.values() for value in tensors_of(each) if value.is_floating_point()]
    if any(bool(value.isinf().any()) for value in inputs):
        return  # which of inf and NaN comes of it depends on the order
    exact = _exact(target, exact_arguments, ones)
    if exact.keys() != found.keys():
        raise Finding(f"the outputs are {sorted(found)}, the reference's {sorted(exact)}")
    allowed = _allowed(target, exact_arguments, exact, found, inputs, ones)
    if target.case is not None:
        allowed |= _derived(CASES[target.case], target, arguments, found, exact, ones)
    for name, value in found.items():
        truth = exact[name]
        if value.shape != truth.shape:
            raise Finding(f"{name} has shape {list(value.shape)}, the reference's {list(truth.shape)}")
        _compare(name, value, truth, allowed[name])


def _compare(name: str, value: Tensor, truth: Tensor, allowed: Tensor) -> None:
    if not value.is_floating_point():
        if not value.equal(truth.to(value.dtype)):
            raise Finding(f"{name} is {value.tolist()}, exactly {truth.tolist()}")
        return
    representable = truth.isnan() | (truth.abs() < 0.99 * torch.finfo(value.dtype).max)
    value = value.double()
    for what, wrong in {
        "is NaN or infinite where the exact value is not": representable & ~truth.isnan() & ~value.isfinite(),
        "is not NaN where the exact value is": truth.isnan() & ~value.isnan(),
        "is off": representable & ((value - truth).abs() > allowed) & truth.isfinite(),
    }.items():
        wrong = wrong & allowed.isfinite()
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise Finding(f"{name} {what}: {value[at]:.9g} for {truth[at]:.9g} at {at}, allowed ±{allowed[at]:.2g}")


def _allowed(
    target: Target, arguments: dict[str, Any], exact: Tensors, found: Tensors, inputs: list[Tensor], ones: bool
) -> Tensors:
    """Errors of a computation that is stable: what changes when every input is shifted by some units in the last
    place.
    """
    generator = torch.Generator().manual_seed(0)

    def shifted(value: Tensor) -> Tensor:
        signs = torch.randint(2, value.shape, generator=generator) * 2 - 1
        return value * (1 + SHIFT * signs)

    change = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in exact.items()}
    for _ in range(SHIFTS):
        nearby = _exact(target, {name: _mapped(shifted, value) for name, value in arguments.items()}, ones, shifted)
        for name, value in nearby.items():
            change[name] = torch.maximum(change[name], _difference(value, exact[name]) / SHIFT)
    flushed = dict(exact)
    if target.flush and inputs:
        least = max(torch.finfo(value.dtype).tiny for value in inputs) ** 0.5
        if any(bool(((value != 0) & (value.abs() < least)).any()) for value in inputs):
            flushed = _exact(
                target,
                {n: _mapped(lambda x: torch.where(x.abs() < least, 0.0, x), v) for n, v in arguments.items()},
                ones,
            )
    length = max([8, *(max(value.shape, default=1) for value in inputs)])
    allowed = {}
    for name, value in found.items():
        if not value.is_floating_point():
            allowed[name] = torch.zeros_like(value, dtype=torch.float64)
            continue
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        unit, magnitude = torch.finfo(wide).eps, exact[name].abs()
        spread = change[name] + (0.25 * change[name].amax(dim=-1, keepdim=True) if value.numel() and value.ndim else 0)
        bound = 8 * length * unit * (spread + magnitude) + 64 * length * torch.finfo(wide).tiny
        if value.dtype != wide:
            bound = bound + torch.finfo(value.dtype).eps * magnitude + torch.finfo(value.dtype).tiny
        allowed[name] = bound + _difference(flushed[name], exact[name])
    return allowed


def _derived(
    case: Case, target: Target, arguments: dict[str, Any], found: Tensors, exact: Tensors, ones: bool
) -> Tensors:
    """The bounds of the op's case, by the names that the outputs have here; none where an argument is empty that may
    not be.

    A bound that is not a number says nothing: rounding of the logits is past what a float64 can tell of their
    exponentials.
    """
    sizes = [
        value.numel() for name, each in arguments.items() if name not in target.lists for value in tensors_of(each)
    ]
    if 0 in sizes:
        return {}
    named = {f"grad {name}": f"gradient of {name}" for name in target.gradient}
    named |= dict(zip(case.outputs, found, strict=False))
    grads = {name: cotangent(exact[named[name]], ones) for name in case.smooth}
    given = {
        name: target.numbers[name].meant(value) if name in target.numbers else value
        for name, value in arguments.items()
    }
    allowed = {}
    for name, bound in case.bound(given, grads).items():
        if name not in named:
            continue
        bound = bound.nan_to_num(nan=torch.inf)
        value, magnitude = found[named[name]], exact[named[name]].abs()
        if value.is_floating_point():
            times = 2 if value.dtype == torch.float64 else 1  # the reference is not more exact than that
            allowed[named[name]] = times * bound.expand(value.shape) + torch.finfo(value.dtype).eps * magnitude
    return allowed


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|; infinite where one of them alone is NaN or infinite."""
    return torch.where(a.isfinite() == b.isfinite(), (a.double() - b.double()).abs().nan_to_num(nan=0.0), torch.inf)


def _exact(
    target: Target, arguments: dict[str, Any], ones: bool, shift: Callable[[Tensor], Tensor] = Tensor.clone
) -> Tensors:
    try:
        assert target.exact is not None
        return _evaluated(target.exact, arguments, target, ones, shift)
    except Undecided:
        raise
    except Exception as error:
        raise Finding(f"accepted what the reference does not take: {type(error).__name__}: {error}") from error


def _evaluated(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    target: Target,
    ones: bool,
    shift: Callable[[Tensor], Tensor] = Tensor.clone,
) -> Tensors:
    """Outputs, what was written, and the gradients that random or constant gradients of the outputs give."""
    arguments = dict(arguments)
    leaves = {}
    for name in target.gradient:
        if isinstance(arguments.get(name), Tensor) and arguments[name].is_floating_point():
            leaves[name] = arguments[name] = arguments[name].detach().requires_grad_()
    outputs = named_tensors(function(**arguments))
    outputs |= {f"written {name}": arguments[name] for name in target.writes}
    grown = {name: value for name, value in outputs.items() if value.requires_grad}
    found = {name: value.detach() for name, value in outputs.items()}
    if grown and leaves:
        weights = [shift(cotangent(value, ones)) for value in grown.values()]
        grads = torch.autograd.grad([*grown.values()], [*leaves.values()], weights, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    elif leaves:
        found |= {f"gradient of {name}": torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return {name: value.detach() for name, value in found.items()}


def cotangent(value: Tensor, ones: bool) -> Tensor:
    """The gradient that an output is given: constant, as that of a sum is, or random."""
    if ones:
        return torch.ones_like(value)
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)


def named_tensors(value: Any) -> Tensors:
    """A result as tensors by name."""
    if isinstance(value, Tensor):
        return {"value": value}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(name): each for name, part in value.items() for each in named_tensors(part).values()}
    if isinstance(value, (tuple, list)):
        return {f"value {place}": each for place, part in enumerate(value) for each in named_tensors(part).values()}
    return {} if value is None else {"value": torch.as_tensor(value)}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that an argument is or holds."""
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(value.copy())] if value.dtype.kind in "fiu" else []
    if isinstance(value, (tuple, list)):
        return [each for part in value for each in tensors_of(part)]
    return [value] if isinstance(value, Tensor) else []


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The argument with its floating-point tensors changed."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(function, part) for part in value))
    return value


def _double(value: Any) -> Any:
    return _mapped(lambda x: x.detach().double(), value)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(part) for part in value))
    return value


def _bytes(value: Any) -> list[bytes]:
    """The memory that a tensor lies in, with what lies between its elements."""
    if isinstance(value, Tensor):
        return [torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy().tobytes()]
    if isinstance(value, np.ndarray):
        return [value.tobytes()]
    return [each for part in value for each in _bytes(part)] if isinstance(value, (tuple, list)) else []
