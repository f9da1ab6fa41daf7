"""The Triton kernels of the losses and statistics in the interpreter, against the reference. Run by
tests/kernels/test_kernels.py in a process of its own, as interpreted.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastuda.ops as F
from fastuda.kernels import _class_planes
from fastuda.kernels import aspp as head
from fastuda.kernels import batch_norm_act as norm
from fastuda.kernels import category_pool as category
from fastuda.kernels import class_statistics as statistics
from fastuda.kernels import depthwise_conv2d as depthwise
from fastuda.kernels import local_affinity as affinity
from fastuda.kernels import lovasz_softmax as lovasz
from fastuda.kernels import smooth_max_pool as smooth_max
from fastuda.kernels import upsample_confusion as confusion
from fastuda.ops import _checks
from fastuda.ops._backends import BACKENDS, launcher
from tests.cases import OPS, case, every
from tests.helpers import judge, value_and_gradient, within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    ((1, 1), (1, 1)),
    ((1, 5), (7, 1)),
    ((3, 2), (11, 63)),
    ((9, 21), (13, 70)),
    ((12, 17), (5, 6)),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def runs(function, x):
    """What ``function`` gives by Triton, by plain torch in the same dtype, and by torch in float64."""
    for backend, dtype in (("triton", x.dtype), ("reference", x.dtype), ("reference", torch.float64)):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        out = function(leaf, backend)
        out = (out,) if isinstance(out, torch.Tensor) else out
        weight = torch.linspace(-1, 2, out[0].numel()).reshape(out[0].shape).to(out[0].dtype)
        yield *out, *torch.autograd.grad(out[0], leaf, weight)


def check(function, x):
    found, plain, truth = runs(function, x)
    assert found[-1].dtype == x.dtype
    for name, *three in zip(("value", "gradient"), found, plain, truth, strict=True):
        within_budget(*three, name, x.dtype if name == "gradient" else torch.float32)


@pytest.mark.parametrize(("low", "high"), SIZES)
@pytest.mark.parametrize("align", [False, True])
def test_cross_entropy_of_odd_sizes(low, high, align):
    x, labels = 3 * torch.randn(2, 5, *low), torch.randint(0, 5, (2, *high))
    labels[torch.rand(labels.shape) < 0.2] = 255
    check(lambda x, backend: F.upsample_cross_entropy(x, labels, align_corners=align, backend=backend), x)


def options(name, labels):
    size = (labels.shape[0], *labels.shape[1:])
    return {
        "class_weight": dict(class_weight=torch.rand(19) + 0.5),
        "pixel_weight": dict(pixel_weight=torch.rand(size), reduction="sum"),
        "smoothing": dict(label_smoothing=0.1, class_weight=torch.rand(19) + 0.5),
        "temperature": dict(temperature=1.8),
        "none": dict(reduction="none", temperature=0.7),
    }[name]


@pytest.mark.parametrize("name", ["class_weight", "pixel_weight", "smoothing", "temperature", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_options(name, soft):
    x, labels = 3 * torch.randn(2, 19, 5, 3), torch.randint(0, 19, (2, 9, 13))
    labels[:, ::4] = 255
    settings = options(name, labels)
    if soft:
        labels = torch.randn(2, 19, 9, 13).softmax(1)
    check(lambda x, backend: F.upsample_cross_entropy(x, labels, **settings, backend=backend), x)


def test_cross_entropy_without_a_valid_pixel():
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = F.upsample_cross_entropy(x, torch.full((1, 9, 9), 255), backend="triton")
    assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].abs().max() == 0


def test_cross_entropy_says_what_it_does_not_take():
    x, labels = torch.randn(1, 129, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="backend 'triton' cannot run: takes at most 128 classes, not 129"):
        F.upsample_cross_entropy(x, labels, backend="triton")


@pytest.mark.parametrize(("low", "high"), SIZES)
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("classes", [1, 40])
def test_confusion(low, high, align, classes):
    """A prediction scores as well as the best; the counts are those of the predictions."""
    x, labels = torch.randn(2, classes, *low), torch.randint(0, classes, (2, *high))
    labels[torch.rand(labels.shape) < 0.2] = 255
    matrix, predicted = F.upsample_confusion(
        x, labels, align_corners=align, return_labels=True, backend="triton"
    )
    full = torch.nn.functional.interpolate(x.double(), high, mode="bilinear", align_corners=align)
    assert (full.amax(1) - full.gather(1, predicted[:, None].long())[:, 0]).max() < 1e-5
    keep = labels != 255
    pairs = labels[keep] * classes + predicted[keep].long()
    assert torch.equal(matrix, pairs.bincount(minlength=classes**2).reshape(classes, classes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_confusion_breaks_ties_downwards(dtype):
    matrix = F.upsample_confusion(
        torch.zeros(1, 7, 3, 3, dtype=dtype), torch.full((1, 10, 10), 2), backend="triton"
    )
    assert matrix[2, 0] == 100 and matrix.sum() == 100


@pytest.mark.parametrize("bins", [16, 1024])
def test_confusion_names_alien_labels(bins, monkeypatch):
    monkeypatch.setattr(confusion, "BINS", bins)
    labels = torch.full((1, 10, 10), 2)
    labels[0, 4, 5] = 9
    with pytest.raises(ValueError, match=r"outside 0\.\.6"):
        F.upsample_confusion(torch.zeros(1, 7, 3, 3), labels, backend="triton")


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 64 rows, so that few make several."""
    monkeypatch.setattr(statistics, "TILES", 2)
    monkeypatch.setattr(category, "TILES", 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width", "classes"), [(1, 1, 1), (63, 97, 5), (150, 70, 19), (129, 3, 40)])
def test_statistics(n, width, classes, dtype, short_chunks):
    x = (torch.randn(n, width) + 3).to(dtype)
    labels = torch.randint(0, classes + 1, (n,))
    labels[labels == classes] = 255
    found = F.class_statistics(x, labels, classes, backend="triton")
    plain = F.class_statistics(x, labels, classes, backend="reference")
    truth = F.class_statistics(x.double(), labels, classes, backend="reference")
    for name in ("count", "mean", "variance"):
        assert getattr(found, name).dtype == torch.float32
        within_budget(*(getattr(run, name) for run in (found, plain, truth)), name, torch.float32)


def test_statistics_survive_a_large_common_mean(short_chunks):
    x = torch.randn(200, 8) * 0.01 + 100
    found = F.class_statistics(x, torch.zeros(200, dtype=torch.int64), 1, backend="triton")
    assert torch.allclose(found.variance[0], x.double().var(0, unbiased=False).float(), rtol=1e-3)


def test_statistics_without_a_feature():
    found = F.class_statistics(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 3, backend="triton")
    assert all((x == 0).all() for x in vars(found).values()) and found.mean.shape == (3, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "k"), [((1, 1), 1.0), ((63, 97), 0.1), ((5, 7), 20.0)])
