"""Frozen batch norms, folded into the convolutions before them."""

import copy

import pytest
import torch
from torch import nn

from fastuda.models import ModelConfig, build_model
from fastuda.models.backbones import BACKBONES
from fastuda.models.ema import EMATeacher
from fastuda.models.frozen import FoldedConv2d, FrozenBatchNorm2d, freeze


def moved(backbone):
    """Statistics, scales and shifts of a network that was trained."""
    generator = torch.Generator().manual_seed(3)
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            for x in (part.weight, part.bias, part.running_mean, part.running_var):
                x.data = torch.rand(x.shape, generator=generator).to(x) + 0.5
    return backbone


def run(net, x):
    x = x.detach().requires_grad_()
    out = net(x)
    weights = [p for p in net.parameters() if p.requires_grad]
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
    return out.detach(), *torch.autograd.grad(out, [x, *weights], weight)


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50", "mobilenet_v2"])
def test_folded_norms_give_what_norms_in_evaluation_mode_give(name):
    plain = moved(BACKBONES[name](False).double())
    folded = copy.deepcopy(plain)
    freeze(folded)
    norms = [part for part in folded.modules() if isinstance(part, FrozenBatchNorm2d)]
    assert norms and all(norm.folded for norm in norms)
    assert list(folded.state_dict()) == list(plain.state_dict())
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.requires_grad_(False)
    plain.eval()
    folded.train()
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    before = {key: value.clone() for key, value in folded.state_dict().items()}
    for one, two in zip(run(folded, x), run(plain, x), strict=True):
        assert torch.allclose(one, two, rtol=1e-8, atol=1e-10 * float(two.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in folded.state_dict().items())


def test_weights_that_are_loaded_later_are_folded():
    model = build_model(ModelConfig(backbone="small", freeze_bn="frozen"), 3).train()
    other = build_model(ModelConfig(backbone="small", freeze_bn="frozen"), 3)
    moved(other.backbone)
    model.load_state_dict(other.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x).logits, other(x).logits)


def test_a_copy_folds_its_own_norms():
    model = build_model(ModelConfig(backbone="small", freeze_bn="frozen"), 3)
    teacher = EMATeacher(model)
    x = torch.randn(1, 3, 32, 32)
    before = teacher(x).logits
    moved(model.backbone)
    assert torch.equal(teacher(x).logits, before) and not torch.equal(model(x).logits, before)
    pairs = [part for part in teacher.modules() if isinstance(part, FoldedConv2d)]
    assert pairs and {id(part.norm[0]) for part in pairs} <= {id(part) for part in teacher.modules()}


def test_a_norm_without_a_convolution_before_it_stays():
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plain = moved(copy.deepcopy(net)).eval()
    moved(net)
    freeze(net)
    assert [net[1].folded, net[3].folded] == [False, True] and not net.train()[1].training
    x = torch.randn(2, 3, 5, 5)
    assert torch.allclose(net(x), plain(x), atol=1e-5)
