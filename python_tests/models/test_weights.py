# SPDX-License-Identifier: BSD-3-Clause
"""Files of weights in the forms that others publish: their names, containers and heads, on networks of their shapes."""

import argparse
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from ssmkernels.models import build_embedding_model, build_model, load_weights
from ssmkernels.trainers.checkpoint import save_checkpoint

torchvision_models = pytest.importorskip("torchvision.models")


def state_of(network, start=1):
    """A state with the names and shapes of the network, each tensor of a value of its own. They take no memory: each
    has one number, repeated by strides of 0.
    """
    names = network.state_dict().items()
    return OrderedDict(
        (name, torch.tensor(number, dtype=value.dtype).expand(value.shape))
        for number, (name, value) in enumerate(names, start=start)
    )


def resnet50():
    with torch.device("meta"):
        return torchvision_models.resnet50(weights=None)


def vit_small():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        return timm.create_model("vit_small_patch16_224")


def without_classifier(state):
    return OrderedDict((name, value) for name, value in state.items() if not name.startswith(("fc.", "head.")))


def prefixed(prefix, state):
    return OrderedDict((prefix + name, value) for name, value in state.items())


def zeros(**shapes):
    return OrderedDict((name.replace("__", "."), torch.zeros(1).expand(shape)) for name, shape in shapes.items())


def mlp(prefix, dimensions):
    """Two layers of a projection, as MoCo v2 has them."""
    first, hidden, last = dimensions
    return OrderedDict(
        {
            f"{prefix}0.weight": torch.zeros(1).expand(hidden, first),
            f"{prefix}0.bias": torch.zeros(1).expand(hidden),
            f"{prefix}2.weight": torch.zeros(1).expand(last, hidden),
            f"{prefix}2.bias": torch.zeros(1).expand(last),
        }
    )


def torchvision_file(state):
    return state


def torchvision_reference(state):
    """What references/classification/train.py leaves: the model, its average and the command line."""
    average = {"n_averaged": torch.tensor(3), **prefixed("module.", state_of(resnet50(), 7000))}
    return {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 90,
        "args": argparse.Namespace(model="resnet50", lr=0.1),
        "model_ema": average,
    }


def swav_file(state):
    head = zeros(
        projection_head__0__weight=(2048, 2048),
        projection_head__0__bias=(2048,),
        projection_head__1__running_mean=(2048,),
        projection_head__3__weight=(128, 2048),
        projection_head__3__bias=(128,),
        prototypes__weight=(3000, 128),
    )
    return prefixed("module.", {**without_classifier(state), **head})


def moco_v2_file(state):
    trunk = without_classifier(state)
    return {
        "epoch": 800,
        "arch": "resnet50",
        "state_dict": OrderedDict(
            {
                **zeros(module__queue=(128, 65536), module__queue_ptr=(1,)),
                **prefixed("module.encoder_q.", {**trunk, **mlp("fc.", (2048, 2048, 128))}),
                **prefixed("module.encoder_k.", {**state_of(resnet50(), 7000), **mlp("fc.", (2048, 2048, 128))}),
            }
        ),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03}]},
    }


def moco_v3_file(state):
    trunk, network = without_classifier(state), resnet50()
    heads = zeros(module__predictor__0__weight=(4096, 256), module__predictor__1__weight=(4096,))
    return {
        "epoch": 1000,
        "arch": "resnet50",
        "state_dict": OrderedDict(
            {
                **prefixed("module.momentum_encoder.", without_classifier(state_of(network, 7000))),
                **prefixed("module.base_encoder.", {**trunk, **zeros(fc__0__weight=(4096, 2048))}),
                **heads,
            }
        ),
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {"scale": 65536.0},
    }


def dino_full_checkpoint(state):
    head = zeros(head__mlp__0__weight=(2048, 2048), head__last_layer__weight_g=(60000, 1))
    return {
        "student": prefixed("module.backbone.", without_classifier(state_of(resnet50(), 7000))),
        "teacher": OrderedDict({**prefixed("backbone.", without_classifier(state)), **head}),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 800,
        "args": argparse.Namespace(arch="resnet50", out_dim=60000),
        "dino_loss": OrderedDict(center=torch.zeros(1, 8)),
    }


def simmatch_file(state):
    """The average comes first here, and is not taken."""
    trunk = without_classifier(state)

    def heads(of):
        classifier = zeros(fc__weight=(1000, 2048), fc__bias=(1000,))
        return prefixed(f"module.{of}.", {**classifier, **mlp("head.", (2048, 2048, 128))})

    return {
        "epoch": 400,
        "arch": "SimMatch",
        "state_dict": OrderedDict(
            {
                **zeros(module__bank=(128, 13000), module__labels=(13000,), module__DA_queue=(256, 1000)),
                **prefixed("module.ema.backbone.", without_classifier(state_of(resnet50(), 7000))),
                **heads("ema"),
                **prefixed("module.main.backbone.", trunk),
                **heads("main"),
            }
        ),
        "optimizer": {"state": {}, "param_groups": []},
    }