def test_smooth_max_pool(size, k, dtype):
    x = (10 * torch.randn(2, 3, *size)).to(dtype)
    check(lambda x, backend: F.smooth_max_pool(x, k=k, backend=backend), x)


def test_smooth_max_pool_of_planes_in_parts(monkeypatch):
    monkeypatch.setattr(smooth_max, "BLOCK", 32)
    monkeypatch.setattr(smooth_max, "BLOCKS", 1)
    x = 10 * torch.randn(2, 3, 63, 97)
    check(lambda x, backend: F.smooth_max_pool(x, backend=backend), x)


def test_smooth_max_does_not_overflow():
    x = 300 * torch.randn(2, 3, 5, 7)
    assert torch.isfinite(F.smooth_max_pool(x, k=20.0, backend="triton")).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "padding", "dilation"),
    [
        (1, (1, 1), (1, 1), 1, 0, 1),
        (7, (9, 5), (3, 3), 1, 1, 1),
        (40, (13, 10), (3, 3), 1, 4, 4),
        (20, (11, 14), (3, 3), 2, 2, 2),
        (3, (7, 12), (1, 5), 3, 2, 1),
    ],
)
def test_depthwise_convolution(channels, size, kernel, stride, padding, dilation, dtype, monkeypatch):
    monkeypatch.setattr(depthwise, "RUN", 64)
    x = torch.randn(2, channels, *size).to(dtype)
    given = torch.randn(channels, 1, *kernel).to(dtype), torch.randn(channels).to(dtype)
    rest = dict(stride=stride, padding=padding, dilation=dilation)

    def run(backend, work):
        leaves = [t.to(work, copy=True).requires_grad_() for t in (x, *given)]
        y = F.depthwise_conv2d(*leaves, **rest, backend=backend)
        weight = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, leaves, weight)

    results = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    for name, *three in zip(("value", "x", "weight", "bias"), *results, strict=True):
        assert three[0].dtype == dtype
        within_budget(*three, name, dtype)


