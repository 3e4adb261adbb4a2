# SPDX-License-Identifier: BSD-3-Clause
"""What every op must do inside torch, over the list of cases: derivatives, compilation, export, transforms,
autocast.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, double, to
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ssmkernels import ops, reference
from ssmkernels.ops import _autograd as autograd

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DIFFERENTIABLE = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.differentiable], ids=lambda case: case.name
)
# An op that writes its arguments has no result to map or to differentiate.
FUNCTIONAL = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if not case.name.endswith("_")], ids=lambda case: case.name
)


def same_bits(first, second):
    assert first.keys() == second.keys()
    return all(first[name].equal(second[name]) for name in first)


def by_parameters(case: Case, inputs):
    """The smooth outputs as a function of the differentiable inputs, and those."""
    names = case.given(inputs)

    def function(*values):
        outputs = case.run(ops, case.free(inputs | dict(zip(names, values, strict=True))))
        return tuple(value for name, value in zip(case.outputs, outputs, strict=True) if name in case.smooth)

    return function, tuple(inputs[name].detach().requires_grad_() for name in names)


def small(case: Case, variant, dtype=torch.float64):
    """Inputs of the second size, in float64; a system is solved until its derivatives are exact."""
    return case.draw(case.sizes[1], dtype, **(variant | {"rtol": 1e-14} if case.name == "laplacian_solve" else variant))


@DIFFERENTIABLE
def test_gradcheck(case, device):
    for variant in case.variants:
        function, parameters = by_parameters(case, to(small(case, variant), device))
        assert gradcheck(function, parameters), variant


class _Recorded(TorchDispatchMode):
    """The operators of the library that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ssmkernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@EVERY
def test_opcheck(case, device):
    """Every operator that the case calls, forward and backward, with the arguments that it is called with."""
    checked, names = set(), set()
    for dtype, variant in [
        (torch.bfloat16, case.variants[0]),
        *((torch.float32, variant) for variant in case.variants),
    ]:
        inputs = to(case.draw(case.sizes[1], dtype, **variant), device)
        grads = case.grads(inputs)
        with _Recorded() as recorded:
            case.evaluate(ops, inputs, grads)
        for operator, args in recorded.calls:
            way = (
                operator,
                tuple((value.dtype, value.ndim) if isinstance(value, torch.Tensor) else value for value in args),
            )
            if way in checked:
                continue
            checked.add(way)
            name = operator._schema.name.split("::")[1]
            names.add(name)
            differentiable = name in autograd._functions and not name.endswith("_backward")  # those: test_autograd.py
            opcheck(operator, tuple(_copy(value, differentiable) for value in args))
    assert names == set(case.registered)


def _copy(value, differentiable):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(differentiable and value.requires_grad)


def batch_of(case: Case, inputs, size):
    """The same inputs with so many rows in a batch, some of them several times."""
    if size == 0 or not case.batch:
        return inputs
    changed = dict(inputs)
    for name, dim in case.batch.items():
        changed[name] = inputs[name].index_select(
            dim, torch.arange(size, device=inputs[name].device) % inputs[name].shape[dim]
        )
    return changed


@EVERY
def test_torch_compile(case, device):
    """One graph of the first size, one of any, and one of a single row, which torch compiles apart: none per batch
    size.
    """
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = replace(case, run=torch.compile(case.run, fullgraph=True, backend=counter))
    inputs = to(case.draw(case.sizes[1], torch.float32), device)
    for size in (5, 8, 3, 17, 1, 33, 64, 2, 40, 100):
        changed = batch_of(case, inputs, max(size, case.least_batch))
        grads = case.grads(changed)
        results = compiled.evaluate(ops, changed, grads)
        for name, value in case.evaluate(ops, changed, grads).items():
            torch.testing.assert_close(results[name], value)
    assert counter.frame_count <= 3


class _Program(torch.nn.Module):
    """A case as a module of its tensors."""

    def __init__(self, case, inputs):
        super().__init__()
        self.run, self.options = (
            case.run,
            {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)},
        )

    def forward(self, tensors):
        return tuple(self.run(ops, tensors | self.options))


def _exported(case, inputs):
    tensors = {name: inputs[name] for name in case.tensors(inputs)}
    batch = torch.export.Dim("batch", min=case.least_batch)
    shapes = {name: {case.batch[name]: batch} if name in case.batch else None for name in tensors}
    return torch.export.export(_Program(case, inputs), (tensors,), dynamic_shapes=(shapes,))


