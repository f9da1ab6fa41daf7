"""Feature distance: the published values, what is frozen, and what checkpoints hold of it."""

import pytest
import torch
from torch import nn

from fastuda.errors import UserError
from fastuda.methods import get_method
from fastuda.methods.feature_distance import InitialFeatures, cell_distance, feature_distance
from fastuda.models import ModelConfig, build_model
from tests.helpers import wave
from tests.oracles.methods import batch, build, collect, data64, gradients, same

THINGS = {"feature_distance": 0.3, "feature_classes": (1, 3)}
PLAIN = {"mix_share": 1.0, "jitter_share": 0.0, "blur_share": 0.0, "threshold": 0.3}


def pretrained(name, backbone="small", k=4, **settings):
    """A method whose network says that its weights came from a file, and moves away from them."""
    torch.manual_seed(0)
    cls = get_method(name)
    model = build_model(ModelConfig(backbone=backbone), k)
    model.pretrained = True
    method = cls(cls.Config(**settings), model, k)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return method


def test_the_published_value_and_gradient():
    """The authors' function with these features and this label: two cells are of things."""
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    label[0, :4, :4], label[0, 0, :4] = 13, 255
    label[0, :2, 4:], label[0, 2, 4:7] = 11, 11
    label[0, 4:, 4:] = 18
    features, initial = wave((1, 3, 2, 2), 0.41).requires_grad_(), wave((1, 3, 2, 2), 0.19)
    things = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
    value = feature_distance(features, initial, "norm", label, things, 19)
    assert value.item() == pytest.approx(1.0543396616, abs=1e-9)
    (0.005 * value).backward()
    assert features.grad.norm().item() == pytest.approx(0.003535533906, abs=1e-11)
    assert feature_distance(features, initial, "norm").item() == pytest.approx(1.2507258564, abs=1e-9)
    nothing = feature_distance(features, initial, "norm", torch.zeros_like(label), things, 19)
    assert nothing.item() == 0 and torch.autograd.grad(nothing, features)[0].abs().max() == 0


def test_the_published_cosine_distance():
    features, initial = wave((1, 4, 2, 3), 0.21).requires_grad_(), 2 * wave((1, 4, 2, 3), 0.35)
    value = feature_distance(features, initial, "cosine")
    assert value.item() == pytest.approx(0.8392149057, abs=1e-9)
    value.backward()
    assert features.grad.norm().item() == pytest.approx(0.2750073902, abs=1e-9)


@pytest.mark.parametrize("kind", ["norm", "cosine"])
def test_equal_features_have_a_finite_gradient(kind):
    """As in the first step."""
    features = torch.randn(1, 3, 2, 2, requires_grad=True)
    cell_distance(features, features.detach().clone(), kind).sum().backward()
    assert features.grad.abs().max() < 1e-6


def test_half_precision_is_compared_in_float32():
    features = torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16)
    assert cell_distance(features, torch.zeros_like(features), "norm").item() == 600
    assert cell_distance(300 * features, torch.zeros_like(features), "norm").dtype == torch.float32


@pytest.mark.parametrize("name", ["self_training", "sepico"])
def test_the_distance_is_added_to_the_sources_loss(name):
    more = {"width": 8, "contrast_start": 9} if name == "sepico" else {}
    method, data = pretrained(name, **PLAIN, **THINGS, feature_share=0.5, **more).double().eval(), data64()
    found, grads = collect(method, data)
    initial = method.initial.held[0].backbone(data.source_image)
    cells = data.source_label.view(2, 4, 8, 8, 8)
    shares = torch.stack([(cells == k).sum((2, 4)) / 64 for k in range(4)], 1)
    share, winner = shares.max(1)
    chosen = ((winner == 1) | (winner == 3)) & (share >= 0.5)
    assert 0 < chosen.sum() < chosen.numel()
    distance = (method.model(data.source_image).features - initial).square().sum(1).sqrt()
    wanted = 0.3 * distance[chosen].mean()
    assert found["feature_distance"].item() == pytest.approx(wanted.item(), rel=1e-9)
    off, without = collect(pretrained(name, **PLAIN, **more).double().eval(), data)
    assert "feature_distance" not in off
    net = method.networks()["model"]
    added = [a if b is None else b if a is None else a + b
             for a, b in zip(gradients(wanted, net), without["model"], strict=True)]  # fmt: skip
    same(grads["model"], added)


