# SPDX-License-Identifier: BSD-3-Clause
"""Views of photographs in two parts beside Pillow's: the same numbers give the same image, within the rounding of
interpolation, and the parameters have the same distribution.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from ssmkernels import data
from ssmkernels.data import augment, batched_colour, batched_crops, decoding
from ssmkernels.data.batched_crops import CROP_DRAWS, BatchImageNetWeak, BatchMoCoV2, random_boxes
from ssmkernels.data.philox import uniforms
from ssmkernels.data.streams import Stream

RNG: np.random.Generator
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)}


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order_of_tests():
    global RNG
    RNG = np.random.default_rng(0)


def picture(width, height, coarse=12):
    """Smooth, as photographs are."""
    noise = Image.fromarray(RNG.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8))
    return noise.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six photographs: of JPEG four, one of them grey and one in CMYK, and a PNG."""
    global RNG
    RNG = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("photographs")
    images = [picture(*size) for size in ((120, 90), (90, 130), (64, 64), (100, 80), (110, 70), (61, 95))]
    images[3], images[4] = images[3].convert("L"), images[4].convert("CMYK")
    paths = [folder / f"{number}.{'png' if number == 5 else 'jpg'}" for number in range(6)]
    for image, path in zip(images, paths, strict=True):
        image.save(path, **({} if path.suffix == ".png" else {"quality": 95}))
    return data.FileImages(paths, np.arange(6) % 3, 3)


def stacked(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2).copy())


def levels_apart(one, other):
    return (one.int() - other.int()).abs()


@pytest.mark.parametrize("index", range(6))
def test_pixels_are_those_of_pillow(files, index):
    expected = torch.from_numpy(np.asarray(files.image(index)).transpose(2, 0, 1).copy())
    assert torch.equal(decoding.Photograph(files, index).pixels(), expected)


@pytest.mark.parametrize("index", range(6))
def test_a_crop_is_pillows_within_the_rounding_of_interpolation(files, index):
    image, box = files.image(index), (7, 5, 55, 60)
    (crop,) = decoding.Photograph(files, index).crops([np.array(box)], [32])
    expected = stacked([image.crop(box).resize((32, 32), Image.Resampling.BILINEAR)])[0]
    assert levels_apart(crop, expected).max() <= 1
    # With a box, Pillow's resize sees a pixel beyond its edges: only the outermost pixels differ by more.
    expected = stacked([image.resize((32, 32), Image.Resampling.BILINEAR, box=box)])[0]
    assert levels_apart(crop, expected)[:, 1:-1, 1:-1].max() <= 1


def test_a_photograph_is_decoded_at_a_reduced_size_where_crops_are_reduced_anyway(tmp_path, monkeypatch):
    picture(800, 640, coarse=8).save(tmp_path / "large.jpg", quality=95)
    files = data.FileImages([tmp_path / "large.jpg"], np.zeros(1, dtype=np.int64), 1)
    whole, boxes = files.image(0), np.array([[0, 0, 480, 480], [101, 57, 801 - 100, 637]])
    loaded = []
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: loaded.append(image.size) or convert(image, mode))
    crops = decoding.Photograph(files, 0).crops(list(boxes), [100, 96])
    assert loaded == [(200, 160)]
    for crop, box, size in zip(crops, boxes.tolist(), (100, 96), strict=True):
        expected = stacked([whole.resize((size, size), Image.Resampling.BILINEAR, box=tuple(box))])[0]
        # Means of 4 x 4 pixels instead of a triangle's: a photograph that is smooth on that scale hardly changes.
        assert levels_apart(crop, expected).float().mean() < 1
    loaded.clear()
    decoding.Photograph(files, 0).crops(list(boxes), [100, 300])
    assert loaded == []


