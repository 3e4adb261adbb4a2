# SPDX-License-Identifier: BSD-3-Clause
"""Batched augmentation beside Pillow's: the same parameters give the same bits, the parameters the same distribution.

Pillow's rules for these ops are integers, or float32 and float64 operations in a stated order, so nothing is left to
rounding: the bound on the difference is 0 levels for every one of them.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels import data
from ssmkernels.data import augment, batched_augment, batched_ops
from ssmkernels.data.augment import OPS, VARIANTS, to_tensors
from ssmkernels.data.batched_augment import (
    BatchCutout,
    BatchRandAugment,
    BatchStrong,
    BatchWeak,
    normalize,
)
from ssmkernels.data.batched_ops import GROUPS, KINDS, apply_ops
from ssmkernels.data.batched_views import batch_transforms
from ssmkernels.data.randaugment import SIGNED

RNG = np.random.default_rng(0)
NO_PARAMETERS = {"Identity", "AutoContrast", "Equalize"}


def pictures(count, channels, size):
    """Smooth ones, noise, one of a single level, one of almost one."""
    colours = (3,) if channels == 3 else ()
    coarse = RNG.integers(0, 256, (count // 2, 5, 5, *colours), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in coarse]
    noise = RNG.integers(0, 256, (count - count // 2, size, size, *colours), dtype=np.uint8)
    noise[:2] = 7
    noise[1, 0, 0] = 9
    return [Image.fromarray(image) for image in (*smooth, *noise)]


def stacked(images):
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(np.ascontiguousarray(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)))


def magnitudes_of(name, variant, count):
    recipe = VARIANTS[variant]
    levels = RNG.random(count) if recipe.levels is None else RNG.integers(1, recipe.levels, count) / recipe.levels
    magnitudes = recipe.magnitudes[name](levels) if name not in NO_PARAMETERS else np.zeros(count)
    return magnitudes * RNG.choice([-1, 1], count) if name in SIGNED else magnitudes


class Replay:
    """A generator that gives the numbers of one image in their order."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def random(self):
        return next(self.draws)

    def integers(self, low, high=None, size=None):
        if high is None:
            low, high = 0, low
        if size is not None:
            return np.array([self.integers(low, high) for _ in range(size)])
        return low + int(next(self.draws) * (high - low))


@pytest.mark.parametrize("size", [8, 28, 33])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_has_the_bits_of_pillow(name, variant, channels, size):
    images = pictures(40, channels, size)
    magnitudes, fill = magnitudes_of(name, variant, len(images)), VARIANTS[variant].fill
    ours = apply_ops(stacked(images), np.full(len(images), KINDS[name]), magnitudes, fill)
    theirs = [OPS[name](image, m, fill) for image, m in zip(images, magnitudes.tolist(), strict=True)]
    assert torch.equal(ours, stacked(theirs))


@pytest.mark.parametrize(
    ("name", "magnitude"),
    [
        ("Rotate", 0.0),
        ("ShearX", 0.0),
        ("TranslateY", 0.0),
        ("TranslateX", -1.5),
        ("Brightness", 0.0),
        ("Contrast", 1.0),
        ("Sharpness", 2.5),
        ("Color", -0.5),
        ("Solarize", 256.0),
        ("Solarize", 0.0),
        ("Posterize", 8.0),
        ("Posterize", 1.0),
    ],
)
def test_ends_of_the_ranges(name, magnitude):
    images = pictures(12, 3, 16)
    ours = apply_ops(stacked(images), np.full(12, KINDS[name]), np.full(12, magnitude), (9, 8, 7))
    assert torch.equal(ours, stacked([OPS[name](image, magnitude, (9, 8, 7)) for image in images]))


