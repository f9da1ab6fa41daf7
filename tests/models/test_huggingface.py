"""Backbones and whole models of transformers: maps, sizes, normalisation, and what is refused."""

import dataclasses
import importlib.util
import json
import logging

import pytest
import torch
import torch.nn.functional as nnf

from fastuda.errors import UserError
from fastuda.models import ModelConfig, build_model
from fastuda.models.build import described
from fastuda.models.daformer import DAFormerHead
from fastuda.models.ema import EMATeacher
from fastuda.models.hf_folder import normalization_of
from fastuda.models.light import LightHead, LinearHead
from fastuda.models.normalization import CAFFE, Normalization
from fastuda.system.settings import plain
from fastuda.system.yaml import read_yaml, to_yaml
from tests.models.foreign import CONFIGS, normalizing, saved_backbone, saved_model

transformers = pytest.importorskip("transformers")
SINGLE = {"dinov2": 14, "dinov2 with registers": 14, "dinov3": 16, "beit": 16}


def backbone_model(spec, **settings):
    return build_model(ModelConfig(backbone=spec, **settings), 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_backbone_of_each_family(name, tmp_path):
    config = described(ModelConfig(backbone=saved_backbone(tmp_path, name)))
    model = build_model(config, 5).eval()
    assert model.stride == SINGLE.get(name, 4)
    assert isinstance(model.head, LightHead if name in SINGLE else DAFormerHead)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        out = model(image)
    assert out.features.shape[:2] == (2, model.feature_channels)
    if name != "hiera":  # its windows are 64 pixels wide
        assert out.features.shape[2:] == (round(64 / model.stride), round(96 / model.stride))
    assert torch.equal(model.classify(out.features), out.logits) and out.logits.shape[1] == 5
    # what a run saves is enough to build it again, after YAML
    values = read_yaml(to_yaml(plain(dataclasses.asdict(config))), "config")
    again = build_model(ModelConfig(**values), 5, pretrained=False).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(image).logits, out.logits)


def test_the_weights_are_those_of_the_folder(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    spec = saved_backbone(tmp_path, "dinov2")
    model = backbone_model(spec).eval()
    theirs = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 70, 98)
    with torch.no_grad():
        tokens = theirs(image).last_hidden_state[:, 1:]
        assert torch.equal(model(image).features, tokens.transpose(1, 2).reshape(1, 32, 5, 7))
    assert f"weights {spec}: 79 of 79 keys loaded, from scratch: none" in caplog.text
    config = ModelConfig(backbone=spec)
    assert model.pretrained and not build_model(config, 5, pretrained=False).pretrained
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert not backbone_model(spec).pretrained
    assert f"{spec} has no weights (model.safetensors): it starts from scratch" in caplog.text


@pytest.mark.parametrize("name", ["dinov2", "convnextv2"])
def test_no_pixels_are_left_out_where_sides_are_no_multiples(name, tmp_path):
    """Such networks ignore what is behind the last whole patch; here the image is resized before."""
    model = backbone_model(saved_backbone(tmp_path, name)).eval()
    cell = model.backbone.cell[0]
    assert cell == {"dinov2": 14, "convnextv2": 32}[name]
    image = torch.randn(1, 3, 99, 128)
    size = [cell * round(side / cell) for side in (99, 128)]
    fitting = nnf.interpolate(image, size, mode="bilinear", align_corners=False)
    changed = image.clone()
    changed[:, :, -1] += 1
    with torch.no_grad():
        features = model(image).features
        assert torch.equal(features, model(fitting).features)
        assert not torch.equal(features, model(changed).features)
        kept = model.backbone.network(changed).feature_maps[-1]
        assert torch.equal(kept, model.backbone.network(image).feature_maps[-1])  # the trap


def test_images_are_enlarged_before_a_vit(tmp_path):
    model = backbone_model(saved_backbone(tmp_path, "dinov2"), enlarge=1.1)
    # 1024 -> 1120, as VFM-UDA
    assert [model.backbone.fitted(side, 14) for side in (1024, 512, 13)] == [1120, 560, 14]
    assert model.stride == 13 and model(torch.randn(1, 3, 64, 102)).features.shape[2:] == (5, 8)


def test_images_of_any_size_go_through_a_vit(tmp_path):
    model = backbone_model(saved_backbone(tmp_path, "dinov2")).eval()
    for size in ((1, 1), (3, 50), (50, 13), (15, 14)):
        with torch.no_grad():
            assert torch.isfinite(model(torch.randn(1, 3, *size)).logits).all()


