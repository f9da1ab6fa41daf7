"""Learning rates that decay with the depth of a backbone."""

import pytest
import torch

from fastuda.config.schema import OptimConfig
from fastuda.engine.optim import build_optimizer
from fastuda.errors import UserError
from fastuda.models import ModelConfig, build_model
from fastuda.models.backbones import BACKBONES
from fastuda.models.layers import blocks_of, layer_factors
from tests.models.foreign import saved_backbone, saved_model


@pytest.mark.parametrize(
    ("layers", "first", "stem"), [(12, 0.03138106, 0.02824295), (24, 0.00886294, 0.00797664)]
)
def test_the_rates_of_vfm_uda(layers, first, stem, tmp_path):
    """Multipliers of the head's rate, ten times the backbone's."""
    model = build_model(ModelConfig(backbone=saved_backbone(tmp_path, "dinov2", num_hidden_layers=layers)), 5)
    optimizer = build_optimizer(OptimConfig("adamw", lr=0.1, head_lr_mult=10, layer_decay=0.9), model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters())) and max(rates.values()) == 1.0
    network = model.backbone.network
    for index, block in enumerate(network.encoder.layer):
        for p in block.parameters():
            assert rates[id(p)] == pytest.approx(0.1 * 0.9 ** (layers - 1 - index))
    assert rates[id(network.encoder.layer[0].norm1.weight)] == pytest.approx(first, rel=1e-6)
    for p in network.embeddings.parameters():
        assert rates[id(p)] == pytest.approx(stem, rel=1e-6)
    assert {rates[id(p)] for p in model.head.parameters()} == {1.0}


def test_blocks_of_our_backbones():
    assert len(blocks_of(BACKBONES["resnet50"](False))) == 16
    assert blocks_of(BACKBONES["small"](False)) == ["stage2.0", "stage2.1", "stage3.0", "stage3.1"]
    factors = layer_factors(BACKBONES["small"](False), 0.5)
    assert {name.split(".")[0] if "stem" in name else name[:8] for name in factors} == {
        "stem", "stage2.0", "stage2.1", "stage3.0", "stage3.1"
    }  # fmt: skip
    assert factors["stem.0.weight"] == 0.5**4 and factors["stage3.1.conv1.weight"] == 1
    with pytest.raises(UserError, match=r"optim.layer_decay needs a backbone of blocks"):
        layer_factors(BACKBONES["vgg16"](False), 0.9)


def test_the_blocks_of_a_decoder_do_not_count(tmp_path):
    model = build_model(ModelConfig(network=saved_model(tmp_path)), 5)
    rates = {id(p): group["lr"] for group in model.param_groups(1.0, 10.0, 0.5) for p in group["params"]}
    stages = model.backbone.network.segformer.stages
    assert {rates[id(p)] for p in stages[3].blocks.parameters()} == {1.0}
    assert {rates[id(p)] for p in stages[0].blocks.parameters()} == {0.125}
    assert {rates[id(p)] for p in model.backbone.network.decode_head.parameters()} == {10.0}


def test_without_a_decay_the_groups_are_those_of_before():
    """A checkpoint's optimiser has one state for each."""
    model = build_model(ModelConfig(backbone="small"), 3)
    assert [len(group["params"]) for group in model.param_groups(0.1, 10.0)] == [
        len(list(model.backbone.parameters())), len(list(model.head.parameters()))
    ]  # fmt: skip
    torch.testing.assert_close([group["lr"] for group in model.param_groups(0.1, 10.0, 1.0)], [0.1, 1.0])
