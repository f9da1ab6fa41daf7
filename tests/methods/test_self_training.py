"""Self-training, SePiCo and compositions: teacher, mixing, prototypes, and what belongs together."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as nnf

import fastuda.ops as F
from fastuda.data.loading import augment
from fastuda.errors import UserError
from fastuda.methods import get_method
from fastuda.methods.cells import downsample_labels
from fastuda.methods.crops import balanced_crops, cut
from fastuda.models import ModelConfig, build_model
from fastuda.models.ema import EMATeacher
from fastuda.ops import PrototypeBank
from tests.oracles.methods import batch, build, collect, data64, gradients, same

PLAIN = {"mix_share": 1.0, "jitter_share": 0.0, "blur_share": 0.0, "threshold": 0.3}


def up(x):
    return nnf.interpolate(x, (32, 64), mode="bilinear", align_corners=False)


def test_self_training_is_the_published_objective():
    method, data = build("self_training", **PLAIN, ignore_top=2, ignore_bottom=5).double().eval(), data64()
    found, grads = collect(method, data)
    with torch.no_grad():
        probability, label = up(method.model(data.target_image).logits).softmax(1).max(1)
    share = (probability >= 0.3).double().mean()
    assert 0 < share < 1
    weight = share.expand(2, 32, 64).clone()
    weight[:, :2] = weight[:, -5:] = 0
    mask = data.source_label != 255
    image = torch.where(mask[:, None], data.source_image, data.target_image)
    label = torch.where(mask, data.source_label, label)
    weight = torch.where(mask, 1.0, weight)
    ce = nnf.cross_entropy(up(method.model(image).logits), label, reduction="none")
    mixed = (weight * ce).mean()
    assert found["mixed"].item() == pytest.approx(mixed.item(), rel=1e-6)
    plain = nnf.cross_entropy(
        up(method.model(data.source_image).logits), data.source_label, ignore_index=255, reduction="sum"
    )
    plain = plain / mask.numel()
    assert found["ce"].item() == pytest.approx(plain.item(), rel=1e-6)
    same(grads["model"], gradients(mixed + plain, method.model))


def test_pseudo_labels_of_the_image_and_its_mirror_image():
    data = data64()
    method = build("self_training", **PLAIN, flip_pseudo_label=True).double().eval()
    with torch.no_grad():
        pseudo = method._pseudo_label(data.target_image, None)
        mirrored = method._pseudo_label(data.target_image.flip(3), None)
        ways = [up(method.model(x).logits).softmax(1) for x in (data.target_image, data.target_image.flip(3))]
    probability, label = ((ways[0] + ways[1].flip(3)) / 2).max(1)
    assert torch.equal(pseudo.label, label) and torch.equal(mirrored.label.flip(2), label)
    assert not torch.equal(label, ways[0].argmax(1))
    assert pseudo.confident.item() == pytest.approx((probability >= 0.3).double().mean().item())


def test_the_teacher_follows_without_gradients():
    method = build("self_training", **PLAIN).train()
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    history = []
    for step in range(3):
        history.append([p.detach().clone() for p in method.model.parameters()])
        optimizer.zero_grad()
        for phase in method.phases(batch(seed=step), step):
            sum(phase.losses.values()).backward()
        assert all(p.grad is None for p in method.teacher.parameters())
        optimizer.step()
    teacher = [p.clone() for p in history[0]]
    for step in (1, 2):
        alpha = min(1 - 1 / (step + 1), 0.999)
        teacher = [alpha * t + (1 - alpha) * s for t, s in zip(teacher, history[step], strict=True)]
    for mine, wanted in zip(method.teacher.module.parameters(), teacher, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["self_training", "sepico", "plca+self_training"])
def test_the_teacher_moves_once_a_step_of_several_batches(name):
    method = build(name, **({"width": 8} if name == "sepico" else {})).train()
    for step in range(3):
        for seed in range(2):
            list(method.phases(batch(seed=seed), step))
        for part in (p for p in method.modules() if isinstance(p, EMATeacher)):
            assert int(part.updates) == step + 1


@pytest.mark.parametrize("name", ["self_training", "sepico", "plca+self_training"])
def test_before_mix_start_the_student_learns_from_the_source_and_the_teacher_follows(name):
    own = {"mix_start": 1, "mask_ratio": 0.5, **({"width": 8} if name == "sepico" else {})}
    settings = {"self_training": get_method("self_training").Config(**own)} if "+" in name else own
    method = build(name, **settings).train()
    prefix = "self_training_" if "+" in name else ""
    before = {key for phase in method.phases(batch(), 0) for key in phase.losses}
    assert f"{prefix}ce" in before and not {f"{prefix}mixed", f"{prefix}masked"} & before
    after = {key for phase in method.phases(batch(), 1) for key in phase.losses}
    assert after == before | {f"{prefix}mixed", f"{prefix}masked"}
    (teacher,) = (part for part in method.modules() if isinstance(part, EMATeacher))
    assert int(teacher.updates) == 2


@pytest.mark.parametrize("name", ["self_training", "sepico"])
def test_the_teacher_labels_no_image_before_its_labels_are_used(name):
    own = {"mix_start": 1, **({"width": 8, "contrast_start": 1} if name == "sepico" else {})}
    method = build(name, **own).train()
    metrics = {key for phase in method.phases(batch(), 0) for key in phase.metrics}
    assert "confident" not in metrics
    assert "confident" in {key for phase in method.phases(batch(), 1) for key in phase.metrics}


@pytest.mark.parametrize("name", ["self_training", "sepico"])
def test_images_that_cannot_be_pasted_are_named_by_their_settings(name):
    data, other = batch(), batch(size=(40, 48))
    data = dataclasses.replace(data, target_image=other.target_image)
    with pytest.raises(
        UserError, match=r"these are 40 x 48, those 32 x 64: make data\.crop, data\.target_crop"
    ):
        list(build(name, **({"width": 8} if name == "sepico" else {})).phases(data, 0))


def test_class_mask_takes_half_of_each_images_classes():
    torch.manual_seed(0)
    labels = torch.randint(0, 7, (40, 16, 16))
    labels[0], labels[1] = 255, 3
    labels[2:, :2] = 255
    mask = augment.class_mask(labels)
    assert not mask[labels == 255].any() and mask[1].all()
    drawn = torch.zeros(7)
    for label, chosen in zip(labels[2:], mask[2:], strict=True):
        inside, outside = set(label[chosen].tolist()), set(label[~chosen].tolist()) - {255}
        assert not inside & outside and len(inside) == math.ceil(len(inside | outside) / 2)
        drawn[list(inside)] += 1
    assert (drawn > 10).all() and (drawn < 36).all()


def test_blur_is_a_gaussian_of_its_own_width_for_each_image():
    torch.manual_seed(0)
    x = torch.zeros(6, 3, 21, 21)
    x[:, :, 10, 10] = 1
    y = augment.gaussian_blur(x, (0.5, 1.0), share=1.0)
    assert torch.allclose(y.sum((2, 3)), torch.ones(6, 3), atol=1e-5)
    for image in y:
        ratio = image[0, 10, 11] / image[0, 10, 10]
        sigma = (-0.5 / ratio.log()).sqrt()
        assert 0.5 <= sigma <= 1.0
        assert image[0, 10, 12] / image[0, 10, 10] == pytest.approx(float((-2 / sigma**2).exp()), rel=1e-3)
    assert torch.equal(augment.gaussian_blur(x, share=0.0), x)


def test_blur_keeps_float32_in_mixed_precision():
    x = torch.randn(2, 3, 12, 12)
    torch.manual_seed(0)
    wanted = augment.gaussian_blur(x, share=1.0)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.gaussian_blur(x, share=1.0), wanted)


def test_labels_of_cells():
    labels = torch.zeros(1, 4, 8, dtype=torch.int64)
    labels[0, :, 4:] = 1
    labels[0, 0, 4:] = 255  # 12 of 16 pixels are left: exactly 0.75
    assert downsample_labels(labels, (1, 2), 3, 0.75).tolist() == [[[0, 1]]]
    labels[0, 1, 4] = 255
    assert downsample_labels(labels, (1, 2), 3, 0.75).tolist() == [[[0, 255]]]
    assert downsample_labels(torch.full((1, 4, 4), 255), (1, 1), 3, 0.0).tolist() == [[[255]]]


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (12, 18)])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.75])
def test_labels_of_cells_are_the_averages_of_planes(size, share):
    torch.manual_seed(0)
    small = torch.randint(0, 4, (2, 4, 6))
    noise = torch.randint(0, 4, (2, 12, 18))
    coarse = small.repeat_interleave(3, 1).repeat_interleave(3, 2)
    labels = torch.where(torch.rand(noise.shape) < 0.3, noise, coarse)
    planes = nnf.adaptive_avg_pool2d(nnf.one_hot(labels, 4).movedim(3, 1).double(), size)
    wanted, winner = planes.max(1)
    found = downsample_labels(torch.where(labels == 3, 255, labels), size, 3, share)
    kept = (wanted >= share - 1e-6) & (winner < 3)
    assert torch.equal(found, torch.where(kept, winner, 255))
    assert kept.any() and (share == 0 or not kept.all())


@pytest.mark.parametrize("variant", ["dist", "proto", "bank"])
def test_sepico_gathers_and_contrasts(variant):
    settings = {**PLAIN, "width": 12, "variant": variant, "tau": 0.1, "contrast_start": 1, "bank_length": 2}
    method = build("sepico", **settings, regularizer_weight=-0.5).eval()
    total, banks = None, [[torch.zeros(12)] for _ in range(4)]
    for step in range(3):
        data = batch(seed=step)
        phases = []
        losses, metrics = {}, {}
        for phase in method.phases(data, step):
            phases.append(phase)
            losses.update(phase.losses)
            metrics.update(phase.metrics)
        with torch.no_grad():  # the student does not move, so the teacher is the student
            embedding = method.student(data.source_image, project=True).embedding
        rows = embedding.movedim(1, -1).reshape(-1, 12)
        labels = downsample_labels(data.source_label, embedding.shape[2:], 4, 0.75).flatten()
        found = F.class_statistics(rows, labels, 4)
        total = found if total is None else total.merge(found)
        for c in range(4):
            if found.count[c]:
                banks[c] = [*banks[c], found.mean[c]][-2:]
        torch.testing.assert_close(method.mean, total.mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(method.variance, total.variance, rtol=1e-3, atol=1e-6)
        assert method.seen.tolist() == total.count.tolist()
        assert any("contrast_source" in p.losses for p in phases) == (step >= 1)
    prototypes = total
    if variant == "bank":
        assert method.bank_count.tolist() == [len(bank) for bank in banks]
        vectors = torch.stack([torch.stack([*bank, torch.zeros(12)][:2]) for bank in banks])
        torch.testing.assert_close(method.bank, vectors, rtol=1e-4, atol=1e-6)
        prototypes = PrototypeBank(method.bank, method.bank_count)
    wanted = F.prototype_contrast(rows, labels, prototypes, kind=variant, tau=0.1)
    assert losses["contrast_source"].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert metrics["contrast_gap_source"].item() == pytest.approx(wanted.item() - math.log(4), abs=1e-4)
    centre = rows[labels != 255].mean(0)
    regularizer = (centre @ total.mean.T / 0.1).log_softmax(0).sum() / (4 * math.log(4))
    assert losses["regularizer_source"].item() == pytest.approx(-0.5 * regularizer.item(), rel=1e-4)
    assert {"contrast_target", "regularizer_target", "mixed", "ce"} <= losses.keys()
    assert 0 <= metrics["centroid_accuracy_source"] <= 1


def test_nothing_trusted_is_no_gap():
    method = build("sepico", **{**PLAIN, "threshold": 1.1}, width=8, contrast_start=0).train()
    metrics = {k: v for p in method.phases(batch(), 0) for k, v in p.metrics.items()}
    assert metrics["contrast_gap_target"] == 0 and metrics["contrast_gap_source"] != 0
    assert metrics["centroid_accuracy_target"] == 0


def test_the_nearest_prototype_is_found_in_float32():
    method = build("sepico", width=8)
    embedding = torch.zeros(1, 8, 4, 8)
    embedding[:, 0] = 1
    method.mean[:, 0] = torch.tensor([0.5, 0.501, 0.0, 0.0])  # alike in bf16
    metrics = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method._contrast("source", embedding, torch.ones(1, 32, 64, dtype=torch.int64), {}, metrics)
    assert metrics["centroid_accuracy_source"] == 1


@pytest.mark.parametrize("variant", ["dist", "proto", "bank"])
def test_sepico_of_a_single_class_is_finite(variant):
    method = build("sepico", k=1, width=8, contrast_start=0, variant=variant).train()
    for phase in method.phases(batch(k=1), 0):
        assert all(torch.isfinite(value) for value in (*phase.losses.values(), *phase.metrics.values()))


def test_balanced_crops_show_many_classes():
    torch.manual_seed(0)
    labels = torch.zeros(3, 40, 60, dtype=torch.int64)
    labels[:, 30:, 40:] = torch.randint(1, 6, (3, 10, 20))
    corners = balanced_crops(labels, (10, 10), 200, 6)
    for label, (y, x) in zip(labels, corners.tolist(), strict=True):
        crop = label[y : y + 10, x : x + 10]
        assert len(crop.unique()) == 6 and crop.flatten().bincount().max() < 75
    with pytest.raises(ValueError, match="does not fit"):
        balanced_crops(labels, (50, 10), 5, 6)


def test_a_crop_with_one_class_on_three_quarters_is_not_taken():
    """Though it scores more: of two windows the left one has three classes, one of them on 76 %."""
    labels = torch.zeros(1, 10, 11, dtype=torch.int64)
    labels[0, :, 8:] = 2
    labels[0, :4, 0] = 1
    left, right = (labels[0, :, x : x + 10].flatten().bincount(minlength=3) for x in (0, 1))
    assert left.tolist() == [76, 4, 20] and right.tolist() == [70, 0, 30]
    assert left.log().sum() > right.clamp(min=1).log().sum()
    assert balanced_crops(labels, (10, 10), 50, 3).tolist() == [[0, 1]]


def test_windows_are_cut_at_their_own_rows_and_columns():
    images = torch.arange(2 * 3 * 20 * 30).view(2, 3, 20, 30)
    found = cut(images, torch.tensor([[2, 11], [7, 0]]), (5, 8))
    assert torch.equal(found[0], images[0, :, 2:7, 11:19])
    assert torch.equal(found[1], images[1, :, 7:12, 0:8])


def test_the_best_of_the_published_candidates_is_taken():
    """Each candidate's score counted by hand, from the same draws."""
    generator = torch.Generator().manual_seed(1)
    labels = (
        torch.randint(0, 5, (2, 5, 7), generator=generator).repeat_interleave(6, 1).repeat_interleave(6, 2)
    )
    labels[:, :12, :20], labels[0, 20:, 20:] = 3, 255
    torch.manual_seed(4)
    found = balanced_crops(labels, (12, 16), 10, 5)
    torch.manual_seed(4)
    rows, columns = torch.randint(30 - 12 + 1, (2, 10)), torch.randint(42 - 16 + 1, (2, 10))
    for b in range(2):
        scores = []
        for y, x in zip(rows[b].tolist(), columns[b].tolist(), strict=True):
            crop = labels[b, y : y + 12, x : x + 16]
            counts = [int((crop == c).sum()) for c in range(5)]
            dull = sum(n > 0 for n in counts) <= 1 or max(counts) >= 0.75 * 12 * 16
            scores.append(0.0 if dull else sum(math.log(n) for n in counts if n > 1))
        best = max(range(10), key=lambda i: (round(scores[i], 4), -i))
        assert found[b].tolist() == [rows[b, best], columns[b, best]]


