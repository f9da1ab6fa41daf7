"""What every registered method must do, and how methods are found."""

import dataclasses

import pytest
import torch

from fastuda.data.batch import Batch
from fastuda.errors import UserError
from fastuda.methods import METHODS, Method, get_method
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


# settings under which three steps reach every part of a method
SETTINGS = {"sepico": {"contrast_start": 0, "width": 16, "tau": 0.1}, "weakseg": {"category_width": 16}}
COMPOSED = ["plca+self_training", "plca+sepico", "fada+asanet+plca"]


@pytest.mark.parametrize("name", [*sorted(METHODS), *COMPOSED])
def test_three_steps(name):
    settings = SETTINGS.get(name, {})
    if "+" in name:
        parts = name.split("+")
        settings = {part: get_method(part).Config(**SETTINGS.get(part, {})) for part in parts}
    method = build(name, **settings).train()
    networks = method.networks()
    optimizers = {key: torch.optim.SGD(net.parameters(), lr=0.01) for key, net in networks.items()}
    before = {key: value.clone() for key, value in method.named_parameters()}
    for step in range(3):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        for phase in method.phases(batch(seed=step), step):
            assert phase.net in networks and phase.losses
            for loss_name, loss in phase.losses.items():
                assert loss.dim() == 0 and torch.isfinite(loss), loss_name
            sum(phase.losses.values()).backward()
        for optimizer in optimizers.values():
            optimizer.step()
        method.after_step(step)
    still = [key for key, value in method.named_parameters() if torch.equal(value, before[key])]
    assert not still, still


@pytest.mark.parametrize("name", sorted(METHODS))
def test_prediction_and_state(name):
    method = build(name).eval()
    with torch.no_grad():
        prediction = method.predict(batch().target_image)
    assert prediction.scores.shape == (2, 4, 4, 8)
    if prediction.are_probabilities:
        assert torch.allclose(prediction.scores.sum(1), torch.ones(2, 4, 8), atol=1e-4)
    twin = build(name)
    for parameter in twin.parameters():
        parameter.data.add_(1)
    twin.load_state_dict(method.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval().predict(batch().target_image).scores, prediction.scores)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_settings_are_frozen_and_documented(name):
    config = get_method(name).Config
    assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen


def test_the_batch_has_no_target_labels():
    names = {f.name for f in dataclasses.fields(Batch)}
    assert {name for name in names if name.startswith("target")} == {
        "target_image", "target_files", "target_tags", "target_points", "target_match",
    }  # fmt: skip


class Foreign(Method):
    """A third party's method."""


def test_finding_methods():
    assert get_method("tests.methods.test_protocol:Foreign").__name__ == "Foreign"
    with pytest.raises(UserError, match="unknown method 'pcla'; did you mean plca"):
        get_method("pcla")
    with pytest.raises(UserError, match="cannot be imported"):
        get_method("no_such_package.module:Thing")
    with pytest.raises(UserError, match="is not a fastuda"):
        get_method("collections:OrderedDict")
