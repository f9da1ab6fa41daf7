"""Discriminators: published parameter counts and sizes, and the batched form against one MLP per class."""

import pytest
import torch
from torch import nn

from fastuda.errors import UserError
from fastuda.models.discriminators import (
    CategoryDiscriminators,
    ClassDomainDiscriminator,
    FCDiscriminator,
    affinity_discriminator,
)
from tests.helpers import count_parameters


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: FCDiscriminator(19), 2_781_121),
        (lambda: affinity_discriminator(19), 2_917_313),
        (lambda: affinity_discriminator(19, neighbours=4), 2_839_489),
        (lambda: ClassDomainDiscriminator(2048, 19), 5_057_702),
        (lambda: CategoryDiscriminators(2048, 19), 159_500_307),
    ],
)
def test_published_parameter_counts(build, count):
    with torch.device("meta"):
        assert count_parameters(build()) == count


def test_patch_discriminator_sizes():
    with torch.device("meta"):
        net = affinity_discriminator(19)
        assert net(torch.empty(1, 152, 720, 1280)).shape == (1, 1, 22, 40)
        assert net(torch.empty(1, 152, 512, 1024)).shape == (1, 1, 16, 32)
    with pytest.raises(ValueError, match="4 or 8"):
        affinity_discriminator(19, neighbours=6)


def test_patch_discriminator_layers():
    net = FCDiscriminator(3, width=4)
    convs = [part for part in net if isinstance(part, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [4, 8, 16, 32, 1]
    assert all(
        conv.kernel_size == (4, 4) and conv.stride == (2, 2) and conv.padding == (1, 1) for conv in convs
    )
    slopes = [part.negative_slope for part in net if isinstance(part, nn.LeakyReLU)]
    assert slopes == [0.2] * 4 and isinstance(net[-1], nn.Conv2d)


def test_class_domain_discriminator_halves_see_one_trunk():
    net = ClassDomainDiscriminator(8, 3, width=6)
    x = torch.randn(2, 8, 5, 7)
    out = net(x)
    assert out.shape == (2, 6, 5, 7)
    trunk = net.trunk(x)
    assert torch.equal(out[:, :3], net.source(trunk)) and torch.equal(out[:, 3:], net.target(trunk))


def literal(net, k):
    """Class k's MLP as separate linear layers."""
    layers = []
    for stacked in net.layers:
        linear = nn.Linear(*stacked.weight.shape[1:]).double()
        linear.weight.data.copy_(stacked.weight[k].t())
        linear.bias.data.copy_(stacked.bias[k])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_category_discriminators_are_one_mlp_per_class():
    net = CategoryDiscriminators(6, 4, width=5).double()
    pooled = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    out = net(pooled)
    assert out.shape == (3, 4)
    expected = torch.cat([literal(net, k)(pooled[:, :, k]) for k in range(4)], 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_category_discriminators_learn_of_the_classes_in_the_loss_alone():
    net = CategoryDiscriminators(6, 4, width=5).double()
    pooled = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    net(pooled)[:, [3, 1]].sum().backward()
    for layer in net.layers:
        assert layer.weight.grad[[0, 2]].abs().sum() == 0
        assert (layer.bias.grad[[1, 3]].abs().sum(1) > 0).all()
    assert pooled.grad[:, :, [0, 2]].abs().sum() == 0 and pooled.grad[:, :, [1, 3]].abs().sum() > 0
    with pytest.raises(ValueError, match=r"\[B, C, 4\]"):
        net(pooled[:, :, :3])


def test_category_discriminators_start_like_linear_layers():
    net = CategoryDiscriminators(100, 3)
    weight, reference = net.layers[0].weight, nn.Linear(100, 100).weight
    assert weight.abs().max() <= 0.1 and weight.std().item() == pytest.approx(
        reference.std().item(), rel=0.05
    )


def test_images_too_small_to_judge_are_named():
    judge = FCDiscriminator(3)
    assert judge(torch.zeros(1, 3, 32, 40)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"input is 31 x 64: raise data\.crop and data\.target_crop"):
        judge(torch.zeros(1, 3, 31, 64))