def used(draws, size, scale, *, flip=True):
    """The numbers that ImageNetWeak takes of those of the batch: no place of a crop that does not fit."""
    numbers = []
    for share, aspect, right, down in draws[:CROP_DRAWS].reshape(-1, 4):
        numbers += [share, aspect]
        area = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * share)
        ratio = np.exp(np.log(3 / 4) + aspect * (np.log(4 / 3) - np.log(3 / 4)))
        width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < width <= size[0] and 0 < height <= size[1]:
            numbers += [right, down]
            break
    return numbers + ([draws[CROP_DRAWS]] if flip else [])


class Replay:
    """A generator that gives the numbers of one image in their order."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def random(self):
        return next(self.draws)

    def uniform(self, low, high):
        return low + (high - low) * next(self.draws)

    def integers(self, bound):
        return int(next(self.draws) * bound)


@pytest.mark.parametrize("size", [(120, 90), (40, 200), (300, 30)])
def test_boxes_of_the_same_numbers_are_pillows(size):
    draws, scale = RNG.random((300, CROP_DRAWS + 1)), (0.2, 1.0)
    boxes = random_boxes(np.tile(size, (300, 1)), scale, draws)
    view, image = augment.ImageNetWeak(32, scale), Image.new("L", size)
    expected = [view._box(image, Replay(used(row, size, scale))) for row in draws]
    assert np.array_equal(boxes, expected)


@pytest.mark.parametrize("name", ["weak", "moco"])
def test_a_view_of_the_same_numbers_is_pillows(files, name):
    """Jitter and hue cut levels off, so that a difference of 1 of the crop may grow with each of the four."""
    count, scale = 60, (0.2, 1.0)
    ours, theirs = (
        (BatchImageNetWeak(48, scale), augment.ImageNetWeak(48, scale))
        if name == "weak"
        else (BatchMoCoV2(48, scale), augment.MoCoV2(48, scale))
    )
    draws = uniforms(3, 0, 0, np.arange(count), ours.num_draws)
    image = files.image(0)
    (crops,) = batched_crops.random_crops(files, np.zeros(count, dtype=np.int64), [(ours, draws)])
    views = ours(crops, draws)
    expected = []
    for row in draws:
        view = theirs if name == "weak" else theirs.crop
        made = view(image, Replay(used(row, image.size, scale)))
        expected.append(made if name == "weak" else distorted(made, ours, row[None]))
    apart = levels_apart(views, stacked(expected))[:, :, 2:-2, 2:-2].float()
    assert apart.mean() < (0.2 if name == "weak" else 0.5)
    assert apart.quantile(0.999) <= (1 if name == "weak" else 8)


def distorted(image, transform, row):
    """MoCo v2's distortions after the crop, by Pillow, with the parameters of the batched transform."""
    order, factors, turns = transform.jitter(row)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in order[0]:
        if number == 3:
            image = augment._shift_hue(image, turns[0])
        elif number >= 0:
            image = enhancers[number](image).enhance(factors[0, number])
    if row[0, CROP_DRAWS + 10] < 0.2:
        image = image.convert("L").convert("RGB")
    sigma = transform.sigmas(row)[0]
    return image.filter(ImageFilter.GaussianBlur(float(sigma))) if sigma else image


@pytest.mark.parametrize("number", range(4))
def test_a_change_of_colours_is_pillows(number):
    images = [*(picture(40, 32, coarse) for coarse in (4, 9, 40)), Image.new("RGB", (40, 32), (9, 9, 9))]
    factors, turns = RNG.uniform(0.2, 1.8, (4, 3)), RNG.uniform(-0.5, 0.5, 4)
    changed = stacked(images)
    batched_colour.jitter_(changed, np.full((4, 1), number), factors, turns)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    if number < 3:
        pairs = zip(images, factors[:, number], strict=True)
        assert torch.equal(changed, stacked([enhancers[number](image).enhance(factor) for image, factor in pairs]))
    else:
        expected = stacked([augment._shift_hue(image, turn) for image, turn in zip(images, turns, strict=True)])
        apart = levels_apart(changed, expected)
        # A level of hue is up to 6 of a channel; float32 and float64 cut off differently in few pixels.
        assert apart.max() <= 6 and (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0, 4.0])
