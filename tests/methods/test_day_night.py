"""Day-to-night adaptation: pseudo-labels fused with a matched day image, and weights of rare classes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as nnf

import fastuda.ops as F
from fastuda.errors import UserError
from fastuda.methods.day_night import fuse_matched, rarity_weights
from tests.oracles.methods import batch, build
from tests.oracles.prototype_contrast import published_query, published_statistics

# pixel frequencies of Cityscapes, as the authors' experiments.py has them
CITYSCAPES = (
    0.36869696, 0.06084986, 0.22824049, 0.00655399, 0.00877272, 0.01227341, 0.00207795,
    0.0055127, 0.15928651, 0.01157818, 0.04018982, 0.01218957, 0.00135122, 0.06994545,
    0.00267456, 0.00235192, 0.00232904, 0.00098658, 0.00413907,
)  # fmt: skip
WEIGHTS = {
    0.05: (.904, .954, .917, 1.016, 1.008, .999, 1.048, 1.021, .927, 1.000, .966, .999, 1.060, .950, 1.041,
           1.045, 1.045, 1.069, 1.029),
    0.16: (.693, .854, .736, 1.052, 1.026, .996, 1.154, 1.067, .768, 1.001, .890, .997, 1.192, .841, 1.132,
           1.143, 1.144, 1.220, 1.093),
}  # fmt: skip
PLAIN = {"mix_share": 1.0, "jitter_share": 0.0, "blur_share": 0.0, "threshold": 0.3}
NIGHT = {
    "static_classes": (0, 2), "class_frequencies": (0.6, 0.3, 0.08, 0.02), "class_spread": 0.05,
}  # fmt: skip


@pytest.mark.parametrize("spread", WEIGHTS)
def test_weights_of_the_published_run(spread):
    assert rarity_weights(CITYSCAPES, spread).tolist() == pytest.approx(WEIGHTS[spread], abs=6e-4)


def literal_fusion(night, day, static):
    out = night.clone()
    for b in range(night.shape[0]):
        for k in static:
            for y in range(night.shape[2]):
                for x in range(night.shape[3]):
                    d, n = day[b, k, y, x], night[b, k, y, x]
                    out[b, k, y, x] = 0.8 * d + 0.2 * n if d > 0.4 else 0.2 * d + 0.8 * n
    return out


def test_fusion_is_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    night, day = (3 * torch.randn(2, 2, 5, 4, 6, generator=generator, dtype=torch.float64)).softmax(2)
    before = night.clone()
    found = fuse_matched(night, day, (0, 1, 3))
    torch.testing.assert_close(found, literal_fusion(night, day, (0, 1, 3)), rtol=0, atol=1e-12)
    assert torch.equal(found[:, [2, 4]], night[:, [2, 4]]) and torch.equal(night, before)


def matched(seed=0):
    day = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(seed + 7))
    return dataclasses.replace(batch(seed=seed), target_match=day)


def test_pseudo_labels_come_from_both_images():
    method, data = build("self_training", **PLAIN, **NIGHT).eval(), matched()
    with torch.no_grad():
        night, day = (
            nnf.interpolate(method.model(x).logits, (32, 64), mode="bilinear").softmax(1)
            for x in (data.target_image, data.target_match)
        )
    weight = rarity_weights(NIGHT["class_frequencies"], 0.05)
    probability, label = (literal_fusion(night, day, (0, 2)) * weight[:, None, None]).max(1)
    share = (probability >= 0.3).float().mean()
    method.teacher.update(method.model)
    found = method._pseudo_label(data.target_image, data.target_match)
    assert (found.label != label).float().mean() < 1e-3
    assert found.confident.item() == pytest.approx(share.item(), abs=2e-3)
    assert not torch.equal(method._pseudo_label(data.target_image, None).label, label)


def test_losses_weigh_rare_classes():
    method, data = build("self_training", **PLAIN, **NIGHT).eval(), matched()
    losses = {k: v for p in method.phases(data, 0) for k, v in p.losses.items()}
    weight = rarity_weights(NIGHT["class_frequencies"], 0.05)
    logits = nnf.interpolate(method.model(data.source_image).logits, (32, 64), mode="bilinear")
    ce = nnf.cross_entropy(logits, data.source_label, weight, ignore_index=255, reduction="sum")
    assert losses["ce"].item() == pytest.approx((ce / data.source_label.numel()).item(), rel=1e-5)


def test_predictions_weigh_rare_classes():
    plain, data = build("sepico", width=8).eval(), batch()
    method = build("sepico", width=8, **NIGHT, test_spread=0.16).eval()
    with torch.no_grad():
        wanted = plain.predict(data.target_image).scores.softmax(1)
        found = method.predict(data.target_image).scores.softmax(1)
    wanted = wanted * rarity_weights(NIGHT["class_frequencies"], 0.16)[:, None, None]
    torch.testing.assert_close(found, wanted / wanted.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)
    assert plain.state_dict().keys() == method.state_dict().keys()


def test_sepico_crops_both_images_alike_and_trains_on_the_night():
    method = build("sepico", **PLAIN, **NIGHT, width=8, contrast_start=0, balanced_crop=(16, 24)).train()
    seen = []
    method.teacher.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    students = []
    method.student.register_forward_pre_hook(lambda _, args: students.append(args[0]))
    data = matched()
    small = batch(size=(16, 24))
    data = dataclasses.replace(data, source_image=small.source_image, source_label=small.source_label)
    # a day image that is the night image plus one: so is each of its crops
    data = dataclasses.replace(data, target_match=data.target_image + 1)
    for phase in method.phases(data, 0):
        loss = sum(phase.losses.values())
        assert torch.isfinite(loss)
        loss.backward()
    night, day, night_crop, day_crop = seen[:4]
    assert night_crop.shape[2:] == (16, 24)
    assert torch.equal(day, night + 1) and torch.equal(day_crop, night_crop + 1)
    assert torch.equal(students[1], night_crop)  # the contrast's target


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="class_frequencies has 2 entries for 4 classes"):
        build("self_training", class_frequencies=(0.5, 0.5))
    method = build("self_training", **PLAIN)
    with pytest.raises(UserError, match="static_classes names class 10 of 4"):
        next(method.phases(matched(), 0))


def test_the_regularizer_has_the_authors_value():
    """ProtoCL with regulariser weight 1 at tau 0.1: the last of the vectors."""
    method = build("sepico", width=5, variant="proto", tau=0.1).double()
    total = published_statistics()
    for buffer, value in ((method.mean, total.mean), (method.variance, total.variance)):
        buffer.copy_(value)
    q, rows, labels = published_query()
    loss = F.prototype_contrast(rows, labels, total, kind="proto", tau=0.1)
    loss = loss + method._regularizer(rows, labels)
    grad = torch.autograd.grad(loss, q)[0]
    assert abs(loss.item() + 1.3272072844) < 1e-8
    assert grad.norm().item() == pytest.approx(0.62427363, abs=2e-8)
    assert grad.flatten()[:3].tolist() == pytest.approx((-0.01706205, 0.0, -0.00698386), abs=2e-8)


def test_the_regularizer_of_no_labelled_pixel_is_zero():
    method = build("sepico", width=8)
    method.mean.normal_()
    rows = torch.randn(6, 8, requires_grad=True)
    loss = method._regularizer(rows, torch.full((6,), 255))
    (gradient,) = torch.autograd.grad(loss, rows)
    assert loss.item() == 0 and not gradient.any()