def test_depthwise_convolution_of_strided_features_and_none():
    weight, bias = torch.randn(6, 1, 3, 3).transpose(2, 3), torch.randn(18)[::3]
    for x in (torch.randn(2, 6, 5, 18)[..., ::2], torch.randn(0, 6, 4, 4)):
        found, wanted = (
            F.depthwise_conv2d(x, weight, bias, padding=1, backend=name) for name in ("triton", "reference")
        )
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("channels", "size"), [(1, (1, 5)), (3, (13, 70)), (24, (9, 31)), (64, (8, 8)), (150, (11, 17))]
)
def test_batch_norm(channels, size, training, dtype, monkeypatch):
    """Without a tile that is filled, with many, and with runs that are merged in several rounds."""
    for name, value in (("TILE", 1024), ("PROGRAMS", 6), ("RUNS", 2)):
        monkeypatch.setattr(norm, name, value)
    x = (3 * torch.randn(2, channels, *size) + torch.randn(channels, 1, 1)).to(dtype)
    given = torch.randn(2, channels)
    # in half precision one rounding decides about a gradient at the edges of a clamp
    activations = ("none", "relu", "relu6") if dtype == torch.float32 else ("none",)

    def run(backend, work, activation):
        kind = torch.promote_types(work, torch.float32)
        leaves = [t.to(kind, copy=True).requires_grad_() for t in given]
        leaves.insert(0, x.to(work, copy=True).requires_grad_())
        statistics = torch.zeros(channels, dtype=kind), torch.ones(channels, dtype=kind)
        settings = dict(training=training, activation=activation, backend=backend)
        y = F.batch_norm_act(*leaves, *statistics, **settings)
        weight = torch.linspace(-1, 2, y.numel()).reshape(y.shape).sin().to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, leaves, weight), *statistics

    names = ("value", "x", "weight", "bias", "mean", "variance")
    for activation in activations:
        kinds = ("triton", dtype), ("reference", dtype), ("reference", torch.float64)
        results = (run(*kind, activation) for kind in kinds)
        for name, *three in zip(names, *results, strict=True):
            assert three[0].dtype == (dtype if name in ("value", "x") else torch.float32)
            within_budget(*three, f"{name} of {activation}", three[0].dtype)


def test_batch_norm_with_a_large_mean_keeps_the_digits_of_the_variance(monkeypatch):
    monkeypatch.setattr(norm, "TILE", 1024)
    monkeypatch.setattr(norm, "PROGRAMS", 6)
    x = torch.randn(2, 8, 40, 40) / 16 + 1000
    mean, variance = norm.batch_norm_act_moments(x)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), truth[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), truth[1], rtol=1e-6, atol=0)


def test_batch_norm_of_nan_of_strided_features_and_of_none():
    channels = [torch.rand(18)[::3] + i for i in range(4)]
    strided, none = torch.randn(2, 6, 5, 18)[..., ::2], torch.randn(0, 6, 4, 4)
    for x in (strided, none, strided.masked_fill(strided > 2, torch.nan)):
        found, wanted = (
            F.batch_norm_act(x, *channels, training=False, activation="relu6", backend=name)
            for name in ("triton", "reference")
        )
        torch.testing.assert_close(found, wanted, equal_nan=True)
        assert found.is_contiguous(memory_format=torch.channels_last)
    leaves = [t.detach().requires_grad_() for t in (none, *channels[:2])]
    y = F.batch_norm_act(*leaves, *channels[2:], training=False, backend="triton")
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), leaves))


@pytest.fixture
def small_blocks(monkeypatch):
    """Planes of several programs."""
    monkeypatch.setattr(affinity, "BLOCK", 32)


@pytest.mark.parametrize(
    ("size", "neighbours", "distance"),
    [((1, 1), 8, 1), ((1, 9), 8, 3), ((5, 1), 4, 1), ((3, 2), 8, 20), ((4, 20), 8, 1), ((7, 13), 4, 2)],
)
@pytest.mark.parametrize("kind", ["kl", "product"])
def test_affinity(size, neighbours, distance, kind, small_blocks):
    x = (4 * torch.randn(1, 2, *size)).softmax(1)
    settings = dict(neighbours=neighbours, distance=distance, kind=kind)
    check(lambda x, backend: F.local_affinity(x, **settings, backend=backend), x)


def test_affinity_passes_no_gradient_through_a_clamp():
    """The four quantities below, inside and above their clamps; and a NaN is not clamped away."""
    p = torch.tensor([0.0, 5e-5, 1e-3, 0.5, 0.9995, 0.99999, 1.0]).repeat(2, 1)[None, None]
    check(lambda x, backend: F.local_affinity(x, backend=backend), p)
    p[0, 0, 0, 3] = torch.nan
    assert F.local_affinity(p, backend="triton")[0, 4, 0, 2].isnan()