def test_sepico_on_balanced_crops_trains():
    method = build("sepico", **PLAIN, width=8, contrast_start=0, balanced_crop=(16, 24)).train()
    data = batch(size=(16, 24))
    whole = batch(size=(32, 64))
    data = type(data)(
        data.source_image, data.source_label, whole.target_image, data.source_files, data.target_files
    )
    for phase in method.phases(data, 0):
        loss = sum(phase.losses.values())
        assert torch.isfinite(loss)
        loss.backward()


def test_senseless_settings_of_sepico_are_named():
    for settings, said in (
        ({"bank_length": 0}, r"method\.bank_length is 0; it must be at least 1"),
        ({"crop_candidates": 0}, r"method\.crop_candidates is 0"),
        ({"tau": 0.0}, r"method\.tau is 0\.0; it must be above 0"),
    ):
        with pytest.raises(UserError, match=said):
            build("sepico", **settings)
    with pytest.raises(
        UserError, match=r"method\.balanced_crop is 64 x 64 and the target images are 32 x 64"
    ):
        list(build("sepico", width=8, balanced_crop=(64, 64)).phases(batch(), 0))


def test_composition_is_the_weighted_sum_of_its_parts():
    names = ("source_only", "plca")
    cls = get_method("source_only+plca")
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="small"), 4).eval()
    method = cls(cls.Config(weights={"plca": 0.25}), model, 4)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    data = batch()
    losses = {k: v for p in method.phases(data, 0) for k, v in p.losses.items()}
    assert len(runs) == 3 and "forward" not in vars(model)  # three calls, of which two share one pass
    for name, weight in zip(names, (1.0, 0.25), strict=True):
        part = get_method(name)
        for phase in part(part.Config(), model, 4).phases(data, 0):
            for key, value in phase.losses.items():
                assert losses[f"{name}_{key}"].item() == pytest.approx(weight * value.item(), rel=1e-6)


