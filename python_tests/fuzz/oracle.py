# SPDX-License-Identifier: BSD-3-Clause
"""What a call has to show: the value and gradient of the reference in float64, or an error that names the argument."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import CASES, Case
from fuzz.contents import Tensors, copied, double, mapped, memory_of, named_tensors, same_bits, tensors_of
from fuzz.values import Draw, Number
from torch import Tensor

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
        holds: raises a :class:`Finding` where a result contradicts the arguments.
        numbers: what its scalar arguments may be.
        words: what its arguments that are strings may be.
        gradient: arguments that it is differentiable in.
        writes: arguments that it writes.
        fixed: arguments that are never made wrong.
        shapes: tensors whose largest element decides how large the result is: huge ones are not tried.
        judged_elsewhere: arguments whose errors come from another library and need not name them.
        undefined: arguments without which nothing is promised: wrong, they are refused or the value means nothing.
        normalized: outputs in whose rows a NaN may be everywhere: the entries share a normaliser.
        flush: whether products of numbers that are tiny for the dtype may vanish.
        inner: by the names of the outputs, how large what an output is a difference of is where the shifts do not show
            it; from the arguments in float64.
        case: of python_tests/ops/cases.py, whose bounds then hold; else errors are judged by shifting the arguments.
        lists: arguments that the bounds of the case allow to be empty; where another one is, they do not apply.
    """

    draw: Callable[[Draw], dict[str, Any]]
    call: Callable[..., Any]
    exact: Callable[..., Any] | None = None
    holds: Callable[[dict[str, Any], Tensors], None] | None = None
    numbers: dict[str, Number] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gradient: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    judged_elsewhere: tuple[str, ...] = ()
    undefined: tuple[str, ...] = ()
    normalized: tuple[str, ...] = ()
    flush: bool = True
    inner: Callable[..., dict[str, Any]] | None = None
    case: str | None = None
    lists: tuple[str, ...] = ()


def check(target: Target, arguments: dict[str, Any], wrong: str | None = None, ones: bool = True) -> bool:
    """Makes the call; ``wrong`` names the argument that is not as it should be. Returns whether it was accepted.

    Raises:
        Finding: saying what is wrong with the call.
    """
    kept = {name: memory_of(value) for name, value in arguments.items()}
    before = {name: copied(value) for name, value in arguments.items()}
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            results = _evaluated(target.call, arguments, target, ones)
    except (TypeError, ValueError) as error:
        if wrong is None:
            raise Finding(f"refused, though nothing is wrong: {type(error).__name__}: {error}") from error
        # A number that is right by itself, such as a smaller size, puts the other arguments in the wrong.
        right = wrong in target.numbers and target.numbers[wrong].accepts(before[wrong])
        names = "|".join(map(re.escape, arguments if right else [wrong]))
        if wrong not in target.judged_elsewhere and not re.search(rf"\b({names})\b", str(error)):
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
    if not target.writes:
        _check_again(target, arguments, results, ones)
    inexact = any("did not converge" in str(warning.message) for warning in given)
    if inexact or wrong in target.undefined:
        return True
    if target.holds is not None:
        target.holds(before, results)
    if target.exact is not None:
        with contextlib.suppress(Undecided):
            _check_values(target, before, results, ones)
    return True