def test_a_blur_is_pillows_to_the_rounding_of_its_passes(sigma, channels):
    images = [picture(80, 64, coarse).convert("L" if channels == 1 else "RGB") for coarse in (4, 9, 30)]
    pixels = torch.stack([decoding._to_tensor(image) for image in images])
    ours = batched_colour.blurred(pixels, np.full(3, sigma), 4.0)
    theirs = [decoding._to_tensor(image.filter(ImageFilter.GaussianBlur(sigma))) for image in images]
    apart = levels_apart(ours, torch.stack(theirs))
    border = 3 * (int(batched_colour.box_radius(np.array([sigma]))[0]) + 1)
    # Half a level in each of six passes; at the border, which Pillow extends anew in each pass, more.
    assert apart[..., border:-border, border:-border].max() <= 3
    assert apart.float().mean() < 2


def test_flips_and_grey():
    images = stacked([picture(20, 20) for _ in range(4)])
    views = images.clone()
    chosen = np.array([True, False, True, False])
    batched_colour.flip_(views, chosen)
    assert torch.equal(views[::2], images[::2].flip(3)) and torch.equal(views[1::2], images[1::2])
    batched_colour.grey_(views, chosen)
    grey = [Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L").convert("RGB") for image in images.flip(3)]
    assert torch.equal(views[::2], stacked(grey)[::2]) and torch.equal(views[1::2], images[1::2])


def agree(values, expected):
    """Two samples of one continuous distribution (Kolmogorov and Smirnov; further apart with probability 1e-6)."""
    values, expected = np.sort(values), np.sort(expected)
    both = np.concatenate([values, expected])
    steps = [np.searchsorted(sample, both, side="right") / len(sample) for sample in (values, expected)]
    bound = 2.7 * np.sqrt((len(values) + len(expected)) / (len(values) * len(expected)))
    assert np.abs(steps[0] - steps[1]).max() < bound


def test_crops_have_pillows_distribution():
    count, size, scale = 4000, (500, 375), (0.2, 1.0)
    view, image = augment.ImageNetWeak(224, scale), Image.new("L", size)
    theirs = np.array([view._box(image, data.generator(1, 0, step)) for step in range(count)])
    draws = uniforms(1, 0, 0, np.arange(count), CROP_DRAWS)
    ours = random_boxes(np.tile(size, (count, 1)), scale, draws)
    for side in range(4):
        agree(ours[:, side], theirs[:, side])
    for extent in (0, 1):
        agree(ours[:, extent + 2] - ours[:, extent], theirs[:, extent + 2] - theirs[:, extent])


def test_distortions_have_pillows_distribution(monkeypatch):
    count, calls = 4000, {name: [] for name in ("Brightness", "Contrast", "Color", "hue", "sigma")}
    numbers, image = [], Image.new("RGB", (8, 8))

    class Enhancer:
        def __init__(self, name):
            self.name = name

        def __call__(self, given):
            return self

        def enhance(self, factor):
            calls[self.name].append(factor)
            numbers[-1].append(self.name)
            return image

    for name in ("Brightness", "Contrast", "Color"):
        monkeypatch.setattr(ImageEnhance, name, Enhancer(name))
    monkeypatch.setattr(
        augment, "_shift_hue", lambda given, turn: calls["hue"].append(turn) or numbers[-1].append("hue") or given
    )
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda sigma: calls["sigma"].append(sigma) or ImageFilter.BLUR)
    view = augment.MoCoV2(8)
    for step in range(count):
        numbers.append([])
        view(image, data.generator(1, 0, step))
    ours = BatchMoCoV2(8)
    draws = uniforms(1, 0, 0, np.arange(count), ours.num_draws)
    order, factors, turns = ours.jitter(draws)
    jittered, sigmas = order[:, 0] >= 0, ours.sigmas(draws)
    for number, name in enumerate(("Brightness", "Contrast", "Color")):
        agree(factors[jittered, number], calls[name])
    agree(turns[jittered], calls["hue"])
    agree(sigmas[sigmas > 0], calls["sigma"])
    names = np.array(["Brightness", "Contrast", "Color", "hue"])
    for sample in ([tuple(names[row]) for row in order[jittered]], [tuple(row) for row in numbers if row]):
        assert abs(len(sample) - 0.8 * count) < 5 * np.sqrt(0.16 * count)
        counts = [sample.count(which) for which in set(sample)]
        assert len(counts) == 24 and max(abs(np.array(counts) - len(sample) / 24)) < 5 * np.sqrt(len(sample) / 24)
    assert abs((sigmas > 0).sum() - count / 2) < 5 * np.sqrt(count / 4) > abs(len(calls["sigma"]) - count / 2)
    greyed = (draws[:, CROP_DRAWS + 10] < 0.2).sum()
    assert abs(greyed - 0.2 * count) < 5 * np.sqrt(0.16 * count)


