# SPDX-License-Identifier: BSD-3-Clause
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels.data import ArrayImages, ImageSplits, default_transforms, generator, to_tensor
from ssmkernels.data.augment import (
    OPS,
    VARIANTS,
    Cutout,
    ImageNetWeak,
    MoCoV2,
    RandAugment,
    ResizeCenterCrop,
    Strong,
    Weak,
    to_tensors,
)


def picture(mode, size=(32, 32), seed=0):
    """Smooth noise, so that interpolation and histograms have something to work on."""
    shape = (6, 6) if mode == "L" else (6, 6, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(20, 236, shape, dtype=np.uint8)).resize(
        size, Image.Resampling.BILINEAR
    )


def same(a, b):
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "transform",
    [
        Weak(32),
        Weak(32, 3, flip=False),
        RandAugment(),
        RandAugment(variant="torchssl"),
        Cutout(),
        Cutout(uniform=True),
        Strong(32),
        Strong(32, variant="torchssl"),
        ImageNetWeak(32),
        MoCoV2(32),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_transforms_keep_size_and_mode_and_depend_on_rng_alone(transform, mode):
    image = picture(mode)
    before = image.copy()
    travelled = pickle.loads(pickle.dumps(transform))
    results = [transform(image, generator(0, 0, step)) for step in range(40)]
    assert all((result.size, result.mode) == (image.size, mode) for result in results)
    assert all(same(result, travelled(image, generator(0, 0, step))) for step, result in enumerate(results))
    assert same(image, before), "the image itself is left alone"
    assert len({result.tobytes() for result in results}) > 10


def test_pool_has_the_fourteen_ops():
    enhance = {"Color", "Contrast", "Brightness", "Sharpness"}
    geometric = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
    assert set(OPS) == {"Identity", "AutoContrast", "Equalize", "Solarize", "Posterize"} | enhance | geometric
    assert len(OPS) == 14
    for variant in VARIANTS.values():
        assert set(variant.magnitudes) == set(OPS) - {"Identity", "AutoContrast", "Equalize"}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_over_its_range(name, variant, mode):
    recipe = VARIANTS[variant]
    levels = (0.0, 0.5, 0.999) if recipe.levels is None else (0.1, 0.5, 0.9)
    image = picture(mode)
    changed = False
    for level in levels:
        for sign in (-1, 1) if name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY") else (1,):
            magnitude = recipe.magnitudes[name](level) if name in recipe.magnitudes else 0.0
            result = OPS[name](image, sign * magnitude, recipe.fill)
            assert (result.size, result.mode) == (image.size, mode)
            changed |= not same(result, image)
    assert changed == (name != "Identity" and (name, mode) != ("Color", "L"))


def test_magnitudes_of_fixmatch():
    magnitudes = VARIANTS["fixmatch"].magnitudes
    levels = [level / 10 for level in range(1, 10)]
    assert [magnitudes["Posterize"](u) for u in levels] == [4, 4, 3, 3, 2, 2, 2, 1, 1]
    assert [magnitudes["Solarize"](u) for u in levels] == [231, 205, 180, 154, 128, 103, 77, 52, 26]
    assert [magnitudes["Brightness"](u) for u in levels] == pytest.approx(
        [0.28, 0.46, 0.64, 0.82, 1.0, 1.18, 1.36, 1.54, 1.72]
    )
    assert magnitudes["Rotate"](0.9) == pytest.approx(27)
    assert magnitudes["ShearX"](0.9) == pytest.approx(0.27)
    assert 32 * magnitudes["TranslateY"](0.9) == pytest.approx(9)


def test_geometric_ops_move_what_they_say():
    image = picture("RGB")
    pixels = np.asarray(image)
    shifted = np.asarray(OPS["TranslateX"](image, 4 / 32, (1, 2, 3)))
    assert np.array_equal(shifted[:, :-4], pixels[:, 4:])
    assert (shifted[:, -4:] == (1, 2, 3)).all()
    shifted = np.asarray(OPS["TranslateY"](image, -4 / 32, (1, 2, 3)))
    assert np.array_equal(shifted[4:], pixels[:-4])
    assert np.array_equal(np.asarray(OPS["Rotate"](image, 90, (0, 0, 0))), np.rot90(pixels))


def test_rand_augment_draws_ops_uniformly(monkeypatch):
    calls = []
    for name in OPS:
        monkeypatch.setitem(OPS, name, lambda image, m, fill, name=name: calls.append((name, m)) or image)
    image = picture("L")
    for step in range(3000):
        RandAugment()(image, generator(1, 0, step))
    names = [name for name, _ in calls]
    assert len(names) == pytest.approx(3000, rel=0.06), "two ops, each with probability 1/2"
    assert min(names.count(name) for name in OPS) > 0.7 * 3000 / 14
    rotations = np.array([m for name, m in calls if name == "Rotate"])
    assert set(np.round(np.abs(rotations))) == {3, 6, 9, 12, 15, 18, 21, 24, 27}
    assert np.mean(rotations > 0) == pytest.approx(0.5, abs=0.15)

    calls.clear()
    for step in range(500):
        RandAugment(variant="torchssl")(image, generator(1, 0, step))
    assert len(calls) == 1500, "three ops always"


def test_weak_is_a_shift_of_the_reflected_image_and_a_flip():
    image = picture("RGB", (8, 8))
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    shifts = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    flips = {padded[y : y + 8, x : x + 8][:, ::-1].tobytes() for y in range(5) for x in range(5)}
    seen = [Weak(8, 2)(image, generator(0, 0, step)).tobytes() for step in range(1000)]
    assert set(seen) == shifts | flips
    assert sum(view in flips for view in seen) == pytest.approx(500, abs=70)
    assert {Weak(8, 2, flip=False)(image, generator(0, 0, step)).tobytes() for step in range(500)} == shifts


@pytest.mark.parametrize("side", [32, 28, 8])
def test_cutout_is_a_grey_square_of_half_the_side(side):
    areas = []
    for step in range(200):
        result = np.asarray(Cutout()(Image.new("RGB", (side, side)), generator(0, 0, step)))
        rows, columns = np.nonzero((result == 127).all(axis=2))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert height * width == len(rows), "a rectangle"
        assert set(np.unique(result)) == {0, 127}
        areas.append((height, width))
    assert max(areas) == (side // 2, side // 2)
    assert min(height for height, _ in areas) < side // 2, "it may stick out"


def test_cutout_of_torchssl_has_any_size_and_its_colour():
    cutout = Cutout(0.5, (125, 123, 114), uniform=True)
    views = [np.asarray(cutout(Image.new("RGB", (32, 32)), generator(0, 0, step))) for step in range(200)]
    sizes = [int((view == (125, 123, 114)).all(axis=2).sum()) for view in views]
    assert min(sizes) < 5
    assert 200 < max(sizes) <= 256
    grey = np.asarray(Cutout(1.0, (125, 123, 114))(Image.new("L", (4, 4)), generator(0, 0)))
    assert set(np.unique(grey)) <= {0, 123}, "the luminance of the colour"


def test_imagenet_crops_cover_the_asked_share():
    image = picture("RGB", (90, 60))
    crop = ImageNetWeak(24, (0.2, 1.0))
    shares, aspects = [], []
    for step in range(500):
        left, top, right, bottom = crop._box(image, generator(0, 0, step))
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        shares.append((right - left) * (bottom - top) / 5400)
        aspects.append((right - left) / (bottom - top))
    assert 0.18 < min(shares) < 0.25
    assert max(shares) > 0.8
    assert 0.72 < min(aspects) < max(aspects) < 1.39
    assert crop(image, generator(0, 0)).size == (24, 24)
    assert ImageNetWeak(24)(picture("RGB", (400, 3)), generator(0, 0)).size == (24, 24), "narrow images too"


def test_resize_center_crop():
    image = Image.new("RGB", (60, 40))
    image.paste((200, 0, 0), (20, 10, 40, 30))
    result = ResizeCenterCrop(40, 20)(image)
    assert same(result, Image.new("RGB", (20, 20), (200, 0, 0)))
    assert ResizeCenterCrop(16, 14)(picture("L", (101, 57))).size == (14, 14)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_to_tensor(mode):
    image = picture(mode, (5, 7))
    mean, std = ((0.4,), (0.2,)) if mode == "L" else ((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    tensor = to_tensor(image, mean, std)
    pixels = torch.tensor(np.asarray(image), dtype=torch.float64).reshape(7, 5, -1).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor(mean, dtype=torch.float64)[:, None, None]) / torch.tensor(
        std, dtype=torch.float64
    )[:, None, None]
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(to_tensors([image, picture(mode, (5, 7), 1)], mean, std)[0], tensor)


def splits(**changes):
    images = ArrayImages(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, int), 1)
    return dataclasses.replace(ImageSplits(images, images, 1, ("a",), (0.5,) * 3, (0.5,) * 3, 32), **changes)


def test_default_transforms():
    weak, strong, evaluation = default_transforms(splits())
    assert (weak.size, weak.padding, weak.flip, evaluation) == (32, 4, True, None)
    assert (strong.weak.padding, strong.weak.flip, strong.rand_augment.num_ops) == (4, True, 2)

    weak, strong, _ = default_transforms(splits(augmentation="crop", image_size=8), variant="torchssl")
    assert (weak.padding, weak.flip, strong.weak.flip) == (1, False, False), "digits are not flipped"
    assert (strong.rand_augment.num_ops, strong.rand_augment.probability, strong.cutout.uniform) == (3, 1.0, True)

    weak, strong, evaluation = default_transforms(splits(augmentation="imagenet", image_size=224))
    assert (type(weak), type(strong), evaluation.resize, evaluation.size) == (ImageNetWeak, MoCoV2, 256, 224)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Weak(4, 4), r"padding is 4; it should be in \[0, size\)"),
        (lambda: Weak(8)(picture("L"), generator(0, 0)), "image is 32x32; it should be 8x8"),
        (lambda: RandAugment(variant="usb"), "variant is 'usb'; it should be one of fixmatch, torchssl"),
        (lambda: Strong(32, variant="usb"), "variant is 'usb'"),
        (lambda: RandAugment(-1), "num_ops is -1"),
        (lambda: RandAugment(probability=2.0), "probability is 2.0"),
        (lambda: Cutout(1.5), "share is 1.5"),
        (lambda: ImageNetWeak(scale=(0.5, 0.2)), r"scale is \(0.5, 0.2\)"),
        (lambda: ResizeCenterCrop(20, 30), "size is 30"),
        (lambda: to_tensor(picture("RGB"), (0.5,), (0.5,)), "mean has 1 values and std 1; both should have 3"),
        (
            lambda: to_tensors([picture("L"), picture("L", (4, 4))], (0.5,), (0.5,)),
            "images are L 32x32, L 4x4; they should be of one size",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