def _check_again(target: Target, arguments: dict[str, Any], results: Tensors, ones: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not same_bits(results, _evaluated(target.call, arguments, target, ones)):
            raise Finding("a second call gives other bits")


def _check_unchanged(arguments: dict[str, Any], kept: dict[str, list[bytes]]) -> None:
    for name, bits in kept.items():
        if memory_of(arguments[name]) != bits:
            raise Finding(f"{name} was written")


def _check_values(target: Target, arguments: dict[str, Any], results: Tensors, ones: bool) -> None:
    exact_arguments = {name: double(_meant(target, name, value)) for name, value in arguments.items()}
    inputs = [value for argument in arguments.values() for value in tensors_of(argument) if value.is_floating_point()]
    if any(bool(value.isinf().any()) for value in inputs):
        return  # which of inf and NaN comes of it depends on the order
    exact = _exact(target, exact_arguments, ones)
    if exact.keys() != results.keys():
        raise Finding(f"the outputs are {sorted(results)}, the reference's {sorted(exact)}")
    for name, value in results.items():
        if value.shape != exact[name].shape:
            raise Finding(f"{name} has shape {list(value.shape)}, the reference's {list(exact[name].shape)}")
    allowed = {} if target.case is None else _derived(CASES[target.case], target, arguments, results, exact, ones)
    if not all(name in allowed or _is_next_to(value, exact[name]) for name, value in results.items()):
        allowed = _allowed(target, exact_arguments, exact, results, inputs, ones) | allowed
    for name, tolerance in allowed.items():
        given = exact[name] if name in target.normalized else exact_arguments.get(name.removeprefix("gradient of "))
        _compare(name, results[name], _with_nan_rows(results[name], exact[name], given), tolerance)


def _meant(target: Target, name: str, value: Any) -> Any:
    return target.numbers[name].meant(value) if name in target.numbers else value


def _with_nan_rows(value: Tensor, truth: Tensor, given: Any) -> Tensor:
    """The exact value, or NaN where that was found and ``given`` has a NaN in the same row.

    The gradient of a row that holds a NaN is NaN, whether or not the loss depends on the row.
    """
    if not isinstance(given, Tensor) or given.ndim == 0 or given.shape != truth.shape or not value.is_floating_point():
        return truth
    return torch.where(given.isnan().any(dim=-1, keepdim=True) & value.isnan(), torch.nan, truth)


def _is_next_to(value: Tensor, truth: Tensor) -> bool:
    """Whether a value is off by no more than every computation may be, so that its tolerance need not be found."""
    if not value.is_floating_point():
        return value.equal(truth.to(value.dtype))
    unit = max(torch.finfo(value.dtype).eps, torch.finfo(torch.float64).eps)
    return torch.allclose(value.double(), truth.double(), rtol=unit, atol=0, equal_nan=True)


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
    target: Target, arguments: dict[str, Any], exact: Tensors, results: Tensors, inputs: list[Tensor], ones: bool
) -> Tensors:
    """Errors of a stable computation: what changes when every input is shifted by some units in the last place."""
    generator = torch.Generator().manual_seed(0)

    def shifted(value: Tensor) -> Tensor:
        signs = torch.randint(2, value.shape, generator=generator) * 2 - 1
        return value * (1 + SHIFT * signs)

    change = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in exact.items()}
    for _ in range(SHIFTS):
        moved = {name: mapped(shifted, value) for name, value in arguments.items()}
        nearby = _exact(target, moved, ones, shifted)
        for name, value in nearby.items():
            change[name] = torch.maximum(change[name], _difference(value, exact[name]) / SHIFT)
    flushed = dict(exact)
    if target.flush and inputs:
        least = max(torch.finfo(value.dtype).tiny for value in inputs) ** 0.5
        if any(bool(((value != 0) & (value.abs() < least)).any()) for value in inputs):
            rounded = {
                name: mapped(lambda x: torch.where(x.abs() < least, 0.0, x), value) for name, value in arguments.items()
            }
            flushed = _exact(target, rounded, ones)
    length = max([8, *(max(value.shape, default=1) for value in inputs)])
    inner = {} if target.inner is None else target.inner(**arguments)
    allowed = {}
    for name, value in results.items():
        if not value.is_floating_point():
            allowed[name] = torch.zeros_like(value, dtype=torch.float64)
            continue
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        unit, magnitude = torch.finfo(wide).eps, exact[name].abs()
        spread = change[name] + (0.25 * change[name].amax(dim=-1, keepdim=True) if value.numel() and value.ndim else 0)
        bound = 8 * length * unit * (spread + magnitude + inner.get(name, 0.0)) + 64 * length * torch.finfo(wide).tiny
        if value.dtype != wide:
            bound = bound + torch.finfo(value.dtype).eps * magnitude + torch.finfo(value.dtype).tiny
        allowed[name] = bound + _difference(flushed[name], exact[name])
    return allowed


def _derived(
    case: Case, target: Target, arguments: dict[str, Any], results: Tensors, exact: Tensors, ones: bool
) -> Tensors:
    """The bounds of the op's case, by the names of the outputs here; none where an argument is empty that may not be.

    A bound that is not a number says nothing: rounding of the logits is past what a float64 can tell of their
    exponentials.
    """
    needed = [argument for name, argument in arguments.items() if name not in target.lists]
    if any(value.numel() == 0 for argument in needed for value in tensors_of(argument)):
        return {}
    named = {f"grad {name}": f"gradient of {name}" for name in target.gradient}
    named |= dict(zip(case.outputs, results, strict=False))
    grads = {name: cotangent(exact[named[name]], ones) for name in case.smooth}
    given = {name: _meant(target, name, value) for name, value in arguments.items()}
    allowed = {}
    for name, bound in case.bound(given, grads).items():
        if name not in named:
            continue
        bound = bound.nan_to_num(nan=torch.inf)
        value, magnitude = results[named[name]], exact[named[name]].abs()
        if value.is_floating_point():
            times = 2 if value.dtype == torch.float64 else 1  # the reference is not more exact than that
            kind = torch.finfo(value.dtype)
            # What is below the smallest normal number has no relative accuracy.
            allowed[named[name]] = times * bound.expand(value.shape) + kind.eps * magnitude + kind.tiny
    return allowed


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|; infinite where one of them alone is NaN or infinite."""
    return torch.where(a.isfinite() == b.isfinite(), (a.double() - b.double()).abs().nan_to_num(nan=0.0), torch.inf)


def _exact(
    target: Target, arguments: dict[str, Any], ones: bool, shift: Callable[[Tensor], Tensor] = Tensor.clone
) -> Tensors:
    assert target.exact is not None
    own = {name: copied(arguments[name]) for name in target.writes}
    try:
        return _evaluated(target.exact, arguments | own, target, ones, shift)
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
    results = {name: value.detach() for name, value in outputs.items()}
    if grown and leaves:
        weights = [shift(cotangent(value, ones)) for value in grown.values()]
        grads = torch.autograd.grad([*grown.values()], [*leaves.values()], weights, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            results[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    elif leaves:
        results |= {f"gradient of {name}": torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return {name: value.detach() for name, value in results.items()}


def cotangent(value: Tensor, ones: bool) -> Tensor:
    """The gradient that an output is given: constant, as that of a sum is, or random."""
    if ones:
        return torch.ones_like(value)
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
