# SPDX-License-Identifier: BSD-3-Clause
import copy

import pytest
import torch
from torch import nn

from ssmkernels.nn.ema_teacher import EMATeacher


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train_a_little(model: nn.Module) -> None:
    """Moves parameters and batch-norm buffers."""
    model.train()(torch.randn(8, 3) * 2 + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("buffers", ["average", "copy", "own"])
def test_parameters_are_averaged_and_buffers_follow_the_rule(buffers):
    model = student()
    start = copy.deepcopy(model.state_dict())
    teacher = EMATeacher(model, 0.9, buffers=buffers)
    train_a_little(model)
    teacher.update(model)
    for name, value in teacher.model.state_dict().items():
        is_parameter = "running" not in name and "tracked" not in name
        if is_parameter or (buffers == "average" and value.is_floating_point()):
            expected = 0.9 * start[name] + 0.1 * model.state_dict()[name]
        else:
            expected = start[name] if buffers == "own" else model.state_dict()[name]
        torch.testing.assert_close(value, expected)


def test_only_own_buffers_see_the_teachers_inputs():
    inputs = torch.randn(16, 3) + 5
    for buffers in ("average", "copy", "own"):
        teacher = EMATeacher(student(), buffers=buffers).train()
        before = teacher.model[1].running_mean.clone()
        teacher(inputs)
        assert torch.equal(teacher.model[1].running_mean, before) == (buffers != "own")
        teacher.eval()
        before = teacher.model[1].running_mean.clone()
        teacher(inputs)
        assert torch.equal(teacher.model[1].running_mean, before)


def test_warm_up_starts_at_the_student_and_ends_at_the_decay():
    model = student()
    teacher = EMATeacher(model, 0.6, warm_up=True)
    train_a_little(model)
    expected = model[0].weight.detach().clone()
    for decay in (0.0, 0.5, 0.6, 0.6):  # min(1 − 1/(step + 1), .6)
        teacher.update(model)
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        torch.testing.assert_close(teacher.model[0].weight, expected)
        train_a_little(model)


def test_state_dict_continues_the_warm_up():
    model = student()
    first = EMATeacher(model, 0.9, warm_up=True)
    train_a_little(model)
    first.update(model)
    second = EMATeacher(student(), 0.9, warm_up=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train_a_little(model)
    first.update(model)
    second.update(model)
    assert torch.equal(first.model[2].weight, second.model[2].weight)
    assert second.updates == 2


def test_no_gradient_and_no_link_to_the_student():
    model = student()
    teacher = EMATeacher(model)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not teacher(torch.randn(2, 3)).requires_grad
    before = teacher.model[0].weight.clone()
    train_a_little(model)
    assert torch.equal(teacher.model[0].weight, before)


class WithBuffer(nn.Sequential):
    """The student with one buffer more, which is its last."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__(*student())
        self[2].register_buffer("more", buffer)


@pytest.mark.parametrize("buffers", ["average", "copy", "own"])
@pytest.mark.parametrize(
    ("made_from", "other", "message"),
    [
        (student(), nn.Linear(3, 3), "student has other parameters"),
        (student(), {}, "student must be a torch.nn.Module, got dict"),
        (student(), WithBuffer(torch.ones(2)), "student has other buffers"),
        (WithBuffer(torch.ones(2)), student(), "student has other buffers"),
        (WithBuffer(torch.ones(2)), WithBuffer(torch.ones(3)), "student has other buffers"),
    ],
)
def test_another_student_is_refused_before_anything_is_written(buffers, made_from, other, message):
    teacher = EMATeacher(made_from, 0.5, buffers=buffers)
    before = copy.deepcopy(teacher.state_dict())
    if isinstance(other, nn.Module):
        for value in [*other.parameters(), *other.buffers()]:
            value.data.add_(1)
    if buffers == "own" and message == "student has other buffers":
        teacher.update(other)  # whose buffers are not looked at
        return
    with pytest.raises((TypeError, ValueError), match=message):
        teacher.update(other)
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("buffers", ["average", "copy", "own"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_student_of_another_dtype(buffers, dtype):
    """Averaged in the teacher's float32, as a student of the same values in float32 is."""
    model = student()
    teacher = EMATeacher(model, 0.9, buffers=buffers)
    twin = copy.deepcopy(teacher)
    train_a_little(model)
    teacher.update(model.to(dtype))
    twin.update(model.float())
    torch.testing.assert_close(teacher.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert teacher.model[0].weight.dtype == torch.float32


def test_a_model_without_parameters():
    teacher = EMATeacher(nn.ReLU())
    teacher.update(nn.ReLU())
    assert teacher.updates == 1