@EVERY
def test_export_with_a_dynamic_batch(case, device):
    inputs = batch_of(case, to(case.draw(case.sizes[1], torch.float32), device), 5)
    program = _exported(case, inputs).module()
    for size in (case.least_batch, 3, 40):
        changed = batch_of(case, inputs, size)
        outputs = program({name: changed[name] for name in case.tensors(changed)})
        for value, expected in zip(outputs, case.run(ops, changed), strict=True):
            torch.testing.assert_close(value, expected)


class _All(torch.nn.Module):
    def __init__(self, programs):
        super().__init__()
        self.programs = torch.nn.ModuleDict(programs)

    def forward(self, inputs):
        return {name: program(inputs[name]) for name, program in self.programs.items()}


# Of the program around the ops: one file, compiled once, that is not to be fast.
SOON_COMPILED = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}


@pytest.mark.long
@pytest.mark.parametrize("how", ["compiled", "packaged"])
def test_inductor(how, device, tmp_path):
    """All ops in one program, by torch.compile and by AOTInductor."""
    drawn = {name: to(case.draw(case.sizes[1], torch.float32), device) for name, case in CASES.items()}
    tensors = {name: {key: drawn[name][key] for key in case.tensors(drawn[name])} for name, case in CASES.items()}
    module = _All({name: _Program(case, drawn[name]) for name, case in CASES.items()})
    if how == "compiled":
        program = torch.compile(module, fullgraph=True)
    else:
        path = str(tmp_path / "program.pt2")
        exported = torch.export.export(module, (tensors,))
        torch._inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=SOON_COMPILED)
        program = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        outputs = program(tensors)
        for name, values in module(tensors).items():
            for value, expected in zip(outputs[name], values, strict=True):
                torch.testing.assert_close(value, expected)


@DIFFERENTIABLE
def test_func_grad(case, device):
    inputs = to(case.draw(case.sizes[1], torch.float32), device)
    names = case.given(inputs)

    def loss(*values):
        outputs = dict(zip(case.outputs, case.run(ops, inputs | dict(zip(names, values, strict=True))), strict=True))
        return sum(outputs[name].sum() for name in case.smooth)

    slopes = torch.func.grad(loss, argnums=tuple(range(len(names))))(*(inputs[name] for name in names))
    expected = case.evaluate(ops, inputs, dict.fromkeys(case.smooth, torch.ones((), device=device)))
    for name, slope in zip(names, slopes, strict=True):
        assert slope.equal(expected[f"grad {name}"])


@DIFFERENTIABLE
def test_activation_checkpointing(case, device):
    inputs = to(case.draw(case.sizes[1], torch.float32), device)
    grads = case.grads(inputs)
    again = replace(case, run=lambda module, values: checkpoint(case.run, module, values, use_reentrant=False))
    assert same_bits(again.evaluate(ops, inputs, grads), case.evaluate(ops, inputs, grads))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@EVERY
def test_autocast(case, low, device):
    """Matrix-like inputs go in autocast's dtype, statistics do not; results are float32, gradients have the dtype of
    their input.
    """
    for variant in case.variants:
        inputs = case.draw(case.sizes[3], torch.float32, **variant)
        grads = case.grads(inputs)
        with torch.autocast(device, low):
            results = case.evaluate(ops, to(inputs, device), grads and to(grads, device))
        rounded = inputs | {name: inputs[name].to(low) for name in case.autocast}
        assert all(value.dtype == torch.float32 or not value.is_floating_point() for value in results.values())
        results, exact = (
            {name: value.cpu() for name, value in results.items()},
            case.evaluate(reference, double(rounded), grads),
        )
        # A gradient comes back through the rounding, but only to those inputs.
        for name, margin in case.margins(results, exact, case.bound(rounded, grads or {})).items():
            assert margin <= 1 and not math.isnan(margin), name


