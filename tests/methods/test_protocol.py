"""What every registered method must do, and how methods are found."""

import dataclasses
import sys

import pytest
import torch

from fastuda.data.loading.batch import Batch
from fastuda.errors import UserError
from fastuda.methods import METHODS, Method, Phase, get_method
from fastuda.methods.base import phases_of
from fastuda.models import ModelConfig, build_model
from tests.oracles.methods import batch, build

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


@pytest.mark.parametrize("name", [*sorted(METHODS), "plca+self_training"])
def test_a_source_without_a_label_gives_finite_losses_curves_and_gradients(name):
    """A crop may show ignored pixels alone, in every image of a batch."""
    method = build(name, **SETTINGS.get(name, {})).train()
    data = batch()
    data = dataclasses.replace(data, source_label=torch.full_like(data.source_label, 255))
    for step in range(2):
        for phase in method.phases(data, step):
            for curve, value in {**phase.losses, **phase.metrics}.items():
                assert torch.as_tensor(value).isfinite(), curve
            sum(phase.losses.values()).backward()
        method.after_step(step)
    for key, value in method.named_parameters():
        assert value.isfinite().all() and (value.grad is None or value.grad.isfinite().all()), key
    assert all(value.isfinite().all() for value in method.buffers() if value.is_floating_point())


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


class Loose(Method):
    """One whose single phase is what a test puts here."""

    given = None

    class Config:
        """Not decorated."""

    def phases(self, batch, step):
        return self.given


def number(**kwargs):
    return torch.ones((), requires_grad=True, **kwargs)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "gave a NoneType: write it with yield"),
        ([("model", {"ce": number()})], r"gave a tuple: yield Phase\(network, losses\)"),
        ([Phase("mdel", {"ce": number()})], "trains 'mdel', which networks\\(\\) lacks; did you mean model"),
        ([Phase("model", {})], "gave no loss of 'model' that has a gradient, but none at all"),
        ([Phase("model", {"ce": torch.ones(())})], "gave no loss of 'model' that has a gradient, but ce"),
        ([Phase("model", {"ce": number()[None]})], r"gave the loss 'ce' as \[1\]: take its mean"),
        ([Phase("model", {"ce": number(), "x": 0.5})], "gave the loss 'x' as a float, not a tensor"),
        (
            [Phase("model", {"ce": number()}, {"m": torch.ones(2)})],
            r"gave the metric 'm' as \[2\]: take its mean",
        ),
        ([Phase("model", {"ce": number()}, {"m": "no"})], "gave the metric 'm' as a str"),
    ],
)
def test_phases_that_cannot_be_trained_are_named(given, said):
    model = build_model(ModelConfig(backbone="small"), 4)
    method = Loose(Method.Config(), model, 4)
    method.given = given
    with pytest.raises(UserError, match="phases\\(\\) of Loose .*" + said):
        list(phases_of(method, batch(), 0))


def test_metrics_may_be_numbers():
    method = Loose(Method.Config(), build_model(ModelConfig(backbone="small"), 4), 4)
    method.given = [Phase("model", {"ce": number()}, {"m": 0.5, "n": 2})]
    assert [phase.metrics for phase in phases_of(method, batch(), 0)] == [{"m": 0.5, "n": 2}]


def test_finding_methods():
    assert get_method("tests.methods.test_protocol:Foreign").__name__ == "Foreign"
    with pytest.raises(UserError, match="unknown method 'pcla'; did you mean plca"):
        get_method("pcla")
    with pytest.raises(UserError, match="cannot be imported"):
        get_method("no_such_package.module:Thing")
    with pytest.raises(UserError, match="is not a fastuda"):
        get_method("collections:OrderedDict")
    with pytest.raises(UserError, match="has a Config that is not a dataclass"):
        get_method("tests.methods.test_protocol:Loose")


def test_a_third_partys_method_goes_together_with_others():
    cls = get_method("tests.methods.test_protocol:Foreign+plca")
    assert list(cls.parts) == ["Foreign", "plca"]
    model = build_model(ModelConfig(backbone="small"), 4)
    method = cls(cls.Config(weights={"Foreign": 0.5}), model, 4)
    method.members["Foreign"].phases = lambda batch, step: [Phase("model", {"x": number()}, {"m": 1.0})]
    (phase,) = phases_of(method, batch(), 0)
    assert phase.losses["Foreign_x"] == 0.5 and phase.metrics["Foreign_m"] == 1.0
    assert "plca_ce" in phase.losses


def test_a_method_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "beside_the_data.py").write_text(
        "from fastuda.methods import Method\n\nclass Mine(Method):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    assert get_method("beside_the_data:Mine").__name__ == "Mine"
