# SPDX-License-Identifier: BSD-3-Clause
"""What every module of ssmkernels.nn keeps to, over the list in module_cases.py."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import typing

import numpy as np
import pytest
import torch
from module_cases import CASES, Call, Case, Inputs, weighted_sum
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import ssmkernels.nn
from ssmkernels.nn import PrototypeHead

EXPORTS = [getattr(ssmkernels.nn, name) for name in ssmkernels.nn.__all__]
MODULES = [export for export in EXPORTS if isinstance(export, type) and issubclass(export, nn.Module)]
Tensors = tuple[Tensor, ...]
HALF = (torch.bfloat16, torch.float16)
SETTINGS = {(case.module, name): (case, name) for case in CASES for name in case.settings if name != "model"}


def cases(*unwanted: str) -> pytest.MarkDecorator:
    """Every case of which none of these attributes is true."""
    wanted = [case for case in CASES if not any(getattr(case, trait) for trait in unwanted)]
    return pytest.mark.parametrize("case", wanted, ids=lambda case: case.name)


def one_case_per_module() -> pytest.MarkDecorator:
    first = {case.module: case for case in reversed(CASES)}
    return pytest.mark.parametrize("case", first.values(), ids=lambda case: case.module.__name__)


def settings(kind: type = object) -> pytest.MarkDecorator:
    """Every setting of every module whose default is of a kind."""
    wanted = [
        (case, name)
        for case, name in SETTINGS.values()
        if isinstance(inspect.signature(case.module).parameters[name].default, kind)
    ]
    return pytest.mark.parametrize(
        ("case", "name"), wanted, ids=[f"{case.module.__name__}-{name}" for case, name in wanted]
    )


def with_leaves(case: Case, inputs: Inputs) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in case.leaves]


def gradients_of(outputs: Tensors, leaves: list[Tensor], *, create_graph: bool = False) -> Tensors:
    if not leaves:
        return ()
    loss = weighted_sum([output for output in outputs if output.requires_grad])
    return torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def results(case: Case, module: nn.Module, inputs: Inputs, run: typing.Any = None) -> tuple[Tensors, Tensors]:
    """Outputs, and gradients of inputs and parameters."""
    leaves = with_leaves(case, inputs) + [parameter for parameter in module.parameters() if parameter.requires_grad]
    outputs = case.run(module, inputs) if run is None else run(inputs)
    gradients = gradients_of(outputs, leaves)
    return tuple(output.detach() for output in outputs), gradients


def assert_same(first: typing.Any, second: typing.Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """In float32: a few hundred roundings of numbers of size 1."""
    torch.testing.assert_close(first, second, rtol=rtol, atol=atol, equal_nan=True)


def test_every_exported_module_has_a_case():
    assert len({case.name for case in CASES}) == len(CASES)
    for module in MODULES:
        assert any(issubclass(case.module, module) for case in CASES), f"{module.__name__} has no case"


# Conversions and copies.


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@cases()
def test_runs_in_every_dtype(case, dtype):
    module = case.make().to(dtype)
    inputs = case.inputs(dtype=dtype)
    exact = copy.deepcopy(module).double()
    outputs, gradients = results(case, module, inputs)
    exact_inputs = {name: value.detach().to(exact_dtype(value)) for name, value in inputs.items()}
    expected, expected_gradients = results(case, exact, exact_inputs)
    tolerance = case.roundings * torch.finfo(dtype).eps
    for actual, right in zip(outputs + gradients, expected + expected_gradients, strict=True):
        scale = max(1.0, right.abs().max().item())
        torch.testing.assert_close(actual.double(), right.double(), rtol=0, atol=tolerance * scale)
    for leaf, gradient in zip(case.leaves, gradients, strict=False):
        assert gradient.dtype == inputs[leaf].dtype


@cases()
def test_inputs_with_the_negative_bit(case):
    """torch._neg_view: minus what lies in memory."""
    inputs = case.inputs()
    negated = {name: torch._neg_view(-value) for name, value in inputs.items()}
    for actual, expected in zip(results(case, case.make(), negated), results(case, case.make(), inputs), strict=True):
        assert all(one.equal(other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("value", [1e-300, 1e-39, 1e39, 1e300])
@settings(float)
def test_numbers_that_float32_lacks_give_no_nan(case, name, value):
    try:
        module = case.make(**{name: value})
    except ValueError:
        with pytest.raises(ValueError, match=name):
            case.make(**{name: value})
        return
    outputs, gradients = results(case, module, case.inputs())
    assert not any(tensor.isnan().any() for tensor in (*outputs, *gradients))


def exact_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.is_floating_point() else value.dtype


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@cases("follows_autocast")
def test_half_inputs_and_autocast_are_computed_in_float32(case, dtype):
    module, inputs = case.make(), case.inputs(dtype=dtype)
    expected = case.run(case.make().double(), case.inputs(dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case.run(case.make(), inputs)
    outputs, gradients = results(case, module, inputs)
    assert all(output.dtype == torch.float32 for output in outputs)
    assert_same(cast, outputs, rtol=0, atol=0)
    assert_same([output.double() for output in outputs], [output.double() for output in expected])
    assert all(gradient.dtype == inputs[name].dtype for name, gradient in zip(case.leaves, gradients, strict=False))


@pytest.mark.parametrize("convert", ["double", "half", "bfloat16", "float"])
@one_case_per_module()
def test_statistics_stay_in_float32_or_better(case, convert):
    module = case.make()
    case.run(module, case.inputs())
    statistics = {name: getattr(module, name).clone() for name in getattr(module, "statistics", ())}
    getattr(module, convert)()
    for name, value in statistics.items():
        converted = getattr(module, name)
        assert converted.dtype == (torch.float64 if convert == "double" else torch.float32)
        assert torch.equal(converted.float(), value)
    if not isinstance(module, ssmkernels.nn.EMATeacher):
        assert all(parameter.dtype == getattr(torch.ones(()), convert)().dtype for parameter in module.parameters())


@cases()
def test_copies_give_the_same_bits_and_share_nothing(case):
    module, inputs = case.make(), case.inputs()
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    addresses = {value.data_ptr() for value in [*module.parameters(), *module.buffers()]}
    expected = results(case, module, inputs)
    for duplicate in copies:
        assert repr(duplicate) == repr(module)
        assert not addresses & {value.data_ptr() for value in [*duplicate.parameters(), *duplicate.buffers()]}
        assert_same(results(case, duplicate, inputs), expected, rtol=0, atol=0)
        assert_same(duplicate.state_dict(), module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
@cases()
def test_state_goes_through_a_file(case, assign):
    module, inputs = case.make(), case.inputs()
    case.run(module, case.inputs(seed=1))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = case.make()
    with torch.no_grad():
        for value in other.parameters():
            value.add_(1)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert_same(other.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert_same(results(case, other, inputs), results(case, module, inputs), rtol=0, atol=0)


@one_case_per_module()
def test_a_state_that_does_not_fit_is_refused(case):
    module = case.make()
    state = module.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surplus"):
        module.load_state_dict({**state, "surplus": torch.ones(1)})
    for name in dict(module.named_parameters()) | dict(module.named_buffers()):
        if not name.endswith("num_batches_tracked"):  # batch norm does without
            with pytest.raises(RuntimeError, match=f"(?s)Missing key.*{re.escape(name)}"):
                module.load_state_dict({key: value for key, value in state.items() if key != name})
        with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(name)}"):
            module.load_state_dict({**state, name: state[name].new_zeros(3, 3, 3)})


# Transforms.


@cases()
def test_compiles_for_all_batch_sizes_at_once(case):
    """In one graph for the first size and one for all others, which is one without plain sizes."""
    torch._dynamo.reset()
    module, twin = case.make(), case.make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Call(case, module), fullgraph=True, backend=counter)
    for rows in range(5, 15):
        assert_same(results(case, module, case.inputs(rows), compiled), results(case, twin, case.inputs(rows)))
        assert_same(module.state_dict(), twin.state_dict())
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["sinkhorn_codes", "draw_class_centers"])
def test_functions_compile_for_all_batch_sizes_at_once(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = getattr(ssmkernels.nn, name)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in range(5, 15):
        scores, labels = torch.linspace(0, 1, 3 * rows).reshape(rows, 3), torch.arange(rows)
        # One row a class, so that the centers do not depend on the draw.
        arguments = (scores,) if name == "sinkhorn_codes" else (scores, labels, 20)
        assert_same(tuple(compiled(*arguments)), tuple(function(*arguments)))
    assert counter.frame_count <= 2


@cases()
def test_exports_with_a_dynamic_batch_from_one_row_on(case):
    module = case.make()
    batch = torch.export.Dim("batch", min=1, max=4096)
    inputs = case.inputs()
    shapes = {name: None if name in case.fixed else {0: batch} for name in inputs}
    exported = torch.export.export(Call(case, module), (inputs,), dynamic_shapes=(shapes,)).module()
    for rows in (1, 2, 3, 33, 100):
        twin = case.make()
        exported.load_state_dict(Call(case, twin).state_dict(), strict=False)
        inputs = case.inputs(rows)
        assert_same(exported(inputs), case.run(twin, inputs))


@cases()
def test_meta_and_fake_tensors_have_the_shapes_and_dtypes(case):
    inputs = case.inputs()
    expected = case.run(case.make(), inputs)
    on_meta = case.run(case.make().to("meta"), {name: value.to("meta") for name, value in inputs.items()})
    call = Call(case, case.make())
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(value) for name, value in [*call.named_parameters(), *call.named_buffers()]}
        fake_inputs = {name: mode.from_tensor(value) for name, value in inputs.items()}
        fake = torch.func.functional_call(call, state, (fake_inputs,))
    for output, *others in zip(expected, on_meta, fake, strict=True):
        for other in others:
            assert (other.shape, other.dtype) == (output.shape, output.dtype)
    assert all(output.device.type == "meta" for output in on_meta)


@cases("accumulates", "without_gradient")
def test_functional_gradients_are_those_of_autograd(case):
    module, inputs = case.make(), case.inputs()
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    call = Call(case, module)

    def loss(parameters, leaves):
        state = {f"module.{name}": value for name, value in parameters.items()}
        return weighted_sum(torch.func.functional_call(call, state, ({**inputs, **leaves},)))

    leaves = {name: inputs[name] for name in case.leaves}
    detached = {name: value.detach() for name, value in trained.items()}
    of_parameters, of_leaves = torch.func.grad(loss, argnums=(0, 1))(detached, leaves)
    _, expected = results(case, module, case.inputs())
    assert_same((*of_leaves.values(), *of_parameters.values()), expected)


def shifted_gradients(case: Case, step: float, *, create_graph: bool = False) -> tuple[list[Tensor], Tensors]:
    """Leaves in float64, moved by so many steps in a fixed direction, and the gradients there of a module that is
    new each time.
    """
    draw = torch.Generator().manual_seed(3)
    inputs = case.inputs(dtype=torch.float64)
    for name in case.leaves:
        direction = torch.randn(inputs[name].shape, generator=draw, dtype=torch.float64)
        inputs[name] = inputs[name] + step * direction
    leaves = with_leaves(case, inputs)
    outputs = case.run(case.make().double(), inputs)
    return leaves, gradients_of(outputs, leaves, create_graph=create_graph)


@cases("without_gradient")
def test_second_derivatives_are_right_or_raise(case):
    """In one direction, against central differences of the gradient, whose error is a multiple of the square of the
    step.
    """
    leaves, gradients = shifted_gradients(case, 0.0, create_graph=True)
    draw = torch.Generator().manual_seed(3)
    directions = [torch.randn(leaf.shape, generator=draw, dtype=torch.float64) for leaf in leaves]
    along = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    if case.is_once_differentiable:
        with pytest.raises(NotImplementedError, match="is not differentiable"):
            torch.autograd.grad(along, leaves)
        return
    products = torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True)
    step = 1e-5
    (_, ahead), (_, behind) = shifted_gradients(case, step), shifted_gradients(case, -step)
    for product, after, before in zip(products, ahead, behind, strict=True):
        torch.testing.assert_close(product, (after - before) / (2 * step), rtol=1e-5, atol=1e-6)


@cases("accumulates")
def test_vmap_is_a_loop(case):
    module = case.make()
    batches = [case.inputs(seed=seed) for seed in range(3)]
    stacked = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
    outputs = torch.func.vmap(lambda inputs: case.run(module, inputs))(stacked)
    expected = [case.run(module, batch) for batch in batches]
    assert_same(outputs, tuple(torch.stack(values) for values in zip(*expected, strict=True)))


@cases("accumulates")
def test_checkpointing_changes_nothing(case):
    module, inputs = case.make(), case.inputs()
    expected = results(case, module, case.inputs())
    again = results(case, module, inputs, lambda value: checkpoint(Call(case, module), value, use_reentrant=False))
    assert_same(again, expected, rtol=0, atol=0)


@cases()
def test_autocast_keeps_losses_and_statistics_in_float32(case):
    module, inputs = case.make(), case.inputs()
    expected = results(case, copy.deepcopy(module), case.inputs())
    leaves = with_leaves(case, inputs) + [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.run(module, inputs)
    gradients = gradients_of(outputs, leaves)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert all(output.dtype == torch.float32 for output in outputs if output.ndim == 0)
    tolerance = case.roundings * torch.finfo(torch.bfloat16).eps
    for actual, right in zip((*outputs, *gradients), expected[0] + expected[1], strict=True):
        scale = max(1.0, right.abs().max().item())
        torch.testing.assert_close(actual.detach().float(), right, rtol=0, atol=tolerance * scale)


# Values.


@cases()
def test_inputs_are_not_written(case):
    inputs = case.inputs()
    before = {name: value.clone() for name, value in inputs.items()}
    results(case, case.make(), inputs)
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert all(value._version == 0 for value in inputs.values())


@cases()
def test_nan_in_nan_out(case):
    """In row 3 of each floating-point input: what another number there changes is NaN, and other rows are what they
    were.
    """
    inputs = case.inputs()
    expected = case.run(case.make(), inputs)
    for name in inputs.keys() - case.values_are_checked:
        if not inputs[name].is_floating_point():
            continue
        runs = []
        for factor in (0.5, torch.nan):
            changed = {**inputs, name: inputs[name].clone()}
            changed[name][3, ::2] *= factor
            runs.append(case.run(case.make(), changed))
        for before, moved, spoilt in zip(expected, *runs, strict=True):
            assert spoilt[(moved - before).abs() > 1e-3].isnan().all()
            if case.rows_are_independent and name not in case.fixed:
                others = torch.arange(len(before)) != 3
                assert_same(spoilt[others], before[others])


@cases()
def test_outputs_and_gradients_of_tiny_batches_are_finite(case):
    for rows in (0, 1, 2):
        outputs, gradients = results(case, case.make(), case.inputs(rows))
        assert all(value.isfinite().all() for value in outputs + gradients)


# Arguments.


@settings()
def test_numbers_of_numpy_are_numbers(case, name):
    value = case.settings[name]
    kinds = {int: (np.int64, np.int32, np.uint8), float: (np.float64, np.float32)}.get(type(value), ())
    for kind in kinds:
        module, inputs = case.make(**{name: kind(value)}), case.inputs()
        assert type(getattr(module, name, value)) is type(value)
        assert_same(case.run(module, inputs), case.run(case.make(), inputs))


@settings()
def test_a_bad_setting_is_named(case, name):
    value = case.settings[name]
    bad = [None, "nonsense", object(), [1]]
    if isinstance(value, (int, float)):
        bad += [float("nan"), 1j]
    if isinstance(value, int):
        bad += [0, -1, 1.5, True]
    for setting in bad:
        if name == "labels" and setting is None:
            continue  # they may be unknown
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            case.make(**{name: setting})


@cases("passes_inputs_on")
def test_a_bad_input_is_named(case):
    """And nothing is written. Where rows or devices differ, it may be the other one that is named."""
    module, inputs = case.make(), case.inputs()
    before = copy.deepcopy(module.state_dict())
    any_name = "|".join(inputs)
    of_the_batch = inputs.keys() - case.fixed
    for name, value in inputs.items():
        other_kind = value.long() if value.is_floating_point() else value.double()
        bad = [
            (bad_value, name) for bad_value in (value.tolist(), value[..., None], other_kind, value.to(torch.complex64))
        ]
        if name not in case.optional:
            bad.append((None, name))
        if len(of_the_batch) > 1 and name in of_the_batch:
            bad.append((value[:-1], any_name))
        if before:
            bad.append((value.to("meta"), any_name))
        for bad_value, named in bad:
            with pytest.raises((TypeError, ValueError), match=rf"\b({named})\b"):
                case.run(module, {**inputs, name: bad_value})
    assert_same(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_takes_only_some_strings_is_typed_so(module):
    for _, method in inspect.getmembers(module, inspect.isfunction):
        is_ours = method.__module__.startswith("ssmkernels.nn")
        if is_ours and (not method.__name__.startswith("_") or method.__name__ == "__init__"):
            hints = typing.get_type_hints(method)
            assert str not in {hint for name, hint in hints.items() if name != "return"}, method.__qualname__


@one_case_per_module()
def test_repr_names_the_settings(case):
    module = case.make()
    for name, value in case.settings.items():
        if not isinstance(value, (Tensor, nn.Module)) and case.module is not PrototypeHead:  # which lists its layers
            assert f"{name}={value!r}" in repr(module)