@DIFFERENTIABLE
def test_second_derivative(case, device):
    """It is right, or differentiating the gradient says that there is none and names the op: in eager mode, nested
    and compiled.
    """
    inputs = to(small(case, case.variants[0]), device)
    function, parameters = by_parameters(case, inputs)
    called = case.name.removeprefix("merge_")  # a merged matching has the gradient of one pass
    if case.name in autograd.twice_differentiable():
        for variant in case.variants:
            assert gradgradcheck(*by_parameters(case, to(small(case, variant), device))), variant
        return

    def penalty(*values):
        slopes = torch.autograd.grad(sum(out.sum() for out in function(*values)), values, create_graph=True)
        return sum(slope.square().sum() for slope in slopes)

    def nested(value):
        def loss(value):
            return sum(out.sum() for out in function(value, *parameters[1:]))

        return torch.func.grad(lambda value: torch.func.grad(loss)(value).square().sum())(value)

    for differentiate in (
        lambda: penalty(*parameters).backward(),
        lambda: nested(parameters[0]),
        lambda: torch.autograd.functional.hessian(
            lambda value: sum(o.sum() for o in function(value, *parameters[1:])), parameters[0]
        ),
    ):
        with pytest.raises(
            (NotImplementedError, RuntimeError), match=f"the gradient of `{called}` is not differentiable"
        ):
            differentiate()


@EVERY
def test_meta_and_fake_tensors(case):
    """Shapes and dtypes without values."""
    inputs = case.draw(case.sizes[1], torch.float32)
    grads = case.grads(inputs)
    expected = case.evaluate(ops, inputs, grads)
    described = {name: (value.shape, value.dtype) for name, value in expected.items()}
    meta = case.evaluate(ops, to(inputs, "meta"), grads and to(grads, "meta"))
    assert {name: (value.shape, value.dtype) for name, value in meta.items()} == described
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        slopes = grads and {name: mode.from_tensor(value) for name, value in grads.items()}
        results = case.evaluate(ops, fake, slopes)
    assert {name: (value.shape, value.dtype) for name, value in results.items()} == described


@FUNCTIONAL
def test_vmap(case, device):
    """Over every input that may have a batch, one by one: the results of a loop."""
    drawn = [to(case.draw(case.sizes[1], torch.float32, seed), device) for seed in range(3)]
    for name in case.given(drawn[0]) or case.floating(drawn[0])[:2]:
        if len({inputs[name].shape for inputs in drawn}) > 1:
            drawn = [drawn[0]] * 3
        values = torch.stack([inputs[name] * (1 + k / 8) for k, inputs in enumerate(drawn)])
        inputs = drawn[0]

        def call(value, name=name, inputs=inputs):
            return case.run(ops, inputs | {name: value})

        outputs = torch.func.vmap(call)(values)
        for place, value in enumerate(values):
            for ours, expected in zip(outputs, call(value), strict=True):
                assert ours[place].equal(expected), name


@DIFFERENTIABLE
def test_vmap_of_grad(case, device):
    """A gradient per sample."""
    inputs = to(case.draw(case.sizes[1], torch.float32), device)
    name = case.given(inputs)[0]
    values = torch.stack([inputs[name], 0.5 * inputs[name]])

    def loss(value):
        outputs = dict(zip(case.outputs, case.run(ops, inputs | {name: value}), strict=True))
        return sum(outputs[output].sum() for output in case.smooth)

    slopes = torch.func.vmap(torch.func.grad(loss))(values)
    for value, slope in zip(values, slopes, strict=True):
        assert slope.equal(torch.func.grad(loss)(value))


@DIFFERENTIABLE
def test_forward_mode_says_that_it_is_missing(case):
    inputs = case.draw(case.sizes[1], torch.float32)
    name = case.given(inputs)[-1]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda value: case.run(ops, inputs | {name: value}), (inputs[name],), (inputs[name],))


@DIFFERENTIABLE
def test_only_the_gradients_asked_for(case, device):
    """What no gradient flows to is detached, what is not asked for gets none."""
    inputs = to(case.draw(case.sizes[1], torch.float32), device)
    with torch.no_grad():
        asked = inputs | {name: inputs[name].detach().requires_grad_() for name in case.given(inputs)}
        assert not any(value.requires_grad for value in case.run(ops, asked))
    for name in case.floating(inputs):
        leaf = inputs[name].detach().requires_grad_()
        outputs = dict(zip(case.outputs, case.run(ops, inputs | {name: leaf}), strict=True))
        smooth = case.smooth if name in case.differentiable else ()
        assert {output for output, value in outputs.items() if value.requires_grad} == set(smooth), name
        if smooth:
            sum(outputs[output].sum() for output in smooth).backward()
            assert leaf.grad is not None and leaf.grad.shape == leaf.shape
