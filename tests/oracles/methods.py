"""What the tests of methods share: small methods, batches, and their losses and gradients."""

from __future__ import annotations

import torch

from fastuda.data.loading.batch import Batch
from fastuda.methods import get_method
from fastuda.models import ModelConfig, build_model


def batch(b=2, k=4, size=(32, 64), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, b, 3, *size, generator=generator)
    blocks = torch.randint(0, k, (b, size[0] // 8, size[1] // 8), generator=generator)
    label = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    label[:, :3] = 255
    images[0] += label.clamp(max=k)[:, None] - 1.5
    files = tuple(f"{i}.png" for i in range(b))
    return Batch(images[0], label, images[1], files, files)


def build(name, k=4, **settings):
    torch.manual_seed(0)
    cls = get_method(name)
    return cls(cls.Config(**settings), build_model(ModelConfig(backbone="small"), k), k)


def data64(**kwargs):
    data = batch(**kwargs)
    return type(data)(
        data.source_image.double(), data.source_label, data.target_image.double(), data.source_files,
        data.target_files,
    )  # fmt: skip


def collect(method, data, step=0):
    """Losses of every phase by name, and the gradients that each phase's network gets from all of them."""
    losses, grads = {}, {}
    networks = method.networks()
    for net in networks.values():
        net.zero_grad()
    for phase in method.phases(data, step):
        losses.update({key: value.detach().clone() for key, value in phase.losses.items()})
        sum(phase.losses.values()).backward()
    for name, net in networks.items():
        grads[name] = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return losses, grads


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


def same(found, wanted):
    for one, two in zip(found, wanted, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero.expand_as(two) if one is None and two is not None else one, two, rtol=1e-4, atol=1e-7
        )