@pytest.mark.parametrize("name", ["self_training", "sepico"])
def test_the_target_has_a_phase_of_its_own(name):
    more = {"width": 8, "contrast_start": 9} if name == "sepico" else {}
    settings = {**PLAIN, **more, "feature_target": 0.1, "feature_loss": "cosine"}
    method, data = pretrained(name, **settings).double().eval(), data64()
    found, _ = collect(method, data)
    initial = method.initial.held[0].backbone(data.target_image)
    wanted = 0.1 * feature_distance(method.model(data.target_image).features, initial, "cosine")
    assert found["feature_target"].item() == pytest.approx(wanted.item(), rel=1e-9)
    assert "feature_distance" not in found


def test_the_frozen_copy_is_in_no_checkpoint_and_nothing_moves_it():
    method = pretrained("self_training", **THINGS)
    plain = pretrained("self_training")
    state = method.state_dict()
    assert state.keys() - plain.state_dict().keys() == {"initial.digest"}
    assert len(list(method.parameters())) == len(list(plain.parameters()))
    assert plain.initial is None
    frozen = method.initial.held[0]
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    method.train()
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    for step in range(2):
        for phase in method.phases(batch(seed=step), step):
            sum(phase.losses.values()).backward()
        optimizer.step()
    assert not frozen.training and not any(part.training for part in frozen.modules())
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    method.double()
    assert next(frozen.parameters()).dtype == torch.float64


def test_a_composition_has_it_too():
    part = get_method("self_training").Config(**THINGS)
    method = pretrained("plca+self_training", self_training=part).train()
    losses = {key for phase in method.phases(batch(), 0) for key in phase.losses}
    assert "self_training_feature_distance" in losses
    cls = get_method("plca+self_training")
    assert method.config.keeps_initial() and not cls.Config().keeps_initial()


def test_other_weights_than_at_the_beginning_are_refused():
    method, other = pretrained("self_training", **THINGS), pretrained("self_training", **THINGS)
    other.load_state_dict(method.state_dict())
    model = build_model(ModelConfig(backbone="small"), 4)
    model.pretrained = True
    cls = get_method("self_training")
    other = cls(cls.Config(**THINGS), model, 4)
    with pytest.raises(UserError, match=r"of model\.weights or hf:PATH\) are others than when the run began"):
        other.load_state_dict(method.state_dict())


def test_what_cannot_be_kept_near_is_one_line():
    with pytest.raises(UserError, match=r"name a file with --weights, or a folder hf:PATH that has weights"):
        list(build("self_training", **THINGS).phases(batch(), 0))
    with pytest.raises(UserError, match=r"method\.feature_classes names class 18 of 4"):
        list(pretrained("self_training", feature_distance=0.1).phases(batch(), 0))


def test_the_deepest_map_of_mit_is_its_last_stage():
    pytest.importorskip("transformers")
    model = build_model(ModelConfig(backbone="mit_b0"), 3).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        out = model(image)
        last = nn.Sequential(*model.backbone.encoder.stages)(image)
    assert out.features.shape == (1, 512, 16, 24) and torch.equal(out.deepest, last)
    assert last.shape == (1, 256, 2, 3)
    assert torch.equal(InitialFeatures(model)(image), last)
    small = build_model(ModelConfig(backbone="small"), 3).eval()
    assert small(image).deepest is None
    assert torch.equal(InitialFeatures(small)(image), small(image).features)
