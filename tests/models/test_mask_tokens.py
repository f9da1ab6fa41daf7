"""Masked patch tokens: the published values, what is masked and when, and who has no mask token."""

import pytest
import torch

from fastuda.models import ModelConfig, build_model
from fastuda.models.ema import EMATeacher
from fastuda.models.mask_tokens import masked_tokens
from tests.helpers import wave
from tests.models.foreign import saved_backbone

pytest.importorskip("transformers")


def test_the_published_value(tmp_path, monkeypatch):
    """The authors' TokenMasking with these draws: the token with u = 0.7 stays."""
    spec = saved_backbone(tmp_path, "dinov2", hidden_size=4, num_attention_heads=1)
    backbone = build_model(ModelConfig(backbone=spec), 3).backbone.double()
    embeddings = backbone.network.embeddings
    with torch.no_grad():
        embeddings.cls_token.zero_()
        embeddings.position_embeddings.zero_()
        embeddings.mask_token.copy_(wave((1, 4), 0.5))
    tokens = wave((1, 6, 4), 0.13)
    monkeypatch.setattr(embeddings.patch_embeddings, "forward", lambda _: tokens)
    u = torch.tensor([[0.1, 0.8, 0.69, 0.71, 0.7, 0.95]])
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: u.reshape(size))
    image = torch.zeros(1, 3, 28, 42, dtype=torch.float64)
    with masked_tokens(backbone, 0.7):
        masked = embeddings(image)[:, 1:]
    assert masked.sum().item() == pytest.approx(2.7149334167, abs=1e-9)
    assert (masked[0] != tokens[0]).any(1).tolist() == [True, False, True, False, False, False]
    assert torch.equal(embeddings(image)[:, 1:], tokens)


@pytest.mark.parametrize("name", ["dinov2", "dinov2 with registers", "dinov3"])
def test_masks_are_of_tokens_within_the_block_alone(name, tmp_path):
    model = build_model(ModelConfig(backbone=saved_backbone(tmp_path, name)), 3).eval()
    backbone, network = model.backbone, model.backbone.network
    torch.nn.init.normal_(network.embeddings.mask_token)
    teacher = EMATeacher(model).eval()
    side = network.config.patch_size
    image = torch.randn(2, 3, 4 * side, 6 * side)
    plain = model(image).features
    with masked_tokens(backbone, 0.5):
        torch.manual_seed(0)
        masked = model(image).features
        assert torch.equal(teacher(image).features, plain)  # its copy of the hook is its own
    torch.manual_seed(0)
    mask = torch.rand(2, 24) < 0.5
    assert mask[0].ne(mask[1]).any() and 0 < mask.sum() < mask.numel()
    whole = type(network).__name__.replace("Backbone", "Model")
    theirs = getattr(pytest.importorskip("transformers"), whole)(network.config).eval()
    theirs.load_state_dict(network.state_dict(), strict=False)
    tokens = theirs(image, bool_masked_pos=mask).last_hidden_state[:, -24:]
    assert torch.allclose(masked, tokens.transpose(1, 2).unflatten(2, (4, 6)), atol=1e-5)
    assert torch.equal(model(image).features, plain) and not torch.allclose(masked, plain, atol=1e-3)
    if name == "dinov2":  # the trap: the backbone takes the argument and ignores it
        assert torch.equal(network(image, bool_masked_pos=mask).feature_maps[-1], plain)
    masked.sum().backward()
    assert network.embeddings.mask_token.grad.any()


@pytest.mark.parametrize("name", ["beit", "swin", "resnet"])
def test_networks_without_a_mask_token(name, tmp_path):
    assert build_model(ModelConfig(backbone=saved_backbone(tmp_path, name)), 3).backbone.token_masks is None


def test_a_beit_may_have_a_mask_token(tmp_path):
    model = build_model(ModelConfig(backbone=saved_backbone(tmp_path, "beit", use_mask_token=True)), 3)
    image = torch.randn(2, 3, 64, 96)
    with masked_tokens(model.backbone, 1.0):
        first, other = model.eval()(image).features, model(image + 1).features
    assert torch.equal(first, other) and not torch.equal(model(image).features, model(image + 1).features)
