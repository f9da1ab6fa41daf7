"""Masked image consistency: the published mask, the loss on masked images, and what it shares."""

import pytest
import torch
import torch.nn.functional as nnf

from fastuda.data.loading import augment
from fastuda.errors import UserError
from fastuda.methods import get_method
from fastuda.models import ModelConfig, build_model
from fastuda.models.mask_tokens import masked_tokens
from tests.helpers import wave
from tests.models.foreign import saved_backbone
from tests.oracles.methods import batch, build, collect, data64, gradients, same

PLAIN = {"mix_share": 1.0, "jitter_share": 0.0, "blur_share": 0.0, "threshold": 0.3}
MASKED = {"mask_ratio": 0.7, "mask_block": 8}
SMALL = {"width": 8, "contrast_start": 0}


def test_the_mask_is_the_published_one(monkeypatch):
    """Values of the authors' BlockMaskGenerator with these draws: the cell with u = 0.7 is hidden."""
    u = torch.tensor([[0.10, 0.80, 0.69], [0.71, 0.70, 0.20], [0.95, 0.05, 0.75]])
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: u.expand(size))
    kept = augment.block_mask(torch.ones(2, 3, 8, 8), 3, 0.7)
    rows = ["".join(str(int(v)) for v in row) for row in kept[1, 2]]
    assert rows == ["00011100"] * 3 + ["11100000"] * 3 + ["11100011"] * 2
    masked = augment.block_mask(wave((1, 3, 8, 8), 0.13), 3, 0.7)
    assert masked.sum().item() == pytest.approx(3.6836501741, abs=1e-9)
    assert masked.norm().item() == pytest.approx(6.4760417545, abs=1e-9)


@pytest.mark.parametrize(
    ("size", "block", "grid"),
    [
        ((512, 512), 32, (16, 16)), ((1024, 1024), 64, (16, 16)), ((1120, 1120), 64, (18, 18)),
        ((720, 1280), 64, (11, 20)), ((80, 112), 32, (2, 4)), ((1080, 1920), 64, (17, 30)),
        ((8, 8), 32, (1, 1)),
    ],
)  # fmt: skip
def test_the_grid_of_the_mask(size, block, grid, monkeypatch):
    drawn = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: drawn.append(shape) or rand(*shape))
    augment.block_mask(torch.ones(2, 1, *size), block, 0.5)
    assert drawn == [(2, 1, *grid)]


def test_masks_are_drawn_per_image_and_hide_their_share():
    torch.manual_seed(0)
    kept = augment.block_mask(torch.ones(50, 3, 64, 64), 8, 0.7)
    assert torch.equal(kept[:, 0], kept[:, 1]) and set(kept.unique().tolist()) == {0, 1}
    assert kept.mean().item() == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(kept[0], kept[1])
    assert augment.block_mask(torch.ones(1, 3, 64, 64), 8, 1.0).sum() == 0


@pytest.mark.parametrize("name", ["self_training", "sepico"])
def test_the_masked_loss_is_of_all_pixels_by_the_labels_of_the_whole_image(name, monkeypatch):
    more = {"width": 8, "contrast_start": 9} if name == "sepico" else {}
    settings = {**PLAIN, **MASKED, "mask_weight": 0.5, "ignore_top": 2, "ignore_bottom": 5}
    method, data = build(name, **settings, **more).double().eval(), data64()
    u = torch.rand(2, 1, 4, 8)
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: u.expand(size))
    found, grads = collect(method, data)
    with torch.no_grad():
        up = nnf.interpolate(method.model(data.target_image).logits, (32, 64), mode="bilinear")
        probability, label = up.softmax(1).max(1)
    weight = (probability >= 0.3).double().mean().expand(2, 32, 64).clone()
    weight[:, :2] = weight[:, -5:] = 0
    mask = (u > 0.7).double().repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert 0 < mask.mean() < 1
    logits = nnf.interpolate(method.model(data.target_image * mask).logits, (32, 64), mode="bilinear")
    wanted = 0.5 * (weight * nnf.cross_entropy(logits, label, reduction="none")).mean()
    assert found["masked"].item() == pytest.approx(wanted.item(), rel=1e-6)
    off, without = collect(build(name, **{**settings, "mask_ratio": 0.0}, **more).double().eval(), data)
    assert "masked" not in off
    net = method.networks()["model"]
    added = [a if b is None else b if a is None else a + b
             for a, b in zip(gradients(wanted, net), without["model"], strict=True)]  # fmt: skip
    same(grads["model"], added)


def on_a_vit(name, folder, k=4, **settings):
    """A method on a tiny DINOv2 whose mask token is no longer zero."""
    cls = get_method(name)
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=saved_backbone(folder, "dinov2")), k)
    torch.nn.init.normal_(model.backbone.network.embeddings.mask_token)
    return cls(cls.Config(**settings), model, k)