def test_ops_of_all_kinds_in_one_batch():
    images = pictures(150, 3, 32)
    kinds = RNG.integers(-1, len(OPS), len(images))
    magnitudes, expected, names = np.zeros(len(images)), [], list(OPS)
    for place, (image, kind) in enumerate(zip(images, kinds, strict=True)):
        if kind >= 0:
            magnitudes[place] = magnitudes_of(names[kind], "torchssl", 1)[0]
            image = OPS[names[kind]](image, float(magnitudes[place]), (1, 2, 3))
        expected.append(image)
    before = stacked(images)
    given = before.clone()
    assert torch.equal(apply_ops(given, kinds, magnitudes, (1, 2, 3)), stacked(expected))
    assert torch.equal(given, before), "the images themselves are left alone"
    assert {name for group in GROUPS for name in group} == set(OPS) - {"Identity"}


def used(draws, variant, *, flip):
    """The numbers that Pillow's transform takes of those of BatchStrong: it draws no sign where an op has none."""
    recipe = VARIANTS[variant]
    numbers = list(draws[: 3 if flip else 2])
    for start in range(3, 3 + 4 * recipe.num_ops, 4):
        which, level, sign, applied = draws[start : start + 4]
        signed = list(OPS)[int(which * len(OPS))] in SIGNED
        numbers += [which, level, *([sign] if signed else []), applied]
    return numbers + list(draws[-3 if recipe.cutout_uniform else -2 :])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_strong_view_of_the_same_numbers_has_the_bits_of_pillow(variant, channels, flip):
    images = pictures(200, channels, 28)
    ours = BatchStrong(28, 3, flip, variant=variant)
    theirs = augment.Strong(28, 3, flip, variant=variant)
    draws = RNG.random((len(images), ours.num_draws))
    expected = [theirs(image, Replay(used(row, variant, flip=flip))) for image, row in zip(images, draws, strict=True)]
    assert torch.equal(ours(stacked(images), draws), stacked(expected))


@pytest.mark.parametrize("padding", [0, 4, 7])
def test_the_weak_view_of_the_same_numbers_has_the_bits_of_pillow(padding):
    images = pictures(100, 3, 8)
    draws = RNG.random((len(images), 3))
    theirs = augment.Weak(8, padding)
    expected = [theirs(image, Replay(row)) for image, row in zip(images, draws, strict=True)]
    assert torch.equal(BatchWeak(8, padding)(stacked(images), draws), stacked(expected))


@pytest.mark.parametrize("padding", [0, 1, 7])
def test_the_kernel_of_a_gpu_shifts_as_a_processor_does(padding):
    rng = np.random.default_rng(padding)
    images = torch.from_numpy(rng.integers(0, 256, (50, 3, 8, 8), dtype=np.uint8))
    top, left = rng.integers(2 * padding + 1, size=(2, 50))
    flipped = rng.random(50) < 0.5
    views = batched_augment.cut(images, top, left, flipped, padding)
    reflected = np.pad(np.arange(8), padding, mode="reflect")
    assert views.is_contiguous() and not torch.equal(views, images)
    assert torch.equal(views, batched_augment.gathered(images, top, left, flipped, reflected))


def frequencies_agree(values, probabilities):
    """Counts within five standard deviations of a binomial; ``probabilities`` by value."""
    values = np.asarray(values)
    assert set(np.unique(values)) <= set(probabilities)
    for value, p in probabilities.items():
        count, mean = (values == value).sum(), len(values) * p
        assert abs(count - mean) <= 5 * np.sqrt(mean * (1 - p)), (value, count, mean)


def parameters_of_pillow(variant, count, monkeypatch):
    """(name, magnitude) of every op that Pillow's RandAugment applies, and the number of ops of each image."""
    calls, numbers = [], []
    for name in OPS:
        monkeypatch.setitem(OPS, name, lambda image, m, fill, name=name: calls.append((name, m)) or image)
    image = Image.new("L", (4, 4))
    for step in range(count):
        before = len(calls)
        augment.RandAugment(variant=variant)(image, data.generator(1, 0, step))
        numbers.append(len(calls) - before)
    return calls, numbers


