# SPDX-License-Identifier: BSD-3-Clause
"""The exponential moving average of a model, as a teacher or for evaluation (Tarvainen & Valpola, Mean Teacher)."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn


class EMATeacher(nn.Module):
    """θ_t ← a θ_t + (1 − a) θ_s for every parameter, on a copy of ``model`` that takes no gradient.

    Which batch-norm statistics the copy uses has to be said: published code differs, and a wrong choice collapses training.

    ``"average"``
        floating-point buffers are averaged like parameters (EMAN); the teacher always runs in eval mode.
    ``"copy"``
        they are the student's (FixMatch and its PyTorch ports); the teacher always runs in eval mode.
    ``"own"``
        they come from the teacher's own forward passes in train mode (Mean Teacher; SimMatch on ImageNet).

    Integer buffers are the student's in the first two.

    Args:
        model: the student at its start; it is copied.
        decay: a, in [0, 1).
        buffers: as above.
        warm_up: a = min(1 − 1/(step + 1), decay), so that the starting weights do not linger in a short run.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, *, buffers: Literal["average", "copy", "own"] = "copy", warm_up: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it should be in [0, 1)")
        if buffers not in ("average", "copy", "own"):
            raise ValueError(f"buffers is {buffers!r}; it should be 'average', 'copy' or 'own'")
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
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
        """One step towards ``student``, a module with the parameters and buffers of the model given at the start."""
        decay = min(1 - 1 / (self.updates + 1), self.decay) if self.warm_up else self.decay
        mine: list[Tensor] = [*self.model.parameters()]
        theirs: list[Tensor] = [*student.parameters()]
        if [p.shape for p in mine] != [p.shape for p in theirs]:
            raise ValueError("student has other parameters than the model that this teacher was made from")
        if self.buffer_rule != "own":
            for buffer, source in zip(self.model.buffers(), student.buffers(), strict=True):
                if self.buffer_rule == "average" and buffer.is_floating_point():
                    mine.append(buffer)
                    theirs.append(source)
                else:
                    buffer.copy_(source)
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        self.updates += 1

    def get_extra_state(self) -> int:
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state

    def extra_repr(self) -> str:
        return f"decay={self.decay}, buffers={self.buffer_rule!r}, warm_up={self.warm_up}"