def our_run(state):
    model = {
        **prefixed("backbone.", without_classifier(state)),
        **zeros(classifier__weight=(1000, 2048)),
        **mlp("projection.", (2048, 2048, 128)),
    }
    average = prefixed("backbone.", without_classifier(state_of(resnet50(), 7000)))
    return {
        "config": {"model": "resnet50", "data": {"name": "imagenet"}},
        "step": 10,
        "history": [{"step": 10, "ema_accuracy": 0.5}],
        "window": {},
        "trainer": {"model": model, "teacher": average, "alignment": {}, "optimizer": {"param_groups": []}},
        "precision": {},
    }


def our_best(state):
    return {"evaluation": {"step": 3}, "model": our_run(state)["trainer"]["model"]}


RESNET50 = {
    torchvision_file: ("", {"fc": 2}),
    without_classifier: ("", {}),  # DINO's file of the backbone
    torchvision_reference: ("", {"fc": 2}),
    swav_file: ("module.", {"module.projection_head": 5, "module.prototypes": 1}),
    moco_v2_file: (
        "module.encoder_q.",
        {"module.queue": 1, "module.queue_ptr": 1, "module.encoder_q.fc": 4, "module.encoder_k": 324},
    ),
    moco_v3_file: (
        "module.base_encoder.",
        {"module.momentum_encoder": 318, "module.base_encoder.fc": 1, "module.predictor": 2},
    ),
    dino_full_checkpoint: ("backbone.", {"head": 2}),
    simmatch_file: (
        "module.main.backbone.",
        {
            "module.bank": 1,
            "module.labels": 1,
            "module.DA_queue": 1,
            "module.ema": 324,
            "module.main.fc": 2,
            "module.main.head": 4,
        },
    ),
    our_run: ("backbone.", {"classifier": 1, "projection": 4}),
    our_best: ("backbone.", {"classifier": 1, "projection": 4}),
}


@pytest.fixture(scope="module")
def networks():
    return [build("resnet50", 7) for build in (build_model, build_embedding_model)]


@pytest.mark.parametrize("form", RESNET50)
def test_a_published_form_fills_resnet50(tmp_path, networks, form):
    """Both of the networks that have it, with and without the old format of torch.save."""
    state = state_of(resnet50())
    path = tmp_path / "weights.pth.tar"
    torch.save(form(state), path, _use_new_zipfile_serialization=form is not swav_file)
    prefix, left_out = RESNET50[form]
    for model in networks:
        for value in model.backbone.state_dict().values():
            value.zero_()
        heads = {name: value.clone() for name, value in model.state_dict().items() if "backbone" not in name}
        report = load_weights(model, path, name="resnet50")
        assert (report.loaded, report.prefix) == (318, prefix)
        assert report.left_out == left_out
        own = model.backbone.state_dict()
        assert len(own) == 318
        assert all(torch.equal(value, state[name].expand(value.shape)) for name, value in own.items())
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in heads.items())


def test_the_report_is_one_line(tmp_path):
    torch.save(simmatch_file(state_of(resnet50())), tmp_path / "w.pth")
    report = str(load_weights(build_model("resnet50", 3), tmp_path / "w.pth"))
    assert report.startswith(f"weights: 318 tensors of {tmp_path / 'w.pth'} from module.main.backbone; left out: ")
    assert "module.main.fc (2), module.main.head (4)" in report
    assert "\n" not in report


def deit_file(state):
    """DINO's ViT-S/16, with the names of timm: no classifier."""
    return without_classifier(state)


def moco_v3_vit_file(state):
    head = {"head.0.weight": torch.zeros(1).expand(4096, 384), "head.1.running_mean": torch.zeros(4096)}
    names = prefixed("module.base_encoder.", {**without_classifier(state), **head})
    average = prefixed("module.momentum_encoder.", without_classifier(state_of(vit_small(), 7000)))
    return {"epoch": 300, "arch": "vit_small", "state_dict": OrderedDict({**average, **names})}


def facebook_file(state):
    return {"model": state}