def test_a_network_of_one_image_size_sees_windows(tmp_path):
    model = backbone_model(saved_backbone(tmp_path, "hiera")).eval()
    image = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        features = model(image).features
        for row in range(2):
            for column in range(3):
                window = image[:, :, 64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
                own = features[:, :, 16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]
                assert torch.allclose(own, model(window).features, atol=1e-5)


def test_positions_are_not_random_in_training_mode(tmp_path):
    """DINOv3 moves them in training mode, in which a teacher labels."""
    model = backbone_model(saved_backbone(tmp_path, "dinov3"))
    teacher = EMATeacher(model).train()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(teacher(image).logits, teacher(image).logits)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.pos_embed_rescale == 2.0
    moving = transformers.DINOv3ViTBackbone(config).train()
    first, second = (moving(image).feature_maps[-1] for _ in range(2))
    assert not torch.equal(first, second)  # the trap


def test_a_local_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    """``AutoBackbone.from_pretrained`` of transformers 5.24 asks the hub, or rejects the folder's name."""
    spec = saved_backbone(tmp_path / "my models" / "swin", "swin")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    config = described(ModelConfig(backbone="hf:my models/swin"))
    assert config.backbone == spec == config.hf["spec"]
    assert build_model(config, 5).feature_channels == 16 + 32 + 64 + 128


def test_four_quarters_of_a_vit_for_daformer(tmp_path):
    model = backbone_model(saved_backbone(tmp_path, "dinov2", num_hidden_layers=8), head="daformer")
    assert model.backbone.network.out_features == ["stage2", "stage4", "stage6", "stage8"]
    assert model.head.widths == [32] * 4 and model(torch.randn(2, 3, 28, 28)).logits.shape == (2, 5, 2, 2)
    assert isinstance(backbone_model(f"hf:{tmp_path}", head="linear").head, LinearHead)


def test_the_images_are_normalised_as_the_folder_says(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    spec = saved_backbone(tmp_path, "resnet")
    assert backbone_model(spec).input == Normalization()
    assert f"no preprocessor_config.json of {spec}: images are normalised as ImageNet's" in caplog.text
    normalizing(tmp_path, image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3])
    assert backbone_model(spec).input == Normalization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert backbone_model(spec, input="caffe").input == CAFFE
    flipped = normalization_of({"do_normalize": False, "do_flip_channel_order": True, "do_rescale": False})
    assert flipped == Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr", 255.0)
    several = {"image_processor": {"image_mean": 0.5, "image_std": [0.1, 0.2, 0.3]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(several))
    assert backbone_model(spec).input == Normalization((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    (tmp_path / "processor_config.json").write_text("{}")  # as of models that read text alone
    assert backbone_model(spec).input == Normalization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"image_mean": [0.5, 0', "Expecting"),
        ("[0.5]", "'list' object"),
        ('{"image_mean": [0.5, 0.4]}', "image_mean has 2 numbers, not 3"),
        ('{"image_std": ["wide", 1, 1]}', "could not convert string to float: 'wide'"),
    ],
)
def test_a_damaged_normalisation_is_named(content, reason, tmp_path):
    spec = saved_backbone(tmp_path, "resnet")
    path = tmp_path / "preprocessor_config.json"
    path.write_text(content)
    refused(f"{path} cannot be read as settings of an image processor: .*{reason}", backbone=spec)


@pytest.mark.parametrize("family", ["Segformer", "UperNet", "DPT"])
def test_a_whole_model_gives_its_own_logits(family, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    spec = saved_model(tmp_path, family)
    model = build_model(ModelConfig(network=spec), 5).eval()
    theirs = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 64, 64 if family == "DPT" else 96)  # DPT takes squares alone
    with torch.no_grad():
        out, logits = model(image), theirs(image).logits
        assert model(torch.randn(1, 3, 64, 96)).logits.shape[1] == 5
    assert out.features.shape[1] == model.feature_channels == {"Segformer": 32}.get(family, 16)
    shown = nnf.interpolate(out.logits, logits.shape[2:], mode="bilinear", align_corners=model.align_corners)
    assert torch.allclose(shown, logits, atol=1e-5)
    assert model.align_corners == (family == "DPT")  # whose head resizes so
    assert torch.equal(model.classify(out.features), out.logits)
    caplog.clear()
    other = build_model(ModelConfig(network=spec), 3)
    assert other.head.out_channels == 3
    assert "from scratch: " in caplog.text and "unused: " in caplog.text


def test_the_rows_of_the_classifier_are_chosen(tmp_path):
    """What a run with other classes keeps of a model, and that it is built again without the folder."""
    config = described(ModelConfig(network=saved_model(tmp_path)))
    assert config.hf["classes"] == [f"LABEL_{k}" for k in range(5)]
    whole = build_model(config, 5).eval()
    model = build_model(config, 4, rows=[3, None, 0, 3]).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        wanted, logits = whole(image).logits, model(image).logits
    assert model.num_classes == logits.shape[1] == 4
    assert torch.equal(logits[:, [0, 2, 3]], wanted[:, [3, 0, 3]])
    assert logits[:, 1].abs().max() < 0.5 * wanted.abs().max() and not model.head.bias[1]
    again = build_model(config, 4, pretrained=False).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(image).logits, logits)
    del config.hf["classes"]  # as runs of older versions saved it
    assert build_model(config, 4, pretrained=False).head.out_channels == 4


def test_a_whole_models_decoder_has_the_heads_learning_rate(tmp_path):
    model = build_model(ModelConfig(network=saved_model(tmp_path)), 5)
    groups = model.param_groups(1.0, 10.0)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    encoder = {id(p) for p in model.backbone.network.segformer.parameters()}
    assert {id(p) for p in groups[0]["params"]} == encoder
    assert [group["lr"] for group in groups] == [1.0, 10.0]


def test_a_teacher_of_a_whole_model_is_its_own(tmp_path):
    """The copy must not hand its features to the student."""
    model = build_model(ModelConfig(network=saved_model(tmp_path)), 5).eval()
    teacher = EMATeacher(model).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image).logits
        for p in teacher.module.parameters():
            p.zero_()
        assert not teacher(image).logits.any() and torch.equal(model(image).logits, before)


def refused(match, **settings):
    with pytest.raises(UserError, match=match) as info:
        build_model(ModelConfig(**settings), 5)
    assert "\n" not in str(info.value)


def test_what_is_no_model_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    refused(r"empty is no Hugging Face model: it has no config\.json", backbone=f"hf:{tmp_path}/empty")
    refused(r"there is no folder .*/none with", backbone=f"hf:{tmp_path}/none")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(r"broken cannot be used", backbone=f"hf:{tmp_path}/broken")
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "dinov9"}))
    refused(r"broken cannot be used: .*dinov9", backbone=f"hf:{tmp_path}/broken")
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "broken" / "config.json").write_text(json.dumps(code))
    refused(r"comes with code of its own, which is never run", backbone=f"hf:{tmp_path}/broken")


