"""FADA, ASANet and WeakSegDA: the published objectives, written out once more, and what moves."""

import pytest
import torch
import torch.nn.functional as nnf

from fastuda.errors import UserError
from fastuda.methods import get_method
from fastuda.methods.weakseg import present_class_loss
from fastuda.models import ModelConfig, build_model
from tests.oracles.methods import batch, build, collect, data64, gradients, same


def up(x, size=(32, 64)):
    return nnf.interpolate(x, size, mode="bilinear", align_corners=False)


def half(name, **settings):
    """A method in float64, batch norm in evaluation mode: forwards can be repeated."""
    method = build(name, **settings).double().train()
    for part in method.model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    return method


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_fada_is_the_published_objective(threshold):
    method, data = half("fada", adversarial_weight=0.1, hard_threshold=threshold, width=8), data64()
    losses, grads = collect(method, data)
    source, target = method.model(data.source_image), method.model(data.target_image)

    def encoding(logits):
        a = (up(logits.detach()) / 1.8).softmax(1)
        if threshold is not None:
            best = a.max(1, keepdim=True)[0]
            return ((a == best) & (best >= threshold)).double()
        return torch.where(a > 0.9, 0.9, a)

    def sce(domain, q):
        return (-q * up(domain).log_softmax(1)).sum(1).mean()

    a_s, a_t = encoding(source.logits), encoding(target.logits)
    nothing = torch.zeros_like(a_s)
    seg = nnf.cross_entropy(up(source.logits) / 1.8, data.source_label, ignore_index=255)
    adversarial = sce(method.discriminator(target.features), torch.cat([a_t, nothing], 1))
    assert losses["ce"].item() == pytest.approx(seg.item(), rel=1e-6)
    assert losses["adversarial"].item() == pytest.approx(0.1 * adversarial.item(), rel=1e-6)
    same(grads["model"], gradients(seg + 0.1 * adversarial, method.model))
    d_source = sce(method.discriminator(source.features.detach()), torch.cat([a_s, nothing], 1))
    d_target = sce(method.discriminator(target.features.detach()), torch.cat([nothing, a_t], 1))
    same(grads["discriminator"], gradients(0.5 * d_source + 0.5 * d_target, method.discriminator))


def literal_affinity(p):
    maps = []
    padded = nnf.pad(p, (1, 1, 1, 1), mode="replicate")
    for y in range(3):
        for x in range(3):
            if (y, x) == (1, 1):
                continue
            q = p * padded[:, :, y : y + p.shape[2], x : x + p.shape[3]]
            a, b, c, d = (v.clamp(1e-4, 1) for v in (q, p, 1 - q, 1 - p))
            maps.append(a * (a / b).log() + c * (c / d).log())
    return torch.cat(maps, 1)


def bce(logits, value):
    return nnf.binary_cross_entropy_with_logits(logits, torch.full_like(logits, value))


