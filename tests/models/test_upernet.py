"""The UPerNet head: transformers' values, the maps that it takes apart, and the networks that have it."""

import pytest
import torch
import torch.nn.functional as nnf

from fastuda.errors import UserError
from fastuda.inference.exporting import export_torch
from fastuda.methods import get_method
from fastuda.models import ModelConfig, build_model
from fastuda.models.daformer import DAFormerHead
from fastuda.models.foreign import concatenated
from fastuda.models.upernet import UPerNetHead, pooled, reduced
from tests.models.foreign import saved_backbone
from tests.program import fastuda, untrained_run

WIDTHS, STRIDES = (8, 12, 16, 20), (4, 8, 16, 32)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
def test_maps_are_taken_back_from_their_enlargement(ratio):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    size = (4 * ratio, 5 * ratio)
    large = nnf.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(reduced(large, ratio), x)


def test_maps_of_other_sizes_are_not_shifted():
    """23 rows of 12, as of an image of 90 pixels."""
    x = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None].expand(1, 1, 12, 4)
    large = nnf.interpolate(x, (23, 8), mode="bilinear", align_corners=False)
    again = reduced(large, 2)
    assert again.shape == x.shape and (again - x).abs().max() < 0.02


def copied(theirs, head):
    """The weights of transformers' head in ours."""
    pairs = [
        (block.layers[1], ours) for block, ours in zip(theirs.psp_modules.blocks, head.pooled, strict=True)
    ]
    pairs += [(theirs.bottleneck, head.context), (theirs.fpn_bottleneck, head.fuse)]
    pairs += [*zip(theirs.lateral_convs, head.lateral, strict=True)]
    pairs += [*zip(theirs.fpn_convs, head.smooth, strict=True)]
    for module, ours in pairs:
        ours[0].load_state_dict(module.conv.state_dict())
        ours[1].load_state_dict(module.batch_norm.state_dict())
    head.classifier.load_state_dict(theirs.classifier.state_dict())


@pytest.mark.parametrize("count", [4, 1])
def test_the_head_is_that_of_transformers(count):
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    torch.manual_seed(0)
    config = transformers.UperNetConfig(
        backbone_config=transformers.ResNetConfig(out_features=["stage4"]), hidden_size=6, num_labels=5
    )
    theirs = UperNetHead(config, WIDTHS[:count]).double()
    head = UPerNetHead(WIDTHS[:count], STRIDES[:count], 5, 6).double()
    for part in theirs.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 2)
            torch.nn.init.normal_(part.running_mean)
    copied(theirs, head)
    maps = [torch.randn(2, w, 192 // s, 256 // s).double() for w, s in zip(WIDTHS, STRIDES, strict=True)]
    with torch.no_grad():
        wanted = theirs.eval()(maps[:count])
        found = head.eval()(concatenated(maps[:count]))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["mit_b0", "convnextv2", "dinov2", "tests.models.own:two_maps"])
def test_networks_of_several_maps(name, tmp_path):
    """Those of DAFormer's head: maps of several strides, and the quarters of a ViT."""
    pytest.importorskip("transformers")
    spec = saved_backbone(tmp_path, name) if name in ("convnextv2", "dinov2") else name
    model = build_model(ModelConfig(backbone=spec, head="upernet"), 5)
    assert isinstance(model.head, UPerNetHead)
    ratios = {"dinov2": [1, 1, 1, 1], "tests.models.own:two_maps": [1, 2]}.get(name, [1, 2, 4, 8])
    assert model.head.ratios == ratios
    image = torch.randn(2, 3, 70, 98)
    out = model(image)
    assert out.logits.shape[1:] == (5, *out.features.shape[2:])
    out.logits.square().mean().backward()
    assert all(p.grad is not None for p in model.head.parameters())
    model.eval()
    with torch.no_grad():
        out = model(image)
        assert torch.equal(model.classify(out.features), out.logits)


def test_a_backbone_of_one_map_is_refused():
    with pytest.raises(UserError, match=r"model\.head upernet needs a mit or hf: backbone, not resnet18"):
        build_model(ModelConfig(backbone="resnet18", head="upernet"), 5)


def test_with_hrda_the_attention_is_daformers():
    model = build_model(ModelConfig(backbone="tests.models.own:two_maps", head="upernet", hrda=(32, 32)), 5)
    assert isinstance(model.head, UPerNetHead) and isinstance(model.attention, DAFormerHead)
    out = model.train()(torch.randn(2, 3, 64, 64))
    assert out.logits.shape == (2, 5, 16, 16) and out.detail.logits.shape == (2, 5, 8, 8)


def test_it_is_exported_with_aggregation(tmp_path):
    """Any size of images; the file is compared with the network before it is written."""
    torch.manual_seed(0)
    cls = get_method("plca")
    model = build_model(ModelConfig(backbone="tests.models.own:two_maps", head="upernet"), 5)
    torch.nn.init.normal_(model.head.classifier.weight)
    method = cls(cls.Config(), model, 5).eval()
    assert export_torch(tmp_path / "a.pt2", method, "{}") < 1e-4 and (tmp_path / "a.pt2").is_file()


@pytest.mark.parametrize("size", [(7, 9), (6, 6), (1, 5), (13, 4)])
def test_pooling_is_adaptive_average_pooling(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for scale in UPerNetHead.SCALES:
        torch.testing.assert_close(pooled(x, scale), nnf.adaptive_avg_pool2d(x, scale), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_exported_file_gives_the_probabilities_of_the_run(tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    settings = {"model.backbone": "mit_b0", "model.head": "upernet"}
    run = untrained_run(tmp_path / "run", "source_only", **settings)
    done = fastuda("export", run, "--out", tmp_path / "upernet.onnx")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "upernet.onnx").stat().st_size > 0
