"""HRDA: its formula, its windows, its losses, and the networks that it takes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

from fastuda.errors import UserError
from fastuda.methods import get_method
from fastuda.methods.losses import pixel_mean_ce, with_detail
from fastuda.models import ModelConfig, SegOutput, build_model
from fastuda.models.backbones import BACKBONES
from fastuda.models.hrda import HRSegmentor, averaged, fuse, placed, windows
from fastuda.models.segmentor import Detail
from tests.helpers import wave
from tests.oracles import spatial_aggregate as aggregate
from tests.oracles.methods import batch, gradients, same


class Cells(nn.Module):
    """Means of cells of 8 x 8 pixels: a backbone whose features are known."""

    channels = 3
    stride = 8

    def forward(self, x):
        return nnf.avg_pool2d(x, 8)


class Planes(nn.Module):
    """A head of fixed 1x1 weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return nnf.conv2d(x, self.weight)


def known(detail=(32, 48)):
    head, attention = (Planes(wave((4, 3, 1, 1), a)) for a in (0.3, 0.7))
    return HRSegmentor(Cells(), head, attention, 4, False, detail).double()


def small(detail=(32, 32), **settings):
    torch.manual_seed(3)
    return build_model(ModelConfig(backbone="small", hrda=detail, **settings), 4)


def test_the_fusion_is_the_published_one():
    """Values of the authors' hrda_head.py with these heads."""
    context, detail = 3 * wave((1, 2, 4, 4), 0.11), 3 * wave((1, 2, 4, 4), 0.23)
    weights = 2 * wave((1, 2, 4, 4), 0.31)
    for x in (context, detail, weights):
        x.requires_grad_(True)
    inside = weights.sigmoid()[:, :, 1:3, 2:4]  # the box (8, 24, 16, 32) in cells of 8 pixels
    fused = fuse(context, placed(inside, 1, 2, (4, 4)), placed(detail, 2, 4, (8, 8)))
    assert fused.sum().item() == pytest.approx(13.6870441146, abs=1e-9)
    assert fused.norm().item() == pytest.approx(18.0289988905, abs=1e-9)
    assert fused[0, 0, 0, :4].tolist() == pytest.approx([0.88656062, 1.39065241, 2.398836, 2.70398078])
    row = [-0.65936724, -0.62316998, -2.44430424, 0.73209979]
    assert fused[0, 1, 3, 3:7].tolist() == pytest.approx(row)
    k = torch.arange(32 * 32)
    y = ((7 * k % 11) % 2).view(1, 32, 32)
    y[0, 0, 0] = y[0, 20, 20] = 255
    w = torch.where(k % 3 == 0, 1.0, 0.5).double().view(1, 32, 32)

    def ce(z, labels, weight):
        return pixel_mean_ce(z, labels, False, weight)

    output = SegOutput(context, fused, None, Detail(detail, (8, 24, 16, 32), 0.1))
    assert ce(fused, y, w).item() == pytest.approx(0.7627622801)
    assert ce(detail, y[:, 8:24, 16:32], w[:, 8:24, 16:32]).item() == pytest.approx(0.7167689520)
    loss = with_detail(output, y, ce, w)
    assert loss.item() == pytest.approx(0.7581629473)
    grads = torch.autograd.grad(loss, (context, weights, detail), retain_graph=True)
    norms = [g.norm().item() for g in grads]
    assert norms == pytest.approx([0.0554856702, 0.0064445589, 0.0114861554])
    assert ce(fused, y, None).item() == pytest.approx(1.1366174994)
    assert with_detail(output, y, ce).item() == pytest.approx(0.9 * 1.1366174994 + 0.1 * 1.0678642405)


def test_the_average_of_windows_is_the_published_one():
    context, weights = 3 * wave((1, 2, 4, 4), 0.11), 2 * wave((1, 2, 4, 4), 0.31)
    parts = (3 * wave((9, 2, 4, 4), 0.17)).split(1)
    places = windows((32, 32), (16, 16), (8, 8))
    assert places == [(y, x) for y in (0, 8, 16) for x in (0, 8, 16)]
    detail = averaged(parts, places, (32, 32), 4)
    assert detail.sum().item() == pytest.approx(2.6775776951)
    assert detail.norm().item() == pytest.approx(18.7221531514)
    fused = fuse(context, weights.sigmoid(), detail)
    assert fused.sum().item() == pytest.approx(-0.6164968818)
    assert fused.norm().item() == pytest.approx(14.7750111227)
    row = [-1.99975972, -2.06268980, -0.84221187, -0.08950099]
    assert fused[0, 0, 3, :4].tolist() == pytest.approx(row)