def parameters_of_batches(variant, count):
    transform = BatchRandAugment(variant=variant)
    draws = data.philox.uniforms(1, 0, 0, np.arange(count), transform.num_draws)
    calls, numbers = [], np.zeros(count)
    for start in range(0, transform.num_draws, 4):
        kinds, magnitudes = transform.parameters(draws[:, start : start + 4])
        calls += [(list(OPS)[kind], m) for kind, m in zip(kinds, magnitudes, strict=True) if kind >= 0]
        numbers += kinds >= 0
    return calls, numbers


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("source", ["pillow", "batches"])
def test_parameters_of_randaugment_have_their_distribution(source, variant, monkeypatch):
    """The same statistics of both, so that a change of either is seen."""
    recipe, count = VARIANTS[variant], 4000
    if source == "pillow":
        calls, numbers = parameters_of_pillow(variant, count, monkeypatch)
    else:
        calls, numbers = parameters_of_batches(variant, count)
    frequencies_agree(numbers, {0: 0.25, 1: 0.5, 2: 0.25} if variant == "fixmatch" else {3: 1.0})
    frequencies_agree([name for name, _ in calls], dict.fromkeys(OPS, 1 / len(OPS)))
    signs = [np.sign(m) for name, m in calls if name in SIGNED]
    frequencies_agree(signs, {-1: 0.5, 1: 0.5})
    for name, magnitude in recipe.magnitudes.items():
        values = np.abs([m for op, m in calls if op == name])
        if recipe.levels is None:
            expected = magnitude((np.arange(100_000) + 0.5) / 100_000)
            grid = np.unique(np.quantile(expected, np.linspace(0, 1, 40)))
            steps = [
                np.searchsorted(np.sort(sample), grid, side="right") / len(sample) for sample in (values, expected)
            ]
            # Dvoretzky-Kiefer-Wolfowitz: further apart with probability 2 exp(−2 · 2.3²) = 5e-5.
            assert np.abs(steps[0] - steps[1]).max() < 2.3 / np.sqrt(len(values)), name
        else:
            share = {}
            for level in np.arange(1, recipe.levels) / recipe.levels:
                share[float(magnitude(level))] = share.get(float(magnitude(level)), 0) + 1 / (recipe.levels - 1)
            frequencies_agree(values, share)


