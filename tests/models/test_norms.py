"""Fused batch norms against the modules that they replace."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from fastuda.engine.parallel import SyncedBatchNorm2d
from fastuda.models.backbones import BACKBONES
from fastuda.models.frozen import freeze
from fastuda.models.norms import BatchNormAct2d, fuse_norms


def passed(network, x):
    """The output, every gradient and the running statistics afterwards."""
    out = network(x)
    weight = torch.sin(torch.arange(out.numel(), dtype=x.dtype)).reshape(out.shape)
    out.backward(weight)
    gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return out.detach(), gradients, *(b.double() for b in network.buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "small"])
def test_a_backbone_computes_the_same(backbone, training):
    torch.manual_seed(3)
    plain = BACKBONES[backbone](False)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    assert any(isinstance(m, BatchNormAct2d) for m in fused.modules())
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 32, 48)
    # doubled after the replacement, which takes float32
    plain, fused = (n.double().train(training) for n in (plain, fused))
    for one, two in zip(passed(fused, x.double()), passed(plain, x.double()), strict=True):
        assert (one - two).norm() <= 1e-9 * two.norm().clamp(min=1)


def test_an_activation_is_taken_where_a_sequence_has_it_behind_the_norm():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True), nn.ReLU())
    norms = nn.ModuleDict({"norm": nn.BatchNorm2d(4), "relu": nn.ReLU()})
    network = nn.ModuleDict({"block": block, "norms": norms})
    fuse_norms(network)
    assert [type(part) for part in block] == [nn.Conv2d, BatchNormAct2d, nn.ReLU6, nn.ReLU]
    called = []
    block[1].forward = lambda x, kind: called.append(kind) or x
    block(torch.zeros(2, 3, 4, 4))
    assert called == ["relu6"]
    assert norms["norm"].activation == "none" and isinstance(norms["relu"], nn.ReLU)


def test_other_norms_stay():
    frozen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    freeze(frozen)
    unusual = [
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4).bfloat16(),
        SyncedBatchNorm2d(4),
    ]
    network = nn.Sequential(frozen, *unusual)
    before = [type(m) for m in network.modules()]
    fuse_norms(network)
    assert [type(m) for m in network.modules()] == before


def test_a_block_of_a_resnet_takes_the_activation_between_its_convolutions():
    network = BACKBONES["resnet50"](True)
    fuse_norms(network)
    block = network.layer1[0]
    assert [block.bn1.activation, block.bn2.activation, block.bn3.activation] == ["relu", "relu", "none"]
    assert isinstance(block.relu1, nn.Identity) and isinstance(block.relu, nn.ReLU)
    assert network.bn1.activation == "relu" and isinstance(network.relu, nn.Identity)


class Apart(nn.Module):
    """What a sequence with a norm and an activation is used for but a call of it."""

    def __init__(self, use):
        super().__init__()
        self.use, self.norm, self.act = use, nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.taken = nn.Sequential(nn.Conv2d(3, 4, 1), self.norm, self.act)
        self.other = nn.Sequential(nn.Conv2d(3, 4, 1), self.norm)

    def forward(self, x):
        return self.use(self, x)


USES = {
    "one by one": lambda n, x: n.norm(n.taken[0](x)) * 2 + n.taken(x),
    "a slice": lambda n, x: n.taken[:2](x) * 2 + n.taken(x),
    "a norm of two sequences": lambda n, x: n.taken(x) + n.other(x),
    "an activation of two": lambda n, x: n.taken(x) + n.act(n.other(x) - 1),
}


@pytest.mark.parametrize("use", USES)
def test_what_runs_apart_from_its_sequence_computes_what_it_did(use):
    plain = Apart(USES[use])
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    x = torch.randn(2, 3, 5, 6)
    for one, two in zip(passed(copy.deepcopy(fused), x), passed(plain, x), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    pairs = pickle.loads(pickle.dumps(fused.taken.eval()))
    torch.testing.assert_close(pairs(x), fused.taken(x))


@pytest.mark.parametrize("watched", [1, 2])
@pytest.mark.parametrize("pair", ["sequence", "named"])
def test_a_hook_sees_what_it_did(pair, watched):
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    if pair == "named":
        block.norm_activations = (("1", "2"),)
    block[watched].register_forward_hook(lambda module, _, out: out - 1)
    fused = copy.deepcopy(block)
    fuse_norms(fused)
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(fused(x), block(x))


def test_a_forward_of_its_own_stays():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    block[1].forward = lambda x: x - 1
    x = torch.randn(2, 3, 5, 6)
    wanted = block(x)
    fuse_norms(block)
    assert torch.equal(block(x), wanted)


@pytest.mark.parametrize("change", ["momentum", "bfloat16"])
def test_a_norm_may_become_unusual_later(change):
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6())
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    x = torch.randn(2, 3, 5, 6)
    if change == "momentum":  # which update_bn sets to none
        for network in (plain, fused):
            update_bn([x, x + 1], network)
    else:
        plain, fused, x = plain.bfloat16(), fused.bfloat16(), x.bfloat16()
    for one, two in zip(passed(fused.eval(), x), passed(plain.eval(), x), strict=True):
        torch.testing.assert_close(one, two)
