"""cycle_association_loss: the authors' values, a literal oracle, gradients, hard cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends, rows, wave, within_budget
from tests.oracles.cycle_association_loss import literal

BACKENDS = cpu_backends("cycle_association_loss")


VECTORS = [
    ("cosine", False, 3.3413903290, (0.33915976, 0.32218595), (0.00567859, -0.00551778, 0.00609812)),
    ("cosine", True, 3.3729524688, (0.33925686, 0.33315410), (0.00756075, -0.00397918, 0.00703783)),
    ("kl", False, 3.7326824772, (0.19657135, 0.18450511), (-0.00703153, 0.00627979, -0.00737717)),
    ("kl", True, 3.6586145024, (0.23642931, 0.18608345), (-0.01132823, 0.00946293, -0.01158063)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "aggregate", "loss", "norms", "first"), VECTORS)
def test_values_of_the_authors_code(backend, kind, aggregate, loss, norms, first):
    k = torch.arange(40)
    labels = ((7 * k % 11) % 4).reshape(2, 4, 5)
    labels[0, 0, 0] = labels[1, 2, 3] = 255
    if kind == "cosine":
        a, b = wave((2, 6, 4, 5), 0.11).requires_grad_(), wave((2, 6, 3, 6), 0.23).requires_grad_()
        maps = a, b
    else:
        a, b = (
            (2 * wave((2, 5, 4, 5), 0.31)).requires_grad_(),
            (2 * wave((2, 5, 3, 6), 0.17)).requires_grad_(),
        )
        maps = a.softmax(1), b.softmax(1)
    source, target = (x.flatten(2).transpose(1, 2) for x in maps)
    if aggregate:
        target = F.spatial_aggregate(target, similarity=kind, contrast=kind == "cosine", backend=backend)
    found, _ = F.cycle_association_loss(source, target, labels.flatten(1), similarity=kind, backend=backend)
    grads = torch.autograd.grad(found, (a, b))
    assert abs(found.item() - loss) < 2e-9
    assert [g.norm().item() for g in grads] == pytest.approx(norms, abs=2e-8)
    assert grads[0].flatten()[:3].tolist() == pytest.approx(first, abs=2e-8)


def case(b, n, m, c, kind, dtype=torch.float64, classes=4, seed=0):
    source = rows(b, n, c, seed, kind)
    target = rows(b, m, c, seed + 1, kind)
    labels = torch.randint(0, classes, (b, n), generator=torch.Generator().manual_seed(seed + 2))
    labels[:, ::5] = 255
    return source.to(dtype).requires_grad_(), target.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["cosine", "kl"])
@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize(
    ("b", "n", "m", "c"), [(1, 20, 31, 7), (2, 63, 40, 19), (2, 33, 97, 40), (2, 50, 280, 6)]
)
def test_value_and_gradients_in_float64(backend, kind, contrast, b, n, m, c):
    source, target, labels = case(b, n, m, c, kind)
    wanted = literal(source, target, labels, kind, contrast)
    found, stats = F.cycle_association_loss(
        source, target, labels, similarity=kind, contrast=contrast, backend=backend
    )
    assert found.item() == pytest.approx(wanted.item(), abs=1e-9)
    for mine, theirs in zip(
        torch.autograd.grad(3 * found, (source, target)),
        torch.autograd.grad(3 * wanted, (source, target)),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-9)
    assert int(stats.valid) == int((labels != 255).sum())
    assert int(stats.covered) == sum(len(set(row.tolist())) for row in stats.forward_index)


@pytest.mark.parametrize("kind", ["cosine", "kl"])
@pytest.mark.parametrize("classes", [1, 3])
def test_more_rows_and_keys_than_are_operands_at_a_time(kind, classes):
    source, target, labels = case(1, 2100, 2250, 5, kind, classes=classes)
    found, wanted = (
        F.cycle_association_loss(source, target, labels, similarity=kind, backend=backend)[0]
        for backend in ("auto", "reference")
    )
    assert found.item() == pytest.approx(wanted.item(), abs=1e-10)
    mine, theirs = (torch.autograd.grad(loss, (source, target)) for loss in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_features_that_are_nearly_parallel(backend, dtype):
    """Similarities of 1 - 1e-3, whose spread a covariance that is not centred would lose in float32."""
    source, target, labels = case(1, 200, 230, 4, "cosine", dtype, classes=1)
    source, target = ((x.detach() * 0.02 + 1).requires_grad_() for x in (source, target))
    exact = [x.detach().double().requires_grad_() for x in (source, target)]
    found, _ = F.cycle_association_loss(source, target, labels, backend=backend)
    wanted, _ = F.cycle_association_loss(*exact, labels, backend="reference")
    # in float32 two pairs of pixels are equally similar, so that gradients are not comparable
    assert found.item() == pytest.approx(wanted.item(), rel=1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", [4, 40])
def test_threads_share_the_rows(backend, c):
    source, target, labels = case(1, 300, 290, c, "cosine")
    before = torch.get_num_threads()
    losses = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            losses.append(F.cycle_association_loss(source, target, labels, backend=backend)[0].item())
    finally:
        torch.set_num_threads(before)
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["cosine", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "n", "m", "c"), [(2, 63, 97, 19), (1, 129, 70, 64), (1, 270, 300, 5)])
def test_error_budget(backend, kind, dtype, b, n, m, c):
    # one class: every cycle matches, so that a match that flips by rounding moves no set, only its two terms
    source, target, _ = case(b, n, m, c, kind, dtype, seed=7)
    labels = torch.zeros(b, n, dtype=torch.int64)
    exact = [x.detach().double().requires_grad_() for x in (source, target)]
    plain = [x.detach().clone().requires_grad_() for x in (source, target)]

    def run(inputs, function):
        loss = function(*inputs)
        return loss, torch.autograd.grad(loss, inputs)

    truth, truth_grads = run(exact, lambda s, t: literal(s, t, labels, kind))
    rough, rough_grads = run(plain, lambda s, t: literal(s, t, labels, kind))
    found, grads = run(
        (source, target),
        lambda s, t: F.cycle_association_loss(s, t, labels, similarity=kind, backend=backend)[0],
    )
    within_budget(found, rough, truth, "loss", dtype)
    for name, mine, theirs, exactly in zip(
        ("source", "target"), grads, rough_grads, truth_grads, strict=True
    ):
        assert mine.dtype == dtype
        within_budget(mine, theirs, exactly, f"gradient of {name}", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["cosine", "kl"])
def test_gradcheck(backend, kind):
    source, target, labels = case(1, 6, 7, 4, kind, classes=2)

    # the temperature is detached, so the numeric gradient holds only without contrast normalisation
    def loss(s, t):
        return F.cycle_association_loss(s, t, labels, similarity=kind, contrast=False, backend=backend)[0]

    assert torch.autograd.gradcheck(loss, (source, target), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", ["ignored", "alien"])
def test_no_consistent_cycle_gives_zero(backend, labels):
    source, target, y = case(2, 9, 11, 5, "cosine", torch.float32)
    y = torch.full_like(y, 255)
    if labels == "alien":
        # every pixel matches one target and comes back to pixel 0, which is ignored
        y = torch.arange(9).expand(2, 9).clone()
        y[:, 0] = 255
        target = (source[:, :1] + 1e-3 * target).detach().requires_grad_()
    loss, stats = F.cycle_association_loss(source, target, y, backend=backend)
    assert loss.item() == 0 and int(stats.matched) == 0
    for grad in torch.autograd.grad(loss, (source, target)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_side_that_asks_gets_a_gradient(backend):
    source, target, labels = case(1, 20, 20, 6, "cosine", torch.float32, classes=1)
    loss, _ = F.cycle_association_loss(source.detach(), target, labels, backend=backend)
    loss.backward()
    assert source.grad is None and target.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend):
    results = []
    for _ in range(2):
        source, target, labels = case(2, 150, 130, 48, "cosine", torch.float32)
        loss, _ = F.cycle_association_loss(source, target, labels, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, (source, target))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_change_the_result(backend):
    source, target, labels = case(1, 40, 40, 16, "cosine", torch.float32)
    plain, _ = F.cycle_association_loss(source, target, labels, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = F.cycle_association_loss(source, target, labels, backend=backend)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 50),
    m=st.integers(1, 50),
    classes=st.integers(1, 5),
    share=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "kl"]),
    seed=st.integers(0, 50),
)
def test_any_labels(backend, n, m, classes, share, kind, seed):
    source, target, labels = case(1, n, m, 9, kind, classes=classes, seed=seed)
    labels[torch.rand(1, n, generator=torch.Generator().manual_seed(seed)) < share] = 255
    found, stats = F.cycle_association_loss(source, target, labels, similarity=kind, backend=backend)
    wanted = literal(source, target, labels, kind) if m > 1 and n > 1 else found
    assert found.item() == pytest.approx(wanted.item(), abs=1e-8)
    assert 0 <= int(stats.matched) <= int(stats.valid) <= n and found.item() >= -1e-12


def test_bad_labels_are_named():
    x = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match=r"labels must have shape \(1, 4\), got \(1, 5\)"):
        F.cycle_association_loss(x, x, torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="labels must be integers"):
        F.cycle_association_loss(x, x, torch.zeros(1, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pixel_without_direction_gets_no_gradient_and_spoils_nobody(backend, dtype):
    source, target, _ = case(2, 40, 30, 16, "cosine", dtype)
    source, target = source.detach(), target.detach()
    source[:, 3] = 0
    target[:, 7] = 0
    source, target = source.requires_grad_(), target.requires_grad_()
    loss, _ = F.cycle_association_loss(source, target, torch.zeros(2, 40, dtype=torch.int64), backend=backend)
    grads = torch.autograd.grad(loss, (source, target))
    assert torch.isfinite(loss) and all(g.abs().max() < 10 for g in grads)
    assert grads[0][:, 3].abs().max() == 0 and grads[1][:, 7].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cosine", "kl"])
@pytest.mark.parametrize(("n", "m"), [(300, 70), (7, 9)])
def test_images_of_one_colour_have_a_uniform_softmax(backend, dtype, kind, n, m):
    """All similarities are equal: rounding is not taken for contrast."""
    source = rows(1, 1, 7, 0, kind).to(dtype).repeat(1, n, 1).requires_grad_()
    target = rows(1, 1, 7, 1, kind).to(dtype).repeat(1, m, 1).requires_grad_()
    labels = torch.zeros(1, n, dtype=torch.long)
    loss, _ = F.cycle_association_loss(source, target, labels, similarity=kind, backend=backend)
    assert loss.item() == pytest.approx(math.log(n) + math.log(m), rel=1e-5)
    for grad in torch.autograd.grad(loss, (source, target)):
        assert grad.isfinite().all() and grad.abs().max() < 1000
