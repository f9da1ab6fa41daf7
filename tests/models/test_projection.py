"""SePiCo's projection head."""

import torch
import torch.nn.functional as nnf
from torch import nn

from fastuda.models.projection import ProjectionHead, UnitVectors
from tests.helpers import count_parameters


def test_embeddings_are_non_negative_unit_vectors():
    head = ProjectionHead(6, 5, width=8)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    out = head(x)
    assert out.shape == (2, 8, 4, 4) and out.min() >= 0
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2, 4, 4))
    out[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_published_widths():
    with torch.device("meta"):
        # 2048 - 2048 - 512 on ResNet-101, 1024 - 256 - 512 on MiT-B5; scale and shift of two batch norms
        assert count_parameters(ProjectionHead(2048)) == 2048 * 2048 + 2 * 2048 + 2048 * 512 + 2 * 512
        assert count_parameters(ProjectionHead(1024, 256)) == 1024 * 256 + 2 * 256 + 256 * 512 + 2 * 512
    kinds = [type(part) for part in ProjectionHead(4).layers]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2


def test_half_precision_is_normalised_in_float32():
    head = ProjectionHead(6, width=8).to(torch.bfloat16)
    out = head(torch.randn(2, 6, 4, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2, 4, 4))


def test_unit_vectors_are_those_of_normalize():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[0, :, 1, 2] = 0  # as after a ReLU
        x[0, :, 0, 0] *= 1e-14
    weight = torch.randn_like(x)
    found, wanted = UnitVectors.apply(x), nnf.normalize(x, dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    grad, truth = (torch.autograd.grad(y, x, weight)[0] for y in (found, wanted))
    torch.testing.assert_close(grad, truth, rtol=1e-12, atol=1e-12)
    like = x.detach().to(memory_format=torch.channels_last)
    assert UnitVectors.apply(like).is_contiguous(memory_format=torch.channels_last)