@pytest.mark.parametrize(("size", "neighbours"), [((1, 1), 8), ((1, 9), 4), ((5, 1), 8), ((4, 20), 8)])
def test_affinity_cleaning(size, neighbours, small_blocks):
    x = 2 * torch.randn(2, 3, *size)
    check(lambda x, backend: F.affinity_cleaning_loss(x, neighbours=neighbours, backend=backend), x)


@pytest.mark.parametrize(
    ("low", "seg", "size"),
    [
        ((1, 1), (1, 1), (1, 1)),
        ((3, 2), (5, 4), (11, 20)),
        ((9, 21), (4, 6), (7, 25)),
        ((4, 6), (4, 6), None),
    ],
)
@pytest.mark.parametrize("encode", ["source", "target"])
def test_domain_cross_entropy(low, seg, size, encode):
    x, z = 3 * torch.randn(2, 10, *low), 4 * torch.randn(2, 5, *seg)
    settings = dict(encode=encode, size=size, align_corners=encode == "source")
    check(lambda x, backend: F.domain_cross_entropy(x, z.to(x.dtype), **settings, backend=backend), x)


def prototypes(kind, classes, width, length=40):
    if kind == "bank":
        vectors, count = torch.randn(classes, length, width), torch.randint(0, length + 1, (classes,))
        vectors[torch.arange(length) >= count[:, None]] = torch.nan
        return F.PrototypeBank(vectors, count)
    return F.ClassStatistics(torch.ones(classes), torch.randn(classes, width), torch.rand(classes, width))


@pytest.mark.parametrize("kind", ["proto", "dist", "bank"])
@pytest.mark.parametrize(("n", "width", "classes"), [(1, 1, 2), (70, 40, 5), (33, 7, 40)])
def test_prototype_contrast(kind, n, width, classes):
    x, labels = torch.randn(n, width), torch.randint(0, classes, (n,))
    labels[1::5] = 255
    given = prototypes(kind, classes, width)
    if kind == "bank":
        plain = F.PrototypeBank(given.vectors.nan_to_num(), given.count)
    else:
        plain = given

    def contrast(x, backend):
        these = given if backend == "triton" else plain
        return F.prototype_contrast(x, labels, these, kind=kind, tau=0.5, backend=backend)

    check(contrast, x)


@pytest.mark.parametrize("kind", ["proto", "bank"])
def test_prototype_contrast_shows_alien_labels_and_needs_no_valid_one(kind, monkeypatch):
    monkeypatch.setattr(_checks, "may_read", lambda x: False)  # as of a GPU's labels
    given = prototypes(kind, 5, 4)
    x = torch.randn(9, 4, requires_grad=True)
    labels = torch.full((9,), 255)
    loss = F.prototype_contrast(x, labels, given, kind=kind, backend="triton")
    assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()
    labels[3] = 7
    assert F.prototype_contrast(x, labels, given, kind=kind, backend="triton").isnan()


@pytest.mark.parametrize(
    ("low", "high"), [((1, 1), (1, 1)), ((1, 5), (7, 1)), ((2, 3), (5, 40)), ((5, 9), (3, 4))]
)
@pytest.mark.parametrize("align", [False, True])
def test_lovasz_from_logits(low, high, align, monkeypatch):
    monkeypatch.setattr(_class_planes, "OUTPUTS", 32)
    if align:  # a class at a time
        monkeypatch.setattr(lovasz, "PANEL_BYTES", 1)
    x, labels = 3 * torch.randn(2, 3, *low), torch.randint(0, 2, (2, *high))
    labels[torch.rand(labels.shape) < 0.2] = 255
    settings = dict(from_logits=True, align_corners=align)
    check(lambda x, backend: F.lovasz_softmax(x, labels, **settings, backend=backend), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("from_logits", [False, True])
def test_lovasz_error_budget(from_logits, dtype):
    x, labels = 3 * torch.randn(2, 3, 4, 7), torch.randint(0, 3, (2, 4, 7))
    x = (x if from_logits else x.softmax(1)).to(dtype)
    found, plain, truth = runs(
        lambda x, backend: F.lovasz_softmax(
            x, labels, from_logits=from_logits, per_image=True, backend=backend
        ),
        x,
    )
    within_budget(found[0], plain[0], truth[0], "loss", torch.float32)
    if from_logits or dtype == torch.float32:  # equal errors have several right orders in half precision
        within_budget(found[1], plain[1], truth[1], "gradient", dtype)


def test_lovasz_of_right_wrong_and_no_labels():
    labels = torch.tensor([[[0, 1], [1, 255]]])
    right = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])[None].requires_grad_()
    assert F.lovasz_softmax(right, labels, backend="triton") == 0
    assert F.lovasz_softmax(1 - right, labels, backend="triton").item() == pytest.approx(1)
    nothing = F.lovasz_softmax(right, torch.full_like(labels, 255), backend="triton")
    assert nothing == 0 and (torch.autograd.grad(nothing, right)[0] == 0).all()
    assert F.lovasz_softmax(right * torch.nan, labels, backend="triton").isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width", "classes"), [(1, 1, 1), (70, 40, 5), (150, 7, 19)])