def train_batches(files, **settings):
    transforms = {"weak": BatchImageNetWeak(24), "strong": BatchMoCoV2(24)}
    usual = {"batch_size": 4, "mu": 2, "seed": 5, "start_step": 0, "num_steps": 4, **STATISTICS}
    return data.TrainBatches(files, np.arange(4), files, **transforms, **{**usual, **settings})


def collection_batches(files, **settings):
    usual = {"batch_size": 4, "seed": 5, "start_step": 0, "num_steps": 4, **STATISTICS}
    return data.CollectionBatches(files, np.arange(6), transform=BatchImageNetWeak(24, order="BGR"), **usual | settings)


def pk_batches(files, **settings):
    usual = {"batch_size": 4, "per_class": 2, "seed": 5, "start_step": 0, "num_steps": 4, **STATISTICS}
    view = BatchImageNetWeak(24)
    return data.PKBatches(files, np.arange(6), files.labels, transform=view, **usual | settings)


def multi_crop_batches(files, **settings):
    views = data.CropViews(BatchMoCoV2(24), BatchMoCoV2(16, (0.05, 0.14)), *STATISTICS.values())
    usual = {"num_small": 3, "batch_size": 4, "seed": 5, "start_step": 0, "num_steps": 4}
    return data.MultiCropBatches(files, views, **{**usual, **settings})


KINDS = [train_batches, collection_batches, pk_batches, multi_crop_batches]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("make", KINDS)
def test_batches_depend_on_the_step_alone(files, make):
    batches = make(files)
    assert batches.cropped
    crops = batches[2]
    assert equal(crops, make(files, start_step=2)[0])
    views = batches.finish(crops, 2)
    assert equal(views, make(files, start_step=1).finish(crops, 2))
    for made, cut in zip(views, crops, strict=True):
        assert made.shape == cut.shape
        assert made.dtype == (torch.int64 if cut.dtype == torch.int64 else torch.float32)


@pytest.mark.parametrize("make", KINDS)
def test_ranks_see_together_what_one_sees(files, make):
    whole = make(files)
    expected = whole.finish(whole[1], 1)
    shares = [make(files, rank=rank, world_size=2) for rank in range(2)]
    made = [share.finish(share[1], 1) for share in shares]
    for name, alone in expected._asdict().items():
        parts = [getattr(batch, name) for batch in made]
        if make is multi_crop_batches and name in ("large", "small"):  # crop by crop
            crops = 2 if name == "large" else 3
            parts = [part.view(crops, -1, *part.shape[1:]) for part in parts]
            assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), alone)
        else:
            assert torch.equal(torch.cat(parts), alone)