@pytest.mark.parametrize("form", [deit_file, moco_v3_vit_file, facebook_file])
def test_a_published_form_fills_a_vision_transformer(tmp_path, form):
    state = state_of(vit_small())
    torch.save(form(state), tmp_path / "vit.pth")
    model = build_model("timm/vit_small_patch16_224", 5, image_size=32, weights=tmp_path / "vit.pth")
    own = model.backbone.network.state_dict()
    assert own.keys() == without_classifier(state).keys()
    assert all(torch.equal(value, state[name].expand(value.shape)) for name, value in own.items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(tmp_path, prefix):
    """timm's files on the hub; names come back sorted, so that "ema" would be before "main"."""
    safetensors = pytest.importorskip("safetensors.torch")
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18")
    state = {name: value.half() for name, value in network.state_dict().items()}
    if prefix:
        state = {**prefixed("module.main.", state), **prefixed("module.ema.", state_of(network, 1))}
        state = {name: value.contiguous() for name, value in state.items()}
    safetensors.save_file(state, tmp_path / "model.safetensors")
    model = build_model("timm/resnet18", 5, weights=tmp_path / "model.safetensors")
    for name, value in model.backbone.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[name].half().to(value.dtype)), name


def small(depth=2):
    torch.manual_seed(depth)
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) for _ in range(depth)))


def test_weights_of_our_networks_fit_each_other(tmp_path):
    """convnet-small is a module of layers in classifiers and those layers in networks of embeddings."""
    first, second = (
        build_model("convnet-small", 3, in_channels=1),
        build_embedding_model("convnet-small", in_channels=1),
    )
    torch.save({"trainer": {"model": first.state_dict()}}, tmp_path / "first.pt")
    torch.save({"evaluation": {}, "model": second.state_dict()}, tmp_path / "second.pt")
    for network, name in ((build_embedding_model("convnet-small", in_channels=1), "first.pt"), (first, "second.pt")):
        load_weights(network, tmp_path / name, name="convnet-small")
    filled = build_embedding_model("convnet-small", weights=tmp_path / "first.pt", in_channels=1)
    for value, other in zip(first.backbone.state_dict().values(), second.backbone.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert len(filled.backbone.state_dict()) == len(second.backbone.state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: small(1).state_dict(), "6 missing, such as 1.0.bias"),
        (
            lambda: {**small().state_dict(), "0.0.bias": torch.ones(5)},
            "1 of another shape, such as 0.0.bias",
        ),
        (lambda: {**small().state_dict(), "1.2.weight": torch.ones(5)}, "1 unexpected, such as 1.2.weight"),
        (lambda: {"conv.kernel": torch.ones(2)}, "missing, such as 0.0.bias. The file has 1, such as conv.kernel"),
        (lambda: [torch.ones(2)], "hold a list and no tensors by name"),
        (lambda: {"epoch": 3, "state_dict": {}}, "hold a dict with epoch, state_dict and no tensors by name"),
        (lambda: {"epoch": 3, "model": small()}, "hold a torch.nn.modules.container.Sequential beside tensors"),
    ],
)
def test_weights_of_another_network(tmp_path, content, message):
    torch.save(content(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_weights(small(), tmp_path / "w.pth", name="a small network")
    assert str(tmp_path / "w.pth") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_deeper_network_is_another_network(tmp_path):
    """All tensors of a ResNet-50 are in a ResNet-101, with their shapes."""
    with torch.device("meta"):
        deeper = torchvision_models.resnet101(weights=None)
    torch.save(state_of(deeper), tmp_path / "resnet101.pth")
    with pytest.raises(ValueError, match=r"not those of resnet50.*255 unexpected, such as layer3\.10\."):
        build_model("resnet50", 3, weights=tmp_path / "resnet101.pth")


def test_files_that_are_no_weights(tmp_path):
    torch.save(small().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    damaged = {"text.pth": b"hello\n", "empty.pth": b"", "torn.pth": whole[: len(whole) // 2]}
    for name, content in {**damaged, "no.safetensors": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"no file that torch\.save wrote|no readable \.safetensors") as error:
            load_weights(small(), tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.pth', where there is no file"):
        load_weights(small(), tmp_path / "none.pth")
    with pytest.raises(ValueError, match="wrn-10-1 has none that can be fetched"):
        build_model("wrn-10-1", 3, weights="imagenet")


def test_a_flipped_bit_in_weights_of_a_run_is_noticed(tmp_path):
    path = tmp_path / "backbone.pt"
    save_checkpoint(path, small().state_dict())
    whole = path.read_bytes()
    for position in range(0, len(whole) - 80, 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"backbone\.pt, are no file that torch\.save wrote, or a damaged one"):
            load_weights(small(), path)


def test_files_run_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"state_dict": small().state_dict(), "more": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="which can run any code"):
        load_weights(small(), tmp_path / "w.pth")
    assert not (tmp_path / "written").exists()