def test_category_pool(n, width, classes, dtype, short_chunks):
    features, logits = torch.randn(2, n, width).to(dtype), (10 * torch.randn(2, n, classes)).to(dtype)
    check(lambda x, backend: F.category_pool(x, logits.to(x.dtype), backend=backend), features)
    check(lambda x, backend: F.category_pool(features.to(x.dtype), x, backend=backend), logits)


def test_category_pool_of_large_logits_and_of_no_pixel():
    features, logits = torch.randn(1, 40, 3), torch.zeros(1, 40, 2)
    logits[0, 5, 0], logits[0, 33, 1] = 1e30, 1e4
    pooled = F.category_pool(features, logits, backend="triton")
    assert torch.equal(pooled[0], features[0, [5, 33]])
    pooled, _ = category.category_pool_fwd(features[:, :0], logits[:, :0])
    assert pooled.shape == (1, 2, 3) and (pooled == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "dilations", "panel"),
    [
        ((1, 1), (6, 12), 32 << 20),
        ((7, 9), (1, 2), 64),
        ((5, 70), (2, 6, 2), 32 << 20),
        ((13, 9), (6, 12, 18, 24), 4096),
    ],
)
def test_aspp(size, dilations, panel, dtype, monkeypatch):
    monkeypatch.setattr(head, "PANEL_BYTES", panel)
    monkeypatch.setattr(head, "BLOCK", 64)
    shapes = [(2, 6, *size), *[(3, 6, 3, 3)] * len(dilations), *[(3,)] * len(dilations)]
    given = [torch.randn(shape).to(dtype) / 4 for shape in shapes]
    grad = torch.randn(2, 3, *size).to(dtype)

    def run(backend, work):
        x, *rest = leaves = [y.to(work).requires_grad_() for y in given]
        weights, biases = rest[: len(dilations)], rest[len(dilations) :]
        out = F.aspp(x, weights, dilations=dilations, biases=biases, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(work))

    results = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    for k, three in enumerate(zip(*results, strict=True)):
        assert three[0].dtype == dtype
        within_budget(*three, f"gradient {k}" if k else "value", dtype)


WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "repeat_interleave.Tensor",
)
"""Ops of torch that make the host wait for a GPU."""


class NoWaits(TorchDispatchMode):
    """Fails where a launcher calls one."""

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        assert str(func).removeprefix("aten.").removesuffix(".default") not in WAITS, f"{func} waits"
        return func(*args, **(kwargs or {}))


def test_no_launcher_waits_for_the_device():
    for op, operator, *args in every("operators", "cpu"):
        # upsample_confusion raises what the labels tell
        names = {row.name for row in BACKENDS[op]} if op != "upsample_confusion" else set()
        for options in [{}] * ("triton" in names) + [{"library": True}] * ("library" in names):
            call = partial(launcher(op, operator), *args, **options)
            call()  # tables are made on the first call
            with NoWaits():
                call()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("op", [op for op in OPS if hasattr(case(op), "small")])
def test_half_precision(op, dtype):
    """In float32 the same inputs are those of interpreted_arithmetic.py."""
    for name, x, function in case(op).small():
        x = x.to(dtype)
        judge(function, x, value_and_gradient(function, x, "triton", dtype), name)


def test_a_masked_class_is_not_seen():
    """-inf less -inf is NaN: equal values have to stay as they are between the sources."""
    x = torch.randn(1, 4, 5, 5)
    masked = x.index_fill(1, torch.tensor([0, 2]), -torch.inf)
    truth = torch.zeros(1, 11, 11, dtype=torch.int64)
    two = F.upsample_confusion(x[:, [1, 3]], truth, backend="triton")
    assert F.upsample_confusion(masked, truth, backend="triton")[0].tolist() == [0, two[0, 0], 0, two[0, 1]]
    labels = torch.arange(121).reshape(1, 11, 11) % 2
    for loss in (F.upsample_cross_entropy, lambda z, y, **k: F.lovasz_softmax(z, y, from_logits=True, **k)):
        found = loss(masked, 2 * labels + 1, backend="triton")
        assert found.item() == pytest.approx(loss(x[:, [1, 3]], labels).item(), rel=1e-5)
