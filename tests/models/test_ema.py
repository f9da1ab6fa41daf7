"""The teacher: its average, its modes, and its state in a checkpoint."""

import io

import pytest
import torch
from torch import nn

from fastuda.models import ModelConfig, build_model
from fastuda.models.ema import EMATeacher


def student():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout2d(0.5))


def shake(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))


def test_the_average_is_the_published_one():
    net = student()
    teacher = EMATeacher(net, decay=0.6)
    average = None
    for step in range(6):
        shake(net)
        teacher.update(net)
        alpha = min(1 - 1 / (step + 1), 0.6)
        now = net[0].weight.detach().double()
        average = now if average is None else alpha * average + (1 - alpha) * now
        torch.testing.assert_close(teacher.module[0].weight.double(), average, rtol=1e-6, atol=1e-6)
    assert int(teacher.updates) == 6
    default = EMATeacher(net)
    assert default.alpha(997) == 1 - 1 / 998 and default.alpha(999) == default.alpha(5000) == 0.999


def test_the_first_update_copies_bit_for_bit():
    net = student()
    teacher = EMATeacher(net)
    shake(net)
    teacher.update(net)
    assert all(torch.equal(a, b) for a, b in zip(teacher.module.parameters(), net.parameters(), strict=True))


def test_running_statistics_are_its_own():
    net = student()
    teacher = EMATeacher(net, decay=0.5).train()
    for _ in range(2):
        net(torch.randn(4, 3, 5, 5) + 3)
        teacher.update(net)
    assert torch.equal(teacher.module[1].running_mean, torch.zeros(4))
    teacher(torch.randn(4, 3, 5, 5) + 3)
    assert teacher.module[1].running_mean.abs().sum() > 0


def test_training_mode_has_no_dropout_and_uses_batch_statistics():
    teacher = EMATeacher(student()).train()
    assert teacher.module[1].training and not teacher.module[2].training
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(teacher(x), teacher(x))
    assert teacher(x).mean((0, 2, 3)).abs().max() < 1e-5
    assert not teacher.eval().module[1].training


def test_no_gradient_reaches_the_teacher_or_through_it():
    net = student()
    teacher = EMATeacher(net)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not teacher(torch.randn(1, 3, 2, 2, requires_grad=True)).requires_grad
    with pytest.raises(ValueError, match="not the network"):
        teacher.update(nn.Conv2d(3, 5, 1))


def test_a_resumed_teacher_goes_on_bit_for_bit():
    torch.manual_seed(3)
    net = student()
    teacher = EMATeacher(net, decay=0.9)
    for _ in range(3):
        shake(net)
        teacher.update(net)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "teacher": teacher.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = student()
    resumed = EMATeacher(other, decay=0.9)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["teacher"])
    assert (resumed.count, int(resumed.updates)) == (3, 3)
    for one, its in ((teacher, net), (resumed, other)):
        torch.manual_seed(4)
        shake(its)
        one.update(its)
    assert all(
        torch.equal(a, b)
        for a, b in zip(teacher.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_it_holds_a_segmentor_with_frozen_batch_norm():
    model = build_model(ModelConfig(backbone="small", freeze_bn="frozen"), 3)
    teacher = EMATeacher(model).train()
    before = teacher.module.backbone.stem[1].running_mean.clone()
    assert teacher(torch.randn(2, 3, 16, 16)).logits.shape == (2, 3, 2, 2)
    assert torch.equal(before, teacher.module.backbone.stem[1].running_mean)
    assert teacher.module.num_classes == 3 and teacher.module.input == model.input
