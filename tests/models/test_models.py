"""Backbones, heads and weight files."""

import argparse
import dataclasses
import pickle

import pytest
import torch

from fastuda.errors import UserError
from fastuda.models import ModelConfig, build_model
from fastuda.models.backbones import BACKBONES, freeze_batch_norm
from fastuda.models.normalization import CAFFE, IMAGENET, Normalization
from fastuda.models.weights import read_state, remap


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_every_backbone_gives_its_stride(backbone):
    if backbone.startswith("mit"):
        pytest.importorskip("transformers")
        if backbone not in ("mit_b0", "mit_b1"):
            pytest.skip("large: its parameters are counted in test_mit")
    model = build_model(ModelConfig(backbone=backbone), 5).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 48, 64))
    size = (48 // model.stride, 64 // model.stride)
    assert model.stride == (4 if backbone.startswith("mit") else 8)
    assert out.logits.shape == (1, 5, *size)
    assert out.features.shape == (1, model.feature_channels, *size)
    assert torch.equal(model.classify(out.features), out.logits)


@pytest.mark.parametrize(("caffe", "side"), [(True, 92), (False, 92)])
def test_published_feature_sizes(caffe, side):
    with torch.device("meta"):
        model = BACKBONES["resnet101"](caffe)
        assert model(torch.empty(1, 3, 730, 730)).shape == (1, 2048, side, side)
        if caffe:
            assert model(torch.empty(1, 3, 720, 1280)).shape[-2:] == (91, 161)
            assert model(torch.empty(1, 3, 730, 1460)).shape[-2:] == (92, 183)


def test_caffe_style_strides_and_dilations():
    caffe, torchvision = BACKBONES["resnet50"](True), BACKBONES["resnet50"](False)
    assert caffe.layer2[0].conv1.stride == (2, 2) and caffe.layer2[0].conv2.stride == (1, 1)
    assert torchvision.layer2[0].conv1.stride == (1, 1) and torchvision.layer2[0].conv2.stride == (2, 2)
    assert caffe.layer4[0].conv2.dilation == (4, 4) and torchvision.layer4[0].conv2.dilation == (2, 2)
    assert torchvision.layer3[0].conv2.dilation == (1, 1) and torchvision.layer3[1].conv2.dilation == (2, 2)


def test_head_branches_and_bias():
    config = ModelConfig(backbone="small", aspp_branches=2, aspp_bias=True, aspp_init_std=0.01)
    two = build_model(config, 3)
    assert len(two.head.convs) == 2 and two.head.convs[0].bias.all()
    assert not build_model(dataclasses.replace(config, aspp_zero_bias=True), 3).head.convs[1].bias.any()
    assert two.head.convs[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    four = build_model(ModelConfig(backbone="small"), 3)
    assert [conv.dilation[0] for conv in four.head.convs] == [6, 12, 18, 24] and four.head.convs[
        0
    ].bias is None


def test_unknown_names_say_what_is_near():
    with pytest.raises(UserError, match="did you mean resnet101"):
        build_model(ModelConfig(backbone="resnet_101"), 3)


@pytest.mark.parametrize("backbone", ["mit_b0", "vgg16", "resnet18", "small"])
def test_images_of_any_size_go_through(backbone):
    if backbone.startswith("mit"):
        pytest.importorskip("transformers")
    model = build_model(ModelConfig(backbone=backbone), 3).eval()
    least = model.least_size
    assert least == {"mit_b0": 29, "vgg16": 8}.get(backbone, 1)
    for size in ((1, 1), (2, 2), (least - 1, 40), (40, least - 1), (least, least)):
        image = torch.randn(1, 3, *(max(1, edge) for edge in size))
        with torch.no_grad():
            out = model(image)
        rows, columns = (-(-edge // model.stride) for edge in image.shape[2:])
        assert out.logits.shape == (1, 3, rows, columns) and out.features.shape[2:] == (rows, columns)
        assert torch.isfinite(out.logits).all()


def test_a_thumbnail_is_continued_by_its_last_pixels():
    model = build_model(ModelConfig(backbone="vgg16"), 3).eval()
    image = torch.randn(1, 3, 6, 24)
    continued = torch.cat([image, image[:, :, -1:], image[:, :, -1:]], 2)
    with torch.no_grad():
        assert torch.equal(model(image).features, model.backbone(continued))


def test_frozen_batch_norm_does_not_move():
    model = build_model(ModelConfig(backbone="small", freeze_bn="frozen"), 3).train()
    before = model.backbone.stem[1].running_mean.clone()
    model(torch.randn(2, 3, 32, 32))
    assert torch.equal(before, model.backbone.stem[1].running_mean)
    assert not model.backbone.stem[1].weight.requires_grad
    moving = BACKBONES["small"](False).train()
    freeze_batch_norm(moving, "affine")
    moving(torch.randn(2, 3, 32, 32))
    assert not torch.equal(moving.stem[1].running_mean, torch.zeros(24))
    assert not moving.stem[1].weight.requires_grad


def test_parameter_groups_hold_each_parameter_once():
    model = build_model(ModelConfig(backbone="small"), 3)
    groups = model.param_groups(0.1, 10.0)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert [group["lr"] for group in groups] == [0.1, 1.0]


def test_normalization_round_trip_and_order():
    image = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    for norm in (IMAGENET, CAFFE):
        assert torch.equal(norm.invert(norm.apply(image)), image)
    assert torch.allclose(CAFFE.apply(image)[0], image[2].float() - 104.00698793)


def test_torchvision_file_loads_whole(tmp_path):
    torch.manual_seed(1)
    state = {
        key: torch.randn_like(v)
        for key, v in BACKBONES["resnet18"](False).state_dict().items()
        if v.is_floating_point()
    }
    torch.save({**state, "fc.weight": torch.zeros(1000, 512)}, tmp_path / "resnet18.pth")
    model = build_model(ModelConfig(backbone="resnet18", weights=str(tmp_path / "resnet18.pth")), 4)
    assert model.input == IMAGENET
    for key, value in state.items():
        assert torch.equal(model.backbone.state_dict()[key], value)


@pytest.mark.parametrize(
    ("settings", "said"), [({"caffe": True}, True), ({"caffe": True, "input": "caffe"}, False), ({}, False)]
)
def test_keys_that_do_not_tell_the_style_are_said(settings, said, tmp_path, caplog):
    torch.save(BACKBONES["resnet50"](False).state_dict(), tmp_path / "resnet50.pth")
    build_model(ModelConfig(backbone="resnet50", weights=str(tmp_path / "resnet50.pth"), **settings), 4)
    assert ("If the file is torchvision's, set model.caffe=false" in caplog.text) == said


def test_adaptsegnet_file_loads_backbone_and_head(tmp_path):
    source = build_model(ModelConfig(backbone="resnet50", caffe=True, aspp_branches=2, aspp_bias=True), 19)
    state = {f"Scale.{key}": value.clone() for key, value in source.backbone.state_dict().items()}
    state |= {
        f"layer6.conv2d_list.{key.removeprefix('convs.')}": v.clone()
        for key, v in source.head.state_dict().items()
    }
    state["layer5.conv2d_list.0.weight"] = torch.zeros(19, 1024, 3, 3)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "gta5.pth"
    )
    config = ModelConfig(
        backbone="resnet50", caffe=True, aspp_branches=2, aspp_bias=True, weights=str(tmp_path / "gta5.pth")
    )
    model = build_model(config, 19)
    assert model.input == CAFFE
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save(BACKBONES["resnet18"](False).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"resnet18.pth does not fit .* keys are missing"):
        build_model(ModelConfig(backbone="resnet50", weights=str(tmp_path / "resnet18.pth")), 4)


class _Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"weight": _Evil()}, file)
    with pytest.raises(UserError, match=r"evil\.pth"):
        read_state(tmp_path / "evil.pth")
    torch.save({"weight": _Evil()}, tmp_path / "evil2.pth")
    with pytest.raises(UserError, match="rejected"):
        read_state(tmp_path / "evil2.pth")
    torch.save({"args": argparse.Namespace(), "w": torch.ones(2)}, tmp_path / "paper.pth")
    with pytest.raises(UserError, match=r"it contains more than tensors \(argparse\.Namespace\)"):
        read_state(tmp_path / "paper.pth")
    (tmp_path / "notes.pth").write_text("names: [a]")
    with pytest.raises(UserError, match=r"notes\.pth cannot be read as weights: torch.save did not"):
        read_state(tmp_path / "notes.pth")


def test_missing_truncated_and_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"no weights file"):
        read_state(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match=r"cut.pth"):
        read_state(tmp_path / "cut.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="no tensors"):
        read_state(tmp_path / "empty.pth")


def test_own_layout_is_left_alone():
    state, layout = remap({"backbone.stem.0.weight": torch.zeros(1), "head.convs.0.weight": torch.zeros(1)})
    assert layout == "fastuda" and set(state) == {"backbone.stem.0.weight", "head.convs.0.weight"}


def test_real_mobilenet_and_vgg_files(real_data):
    weights = real_data / "weights"
    mobile = build_model(
        ModelConfig(
            backbone="mobilenet_v2", weights=str(weights / "mobilenet_v2_imagenet_features_tvkeys.pth")
        ),
        11,
    ).eval()
    assert mobile.input == Normalization()
    state = torch.load(weights / "mobilenet_v2_imagenet_features_tvkeys.pth", weights_only=True)
    assert all(torch.equal(mobile.backbone.state_dict()[key], value) for key, value in state.items())
    build_model(ModelConfig(backbone="vgg16", weights=str(weights / "vgg16_imagenet_features_fp16.pth")), 11)
    with pytest.raises(UserError, match="does not fit"):
        build_model(
            ModelConfig(backbone="mobilenet_v2", weights=str(weights / "vgg16_imagenet_features_fp16.pth")),
            11,
        )


def test_mobilenet_gradients_are_right_under_cpu_autocast():
    block = BACKBONES["mobilenet_v2"](False).features[14].to(memory_format=torch.channels_last)
    x = torch.randn(2, 96, 24, 32).to(memory_format=torch.channels_last)
    weight = torch.randn(2, block.conv[2].out_channels, 24, 32)
    depthwise = block.conv[1][0].weight

    def gradient(amp):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = block(x)
        return torch.autograd.grad((y.float() * weight).mean(), depthwise)[0]

    exact, mixed = gradient(False), gradient(True)
    assert (mixed - exact).norm() < 0.1 * exact.norm()
