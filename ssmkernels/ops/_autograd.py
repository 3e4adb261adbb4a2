# SPDX-License-Identifier: BSD-3-Clause
"""How the ops are called and differentiated: one derivative per op, given to torch in three ways.

``torch.library.register_autograd`` makes ``torch.ops.ssmkernels.*`` differentiable for whoever calls it, torch.compile included, at about
40 µs a call. In eager mode that is more than a small batch takes to compute, so :func:`call` goes by a plain ``torch.autograd.Function``
with the same derivative; under torch.func, which refuses the other two, by one with a ``setup_context``, which costs 20 µs more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

# What torch's own registrations from Python use as well: the kernel of the device, past the one that records a derivative.
_below_autograd = torch._C._AutoDispatchBelowAutograd


class _Functions(NamedTuple):
    eager: type[torch.autograd.Function]
    transformable: type[torch.autograd.Function]


_functions: dict[str, _Functions] = {}


def register(name: str, backward: Callable[..., Any], save: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
    """Makes an op of the library differentiable; its gradient is not.

    Args:
        name: of the op. Exactly one of its outputs is differentiable.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs. The gradients of other outputs mean nothing.
        save: (ctx, inputs, output), called after the forward.
    """
    first_order = once_differentiable(backward)
    torch.library.register_autograd(f"ssmkernels::{name}", first_order, setup_context=save)
    op = kernel(name)

    def run(*inputs: Any) -> Any:
        with _below_autograd():
            return op(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with _below_autograd():
            output = op(*inputs)
        save(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        return output

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Any) -> Any:
        for grad in grads:
            if grad is not None:
                # Without create_graph there is nothing that first_order would have to guard, for its 2 µs.
                return first_order(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)
        return (None,) * len(ctx.needs_input_grad)

    def function(**methods: Callable[..., Any]) -> type[torch.autograd.Function]:
        return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})

    _functions[name] = _Functions(
        eager=function(forward=forward, backward=differentiate),
        transformable=function(forward=run, setup_context=setup_context, backward=differentiate),
    )


def kernel(name: str) -> Any:
    """The op of the library itself."""
    return getattr(torch.ops.ssmkernels, name).default


def call(name: str, *inputs: Any) -> Any:
    """Calls a differentiable op."""
    if torch.compiler.is_compiling():
        return kernel(name)(*inputs)
    if torch._C._are_functorch_transforms_active():
        return _functions[name].transformable.apply(*inputs)
    if torch.is_grad_enabled():
        return _functions[name].eager.apply(*inputs)
    with _below_autograd():
        return kernel(name)(*inputs)
