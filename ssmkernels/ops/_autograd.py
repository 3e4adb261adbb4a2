# SPDX-License-Identifier: BSD-3-Clause
"""How the ops are called and differentiated: one derivative per op, given to torch in three ways.

``torch.library.register_autograd`` makes ``torch.ops.ssmkernels.*`` differentiable for whoever calls it, torch.compile
included, at about 40 µs a call. In eager mode that is more than a small batch takes to compute, so :func:`call` goes by
a plain ``torch.autograd.Function`` with the same derivative; under torch.func, which refuses the other two, by one with
a ``setup_context``, which costs 20 µs more.

The kernel of a gradient is itself an op, called through :func:`call` and registered with its own derivative
(:func:`register`) or with one that raises (:func:`register_gradient`), so that a gradient asked for under
``create_graph=True`` or nested torch.func.grad always has a graph. A gradient that comes out of the forward gets one
from :func:`gradient_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ssmkernels import _library

Function = TypeVar("Function", bound=Callable[..., Any])

# What torch's own registrations from Python use as well: the kernel of the device, past what records a derivative.
_below_autograd = torch._C._AutoDispatchBelowAutograd


class _Functions(NamedTuple):
    eager: type[torch.autograd.Function]
    transformable: type[torch.autograd.Function]


_functions: dict[str, _Functions] = {}
_not_differentiable: set[str] = set()  # gradients


def public_name(name: str) -> str:
    """The function of :mod:`ssmkernels.ops` that an op belongs to."""
    return name.removesuffix("_backward").removesuffix("_sum")


def twice_differentiable() -> list[str]:
    """The functions of :mod:`ssmkernels.ops` that have second derivatives."""
    gradients = (name for name in _functions if name.endswith("_backward"))
    return sorted(public_name(name) for name in gradients if name not in _not_differentiable)


def _refuse_second_derivative(name: str) -> NoReturn:
    raise NotImplementedError(
        f"ssmkernels: the gradient of `{public_name(name)}` is not differentiable "
        f"(second derivatives exist for {', '.join(twice_differentiable())})"
    )


def _refuse_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"ssmkernels: `{public_name(name)}` has no forward-mode derivative (jvp); use reverse mode, as torch.func.vjp"
        " does"
    )


def _over_batch(call: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    """torch.func.vmap of a kernel: one call for each element of the batch."""
    outputs = []
    for element in range(info.batch_size):
        pairs = zip(inputs, in_dims, strict=True)
        outputs.append(call(*(value if dim is None else value.select(dim, element) for value, dim in pairs)))
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    stacked = tuple(map(torch.stack, zip(*outputs, strict=True)))
    return stacked, (0,) * len(stacked)


def fake(name: str) -> Callable[[Function], Function]:
    """Decorates the function that gives an op's results for fake tensors: their shapes, dtypes and devices.

    This and the functions below register an op beside its public function, and do nothing without the library.
    """

    def register_fake(function: Function) -> Function:
        if _library.load():
            torch.library.register_fake(f"ssmkernels::{name}", function)
        return function

    return register_fake


def register_vmap(name: str) -> None:
    """Makes an op work under torch.func.vmap."""
    if not _library.load():
        return
    op = kernel(name)
    torch.library.register_vmap(f"ssmkernels::{name}", lambda info, dims, *inputs: _over_batch(op, info, dims, *inputs))


def register(name: str, backward: Callable[..., Any], save: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
    """Makes an op of the library differentiable, and work under torch.func.vmap.

    Args:
        name: of the op.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs, made of differentiable operations. The
            gradient of an output may be None, though not of all; those of outputs that ``save`` has marked as not
            differentiable mean nothing.
        save: (ctx, inputs, output), called after the forward.
    """
    if not _library.load():
        return
    torch.library.register_autograd(f"ssmkernels::{name}", backward, setup_context=save)
    register_vmap(name)
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
                return backward(ctx, *grads)
        return (None,) * len(ctx.needs_input_grad)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _over_batch(lambda *element: call(name, *element), info, in_dims, *inputs)

    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode(name)

    def function(**methods: Callable[..., Any]) -> type[torch.autograd.Function]:
        methods |= {"backward": differentiate, "jvp": jvp}
        return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})

    _functions[name] = _Functions(
        eager=function(forward=forward),
        transformable=function(forward=run, setup_context=setup_context, vmap=vmap),
    )


def register_gradient(name: str) -> None:
    """Makes the op of a gradient say that it is not differentiable, when it is differentiated."""
    _not_differentiable.add(name)

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        _refuse_second_derivative(name)

    register(name, backward, lambda ctx, inputs, output: None)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """A ``save`` for :func:`register` that keeps all inputs; the backward has them from :func:`saved_inputs`."""
    ctx.tensors = [isinstance(value, Tensor) for value in inputs]
    ctx.settings = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def saved_inputs(ctx: Any) -> list[Any]:
    tensors, settings = iter(ctx.saved_tensors), iter(ctx.settings)
    return [next(tensors) if is_tensor else next(settings) for is_tensor in ctx.tensors]


def kernel(name: str) -> Any:
    """The op of the library itself."""
    return getattr(torch.ops.ssmkernels, name).default


def call(name: str, *inputs: Any) -> Any:
    """Calls a differentiable op."""
    if torch.compiler.is_compiling():
        return kernel(name)(*inputs)
    if torch._C._are_functorch_transforms_active():
        return _functions[name].transformable.apply(*inputs)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return _functions[name].eager.apply(*inputs)
    with _below_autograd():
        return kernel(name)(*inputs)


def is_wanted(*tensors: Tensor) -> bool:
    """Whether a gradient may be asked for: what torch.func transforms does not show that it requires one."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor.requires_grad:
            return True
    return torch._C._are_functorch_transforms_active()


class _GradientOf(torch.autograd.Function):
    """(name, gradient, *inputs) -> gradient, as a function of the inputs whose derivative is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        _refuse_second_derivative(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode(ctx.name)


def gradient_of(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
    """In a backward: a gradient from the forward of an op, which depends on these inputs in a way that is not known."""
    if not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()):
        return gradient
    return _GradientOf.apply(name, gradient, *inputs)


class _OnceDifferentiable(torch.autograd.Function):
    """(name, x) -> x, whose gradient depends on x in a way that is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, gradient_of(ctx.name, grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode(ctx.name)


def once_differentiable(name: str, x: Tensor) -> Tensor:
    """``x``, for an expression whose gradient is not the derivative of its own formula."""
    if not torch.compiler.is_compiling():
        return _OnceDifferentiable.apply(name, x)
    if torch._C._are_functorch_transforms_active():  # dynamo would give 0 for a nested torch.func.grad, in silence
        raise NotImplementedError(f"ssmkernels: `{name}` is not traced under torch.func")
    return x  # a compiled function has no second derivative