def test_asanet_is_the_published_objective():
    method, data = half("asanet", adversarial_weight=0.1, width=4), data64()
    method.horizon = 10
    losses, grads = collect(method, data, step=4)
    source, target = method.model(data.source_image), method.model(data.target_image)
    a_s, a_t = (literal_affinity(up(x.logits).softmax(1)) for x in (source, target))
    seg = nnf.cross_entropy(up(source.logits), data.source_label, ignore_index=255)
    adversarial = 0.1 * (1 - 4 / 10) * bce(method.discriminator(a_t), 0.0)
    assert losses["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-5)
    same(grads["model"], gradients(seg + adversarial, method.model))
    judge = method.discriminator
    wanted = 0.5 * bce(judge(a_s.detach()), 0.0) + 0.5 * bce(judge(a_t.detach()), 1.0)
    same(grads["discriminator"], gradients(wanted, judge))


def test_asanet_cleaning():
    method, data = half("asanet", strategy="asc", cleaning_weight=0.3), data64()
    assert list(method.networks()) == ["model"]
    losses, grads = collect(method, data)
    p = up(method.model(data.target_image).logits).softmax(1)
    padded = nnf.pad(p, (1, 1, 1, 1), mode="replicate")
    terms = [
        1 - (p * padded[:, :, y : y + 32, x : x + 64]).sum(1)
        for y in range(3) for x in range(3) if (y, x) != (1, 1)
    ]  # fmt: skip
    cleaning = 0.3 * torch.stack(terms).mean()
    assert losses["cleaning"].item() == pytest.approx(cleaning.item(), rel=1e-9)
    logits = up(method.model(data.source_image).logits)
    seg = nnf.cross_entropy(logits, data.source_label, ignore_index=255)
    same(grads["model"], gradients(seg + cleaning, method.model))


def test_weakseg_is_the_published_objective():
    settings = {"dropout": 0.0, "classification_weight": 0.2, "category_weight": 0.1, "category_width": 8}
    method, data = half("weakseg", adversarial_weight=0.05, pseudo_threshold=0.5, **settings), data64()
    losses, grads = collect(method, data)
    source, target = method.model(data.source_image), method.model(data.target_image)
    pooled = target.logits.exp().mean((2, 3)).log()
    weak = (pooled.sigmoid() > 0.5).detach()
    assert 0 < weak.sum() < weak.numel()
    probability = pooled.sigmoid()
    weak_loss = -(weak * probability.log() + ~weak * (1 - probability).log()).mean()
    assert losses["weak"].item() == pytest.approx(0.2 * weak_loss.item(), rel=1e-6)

    def pool(out):
        attention = out.logits.detach().flatten(2).softmax(2)
        return torch.einsum("bkn,bcn->bck", attention, out.features.flatten(2))

    def present(logits, tags, value):
        means = []
        for b in range(len(tags)):
            if tags[b].any():
                means.append(torch.stack([bce(logits[b, c], value) for c in range(4) if tags[b, c]]).mean())
        return torch.stack(means).mean()

    category = present(method.category(pool(target)), weak, 0.0)
    p_t, p_s = up(target.logits).softmax(1), up(source.logits).softmax(1)
    seg = nnf.cross_entropy(up(source.logits), data.source_label, ignore_index=255)
    total = seg + 0.2 * weak_loss + 0.1 * category + 0.05 * bce(method.output(p_t), 0.0)
    same(grads["model"], gradients(total, method.model))
    output = 0.5 * bce(method.output(p_s.detach()), 0.0) + 0.5 * bce(method.output(p_t.detach()), 1.0)
    same(grads["output"], gradients(output, method.output))
    shares = torch.stack([(data.source_label == c).flatten(1).double().mean(1) for c in range(4)], 1)
    tags = shares > 0  # nothing has been seen before
    wanted = 0.5 * present(method.category(pool(source).detach()), tags, 0.0)
    wanted = wanted + 0.5 * present(method.category(pool(target).detach()), weak, 1.0)
    same(grads["category"], gradients(wanted, method.category))


def test_weakseg_with_given_labels():
    base = batch()
    tags = torch.tensor([[True, False, True, False], [False, True, False, False]])
    points = torch.tensor([[[3, 5, 0], [20, 40, 2], [0, 0, 255]], [[31, 63, 1], [1, 1, 3], [0, 0, 255]]])
    data = type(base)(base.source_image, base.source_label, base.target_image, base.source_files,
                      base.target_files, tags, points)  # fmt: skip
    method = build("weakseg", weak_labels="points", category_width=8, dropout=0.0).eval()
    losses, _ = collect(method, data)
    log_p = up(method.model(base.target_image).logits).log_softmax(1)
    # class 3 of the second image has a point, but its tag says that it is not there
    terms = [-log_p[0, 0, 3, 5], -log_p[0, 2, 20, 40], -log_p[1, 1, 31, 63]]
    assert losses["points"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    with pytest.raises(UserError, match=r"data\.weak_labels"):
        collect(build("weakseg", weak_labels="tags", category_width=8), base)


def test_absent_classes_are_not_judged():
    method = build("weakseg", category_width=8)
    pooled = torch.randn(2, method.model.feature_channels, 4, requires_grad=True)
    present = torch.tensor([[True, False, False, False], [True, False, True, False]])
    (found,) = method._judge((pooled, present, 1.0))
    (reached,) = torch.autograd.grad(found, pooled, retain_graph=True)
    assert torch.equal(reached.abs().amax(1) > 0, present)
    wanted = present_class_loss(method.category(pooled), present, 1.0)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    weight = method.category.layers[0].weight
    grad, truth = (torch.autograd.grad(x, weight)[0] for x in (found, wanted))
    torch.testing.assert_close(grad, truth)
    assert grad[1].abs().max() == 0 and grad[3].abs().max() == 0
    (nothing,) = method._judge((pooled, torch.zeros_like(present), 1.0))
    assert nothing.item() == 0 and torch.autograd.grad(nothing, weight)[0].abs().max() == 0


def test_both_domains_are_judged_in_one_pass():
    method = build("weakseg", category_width=8)
    calls = []
    method.category.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    pooled = torch.randn(3, method.model.feature_channels, 4)
    present = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    sides = [(pooled[:2], present[:2], 0.0), (pooled[2:], present[2:], 1.0)]
    found = method._judge(*sides)
    assert calls == [3]
    for value, side in zip(found, sides, strict=True):
        torch.testing.assert_close(value, method._judge(side)[0])


def test_no_class_present_anywhere_is_zero_not_a_crash():
    logits = torch.randn(2, 4, requires_grad=True)
    loss = present_class_loss(logits, torch.zeros(2, 4, dtype=torch.bool), 0.0)
    assert loss.item() == 0 and torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_source_tags_follow_the_mean_share():
    method = build("weakseg", category_width=8)
    label = torch.zeros(1, 10, 10, dtype=torch.int64)
    label[:, :5] = 1
    assert method._source_tags(label).tolist() == [[True, True, False, False]]
    label = torch.zeros(1, 10, 10, dtype=torch.int64)
    label[:, 0, :4] = 1  # 4% is under a tenth of the mean share of 50%
    assert method._source_tags(label).tolist() == [[True, False, False, False]]
    assert method.mean_share.tolist() == pytest.approx([(0.5 + 0.96) / 2, 0.5, 0, 0])
    big = label.repeat_interleave(4, 1).repeat_interleave(4, 2)  # the resolution does not matter
    assert method._source_tags(big).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("name", ["fada", "asanet", "weakseg"])
def test_the_generator_leaves_the_discriminators_alone(name):
    method, data = build(name, **({"category_width": 8} if name == "weakseg" else {})), batch()
    judges = {key: net for key, net in method.networks().items() if key != "model"}
    for phase in method.phases(data, 0):
        for net in method.networks().values():
            net.zero_grad()
        sum(phase.losses.values()).backward()
        for key, net in method.networks().items():
            touched = any(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
            assert touched == (key == phase.net), (phase.net, key)
    assert judges and all(p.requires_grad for net in judges.values() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("asanet", {"strategy": "gan"}, "choose asa or asc"),
        ("asanet", {"neighbours": 6}, "choose 4 or 8"),
        ("weakseg", {"weak_labels": "boxes"}, "pseudo, tags or points"),
        ("sepico", {"variant": "mean"}, "dist, bank or proto"),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    cls = get_method(name)
    with pytest.raises(UserError, match=message):
        cls(cls.Config(**settings), build_model(ModelConfig(backbone="small"), 4), 4)
