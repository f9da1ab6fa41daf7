"""Networks of users: taken apart at their classifier, or by the contract; and what is refused."""

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

from fastuda.data.labels import ClassSet
from fastuda.errors import UserError
from fastuda.inference.saved import save_model
from fastuda.models import ModelConfig, Segmentor, build_model
from fastuda.models.daformer import DAFormerHead
from fastuda.models.ema import EMATeacher
from fastuda.models.normalization import INPUTS
from fastuda.models.whole import segmentor_of
from tests.models import own

HERE = "tests.models.own:"


def network(name, classes=5, **settings):
    return build_model(ModelConfig(network=HERE + name, **settings), classes)


@pytest.mark.parametrize("align", [False, True])
def test_a_plain_network_is_taken_apart_at_its_classifier(align):
    whole = own.Plain(5, align).eval()
    image = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        logits = whole(image)["out"]
        model = segmentor_of(whole, "mine", 5).eval()
        out = model(image)
    assert model.align_corners == align and model.stride == 4 and model.feature_channels == 12
    assert out.features.shape == (2, 12, 10, 14) and torch.equal(model.classify(out.features), out.logits)
    shown = nnf.interpolate(out.logits, image.shape[2:], mode="bilinear", align_corners=align)
    assert torch.allclose(shown, logits, atol=1e-6)
    assert isinstance(model.head, nn.Conv2d) and model.head.in_channels == 12  # not the auxiliary one


def test_training_reaches_all_but_the_auxiliary_head():
    model = network("plain").train()
    out = model(torch.randn(2, 3, 32, 32))
    out.logits.square().mean().backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None}
    assert unreached == {"backbone.network.auxiliary.weight", "backbone.network.auxiliary.bias"}
    groups = model.param_groups(1.0, 10.0)
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(4, 1.0), (8, 10.0)]


def test_a_copy_keeps_its_own_features():
    model = network("plain").eval()
    teacher = EMATeacher(model).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for p in teacher.module.parameters():
            p.zero_()
        assert not teacher(image).logits.any() and model(image).logits.any()


def test_a_network_of_one_image_size_sees_windows():
    model = network("fixed").eval()
    assert model.backbone.windows and model.backbone.cell == (32, 32)
    with torch.no_grad():
        image = torch.randn(1, 3, 64, 96)
        features = model(image).features
        assert features.shape == (1, 12, 16, 24)
        assert torch.allclose(features[:, :, 8:, 8:16], model(image[:, :, 32:, 32:64]).features, atol=1e-6)
        assert model(torch.randn(1, 3, 70, 20)).logits.shape == (1, 5, 16, 8)


def test_the_contract_in_its_own_words():
    model = network("contract")
    assert (model.stride, model.align_corners, model.feature_channels) == (4, True, 8)
    assert model.input == INPUTS["half"]
    out = model(torch.randn(2, 3, 32, 64))
    assert out.features.shape == (2, 8, 8, 16) and torch.equal(model.classify(out.features), out.logits)
    assert [group["lr"] for group in model.param_groups(1.0, 10.0)] == [1.0, 10.0]
    with pytest.raises(UserError, match=r"layer_decay: the network has param_groups of its own"):
        model.param_groups(1.0, 10.0, 0.9)
    assert isinstance(network("segmentor"), Segmentor)


@pytest.mark.parametrize("name", ["plain", "contract", "segmentor", "shared"])
def test_its_own_weights_load_into_it(name, tmp_path):
    """As a stage takes those of the stage before it."""
    first, image = network(name).eval(), torch.randn(1, 3, 32, 32)
    save_model(tmp_path / "model.safetensors", first, ClassSet(tuple("abcde"), ((0, 0, 0),) * 5))
    again = network(name, weights=str(tmp_path / "model.safetensors")).eval()
    with torch.no_grad():
        assert torch.equal(first(image).logits, again(image).logits) and again.input == first.input


def test_a_function_knows_whether_its_weights_are_read_afterwards():
    own.BUILT.clear()
    network("contract")
    build_model(ModelConfig(network=HERE + "contract"), 5, pretrained=False)
    assert own.BUILT == [True, False]


def test_a_backbone_of_several_maps_has_our_heads():
    model = build_model(ModelConfig(backbone=HERE + "two_maps"), 5)
    assert isinstance(model.head, DAFormerHead) and model.head.widths == [8, 16] and model.stride == 4
    assert model.backbone.cell == (8, 8)  # its convolutions leave the rest out
    assert model(torch.randn(2, 3, 30, 33)).logits.shape == (2, 5, 8, 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sharpened", r"does more between its last convolution and its logits than bilinear resizing"),
        ("wordless", r"returns no logits \[B, K, h, w\]"),
        ("others", r"gives 6 classes, and the run has 5"),
        ("nothing", r"gave a NoneType, not a torch\.nn\.Module"),
        ("BUILT", r"own:BUILT is a list, not a function that returns a network"),
        ("unasked", r"own:unasked cannot be called with the number of classes .*too many positional"),
        ("absent", r"own:absent' cannot be imported: .*absent"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as info:
        network(name)
    assert "\n" not in str(info.value)


def test_names_that_are_neither():
    with pytest.raises(UserError, match=r"model.network is 'my unet': give hf:PATH or package\.module:func"):
        build_model(ModelConfig(network="my unet"), 5)
    with pytest.raises(UserError, match=r"model 'no_such_package:f' cannot be imported"):
        build_model(ModelConfig(network="no_such_package:f"), 5)
    with pytest.raises(UserError, match=r"backbone 'no_such_package:f' cannot be imported"):
        build_model(ModelConfig(backbone="no_such_package:f"), 5)
    with pytest.raises(UserError, match=r"own:plain cannot be called with no arguments .*'num_classes'"):
        build_model(ModelConfig(backbone=HERE + "plain"), 5)
