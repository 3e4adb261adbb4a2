# SPDX-License-Identifier: BSD-3-Clause
"""What every op must show by itself, over the list of cases; what it must do inside torch is in
test_contract_torch.py.
"""

from __future__ import annotations

import gc
import inspect
import math
import threading
import types

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, Case, double, judge, problems, to

from ssmkernels import _C, ops, reference
from ssmkernels.ops import _autograd as autograd

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
REAL = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


# Behind functions of ssmkernels.graph and ssmkernels.metrics; see test_neighbours.py and test_laplacian_rows.py.
WITHOUT_PUBLIC_OP = {
    "laplacian_residual",
    "laplacian_rows_",
    "laplacian_step_",
    "nearest_neighbours",
    "pair_products",
    "symmetric_graph",
}


def everything(case: Case, device="cpu"):
    """Results at the sizes with work for several threads."""
    results = []
    for size, variant in case.busy:
        inputs = to(case.draw(size, torch.float32, **variant), device)
        outputs = case.evaluate(ops, inputs, case.grads(inputs))
        results += [outputs[name] for name in outputs if name not in case.unordered(inputs)]
    return results


def same_bits(first, second):
    return len(first) == len(second) and all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_every_op_is_in_the_list():
    public = {name for name in ops.__all__ if isinstance(getattr(ops, name), types.FunctionType)}
    assert public == {name for case in CASES.values() for name in (case.name, *case.calls)}
    operators = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("ssmkernels::")
    }
    listed = {name for case in CASES.values() for name in case.registered}
    assert {name.split(".")[0] for name in operators} == listed | WITHOUT_PUBLIC_OP
    differentiable = {name for case in CASES.values() if case.differentiable for name in case.registered}
    assert set(autograd._functions) <= differentiable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_value_and_gradient(case, dtype, device):
    for size, variant in problems(case):
        judge(case, case.draw(size, dtype, **variant), device)


@EVERY
def test_empty(case, device):
    for size in case.empty:
        results = judge(case, case.draw(size, torch.float32), device)
        assert all(value.isfinite().all() or value.isneginf().all() for value in results.values())
        assert not any(value.any() for name, value in results.items() if name.startswith("grad "))


@pytest.mark.arithmetic
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@REAL
@EVERY
def test_every_instruction_set(case, dtype, isa):
    if isa not in _C.available_isas():
        pytest.skip(f"this processor has no {isa}")
    chosen = _C.current_isa()
    try:
        _C.set_isa(isa)
        for variant in case.variants:
            judge(case, case.draw(case.sizes[3], dtype, **variant))
    finally:
        _C.set_isa(chosen)


@EVERY
def test_bits_do_not_depend_on_threads_or_run(case):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(everything(case))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


@EVERY
def test_calls_from_several_threads(case):
    inputs = case.draw(case.sizes[-1], torch.float32)
    grads, seen = case.grads(inputs), []
    expected = list(case.evaluate(ops, inputs, grads).values())
    workers = [threading.Thread(target=lambda: seen.append(case.evaluate(ops, inputs, grads))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(seen) == 4 and all(same_bits(expected, list(results.values())) for results in seen)


def _apart(value):
    """Every second element of a larger tensor."""
    return torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]


def _offset(value):
    """Behind one element of other memory."""
    return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)


def _transposed(value):
    return value.mT.contiguous().mT if value.ndim == 2 else value