class Opened:
    """A data set of the user's own, whose images are as Pillow opens them, of files that it does not name."""

    num_classes = 1

    def __init__(self, *images):
        self.images, self.labels = images, np.zeros(len(images), dtype=np.int64)

    def __len__(self):
        return len(self.images)

    def image(self, index):
        return self.images[index]


def test_opened_images_of_a_data_set_without_paths(files):
    transform = BatchImageNetWeak(24)
    draws = uniforms(5, 0, 0, np.arange(2), transform.num_draws)
    opened = Opened(*(Image.open(files.path(index)) for index in (0, 5)))
    (crops,) = batched_crops.random_crops(opened, np.arange(2), [(transform, draws)])
    (expected,) = batched_crops.random_crops(files, np.array([0, 5]), [(transform, draws)])
    assert torch.equal(crops, expected)


def test_images_of_a_batch_have_the_same_channels():
    transform = BatchImageNetWeak(24)
    draws = uniforms(5, 0, 0, np.arange(2), transform.num_draws)
    images = Opened(picture(40, 40), picture(40, 40).convert("L"))
    with pytest.raises(ValueError, match="image 1 has 1 channels and image 0 has 3"):
        batched_crops.random_crops(images, np.arange(2), [(transform, draws)])


def test_views_of_a_batch_are_the_transforms_of_its_images(files):
    batches = train_batches(files)
    batch = batches.finish(batches[3], 3)
    transform = batches.strong
    index = np.array([i for i in range(6) for _ in range(2)])[:8]
    assert len(batch.unlabeled_strong) == 8 and len(index) == 8
    order = data.IndexStream(6, 5, stream=Stream.UNLABELED_ORDER).batch(3, 8)
    draws = uniforms(5, Stream.UNLABELED_STRONG, 3, np.arange(8), transform.num_draws)
    (crops,) = batched_crops.random_crops(files, order, [(transform, draws)])
    views = data.batched_augment.normalize(transform(crops, draws), **STATISTICS)
    assert torch.equal(batch.unlabeled_strong, views)


def test_channels_in_the_order_of_the_network(files):
    plain = data.CollectionBatches(
        files, np.arange(6), transform=BatchImageNetWeak(24), **{**STATISTICS, "mean": (0.3, 0.4, 0.5)},
        batch_size=4, seed=5, start_step=0, num_steps=4,
    )  # fmt: skip
    bgr = collection_batches(files, std=STATISTICS["std"])
    one, other = plain.finish(plain[0], 0).images, bgr.finish(bgr[0], 0).images
    scale = torch.tensor(STATISTICS["std"]).view(3, 1, 1)
    assert torch.allclose((one * scale).flip(1), other * scale, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transform", [BatchImageNetWeak(32), BatchMoCoV2(32)])
def test_nothing_is_read_from_the_device(transform, channels):
    """A meta tensor has no values to read."""
    crops = torch.empty(50, channels, 32, 32, dtype=torch.uint8, device="meta")
    draws = RNG.random((50, transform.num_draws))
    views = batched_crops.finished_views(crops, transform, draws, (0.5,) * channels, (0.2,) * channels)
    assert (views.shape, views.dtype, views.device.type) == (crops.shape, torch.float32, "meta")


def test_a_broken_file_is_named_by_pillow(tmp_path):
    picture(60, 60).save(tmp_path / "whole.jpg", quality=95)
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1000])
    files = data.FileImages([tmp_path / "torn.jpg"], np.zeros(1, dtype=np.int64), 1)
    with pytest.raises(OSError, match="truncated"):
        decoding.Photograph(files, 0).pixels()


def test_a_stream_of_pk_batches_has_a_place_among_the_draws(files):
    with pytest.raises(ValueError, match="stream is 256; of views in batches it should be below 256"):
        pk_batches(files, stream=256)[0]
    assert not torch.equal(pk_batches(files)[0].images, pk_batches(files, stream=1)[0].images)
