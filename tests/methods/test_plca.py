"""PLCA against a literal transcription of its objective, its switches, and the authors' values."""

import pytest
import torch
import torch.nn.functional as nnf

from fastuda.errors import UserError
from fastuda.methods.plca import adaptive_lsr
from tests.helpers import wave
from tests.methods.test_protocol import batch, build
from tests.ops import test_cycle_association_loss as association
from tests.ops import test_lovasz_softmax as lovasz
from tests.ops import test_spatial_aggregate as aggregate


def test_lsr_has_the_authors_value():
    logits = (12 * wave((2, 5, 4, 5), 0.31)).requires_grad_()
    loss = adaptive_lsr(logits, 10.0)
    # the published gradient is with respect to zs, of which the logits are six times
    grad = torch.autograd.grad(loss, logits)[0] * 6
    assert loss.item() == pytest.approx(-0.4003728240, abs=1e-9)
    assert grad.norm().item() == pytest.approx(0.17336120, abs=1e-8)
    assert grad.flatten()[:3].tolist() == pytest.approx([-0.01116881, -0.02388945, 0.00637471], abs=1e-8)


def test_lsr_gradient_is_that_of_the_squared_distance_to_gamma():
    logits = torch.randn(1, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    uniform = -logits.log_softmax(1).mean(1)
    wanted = torch.autograd.grad(((uniform - 10) ** 2 / 20).mean(), logits)[0]
    assert torch.allclose(torch.autograd.grad(adaptive_lsr(logits, 10.0), logits)[0], wanted)


def literal(method, data):
    """The published objective in float64, term by term."""
    config = method.config
    target, source = method.model(data.target_image), method.model(data.source_image)
    labels = data.source_label
    full = nnf.interpolate(source.logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    out = {"ce": nnf.cross_entropy(full, labels, ignore_index=255)}
    out["lovasz"] = config.lovasz_weight * lovasz.literal(full.softmax(1), labels)
    h, w = source.logits.shape[2:]
    rows = torch.arange(h) * labels.shape[1] // h
    columns = torch.arange(w) * labels.shape[2] // w
    small = labels[:, rows][:, :, columns].flatten(1)

    def flat(x):
        return x.flatten(2).transpose(1, 2)

    pairs = {
        "feature": ("cosine", source.features, target.features, config.contrast),
        "prediction": ("kl", source.logits.softmax(1), target.logits.softmax(1), False),
    }
    for name, (kind, a, b, contrast) in pairs.items():
        b = aggregate.literal(flat(b), kind, contrast) if config.aggregation else flat(b)
        loss = association.literal(flat(a), b, small, kind, config.contrast)
        out[f"{name}_association"] = config.association_weight * loss
    total = 0
    for logits in (source.logits, target.logits):
        uniform = -logits.log_softmax(1).mean(1)
        total = total + ((uniform.detach() / config.lsr_gamma - 1) * uniform).mean()
    out["lsr"] = config.lsr_weight * total
    return out


@pytest.mark.parametrize(
    "settings", [{}, {"aggregation": False}, {"contrast": False}, {"lovasz_weight": 3.0}]
)
def test_objective(settings):
    method = build("plca", **settings).double().train()
    data = batch()
    data = type(data)(data.source_image.double(), data.source_label, data.target_image.double(), (), ())
    (phase,) = method.phases(data, 0)
    wanted = literal(method, data)
    assert set(phase.losses) == set(wanted)
    for name, value in wanted.items():
        assert phase.losses[name].item() == pytest.approx(value.item(), abs=2e-6), name
    if settings:
        return
    parameters = list(method.model.parameters())
    one, two = (torch.autograd.grad(sum(x.values()), parameters) for x in (phase.losses, wanted))
    for mine, truth in zip(one, two, strict=True):
        assert (mine - truth).norm() <= 1e-4 * truth.norm().clamp(min=1e-3)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        (
            {
                "lovasz_weight": 0,
                "feature_association": False,
                "prediction_association": False,
                "lsr_weight": 0,
            },
            {"ce"},
        ),
        ({"feature_association": False, "prediction_association": False, "lsr_weight": 0}, {"ce", "lovasz"}),
        ({"prediction_association": False, "lsr_weight": 0}, {"ce", "lovasz", "feature_association"}),
        ({"lsr_weight": 0}, {"ce", "lovasz", "feature_association", "prediction_association"}),
    ],
)
def test_rows_of_the_ablation_table(settings, terms):
    (phase,) = build("plca", **settings).phases(batch(), 0)
    assert set(phase.losses) == terms


def test_test_time_aggregation_and_its_switch():
    data = batch()
    on, off = build("plca").eval(), build("plca", test_aggregation=False).eval()
    with torch.no_grad():
        aggregated, plain = on.predict(data.target_image), off.predict(data.target_image)
        out = on.model(data.target_image)
        features = aggregate.literal(out.features.flatten(2).transpose(1, 2), "cosine", True)
        logits = on.model.classify(features.transpose(1, 2).reshape(out.features.shape))
        p = logits.softmax(1).flatten(2).transpose(1, 2)
        wanted = aggregate.literal(p, "kl", False).transpose(1, 2).reshape(logits.shape)
    assert aggregated.are_probabilities and not plain.are_probabilities
    assert torch.equal(plain.scores, out.logits)
    assert torch.allclose(aggregated.scores, wanted, atol=1e-5)


def test_share_of_pixels():
    (phase,) = build("plca", pixel_share=0.25).phases(batch(), 0)
    assert torch.isfinite(phase.losses["feature_association"])
    with pytest.raises(UserError, match="pixel_share is 0"):
        build("plca", pixel_share=0)


def test_association_starts_at_its_step():
    method, seen, data = build("plca", association_start=2).train(), [], batch()
    method.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    (before,) = method.phases(data, 1)
    assert set(before.losses) == {"ce", "lovasz"} and len(seen) == 1 and seen[0] is data.source_image
    (after,) = method.phases(data, 2)
    (always,) = build("plca").train().phases(data, 0)
    assert set(after.losses) == set(always.losses)


def test_batch_norm_sees_the_target_first():
    method, seen = build("plca").train(), []
    method.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    data = batch()
    list(method.phases(data, 0))
    assert seen[0] is data.target_image and seen[1] is data.source_image