@pytest.mark.parametrize("layout", [_apart, _offset, _transposed], ids=lambda layout: layout.__name__[1:])
@EVERY
def test_strides_and_offsets(case, layout, device):
    """Views are read in place; none is written."""
    for variant in case.variants:
        inputs = to(case.draw(case.sizes[2], torch.float32, **variant), device)
        grads = case.grads(inputs)
        laid_out = {name: layout(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        results, expected = case.evaluate(ops, laid_out, grads), case.evaluate(ops, inputs, grads)
        bounds = case.bound(inputs, grads or {})
        for name, margin in case.margins(results, expected, bounds).items():
            assert margin <= 1, name


@EVERY
def test_inputs_are_not_written(case, device):
    inputs = to(case.draw(case.sizes[3], torch.float32), device)
    for name in case.given(inputs):
        inputs[name].requires_grad_()
    before = {name: (inputs[name].detach().clone(), inputs[name]._version) for name in case.tensors(inputs)}
    outputs = dict(zip(case.outputs, case.run(ops, inputs), strict=True))
    if case.given(inputs):
        sum(outputs[name].sum() for name in case.smooth).backward()
    for name, (value, version) in before.items():
        assert inputs[name].equal(value) and inputs[name]._version == version, name


def refuses(case, inputs, name):
    """Whether the op refuses an input; it says which."""
    try:
        case.run(ops, inputs)
    except ValueError as error:
        return str(error).startswith(name)
    return False


@EVERY
def test_nan_in_nan_out(case, device):
    """What depends on a NaN is NaN, what does not is untouched; or the argument is refused by its name."""
    whole = case.draw(case.sizes[3], torch.float32)
    if "ignore_index" in case.numbers:
        whole["ignore_index"] = -7  # plain PyTorch gives NaN gradients to ignored pairs too, which nothing depends on
    grads = case.grads(whole)
    for name in case.floating(whole):
        for place in (0, whole[name].numel() // 2):
            spoiled = whole[name].clone()
            spoiled.view(-1)[place] = math.nan
            inputs = whole | {name: spoiled}
            if device == "cpu" and refuses(case, inputs, name):
                continue
            results = case.evaluate(ops, to(inputs, device), grads and to(grads, device))
            for result, expected in case.evaluate(reference, double(inputs), grads).items():
                values, where = results[result].cpu(), f"{result}, of a NaN in {name}"
                assert values[expected.isnan()].isnan().all(), where
                if result not in case.outputs:
                    continue
                assert values.isnan().equal(expected.isnan()), where
                sound = ~expected.isnan()
                error = (values.double() - expected.double())[sound].abs()
                assert (error <= 1e-3 * expected[sound].abs().amax()).all() if sound.any() else True, where


FACTORS = {torch.float32: (1e-40, 1e-30, 1e30), torch.float64: (1e-310, 1e-300, 1e-150, 1e150, 1e300)}


@pytest.mark.arithmetic
@pytest.mark.filterwarnings("ignore:.*did not converge")  # where weights of 1e30 hide a diagonal of 1 from a float32
@REAL
@EVERY
def test_every_scale(case, dtype, device):
    """Finite results where the exact ones are within the range of the dtype, for one input at a time denormal, tiny
    or huge.
    """
    whole, largest = case.draw(case.sizes[2], dtype), torch.finfo(dtype).max
    grads = case.grads(whole)
    for name in case.floating(whole):
        for factor in FACTORS[dtype]:
            inputs = whole | {name: whole[name] * factor}
            if not inputs[name].isfinite().all():
                continue
            exact = case.evaluate(reference, double(inputs), grads)
            results = case.evaluate(ops, to(inputs, device), grads and to(grads, device))
            for result, expected in exact.items():
                possible = expected.abs() < largest / 2
                assert results[result].cpu()[possible].isfinite().all(), f"{result}, of {name} times {factor:g}"


@EVERY
def test_numpy_scalars(case):
    inputs = case.draw(case.sizes[2], torch.float32)
    expected = list(case.evaluate(ops, inputs | _numbers(case), None).values())
    whole, real = (np.int32, np.int64), (np.float32, np.float64)
    for kind in range(2):
        numbers = {
            name: (whole if isinstance(value, int) else real)[kind](value) for name, value in _numbers(case).items()
        }
        assert same_bits(expected, list(case.evaluate(ops, inputs | numbers, None).values()))


def _numbers(case):
    """Of as many classes as the inputs have."""
    return case.numbers | ({"num_classes": case.sizes[2][3]} if "num_classes" in case.numbers else {})


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.peak], ids=lambda case: case.name)
def test_peak_memory(case):
    """Resident memory of forward and backward stays far below the tensor that the op never stores."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    (size, allowed), small = case.peak, case.draw(case.sizes[2], torch.float32)
    inputs = case.draw(size, torch.float32)
    case.evaluate(ops, small, case.grads(small))
    grads = dict.fromkeys(case.smooth, torch.ones(()))
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = case.evaluate(ops, inputs, grads)
    copies = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - copies
    assert results and extra < allowed * 2**20, f"{extra / 2**20:.1f} MiB more"


@pytest.mark.parametrize(
    ("case", "change", "error", "message"),
    [(case, *bad) for case in CASES.values() for bad in case.bad],
    ids=[f"{case.name}-{bad[2][:48]}" for case in CASES.values() for bad in case.bad],
)
def test_bad_input(case, change, error, message):
    inputs = case.draw(case.sizes[case.bad_size], torch.float32)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message):
        case.run(ops, inputs | change(inputs))
    assert all(inputs[name].equal(value) for name, value in before.items())


def wrong_kinds(value):
    """What an argument with this value cannot be."""
    if isinstance(value, str):
        return "x", 1, None, [], object()
    if not isinstance(value, torch.Tensor):
        return "x", 1j, None, [0.5], {}, object(), torch.zeros(2)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    return (
        "x",
        1,
        0.5,
        [0.5],
        {},
        object(),
        value.numpy(),
        value.unsqueeze(0),
        value.to(torch.complex64),
        value.to_sparse(),
        nested,
    )


@EVERY
def test_arguments_of_the_wrong_kind(case):
    """For every argument: a TypeError or ValueError that names it, and nothing is written."""
    inputs = case.draw(case.sizes[case.bad_size], torch.float32)
    inputs |= {name: value for name, value in case.numbers.items() if name not in inputs}
    op = getattr(ops, case.name.removeprefix("merge_"))
    arguments = {name: value for name, value in inputs.items() if name in inspect.signature(op).parameters}
    before = {name: arguments[name].clone() for name in case.tensors(arguments)}
    assert before
    for name, value in arguments.items():
        for wrong in wrong_kinds(value):
            if (name, wrong) == ("alpha", None):
                continue  # weighs all pairs by 1
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                op(**arguments | {name: wrong})
    assert all(arguments[name].equal(value) for name, value in before.items())


@pytest.mark.gpu
@EVERY
def test_bits_do_not_depend_on_the_run_on_a_gpu(case):
    assert same_bits(everything(case, "cuda"), everything(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_small_set(case, dtype):
    """Every kernel once, at sizes that a sanitizer gets through."""
    for variant in case.variants:
        judge(case, case.draw(case.sizes[1], dtype, **variant), "cuda")
    judge(case, case.draw(case.sizes[3], dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.peak], ids=lambda case: case.name)
def test_peak_memory_on_a_gpu(case):
    size, allowed = case.peak
    inputs = to(case.draw(size, torch.float32), "cuda")
    grads = dict.fromkeys(case.smooth, torch.ones((), device="cuda"))
    case.evaluate(ops, inputs, grads)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.evaluate(ops, inputs, grads)
    copies = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
    extra = torch.cuda.max_memory_allocated() - base - copies
    assert extra < allowed * 2**20, f"{extra / 2**20:.1f} MiB more"


@pytest.mark.gpu
@EVERY
def test_cuda_graph(case):
    """A captured step gives the results of other inputs, once they are copied in."""
    first, second = (to(case.draw(case.sizes[3], torch.float32, seed), "cuda") for seed in (0, 1))
    second = {
        name: second[name] if first[name].shape == second[name].shape else first[name] for name in case.tensors(first)
    }
    second = first | second | {name: first[name] for name in ("crow", "col", "reverse") if name in first}
    grads = case.grads(first)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        case.evaluate(ops, first, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.evaluate(ops, first, grads)
    for name in case.tensors(first):
        first[name].copy_(second[name])
    graph.replay()
    assert same_bits(list(results.values()), list(case.evaluate(ops, second, grads).values()))
