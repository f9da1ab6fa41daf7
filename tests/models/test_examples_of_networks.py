"""The networks on docs/own-network.md, where their packages are installed, and that they are written so."""

import re
from pathlib import Path

import pytest
import torch

from fastuda.models.foreign import ForeignBackbone, listed, survey
from fastuda.models.whole import segmentor_of
from tests.program import ROOT


@pytest.fixture(scope="module")
def page():
    """What the python blocks of the page define."""
    text = (ROOT / "docs" / "own-network.md").read_text()
    defined: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(code, defined)
    return defined


def needed(package):
    try:
        return pytest.importorskip(package)
    except (RuntimeError, AttributeError) as error:  # a torchvision of another torch
        pytest.skip(f"{package} cannot be imported: {error}")


def test_the_contract(page):
    model = segmentor_of(page["Queries"](4), "page", 4)
    out = model(torch.randn(1, 3, 32, 48))
    assert out.features.shape == (1, 64, 8, 12) and torch.equal(model.classify(out.features), out.logits)
    assert [group["lr"] for group in model.param_groups(1.0, 10.0)] == [1.0, 10.0]


def test_a_unet_of_segmentation_models_pytorch(page):
    needed("segmentation_models_pytorch")
    model = segmentor_of(page["unet"](4, pretrained=False), "unet", 4).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 75, 107))
    assert out.logits.shape[1] == 4 and out.features.shape[1] == model.feature_channels == 16
    assert model.backbone.decoder_parameters()


def test_a_backbone_of_timm(page):
    needed("timm")
    network = page["convnext"](pretrained=False)
    backbone = ForeignBackbone(network, listed, survey(network, listed, "convnext"))
    assert backbone.widths == [40, 80, 160, 320] and backbone.stride == 4 and backbone.cell == (32, 32)
    assert backbone(torch.randn(1, 3, 64, 96)).shape == (1, 600, 16, 24)


def test_a_model_of_mmsegmentation(page, monkeypatch):
    configs = Path(needed("mmseg").__file__).parent / ".mim" / "configs" / "segformer"
    if not configs.is_dir():
        pytest.skip("mmsegmentation was installed without its configurations")
    monkeypatch.chdir(configs)
    model = segmentor_of(page["segformer"](4, pretrained=False), "segformer", 4).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96)).logits.shape == (1, 4, 16, 24)
