# SPDX-License-Identifier: BSD-3-Clause
"""The memory of a training step, without images and without computing it.

The trainer itself makes the step, of the size that its settings say, on tensors that have shapes and no values
(``torch._subclasses.FakeTensorMode``), while the storages that are alive are counted. So what a step keeps for its
backward pass and what it takes for the moment are those of the code that runs, whatever the network.

Not counted, as no tensor of torch holds it: what kernels take inside (the workspaces of convolutions, sums of threads),
what allocators round up and leave unused, the CUDA context (some 0.5 GB), buckets of DDP (as much as the gradients),
and the batches that loading processes have ready. ``run.compile`` can only take less.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssmkernels.nn import EMATeacher
from ssmkernels.trainers.base import Trainer
from ssmkernels.trainers.classifier import ClassifierTrainer
from ssmkernels.trainers.loop import lone_fabric
from ssmkernels.trainers.stand_ins import PHOTOGRAPH, batch_of, stand_in, without_files


class StepMemory(NamedTuple):
    """Bytes of one device at the peak of a step that is not the first."""

    network: int
    """Parameters and buffers, and the proxies or the basis that learn with them."""
    optimizer: int
    average: int
    """The teacher, or the average that is evaluated."""
    memory: int
    """Of labelled embeddings, queues, labels of images, and other tensors of the trainer."""
    images: int
    """A data set that is held on the device, uint8."""
    batch: int
    """Its views, float32, and the crops that they are made of, uint8."""
    rest: int
    """Activations, gradients, and what ops take for the moment."""

    @property
    def total(self) -> int:
        return sum(self)


class LiveStorages(TorchDispatchMode):
    """Within it, the bytes of the storages that ops have made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes, self.peak = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.add(result)
        elif isinstance(result, (tuple, list)):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> int:
        """Its bytes, 0 where its storage is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return 0
        self.alive[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key)
        return storage.nbytes()

    def _remove(self, key: int) -> None:
        self.bytes -= self.alive.pop(key)


def step_memory(method: str, config: Any, *, pieces: int = 1, ranks: int = 1) -> StepMemory:
    """The memory of a step of a ``method`` of ``ssmkernels train``. What a rank keeps of a memory that is split is
    counted as the whole.

    Args:
        config: its settings.
        pieces: in which each rank takes its part of a batch; those that a network cannot be given piece by piece have
            one.
        ranks: that share a batch.

    Raises:
        ValueError, OSError, ImportError: as of :func:`ssmkernels.trainers.stand_ins.stand_in`.
    """
    rows = config.batch_size // ranks
    if not hasattr(config, "accumulate"):
        pieces = 1
    # All pieces after the second find what it found.
    made = min(pieces, 2)
    config = without_files(config, rows=rows * made // pieces)
    if hasattr(config, "accumulate"):
        config.accumulate = made
    if hasattr(config, "pairs"):
        config.pairs //= ranks
    trainer = stand_in(method, config, lone_fabric(config.precision))
    of_step = _of_step(trainer)
    # The other pieces of the batch are there too.
    return of_step._replace(batch=of_step.batch * pieces // made)


def _of_step(trainer: Trainer) -> StepMemory:
    live = LiveStorages()
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        sizes = _forget_values(trainer, fakes, live)
        with live:
            before = live.bytes
            batch = batch_of(trainer)
            sizes["batch"], before_step = live.bytes - before, live.bytes
            peak_of_backward = _step(trainer, batch, live)
    state = _distinct_bytes(tree_leaves([_optimizer(trainer).state[key] for key in _optimizer(trainer).state]))
    peak = max(peak_of_backward + state, live.peak)
    sizes["batch"] += sum(view.numel() for view in _crops(trainer, batch))
    return StepMemory(optimizer=state, images=_held_images(trainer), rest=peak - state - before_step, **sizes)


def _step(trainer: Trainer, batch: Any, live: LiveStorages) -> int:
    """The last step of a run; returns the peak until the optimiser has its turn, which is of every step: in this one it
    makes its state.
    """
    peaks: list[int] = []
    handle = _optimizer(trainer).register_step_pre_hook(lambda *_: peaks.append(live.peak))
    trainer.step(batch, trainer.steps - 1)
    handle.remove()
    return peaks[0]


def _optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """Without its wrapper."""
    optimizer: torch.optim.Optimizer = trainer.optimizer.optimizer
    return optimizer


def _forget_values(trainer: Trainer, fakes: FakeTensorMode, live: LiveStorages) -> dict[str, int]:
    """Puts tensors without values in the place of the trainer's; returns the bytes of its parts."""
    known: dict[int, Tensor] = {}
    sizes = {"network": 0, "average": 0, "memory": 0}

    def fake(tensor: Tensor, part: str) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = fakes.from_tensor(tensor)
            known[id(known[id(tensor)])] = known[id(tensor)]  # in modules that others have too
            sizes[part] += live.add(known[id(tensor)])
        return known[id(tensor)]

    for value in vars(trainer).values():
        for module in value.modules() if isinstance(value, nn.Module) else ():
            part = _part_of(value)
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor, part)  # type: ignore[assignment]
    for group in _optimizer(trainer).param_groups:
        group["params"] = [fake(parameter, "network") for parameter in group["params"]]
    for name, value in vars(trainer).items():
        if isinstance(value, Tensor):
            setattr(trainer, name, fake(value, "memory"))
        elif isinstance(value, list) and value and all(isinstance(one, nn.Parameter) for one in value):
            setattr(trainer, name, [fake(parameter, "network") for parameter in value])
        elif isinstance(value, dict):  # copies of what learns
            sizes["memory"] += _distinct_bytes(tree_leaves(value))
    return sizes


def _part_of(module: nn.Module) -> str:
    if isinstance(module, EMATeacher):
        return "average"
    return "network" if any(True for _ in module.parameters()) else "memory"


def _distinct_bytes(leaves: Iterable[Any]) -> int:
    storages = {leaf.untyped_storage()._cdata: leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)}
    return sum(storages.values())


def _held_images(trainer: Trainer) -> int:
    """Bytes of the training images, where they are all on the device."""
    if not (isinstance(trainer, ClassifierTrainer) and trainer.batched) or trainer.seen.image_size > PHOTOGRAPH:
        return 0
    return int(len(trainer.splits.train) * trainer.seen.channels * trainer.seen.image_size**2)


def _crops(trainer: Trainer, batch: Any) -> list[Tensor]:
    """The views that are made of crops on the device."""
    is_batched = trainer.config.data.augment == "batched" and trainer.seen.image_size > PHOTOGRAPH
    return [leaf for leaf in tree_leaves(batch) if is_batched and isinstance(leaf, Tensor) and leaf.ndim == 4]
