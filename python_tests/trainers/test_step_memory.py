# SPDX-License-Identifier: BSD-3-Clause
import gc

import pytest
import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ssmkernels import data
from ssmkernels.trainers import loop, stand_ins, step_memory
from ssmkernels.trainers.cli import CONFIGS, parse_config

SMALL = {
    "simmatch": ["--config", "cifar10-40", "--model", "wrn-10-1", "--batch_size", "4"],
    "mlsn": ["--config", "cifar10-4000", "--model", "wrn-10-1", "--batch_size", "8", "--pairs", "64"],
    "mixed-lp": ["--config", "digits"],
    "slade": ["--config", "digits"],
    "swav": ["--model", "convnet-small", "--batch_size", "32", "--queue_length", "64", "--hidden_dim", "32"],
}


class AnyDevice(CPUAccelerator):
    def setup_device(self, device):
        pass


def small(method, *more):
    return parse_config(method, [*SMALL[method], *more])[0]


def measured_peak(method, config):
    """What torch's allocator handed out at most, from before there was a trainer to the end of its second step."""
    config = stand_ins.without_files(config, rows=config.batch_size)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = stand_ins.stand_in(method, config, loop.lone_fabric(config.precision))
        for _ in range(2):
            batch = stand_ins.batch_of(trainer)
            trainer.step(batch, trainer.steps - 1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    bytes_now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        bytes_now += event.nbytes()
        peak = max(peak, bytes_now)
    return peak, trainer


@pytest.mark.parametrize("method", SMALL)
def test_memory_of_a_step_is_what_the_allocator_gives(method):
    """But for the copies in another order that a convolution makes of its weights and of their gradient while it runs,
    and for what is smaller than a hundredth: the sums of threads, and scalars of the schedule.
    """
    config = small(method)
    of_step = step_memory.step_memory(method, config)
    peak, trainer = measured_peak(method, config)
    counted = of_step.total - of_step.images  # which come from NumPy here
    modules = [value for value in vars(trainer).values() if isinstance(value, nn.Module)]
    largest = max(parameter.nbytes for module in modules for parameter in module.parameters())
    assert -0.01 * peak <= peak - counted <= 2 * largest + 0.01 * peak
    assert of_step.rest > 0.3 * peak  # and it is not the parameters alone that agree


def test_parts_of_the_memory_are_those_that_the_settings_say():
    config = small("simmatch")
    of_step = step_memory.step_memory("simmatch", config)
    trainer = stand_ins.stand_in("simmatch", stand_ins.without_files(config, rows=4), loop.lone_fabric("32-true"))
    parameters = sum(parameter.nbytes for parameter in trainer.model.parameters())
    buffers = sum(buffer.nbytes for buffer in trainer.model.buffers())
    assert of_step.network == of_step.average == parameters + buffers
    assert of_step.optimizer == parameters  # momentum
    bank = 40 * (128 * 4 + 8 + 8)  # embedding, label and row of a slot
    queue = 32 * 10 * 4 + 8
    assert bank + queue <= of_step.memory <= bank + queue + 64
    assert of_step.images == 50_000 * 32 * 32 * 3
    assert of_step.batch == 4 * (1 + 7 + 7) * 3 * 32 * 32 * 4 + 8 * (2 * 4 + 7 * 4)
    assert of_step.rest > parameters  # the gradients among it


def test_memory_follows_batches_pieces_ranks_and_precision():
    whole = step_memory.step_memory("simmatch", small("simmatch", "--batch_size", "8"))
    shared = step_memory.step_memory("simmatch", small("simmatch", "--batch_size", "8"), ranks=2)
    pieces = step_memory.step_memory("simmatch", small("simmatch", "--batch_size", "8"), pieces=4)
    half = step_memory.step_memory("simmatch", small("simmatch", "--batch_size", "8", "--precision", "bf16-mixed"))
    assert 1.9 < whole.rest / shared.rest < 2.1 and whole.batch == 2 * shared.batch
    assert pieces.batch == whole.batch and 3 < whole.rest / pieces.rest < 4
    assert 0.45 < half.rest / whole.rest < 0.7 and half.network == whole.network


def test_photographs_are_cropped_and_not_held():
    config = parse_config("simmatch", ["--config", "imagenet-1", "--model", "wrn-10-1", "--batch_size", "2"])[0]
    of_step = step_memory.step_memory("simmatch", config)
    views = 2 * (1 + 5 + 5) * 3 * 224 * 224
    assert of_step.images == 0 and views * 5 <= of_step.batch <= views * 5 + 1000  # float32, and uint8 crops
    swav = step_memory.step_memory("swav", small("swav", "--data.name", "cub200", "--batch_size", "4"))
    views = 4 * 3 * (2 * 224**2 + 6 * 96**2)
    assert views * 5 <= swav.batch <= views * 5 + 1000


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_sizes_are_those_of_the_data_sets(name):
    size, splits = stand_ins.SIZES[name], data.load_dataset(name)
    assert size == (len(splits.train), splits.num_classes, splits.image_size, splits.channels)


def test_sizes_are_known_of_every_configuration():
    """But of those whose images a folder says."""
    for path in CONFIGS.rglob("*.yaml"):
        images = yaml.safe_load(path.read_text())["data"]
        for name in (images["name"], images.get("unlabeled_name")):
            assert name in stand_ins.SIZES or name in (None, "folder", "glyphs", "glyphs-latin", "glyphs-other"), path


ON_DEVICE = {
    "simmatch": {"model", "teacher", "memory", "align"},
    "mlsn": {"model", "teacher"},
    "swav": {"network", "queue"},
}


@pytest.mark.parametrize("method", ON_DEVICE)
def test_bank_averages_and_queues_live_on_the_device_of_the_run(method):
    """Before a step and after it, with another device in the place of a GPU."""
    meta = Fabric(strategy=SingleDeviceStrategy(torch.device("meta"), AnyDevice()))
    config = small(method)
    trainer = stand_ins.stand_in(method, stand_ins.without_files(config, rows=config.batch_size), meta)
    metrics = trainer.step(meta.to_device(stand_ins.batch_of(trainer)), trainer.steps - 1)
    held = {name: [value] for name, value in vars(trainer).items() if isinstance(value, torch.Tensor)}
    for name, value in vars(trainer).items():
        if isinstance(value, nn.Module):
            held[name] = [*value.parameters(), *value.buffers()]
    held["metrics"] = [*metrics.values()]
    assert held.keys() >= ON_DEVICE[method] and all(held[name] for name in ON_DEVICE[method])
    elsewhere = [name for name, tensors in held.items() if any(not tensor.is_meta for tensor in tensors)]
    assert elsewhere == []
