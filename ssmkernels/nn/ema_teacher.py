# SPDX-License-Identifier: BSD-3-Clause
"""The exponential moving average of a model, as a teacher or for evaluation (Tarvainen & Valpola, Mean Teacher)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ssmkernels.ops import _checks as check

BufferRule = Literal["average", "copy", "own"]


class EMATeacher(nn.Module):
    """θ_t ← a θ_t + (1 − a) θ_s for every parameter, on a copy of ``model`` that takes no gradient.

    Which batch-norm statistics the copy uses has to be said: published code differs, and a wrong choice collapses
    training.

    ``"average"``
        floating-point buffers are averaged like parameters (EMAN); the teacher always runs in eval mode.
    ``"copy"``
        they are the student's (FixMatch and its PyTorch ports); the teacher always runs in eval mode.
    ``"own"``
        they come from the teacher's own forward passes in train mode (Mean Teacher; SimMatch on ImageNet).

    Integer buffers are the student's in the first two.

    The average is kept in the teacher's own dtype, whatever the student's is. In a half type it stands still, because
    what a step adds is rounded away: give a half-precision student a float32 teacher, ``EMATeacher(student).float()``.

    Args:
        model: the student at its start; it is copied.
        decay: a, in [0, 1).
        buffers: as above.
        warm_up: a = min(1 − 1/(step + 1), decay), so that the starting weights do not linger in a short run.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        buffers: BufferRule = "copy",
        warm_up: bool = False,
    ) -> None:
        super().__init__()
        _check_module("model", model)
        self.decay = check.check_fraction("decay", decay)
        if self.decay == 1:
            raise ValueError("decay must be below 1, or the teacher would never learn")
        check.check_choice("buffers", buffers, get_args(BufferRule))
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.buffer_rule = buffers
        self.warm_up = warm_up
        self.updates = 0
        self.train(model.training)

    def train(self, mode: bool = True) -> EMATeacher:
        return super().train(mode and self.buffer_rule == "own")

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """One step towards ``student``, a module with the parameters and buffers of the model given at the start, in
        any dtype.

        Raises:
            ValueError, TypeError: ``student`` has other parameters or, unless they are the teacher's own, other
                buffers. Nothing is written then.
        """
        _check_module("student", student)
        averaged = _pairs("parameters", self.model.parameters(), student.parameters())
        if self.buffer_rule != "own":
            buffers = _pairs("buffers", self.model.buffers(), student.buffers())
            averages = self.buffer_rule == "average"
            averaged += [pair for pair in buffers if averages and pair[0].is_floating_point()]
            for buffer, source in buffers:
                if not (averages and buffer.is_floating_point()):
                    buffer.copy_(source)
        if averaged:
            decay = min(1 - 1 / (self.updates + 1), self.decay) if self.warm_up else self.decay
            mine = [value for value, _ in averaged]
            torch._foreach_lerp_(mine, [source.to(value) for value, source in averaged], 1 - decay)
        self.updates += 1

    def get_extra_state(self) -> int:
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state

    def extra_repr(self) -> str:
        return f"decay={self.decay}, buffers={self.buffer_rule!r}, warm_up={self.warm_up}"


def _check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def _pairs(kind: str, mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    values, sources = [*mine], [*theirs]
    if [value.shape for value in values] != [source.shape for source in sources]:
        raise ValueError(f"student has other {kind} than the model that this teacher was made from")
    return [*zip(values, sources, strict=True)]