@pytest.mark.parametrize(
    ("size", "window", "stride", "count"),
    [
        ((40, 32), (16, 16), (8, 8), 12), ((1024, 1024), (512, 512), (256, 256), 9),
        ((1024, 2048), (1024, 1024), (512, 512), 3), ((1080, 1920), (1024, 1024), (512, 512), 6),
        ((32, 32), (32, 32), (16, 16), 1),
    ],
)  # fmt: skip
def test_windows(size, window, stride, count):
    places = windows(size, window, stride)
    assert len(places) == count and places[-1] == (size[0] - window[0], size[1] - window[1])
    seen = torch.zeros(size)
    for y, x in places:
        seen[y : y + window[0], x : x + window[1]] += 1
    assert seen.min() >= 1


def test_training_sees_one_window_of_whole_cells():
    model, images = known(), wave((2, 3, 64, 96), 0.05)
    boxes = set()
    for _ in range(60):
        out = model(images)
        top, bottom, left, right = out.detail.box
        boxes.add((top, left))
        assert (bottom - top, right - left) == (32, 48) and out.detail.weight == 0.1
        features = nnf.avg_pool2d(images, 16)
        torch.testing.assert_close(out.features, features)
        crop = nnf.avg_pool2d(images[:, :, top:bottom, left:right], 8)
        torch.testing.assert_close(out.detail.logits, model.head(crop))
        attention = torch.zeros(2, 4, 4, 6, dtype=torch.float64)
        cells = (..., slice(top // 16, bottom // 16), slice(left // 16, right // 16))
        attention[cells] = model.attention(features).sigmoid()[cells]
        detail = torch.zeros(2, 4, 8, 12, dtype=torch.float64)
        detail[..., top // 8 : bottom // 8, left // 8 : right // 8] = model.head(crop)
        up = {"size": (8, 12), "mode": "bilinear", "align_corners": False}
        context = nnf.interpolate((1 - attention) * model.head(features), **up)
        torch.testing.assert_close(out.logits, context + nnf.interpolate(attention, **up) * detail)
    assert boxes == {(y, x) for y in (0, 16, 32) for x in (0, 16, 32, 48)}


@pytest.mark.parametrize("training", [False, True])
def test_without_gradients_the_windows_slide(training):
    """The backbone is linear and local, so that the averaged details are the head of the whole image."""
    model, images = known().train(training), wave((2, 3, 64, 96), 0.05)
    with torch.no_grad():
        out = model(images)
    attention = model.attention(nnf.avg_pool2d(images, 16)).sigmoid()
    context, detail = model.head(nnf.avg_pool2d(images, 16)), model.head(nnf.avg_pool2d(images, 8))
    torch.testing.assert_close(out.logits, fuse(context, attention, detail))
    assert out.detail is None and out.features.shape == (2, 3, 4, 6)


@pytest.mark.parametrize("size", [(64, 200), (100, 96), (130, 210), (20, 30)])
def test_images_of_any_size_are_read_in_windows_of_the_training_size(size):
    model, images = known().eval(), wave((1, 3, *size), 0.05)
    seen = []
    model.backbone.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        out = model(images)
    assert {shape[2:] for shape in seen} <= {(32, 48), (16, 24)}  # contexts and details alike, as in training
    rows, columns = (-(-side // 8) for side in size)
    assert out.logits.shape == (1, 4, rows, columns)
    assert out.features.shape == (1, 3, -(-size[0] // 16), -(-size[1] // 16))
    inner = model.head(nnf.avg_pool2d(images, 8))
    mixed = fuse(model.head(out.features), model.attention(out.features).sigmoid(), inner) if (
        size[0] % 16 == 0 == size[1] % 16) else None  # fmt: skip
    if mixed is not None:
        torch.testing.assert_close(out.logits[..., 2:-2, 2:4], mixed[..., 2:-2, 2:4])


def test_the_teachers_batch_norm_sees_all_details_together():
    model = small().train()
    counts = []
    model.backbone.stem[1].register_forward_hook(lambda m, args, out: counts.append(len(args[0])))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert counts == [2, 18]


@pytest.mark.parametrize(
    "settings",
    [{}, {"aspp_branches": 2, "aspp_bias": True}, {"backbone": "resnet18"}, {"backbone": "vgg16"},
     {"backbone": "mobilenet_v2"}, {"backbone": "mit_b0"}, {"backbone": "mit_b0", "head": "deeplabv2"}],
    ids=str,
)  # fmt: skip
def test_heads_and_backbones(settings):
    if settings.get("backbone", "").startswith("mit"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = ModelConfig(**{"backbone": "small", "hrda": (32, 32), **settings})
    model = build_model(config, 4).train()
    out = model(torch.randn(2, 3, 64, 64))
    side = 64 // model.stride
    assert out.logits.shape == (2, 4, side, side) and out.detail.logits.shape[2] == side // 2
    (out.logits.sum() + out.detail.logits.sum()).backward()
    fresh = [name for name, p in model.named_parameters() if p.grad is None]
    assert not fresh
    rates = {id(p): g["lr"] for g in model.param_groups(1.0, 10.0) for p in g["params"]}
    assert rates.keys() == {id(p) for p in model.parameters()}
    for name, p in model.named_parameters():
        assert rates[id(p)] == (1.0 if name.startswith("backbone.") else 10.0), name


def test_a_backbone_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    config.save_pretrained(tmp_path)
    model = build_model(ModelConfig(backbone=f"hf:{tmp_path}", hrda=(32, 64)), 4).train()
    out = model(torch.randn(2, 3, 64, 128))
    assert model.stride == 4 and out.logits.shape == (2, 4, 16, 32) and out.features.shape[2:] == (8, 16)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 70, 150)).logits.shape == (1, 4, 18, 38)
    with pytest.raises(UserError, match=r"model.hrda needs a backbone and a head, and hf:.*"):
        build_model(ModelConfig(network=f"hf:{tmp_path}", hrda=(32, 64)), 4)


def test_the_attention_of_daformer_has_no_context():
    pytest.importorskip("transformers")
    model = build_model(ModelConfig(backbone="mit_b0", hrda=(32, 32)), 4)
    assert len(model.head.context) == 4 and len(model.attention.context) == 0
    assert model.attention.fuse[0].kernel_size == (1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hrda": (24, 32)}, "model.hrda is 24 x 32; with this backbone it must be a multiple of 16"),
        ({"hrda": (32, 32), "align_corners": True}, "model.hrda needs model.align_corners=false"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(backbone="small", **settings), 4)


@pytest.mark.parametrize("size", [(16, 64), (64, 72)])
def test_crops_that_do_not_fit_name_the_setting(size):
    with pytest.raises(UserError, match=rf"the training images are {size[0]} x {size[1]}: make data.crop"):
        small().train()(torch.randn(1, 3, *size))


def test_a_backbone_without_whole_cells_is_refused():
    model = build_model(ModelConfig(backbone="resnet18", caffe=True, hrda=(32, 32)), 4).eval()
    with pytest.raises(UserError, match=r"one cell for every 8 x 8 pixels: set model.caffe=false"):
        model(torch.randn(1, 3, 64, 64))


PLAIN = ["source_only", "asanet", "plca", "fada", "weakseg"]
METHODS = [*PLAIN, "self_training", "sepico", "plca+self_training"]


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_both_scales(name):
    more = {"width": 8, "contrast_start": 0} if name == "sepico" else {}
    more |= {"mask_ratio": 0.5, "mask_block": 8} if name in ("self_training", "sepico") else {}
    cls = get_method(name)
    method = cls(cls.Config(**more), small(), 4).train()
    for phase in method.phases(batch(size=(64, 64)), 0):
        assert all(value.isfinite() for value in phase.losses.values())
        sum(phase.losses.values()).backward()
    for net in method.networks().values():
        assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", PLAIN)
def test_the_cross_entropy_of_the_source_is_of_both_scales(name, monkeypatch):
    cls = get_method(name)
    method = cls(cls.Config(**({"temperature": 1.0} if name == "fada" else {})), small(), 4).train()
    data = batch(size=(64, 64))
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.tensor(1))
    found = next(iter(method.phases(data, 0))).losses["ce"]
    out, label = method.model(data.source_image), data.source_label
    assert out.detail.box == (16, 48, 16, 48)

    def literal(z, y):
        up = nnf.interpolate(z, y.shape[1:], mode="bilinear", align_corners=False)
        return nnf.cross_entropy(up, y, ignore_index=255)

    wanted = 0.9 * literal(out.logits, label) + 0.1 * literal(out.detail.logits, label[:, 16:48, 16:48])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_fada_and_weakseg_align_the_features_of_the_context():
    """With the fused logits, which are twice as fine: of the whole image for FADA, pooled for WeakSegDA."""
    data = batch(size=(64, 64))
    cls = get_method("fada")
    method = cls(cls.Config(), small(), 4).train()
    seen = []
    method.discriminator.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[2:]))
    list(method.phases(data, 0))
    assert set(seen) == {(4, 4)}
    cls = get_method("weakseg")
    method = cls(cls.Config(), small(), 4)
    features, logits = torch.randn(2, 128, 4, 4), torch.randn(2, 4, 8, 8)
    attention = nnf.avg_pool2d(logits, 2).flatten(2).softmax(2)
    wanted = features.flatten(2) @ attention.transpose(1, 2)
    torch.testing.assert_close(method._pool(features, logits), wanted, rtol=1e-4, atol=1e-5)


def test_features_are_refined_before_the_head_and_the_attention():
    model, images = known().eval(), wave((2, 3, 64, 96), 0.05)
    features = 2 * nnf.avg_pool2d(images, 16)
    detail = model.head(nnf.avg_pool2d(images, 8))
    wanted = fuse(model.head(features), model.attention(features).sigmoid(), detail)
    with torch.no_grad():
        torch.testing.assert_close(model.refined(images, lambda x: 2 * x), wanted)


def test_plca_aggregates_the_context_and_the_fused_predictions():
    cls = get_method("plca")
    method = cls(cls.Config(), known(), 4).eval()
    images = wave((2, 3, 64, 96), 0.05)

    def rows(x, similarity, contrast):
        done = aggregate.literal(x.flatten(2).transpose(1, 2), similarity, contrast)
        return done.transpose(1, 2).reshape(x.shape)

    features = rows(nnf.avg_pool2d(images, 16), "cosine", True)
    head, attention = method.model.head(features), method.model.attention(features).sigmoid()
    fused = fuse(head, attention, method.model.head(nnf.avg_pool2d(images, 8)))
    with torch.no_grad():
        found = method.predict(images)
    assert found.are_probabilities and found.scores.shape == (2, 4, 8, 12)
    torch.testing.assert_close(found.scores, rows(fused.softmax(1), "kl", False), rtol=1e-5, atol=1e-6)


def test_the_loss_of_the_source_is_that_of_the_formula(monkeypatch):
    cls = get_method("self_training")
    method = cls(cls.Config(), small(), 4).double().train()
    data = batch(size=(64, 96))
    data = dataclasses.replace(data, source_image=data.source_image.double(),
                               target_image=data.target_image.double())  # fmt: skip
    boxes = iter([1, 2] * 9)
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.tensor(next(boxes)))
    first = next(iter(method.phases(data, 0)))
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.tensor(next(boxes)))
    out = method.model(data.source_image)
    assert out.detail.box == (16, 48, 32, 64)

    def literal(z, y):
        up = nnf.interpolate(z, y.shape[1:], mode="bilinear", align_corners=False)
        return nnf.cross_entropy(up, y, ignore_index=255, reduction="sum") / y.numel()

    label = data.source_label
    wanted = 0.9 * literal(out.logits, label) + 0.1 * literal(out.detail.logits, label[:, 16:48, 32:64])
    assert first.losses["ce"].item() == pytest.approx(wanted.item())
    same(gradients(first.losses["ce"], method.model), gradients(wanted, method.model))


def test_the_feature_distance_is_of_the_context():
    model, cls = small(), get_method("self_training")
    model.pretrained = True
    method = cls(cls.Config(feature_distance=0.5, feature_classes=None), model, 4).train()
    data = batch(size=(64, 64))
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.add_(0.01)
    model.eval()
    initial = method.initial(data.source_image)
    features = model.backbone(nnf.avg_pool2d(data.source_image, 2))
    assert initial.shape == features.shape == (2, 128, 4, 4)
    wanted = 0.5 * torch.linalg.vector_norm(features - initial, dim=1).mean()
    first = next(iter(method.phases(data, 0)))
    assert first.losses["feature_distance"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_composition_shares_the_window():
    """Both parts have the same forward of the source, and so the same detail crop."""
    cls = get_method("source_only+self_training")
    method = cls(cls.Config(), small(), 4).train()
    seen = []
    method.model.backbone.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    first = next(iter(method.phases(batch(size=(64, 64)), 0)))
    assert {"source_only_ce", "self_training_ce"} <= first.losses.keys() and seen == [2, 2]
    sum(first.losses.values()).backward()


def test_every_backbone_at_half_size_has_whole_cells():
    """Of those that are built without an optional package."""
    for name in BACKBONES:
        if not name.startswith(("mit", "resnet1", "resnet34", "resnet50")):
            out = build_model(ModelConfig(backbone=name, hrda=(32, 32)), 2).eval()(torch.randn(1, 3, 64, 64))
            assert out.logits.shape[2:] == (8, 8), name
