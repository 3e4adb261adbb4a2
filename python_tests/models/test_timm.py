# SPDX-License-Identifier: BSD-3-Clause
"""Networks of timm as backbones: features, maps, sizes of images, normalisation."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ssmkernels.models import build_embedding_model, build_model, preprocessing

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "side", "features"),
    [("resnet18", 32, 512), ("vit_small_patch16_224", 32, 384), ("mobilenetv3_small_050", 64, 1024)],
)
def test_features_are_timms_own(name, side, features):
    """Of images of other sides than the network was published with, pooled as timm pools them."""
    torch.manual_seed(0)
    model = build_model(f"timm/{name}", 5, image_size=side).eval()
    fixed = {"img_size": 224, "dynamic_img_size": True} if name.startswith("vit") else {}
    theirs = timm.create_model(name, num_classes=0, **fixed).eval()
    theirs.load_state_dict(model.backbone.network.state_dict())
    images = torch.randn(2, 3, side, side)
    assert model.backbone.feature_dim == features
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(images), theirs(images))
    logits, embeddings = model(images)
    assert (logits.shape, embeddings.shape) == ((2, 5), (2, 128))


def test_maps_of_convolutions_are_pooled_by_us():
    torch.manual_seed(0)
    model = build_embedding_model("timm/resnet18", 7, pooling="avg", freeze_bn=False).eval()
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    theirs.load_state_dict(model.backbone.network.state_dict())
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert model.backbone(images).shape == (2, 512, 3, 3)
        torch.testing.assert_close(model(images)[0], F.normalize(theirs(images)))
    assert build_embedding_model("timm/resnet18", 7, pooling="avg+max")(images)[1].shape == (2, 7)


def test_tokens_are_pooled_by_the_network():
    torch.manual_seed(0)
    model = build_embedding_model("timm/vit_tiny_patch16_224", 7, pooling="avg", image_size=32).eval()
    images = torch.randn(2, 3, 48, 48)  # and of any other side
    with torch.no_grad():
        features = model.backbone.network(images)
        torch.testing.assert_close(model(images)[0], F.normalize(features))


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224"])
def test_every_parameter_gets_a_gradient_and_nothing_is_drawn(name):
    torch.manual_seed(0)
    model = build_embedding_model(name, 4, image_size=64, freeze_bn=False, pooling="avg").train()
    images = torch.randn(3, 3, 64, 64)
    before = torch.get_rng_state()
    model(images)[1].square()[:, :2].sum().backward()
    assert torch.equal(torch.get_rng_state(), before)  # a run that is resumed has no state of the generator
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


def test_normalisation_is_the_networks():
    half = (0.5, 0.5, 0.5)
    assert preprocessing("timm/vit_small_patch16_224") == (half, half)
    assert preprocessing("timm/resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert preprocessing("timm/vit_small_patch16_224.dino") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_grey_images_and_momentum_of_batch_norm():
    model = build_model("timm/resnet18", 3, in_channels=1, bn_momentum=0.02)
    assert model.backbone.network.conv1.in_channels == 1
    assert model.backbone.network.bn1.momentum == 0.02


def test_names_and_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"no model 'timm/resnt18'; did you mean timm/resnet18"):
        build_model("timm/resnt18", 3)
    with pytest.raises(ValueError, match=r"no model 'timm/qqqqqq'; timm\.list_models\(\) has all"):
        preprocessing("timm/qqqqqq")
    model = build_model("timm/vit_tiny_patch16_224", 3, image_size=8)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 does not take images of 8x8 pixels: Input height"):
        model(torch.zeros(1, 3, 8, 8))


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for build in (lambda: build_model("timm/resnet18", 3), lambda: build_embedding_model("timm/resnet18")):
        with pytest.raises(ImportError, match=r"needs timm .* pip install timm, or 'ssmkernels\[timm\]'") as error:
            build()
        assert "\n" not in str(error.value)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("no connection\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    from ssmkernels.models.weights import imagenet_weights

    with pytest.raises(OSError, match=r"those of timm/resnet18 could not be fetched: no connection$"):
        imagenet_weights("timm/resnet18")


def test_timm_is_not_imported_before_it_is_needed():
    code = "import sys, ssmkernels.models; sys.exit('timm' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