def test_other_families_are_refused_with_what_to_do(tmp_path):
    whole, part = saved_model(tmp_path / "whole"), saved_backbone(tmp_path / "part", "dinov2")
    refused(r"whole is a segformer, which transformers has no backbone of; .*--model hf:", backbone=whole)
    refused(r"part is a dinov2, which has no model of semantic .*--backbone hf:", network=part)
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    refused(r"bert is a bert, which transformers has no backbone of$", backbone=f"hf:{tmp_path}/bert")
    transformers.VitPoseBackboneConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path / "pose")
    refused(r"pose has no usable feature map: it gives \[\(1, 192, 32\)", backbone=f"hf:{tmp_path}/pose")


def test_a_missing_package_is_named(tmp_path):
    if importlib.util.find_spec("natten"):
        pytest.skip("natten is here")
    transformers.DinatConfig().save_pretrained(tmp_path / "dinat")
    refused(r"needs the package natten, which is not installed: pip install", backbone=f"hf:{tmp_path}/dinat")
    transformers.TimmBackboneConfig().save_pretrained(tmp_path / "timm")
    refused(r"wraps another library's network: .* package\.module:function", backbone=f"hf:{tmp_path}/timm")


def test_weights_of_another_network_are_refused(tmp_path):
    saved_backbone(tmp_path / "a", "resnet")
    saved_backbone(tmp_path / "b", "dinov2")
    (tmp_path / "a" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    refused(r"the weights of hf:.*/a are of another network", backbone=f"hf:{tmp_path}/a")


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    refused(r"needs the transformers package .*fastuda\[transformers\]", backbone=f"hf:{tmp_path}")