@pytest.mark.parametrize("source", ["pillow", "batches"])
def test_shifts_and_flips_have_their_distribution(source):
    """A picture whose levels say where they come from: the middle pixel gives the shift, its neighbour the flip."""
    count, size, padding = 4000, 9, 2
    pixels = np.arange(size * size, dtype=np.uint8).reshape(size, size)
    if source == "pillow":
        view = augment.Weak(size, padding)
        views = np.stack([view(Image.fromarray(pixels), data.generator(1, 0, step)) for step in range(count)])
    else:
        images = torch.from_numpy(pixels)[None, None].expand(count, 1, size, size)
        draws = {"seed": 1, "stream": 0, "step": 0, "positions": np.arange(count)}
        views = batched_augment.augment(images, BatchWeak(size, padding), **draws)[:, 0].numpy()
    rows, columns = np.divmod(views[:, size // 2, size // 2], size)
    shifts = dict.fromkeys(range(size // 2 - padding, size // 2 + padding + 1), 1 / (2 * padding + 1))
    frequencies_agree(rows, shifts)
    frequencies_agree(columns, shifts)
    frequencies_agree(
        views[:, size // 2, size // 2 + 1].astype(int) - views[:, size // 2, size // 2], {1: 0.5, -1: 0.5}
    )


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("source", ["pillow", "batches"])
def test_squares_have_their_distribution(source, uniform):
    count, size = 4000, 8
    if source == "pillow":
        cutout = augment.Cutout(0.5, (255,) * 3, uniform=uniform)
        views = np.stack([cutout(Image.new("L", (size, size)), data.generator(1, 0, step)) for step in range(count)])
    else:
        cutout = BatchCutout(0.5, (255,) * 3, uniform=uniform)
        draws = data.philox.uniforms(1, 0, 0, np.arange(count), 3)
        views = cutout(torch.zeros(count, 1, size, size, dtype=torch.uint8), draws)[:, 0].numpy()
    # The side is 4, or half of U(0, 1) of 8 pixels, rounded: 0 to 4, the ends half as often. A square of side s in row
    # r begins at r − s // 2, cut off at the edges.
    sides = {4: 1.0} if not uniform else {0: 0.125, 1: 0.25, 2: 0.25, 3: 0.25, 4: 0.125}
    share: dict[int, float] = {}
    for side, p in sides.items():
        for row in range(size):
            rows = min(row - side // 2 + side, size) - max(row - side // 2, 0)
            share[rows] = share.get(rows, 0) + p / size
    painted = views.any(axis=(1, 2))
    frequencies_agree(painted, {False: sides.get(0, 0.0), True: 1 - sides.get(0, 0.0)})
    heights, widths = views.any(axis=2).sum(axis=1), views.any(axis=1).sum(axis=1)
    frequencies_agree(heights, share)
    frequencies_agree(widths, share)


@pytest.mark.parametrize("transform", [BatchWeak(16), BatchStrong(16), BatchStrong(16, variant="torchssl")])
def test_a_view_depends_on_its_place_alone(transform):
    images = stacked(pictures(30, 3, 16))
    keys = {"seed": 3, "stream": 5}

    def views(rows, step=9):
        return batched_augment.augment(images[rows], transform, step=step, positions=np.arange(30)[rows], **keys)

    whole = views(slice(None))
    assert torch.equal(whole, torch.cat([views(slice(0, 11)), views(slice(11, None))]))
    other_order = RNG.permutation(30)
    assert torch.equal(whole[torch.from_numpy(other_order)], views(other_order))
    assert not torch.equal(whole, views(slice(None), step=10))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transform", [BatchWeak(16), BatchStrong(16), BatchStrong(16, variant="torchssl")])
def test_nothing_is_read_from_the_device(transform, channels):
    """A meta tensor has no values to read."""
    images = torch.empty(500, channels, 16, 16, dtype=torch.uint8, device="meta")
    views = transform(images, RNG.random((500, transform.num_draws)))
    assert (views.shape, views.dtype) == (images.shape, torch.uint8)
    assert normalize(views, (0.5,) * channels, (0.2,) * channels).dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_have_the_bits_of_those_of_images(channels):
    images = pictures(5, channels, 12)
    mean, std = (0.4914, 0.4822, 0.4465)[:channels], (0.2471, 0.2435, 0.2616)[:channels]
    assert torch.equal(normalize(stacked(images), mean, std), to_tensors(images, mean, std))


def test_transforms_of_a_data_set():
    digits = data.load_dataset("digits")
    weak, strong, evaluation = batch_transforms(digits, variant="torchssl")
    assert (weak.settings.size, weak.settings.padding, weak.settings.flip) == (8, 1, False)
    assert strong.parts[1].recipe is VARIANTS["torchssl"]
    assert evaluation is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchWeak(8, 8), "padding is 8; it should be in"),
        (lambda: BatchWeak(8)(torch.zeros(1, 3, 9, 8, dtype=torch.uint8), np.zeros((1, 3))), "images are 8x9"),
        (lambda: BatchCutout(1.5), r"share is 1\.5"),
        (lambda: BatchRandAugment(-1), "num_ops is -1"),
        (lambda: BatchRandAugment(probability=2), "probability is 2"),
        (lambda: BatchStrong(8, variant="uda"), "variant is 'uda'"),
        (lambda: normalize(torch.zeros(1, 3, 2, 2), (0.5,), (0.5,)), "mean has 1 values"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_op_has_a_number():
    assert {name: place for place, name in enumerate(OPS)} == batched_ops.KINDS