@pytest.mark.parametrize("name", ["self_training", "sepico", "plca+self_training"])
def test_tokens_are_masked_in_place_of_blocks(name, tmp_path, monkeypatch):
    """Also in a composition, which runs the network once for a tensor of images; here it is the target's."""
    more = {"width": 8, "contrast_start": 9} if name == "sepico" else {}
    settings = {**PLAIN, **more, "mask_ratio": 0.7, "mask_kind": "tokens"}
    if "+" in name:
        settings = {"self_training": get_method("self_training").Config(**settings)}
    method, data = on_a_vit(name, tmp_path, **settings).double().eval(), data64()
    draws = torch.rand(2, 2 * 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: draws if size == (2, 10) else pytest.fail("drawn"))
    found, _ = collect(method, data)
    with torch.no_grad():
        up = nnf.interpolate(method.model(data.target_image).logits, (32, 64), mode="bilinear")
        probability, label = up.softmax(1).max(1)
        weight = (probability >= 0.3).double().mean()
        assert weight > 0
        with masked_tokens(method.model.backbone, 0.7):
            masked = method.model(data.target_image).logits
        logits = nnf.interpolate(masked, (32, 64), mode="bilinear")
        wanted = (weight * nnf.cross_entropy(logits, label, reduction="none")).mean()
        plain = (weight * nnf.cross_entropy(up, label, reduction="none")).mean()
    loss = found["self_training_masked" if "+" in name else "masked"]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert plain.item() != pytest.approx(wanted.item(), rel=1e-3)


def test_a_network_without_a_mask_token_is_refused():
    with pytest.raises(UserError, match=r"mask_kind=tokens needs a ViT with a mask token, such as DINOv2 by"):
        build("self_training", mask_ratio=0.7, mask_kind="tokens")
    build("self_training", mask_kind="tokens")  # nothing is masked


def passes(method, data):
    """Numbers of the teacher's and the student's forwards in a step."""
    counts = {"teacher": 0, "student": 0}

    def count(who):
        return lambda *_: counts.update({who: counts[who] + 1})

    teacher = next(part for part in method.modules() if type(part).__name__ == "EMATeacher")
    teacher.register_forward_hook(count("teacher"))
    method.model.backbone.register_forward_hook(count("student"))
    for phase in method.phases(data, 0):
        sum(phase.losses.values()).backward()
    return counts


@pytest.mark.parametrize("name", ["self_training", "sepico", "plca+self_training"])
def test_masks_take_one_more_forward_of_the_student_and_none_of_the_teacher(name):
    def settings(**more):
        own = {**more, **(SMALL if name == "sepico" else {})}
        return {"self_training": get_method("self_training").Config(**own)} if "+" in name else own

    plain = passes(build(name, **settings()).train(), batch())
    masked = passes(build(name, **settings(**MASKED)).train(), batch())
    assert masked == {"teacher": plain["teacher"], "student": plain["student"] + 1}


def test_without_masks_nothing_is_drawn_for_them(monkeypatch):
    monkeypatch.setattr(augment, "block_mask", lambda *_: pytest.fail("a mask was drawn"))
    list(build("self_training").phases(batch(), 0))


def test_the_masked_loss_is_the_last_phase_and_alone_in_it():
    """Its graph is built after the others are freed: the peak is theirs."""
    *_, mixed, masked = build("self_training", **MASKED).phases(batch(), 0)
    assert set(mixed.losses) == {"mixed"} and set(masked.losses) == {"masked"}


@pytest.mark.parametrize(("name", "count", "half"), [("self_training", 2, 1), ("sepico", 3, 2)])
def test_both_domains_are_masked_as_published_for_day_and_night(name, count, half, monkeypatch):
    """Half of the source images by their labels with weight 1, and half of the target images; no jitter."""
    more = {"width": 8, "contrast_start": 9} if name == "sepico" else {}
    settings = {**PLAIN, "ignore_top": 2, **MASKED, "mask_images": "both", "mask_strong": False}
    method, data = build(name, **settings, **more).double().eval(), data64(b=count)
    u = torch.rand(2 * half, 1, 4, 8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **kwargs: u.expand(size))
        losses, _ = collect(method, data)
    with torch.no_grad():
        up = nnf.interpolate(method.model(data.target_image).logits, (32, 64), mode="bilinear")
        probability, label = up.softmax(1).max(1)
    weight = (probability >= 0.3).double().mean().expand(half, 32, 64).clone()
    weight[:, :2] = 0
    assert 0 < weight.max() < 1
    mask = (u > 0.7).double().repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = torch.cat([data.source_image[:half], data.target_image[:half]]) * mask
    logits = nnf.interpolate(method.model(images).logits, (32, 64), mode="bilinear")
    source = nnf.cross_entropy(logits[:half], data.source_label[:half], ignore_index=255, reduction="sum")
    target = (weight * nnf.cross_entropy(logits[half:], label[:half], reduction="none")).sum()
    wanted = (source + target) / (2 * half * 32 * 64)
    assert losses["masked"].item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("strong", [True, False])
def test_masked_images_are_jittered_unless_that_is_off(strong, monkeypatch):
    method = build("self_training", **MASKED, mask_strong=strong, jitter_share=1.0)
    data, seen = batch(), []
    masked = augment.block_mask
    monkeypatch.setattr(augment, "block_mask", lambda x, *rest: seen.append(x) or masked(x, *rest))
    list(method.phases(data, 0))
    assert torch.equal(seen[0], data.target_image) is not strong