FORWARDS = {
    "source_only+plca": 2,
    "plca+self_training": 3,  # the mixed images are its own
    "plca+fada": 2,
    "asanet+plca+fada": 2,
    "fada+asanet+weakseg": 2,
    "plca+sepico": 5,  # jittered source and target, mixed
}


def composed(name, **settings):
    parts = {"self_training": PLAIN, "sepico": {"width": 8, "contrast_start": 0}}
    parts |= {"weakseg": {"category_width": 8, "dropout": 0.0}}
    configs = {part: get_method(part).Config(**parts.get(part, {})) for part in name.split("+")}
    return build(name, **configs, **settings)


@pytest.mark.parametrize("name", FORWARDS)
def test_composition_runs_a_shared_forward_once(name):
    method, passes = composed(name).train(), []
    method.model.backbone.register_forward_hook(lambda *_: passes.append(1))
    for phase in method.phases(batch(), 0):
        sum(phase.losses.values()).backward()
    assert len(passes) == FORWARDS[name] and "forward" not in vars(method.model)


@pytest.mark.parametrize("name", ["plca+fada", "weakseg+plca+self_training"])
def test_composition_has_the_gradients_of_its_parts(name):
    method = composed(name, weights={"plca": 0.25}).double().eval()
    data = data64()
    losses, found = collect(method, data)
    networks = method.networks()
    wanted = {key: [torch.zeros_like(p) for p in net.parameters()] for key, net in networks.items()}
    for part, member in method.members.items():
        weight = 0.25 if part == "plca" else 1.0
        own, gradients = collect(member, data)
        for key, value in own.items():
            assert losses[f"{part}_{key}"].item() == pytest.approx(weight * value.item(), rel=1e-9)
        for key, values in gradients.items():
            for total, grad in zip(wanted[key], values, strict=True):
                if grad is not None:
                    total += weight * grad
    for key in networks:
        same(found[key], wanted[key])


def test_composition_says_what_does_not_go_together():
    model = build_model(ModelConfig(backbone="small"), 4)
    with pytest.raises(UserError, match="a method twice"):
        get_method("plca+plca")
    with pytest.raises(UserError, match="unknown method 'dacs'"):
        get_method("plca+dacs")
    cls = get_method("plca+fada")
    with pytest.raises(UserError, match=r"method\.weights has \['pcla'\]; the parts are plca, fada"):
        cls(cls.Config(weights={"pcla": 2.0}), model, 4)
    assert set(cls(cls.Config(), model, 4).networks()) == {"model", "discriminator"}
    cls = get_method("fada+asanet")
    assert set(cls(cls.Config(), model, 4).networks()) == {
        "model",
        "fada_discriminator",
        "asanet_discriminator",
    }
    assert cls.optim_defaults["optim.networks.asanet_discriminator.name"] == "adam"
