# SPDX-License-Identifier: BSD-3-Clause
"""What a Lightning module needs beside itself for SimMatch or Mean Teacher: a callback with the memory and the teacher.

It works with ``lightning`` and with ``pytorch-lightning``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ssmkernels.nn import EMATeacher, LabeledMemory
from ssmkernels.nn.ema_teacher import BufferRule

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'ssmkernels.lightning needs Lightning: pip install "ssmkernels[lightning]"', name=error.name
        ) from None

__all__ = ["MemoryAndTeacher"]


class MemoryAndTeacher(Callback):
    """Owns a :class:`~ssmkernels.nn.LabeledMemory` and an :class:`~ssmkernels.nn.EMATeacher`: moves them to the device
    of the module, updates them in the right order, and saves them in Lightning's checkpoints.

    Give it to the module, which reads from it, and to the trainer. In ``training_step`` the module reads the memory
    (``callback.memory.instance_matching``), runs the teacher (``callback.teacher(images)``) and calls :meth:`remember`;
    after the batch the callback writes the memory, so that a step never reads what it wrote, and after each step of the
    optimiser it updates the teacher, once for several accumulated batches.

    Args:
        memory: None for a teacher alone.
        student: the attribute of the module that the teacher averages, "model" or "encoder" say; None for no teacher.
        decay, buffers, warm_up: of the teacher.

    Attributes:
        memory: as given.
        teacher: from ``setup`` on, a copy of the student at that time, or as in the checkpoint that is resumed.
    """

    teacher: EMATeacher

    def __init__(
        self,
        memory: LabeledMemory | None = None,
        *,
        student: str | None = None,
        decay: float = 0.999,
        buffers: BufferRule = "copy",
        warm_up: bool = False,
    ) -> None:
        self.memory = memory
        self.student = student
        self._teacher_settings: dict[str, Any] = {"decay": decay, "buffers": buffers, "warm_up": warm_up}
        EMATeacher(nn.Identity(), **self._teacher_settings)  # says now what is wrong with them
        self._to_write: list[tuple[Tensor, Tensor, Tensor]] = []
        self._steps = 0

    def remember(self, slots: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        """Has slots [B] of the memory written after this batch, with embeddings [B, D] and labels [B]. On several ranks
        every rank calls it, as often as the others.

        Raises:
            ValueError: there is no memory.
        """
        if self.memory is None:
            raise ValueError("there is no memory to remember anything in; give MemoryAndTeacher one")
        self._to_write.append((slots, embeddings.detach(), labels))

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        if self.student is not None and not hasattr(self, "teacher"):
            student = getattr(pl_module, self.student, None)
            if not isinstance(student, nn.Module):
                raise ValueError(f"student is {self.student!r}, which is no module of {type(pl_module).__name__}")
            self.teacher = EMATeacher(student, **self._teacher_settings)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for module in self._modules().values():
            module.to(pl_module.device)
        self._to_write.clear()  # what a run that was interrupted has left
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for slots, embeddings, labels in self._to_write:
            assert self.memory is not None  # or remember had refused
            self.memory.update(slots, embeddings, labels)
        self._to_write.clear()
        if self.student is not None and trainer.global_step > self._steps:
            self.teacher.update(getattr(pl_module, self.student))
        self._steps = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {name: module.state_dict() for name, module in self._modules().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(state_dict[name])

    def _modules(self) -> dict[str, nn.Module]:
        modules = {"memory": self.memory, "teacher": getattr(self, "teacher", None)}
        return {name: module for name, module in modules.items() if module is not None}
