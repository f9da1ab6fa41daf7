"""What no op may be given: every op, every argument, every backend that runs here; and the edges that are
legal.

A fault is refused with one message on every backend, which names the argument and what was given. Legal edges
give on every backend what the reference gives, and nothing that is not finite.
"""

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastuda.ops as F
from fastuda.ops import ClassStatistics, PrototypeBank, _checks
from tests.helpers import cpu_backends, rows


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Waking a second thread costs more than these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensor(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype) * 0.9 + 0.05


def labels(*shape, classes=3):
    found = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(1))
    return found.masked_fill(torch.arange(found.numel()).reshape(shape) % 5 == 4, 255)


def statistics(classes=3, width=4):
    return ClassStatistics(torch.ones(classes), tensor(classes, width), tensor(classes, width))


def bank(classes=3, length=5, width=4, count=None):
    count = torch.arange(classes) + 1 if count is None else torch.tensor(count)
    return PrototypeBank(tensor(classes, length, width), count)


def good(op):
    """Arguments that the op takes."""
    return {
        "cycle_match": dict(source=tensor(2, 5, 4), target=tensor(2, 3, 4)),
        "cycle_association_loss": dict(source=tensor(2, 5, 4), target=tensor(2, 3, 4), labels=labels(2, 5)),
        "spatial_aggregate": dict(x=tensor(2, 5, 4)),
        "contrast_softmax": dict(x=tensor(2, 5, 4)),
        "local_affinity": dict(p=tensor(2, 3, 4, 5)),
        "affinity_cleaning_loss": dict(logits=tensor(2, 3, 4, 5)),
        "upsample_cross_entropy": dict(logits=tensor(2, 3, 4, 5), labels=labels(2, 7, 9)),
        "upsample_confusion": dict(x=tensor(2, 3, 4, 5), labels=labels(2, 7, 9)),
        "lovasz_softmax": dict(x=tensor(2, 3, 4, 5).softmax(1), labels=labels(2, 4, 5)),
        "domain_cross_entropy": dict(
            domain_logits=tensor(2, 6, 4, 5), seg_logits=tensor(2, 3, 4, 5), encode="source"
        ),
        "class_statistics": dict(features=tensor(11, 4), labels=labels(11), num_classes=3),
        "prototype_contrast": dict(features=tensor(11, 4), labels=labels(11), prototypes=statistics()),
        "smooth_max_pool": dict(logits=tensor(2, 3, 4, 5)),
        "category_pool": dict(features=tensor(2, 5, 4), logits=tensor(2, 5, 3)),
        "depthwise_conv2d": dict(x=tensor(2, 4, 5, 6), weight=tensor(4, 1, 3, 3) - 0.5, padding=1),
        "aspp": dict(features=tensor(2, 4, 5, 6), weights=[tensor(3, 4, 3, 3) - 0.5] * 2, dilations=(1, 2)),
    }[op]


OPS = [op for op in F.__all__ if op.islower() and op not in ("backends", "release_memory")]
FREE_FIRST_AXIS = ("class_statistics", "prototype_contrast")  # the others' first axis is the batch


def tensors(op):
    return [name for name, value in good(op).items() if isinstance(value, torch.Tensor)]


def generic(op):
    """The faults that every tensor can have."""
    for position, name in enumerate(tensors(op)):
        x = good(op)[name]
        yield name, x.tolist(), TypeError, "list"
        yield name, None, TypeError, "None"
        yield name, x.numpy(), TypeError, "ndarray"
        yield name, x.to_sparse(), TypeError, "sparse"
        yield name, x.to(torch.complex64), TypeError, "complex64"
        yield name, x > 0, TypeError, "bool"
        if x.is_floating_point():
            yield name, x.long(), TypeError, "int64"
            yield name, x.to(torch.float8_e5m2), TypeError, "float8_e5m2"
        if op != "contrast_softmax":
            yield name, x[0], ValueError, str(tuple(x[0].shape))
            yield name, x[None], ValueError, str((1, *x.shape))
        for axis in range(1, x.dim()):
            if op != "contrast_softmax" or axis == x.dim() - 1:
                empty = x.narrow(axis, 0, 0)
                yield name, empty, ValueError, str(tuple(empty.shape))
        if position:
            yield name, x.to("meta"), ValueError, "meta"
            yield name, x[:-1], ValueError, str(tuple(x[:-1].shape))


NAN, INF = math.nan, math.inf

NUMBERS = {
    "alpha": ([-0.1, 2, NAN, INF], "spatial_aggregate"),
    "eps": ([0, -1e-3, NAN, INF, 1e-300], "contrast_softmax"),
    "temperature": ([0, -1.0, NAN, INF], "upsample_cross_entropy", "domain_cross_entropy"),
    "label_smoothing": ([-0.1, 2, NAN], "upsample_cross_entropy"),
    "clip": ([0, -0.5, 1.5, NAN], "domain_cross_entropy"),
    "hard_threshold": ([-0.1, 1.1, NAN], "domain_cross_entropy"),
    "tau": ([0, -1.0, NAN, INF], "prototype_contrast"),
    "k": ([0, -1, NAN, INF], "smooth_max_pool"),
}
INTEGERS = {
    "neighbours": ([0, 6], "local_affinity", "affinity_cleaning_loss"),
    "distance": ([0, -1], "local_affinity"),
    "num_classes": ([0, -3], "class_statistics"),
    "ignore_index": (
        [10**30],
        "cycle_association_loss",
        "upsample_cross_entropy",
        "upsample_confusion",
        "lovasz_softmax",
        "class_statistics",
        "prototype_contrast",
    ),
}
FLAGS = {
    "contrast": ("cycle_association_loss", "spatial_aggregate"),
    "align_corners": (
        "upsample_cross_entropy",
        "upsample_confusion",
        "lovasz_softmax",
        "domain_cross_entropy",
    ),
    "per_image": ("lovasz_softmax",),
    "from_logits": ("lovasz_softmax",),
    "return_labels": ("upsample_confusion",),
}
CHOICES = {
    "similarity": ("cycle_match", "cycle_association_loss", "spatial_aggregate"),
    "kind": ("local_affinity", "prototype_contrast"),
    "encode": ("domain_cross_entropy",),
    "reduction": ("upsample_cross_entropy",),
}


def settings():
    """The faults of what is no tensor."""
    for argument, (values, *ops) in NUMBERS.items():
        for op in ops:
            yield from ((op, {argument: value}, ValueError, argument, str(value)) for value in values)
            yield from ((op, {argument: x}, TypeError, argument, repr(x)) for x in ("1", True, [1.0]))
            yield op, {argument: torch.tensor(0.5)}, TypeError, argument, "Tensor"
    for argument, (values, *ops) in INTEGERS.items():
        for op in ops:
            yield from ((op, {argument: value}, ValueError, argument, str(value)) for value in values)
            yield from ((op, {argument: x}, TypeError, argument, repr(x)) for x in ("1", True, 1.5, None))
            yield op, {argument: torch.tensor(4)}, TypeError, argument, "Tensor"
    for argument, ops in FLAGS.items():
        for op in ops:
            yield from ((op, {argument: x}, TypeError, argument, repr(x)) for x in (None, 1, "no"))
    for argument, ops in CHOICES.items():
        for op in ops:
            yield from ((op, {argument: x}, ValueError, argument, repr(x)) for x in ("dot", None, 3, ["kl"]))
    for value, kind in (
        (16, TypeError),
        ("ab", TypeError),
        ((16,), ValueError),
        ((1, 2, 3), ValueError),
        ((0, 4), ValueError),
        ((4, -1), ValueError),
        ((4, 2.5), TypeError),
        ([4, None], TypeError),
    ):
        given = str(value) if not isinstance(value, tuple | list) or len(value) != 2 else ""
        yield "domain_cross_entropy", {"size": value}, kind, "size", given


def stray(y, value):
    return y.masked_fill(torch.arange(y.numel()).reshape(y.shape) == 1, value)


def special():
    """The faults that only one op can have."""
    x = tensor(2, 5, 4)
    yield "cycle_match", {"target": tensor(2, 3, 5)}, ValueError, "target", "(2, 3, 5)"
    yield "cycle_match", {"target": x.double()}, ValueError, "target", "float64"
    yield "category_pool", {"logits": tensor(2, 4, 3)}, ValueError, "logits", "(2, 4, 3)"
    yield "lovasz_softmax", {"labels": labels(2, 7, 9)}, ValueError, "labels", "(2, 7, 9)"
    taps = good("aspp")["weights"]
    yield "aspp", {"weights": taps[0]}, TypeError, "weights", "Tensor"
    yield "aspp", {"weights": [taps[0], taps[0][:2]]}, ValueError, "weights[1]", "(2, 4, 3, 3)"
    yield "aspp", {"weights": taps[:1]}, ValueError, "dilations", "2 branches, weights of 1"
    yield "aspp", {"dilations": (1, 0)}, ValueError, "dilations[1]", "got 0"
    yield "aspp", {"dilations": (1, 2.5)}, TypeError, "dilations[1]", "2.5"
    yield "aspp", {"biases": [tensor(3)]}, ValueError, "biases", "1 branches"
    yield "aspp", {"biases": [tensor(2)] * 2}, ValueError, "biases[0]", "(2,)"
    yield "depthwise_conv2d", {"bias": tensor(3)}, ValueError, "bias", "(3,)"
    for name, value in (("stride", 0), ("padding", -1), ("dilation", 0)):
        yield "depthwise_conv2d", {name: value}, ValueError, name, str(value)
    for op in ("upsample_cross_entropy", "upsample_confusion", "lovasz_softmax", "prototype_contrast"):
        for value in (3, -1, -(2**62), 300):
            y = stray(good(op)["labels"], value)
            yield op, {"labels": y}, ValueError, "labels", str(value)
        for dtype, value in ((torch.uint8, 3), (torch.int8, -1), (torch.int32, 70000)):
            y = stray(good(op)["labels"].clamp(max=2).to(dtype), value)
            yield op, {"labels": y}, ValueError, "labels", str(value)
            yield op, {"labels": y, "ignore_index": value + 256}, ValueError, "labels", str(value)
    yield (
        "lovasz_softmax",
        {"labels": labels(2, 7, 9, classes=9), "from_logits": True},
        ValueError,
        "labels",
        "3, 4, 5",
    )
    yield "upsample_confusion", {"x": tensor(2, 256, 1, 1)}, ValueError, "x", "(2, 256, 1, 1)"

    op = "upsample_cross_entropy"
    for name, x in (("class_weight", tensor(3)), ("pixel_weight", tensor(2, 7, 9))):
        for value, kind, given in (
            (x.tolist(), TypeError, "list"),
            (2.0, TypeError, "float"),
            (x.to_sparse(), TypeError, "sparse"),
            (x.to(torch.complex64), TypeError, "complex64"),
            (x[:-1], ValueError, str(tuple(x[:-1].shape))),
            (x.to("meta"), ValueError, "meta"),
        ):
            yield op, {name: value}, kind, name, given
    yield op, {"labels": tensor(2, 7, 9)}, ValueError, "labels", "(2, 7, 9)"
    yield op, {"labels": tensor(2, 4, 7, 9)}, ValueError, "labels", "(2, 4, 7, 9)"
    yield op, {"labels": tensor(2, 3, 0, 9)}, ValueError, "labels", "(2, 3, 0, 9)"
    yield op, {"labels": tensor(2, 3, 7, 9).to("meta")}, ValueError, "labels", "meta"
    yield op, {"labels": tensor(2, 3, 7, 9).to(torch.float8_e5m2)}, TypeError, "labels", "float8_e5m2"

    op = "domain_cross_entropy"
    yield op, {"seg_logits": tensor(2, 2, 4, 5)}, ValueError, "seg_logits", "(2, 2, 4, 5)"
    yield op, {"seg_logits": tensor(2, 3, 4, 4)}, ValueError, "seg_logits", "(2, 3, 4, 4)"

    op, name = "prototype_contrast", "prototypes"
    for kind in ("dist", "proto", "bank"):
        yield op, {name: tensor(3, 4), "kind": kind}, TypeError, name, "Tensor"
        yield op, {name: None, "kind": kind}, TypeError, name, "None"
    yield op, {name: bank()}, ValueError, name, "PrototypeBank"
    yield op, {name: statistics(), "kind": "bank"}, ValueError, name, "ClassStatistics"
    yield op, {name: statistics(width=5)}, ValueError, name, "width 5"
    yield op, {name: statistics(classes=0)}, ValueError, name, "0 classes"
    for key in ("mean", "variance"):
        for value, kind, given in (
            (None, TypeError, "None"),
            (tensor(3, 4).long(), TypeError, "int64"),
            (tensor(4), ValueError, "(4,)"),
            (tensor(3, 0), ValueError, "(3, 0)"),
        ):
            fault = {name: dataclasses.replace(statistics(), **{key: value})}
            yield op, fault, kind, f"prototypes.{key}", given
    fault = {name: dataclasses.replace(statistics(), variance=tensor(2, 4))}
    yield op, fault, ValueError, "prototypes.variance", "(2, 4)"
    fault = {name: dataclasses.replace(statistics(), variance=tensor(3, 4).to("meta"))}
    yield op, fault, ValueError, "prototypes.variance", "meta"
    fault = {name: ClassStatistics(*(x.to("meta") for x in vars(statistics()).values()))}
    yield op, fault, ValueError, name, "meta"
    for vectors, kind, given in (
        (None, TypeError, "None"),
        (tensor(3, 4), ValueError, "(3, 4)"),
        (tensor(3, 0, 4), ValueError, "(3, 0, 4)"),
    ):
        fault = {name: PrototypeBank(vectors, bank().count), "kind": "bank"}
        yield op, fault, kind, "prototypes.vectors", given
    for count, kind, given in (
        ([1, 2, 3], TypeError, "list"),
        (torch.ones(3), TypeError, "float32"),
        (torch.ones(2).long(), ValueError, "(2,)"),
        (torch.tensor([1, 6, 0]), ValueError, "[1, 6, 0]"),
        (torch.tensor([1, -1, 0]), ValueError, "[1, -1, 0]"),
    ):
        fault = {name: PrototypeBank(bank().vectors, count), "kind": "bank"}
        yield op, fault, kind, "prototypes.count", given


FAULTS = [
    *((op, {name: value}, kind, name, given) for op in OPS for name, value, kind, given in generic(op)),
    *settings(),
    *special(),
]


def label_of(fault):
    op, _, _, name, given = fault
    return f"{op}-{name}-{given}".replace(" ", "")[:70]


@pytest.mark.parametrize("fault", FAULTS, ids=label_of)
def test_a_fault_is_named_alike_on_every_backend(fault):
    op, wrong, kind, name, given = fault
    messages = set()
    for backend in ("auto", *dict.fromkeys(x.values[0] for x in cpu_backends(op))):
        with pytest.raises(kind) as caught:
            getattr(F, op)(**{**good(op), **wrong}, backend=backend)
        assert type(caught.value) is kind
        messages.add(str(caught.value))
    assert len(messages) == 1, messages
    message = messages.pop()
    assert name in message.split("\n")[0] and given in message, message


def test_every_argument_has_a_fault():
    for op in OPS:
        names = set(getattr(F, op).__annotations__) - {"backend", "return"}
        tested = {name for fault in FAULTS if fault[0] == op for name in fault[1]}
        assert names <= tested, f"{op}: {names - tested}"


@pytest.mark.parametrize("op", OPS)
def test_what_the_faults_are_changes_of_is_taken(op):
    for backend in cpu_backends(op):
        run(op, backend.values[0], good(op))


def test_statistics_of_other_classes_do_not_merge():
    with pytest.raises(ValueError, match=r"other .*\(5, 4\).*\(3, 4\)"):
        statistics().merge(statistics(5))
    with pytest.raises(TypeError, match="other must be ClassStatistics, got Tensor"):
        statistics().merge(tensor(3, 4))


# ops whose first tensors alone have a gradient
DIFFERENTIABLE = {"cycle_association_loss": 2, "category_pool": 2}
CONSTANT = ("cycle_match", "upsample_confusion", "class_statistics")


def flat(found):
    if isinstance(found, torch.Tensor):
        return [found]
    parts = vars(found).values() if dataclasses.is_dataclass(found) else found
    return [x for part in parts for x in flat(part)]


def run(op, backend, arguments):
    """Results and gradients."""
    leaves = [] if op in CONSTANT else tensors(op)[: DIFFERENTIABLE.get(op, 1)]
    given = {**arguments, **{name: arguments[name].detach().requires_grad_() for name in leaves}}
    found = flat(getattr(F, op)(**given, backend=backend))
    if not leaves:
        return found
    out = found[0]
    assert out.requires_grad
    total = (out * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)).sum()
    return [*found, *torch.autograd.grad(total, [given[name] for name in leaves])]


def assert_alike(op, arguments):
    wanted = run(op, "reference", arguments)
    for backend in cpu_backends(op):
        found = run(op, backend.values[0], arguments)
        for one, two in zip(found, wanted, strict=True):
            assert one.dtype == two.dtype and torch.isfinite(one).all(), (backend.id, one)
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    return wanted


def edges():
    one_class = {"labels": torch.zeros(2, 7, 9).long()}
    none = labels(0, 7, 9)
    yield "cycle_match", dict(source=tensor(0, 5, 4), target=tensor(0, 3, 4))
    yield "cycle_match", dict(source=tensor(2, 1, 1), target=tensor(2, 1, 1))
    for contrast in (True, False):
        for b, n, m, c in ((0, 5, 3, 4), (1, 1, 1, 1), (2, 1, 3, 4), (2, 5, 1, 4)):
            yield (
                "cycle_association_loss",
                dict(source=tensor(b, n, c), target=tensor(b, m, c), labels=labels(b, n), contrast=contrast),
            )
        for shape in ((0, 5, 4), (1, 1, 1), (2, 1, 4)):
            yield "spatial_aggregate", dict(x=tensor(*shape), contrast=contrast)
    yield "cycle_association_loss", {"labels": labels(2, 5) - 2}
    yield from (("spatial_aggregate", {"alpha": alpha}) for alpha in (0, 1))
    yield from (("contrast_softmax", dict(x=tensor(*s))) for s in ((0, 4), (3, 0, 4), (1,), (2, 1)))
    yield "contrast_softmax", dict(x=torch.ones(2, 4))
    for op, name in (("local_affinity", "p"), ("affinity_cleaning_loss", "logits")):
        for shape in ((0, 3, 4, 5), (1, 1, 1, 1), (2, 1, 4, 5), (2, 3, 1, 5)):
            yield op, {name: tensor(*shape) / 2}
    yield from (("local_affinity", {"distance": d, "neighbours": 4}) for d in (5, 10**12))
    for reduction in ("mean", "sum", "none"):
        op = "upsample_cross_entropy"
        yield op, dict(logits=tensor(0, 3, 4, 5), labels=none, reduction=reduction)
        yield op, dict(logits=tensor(0, 3, 4, 5), labels=tensor(0, 3, 7, 9), reduction=reduction)
        yield op, dict(logits=tensor(2, 1, 4, 5), **one_class, reduction=reduction)
        yield op, dict(logits=tensor(2, 3, 1, 1), labels=labels(2, 1, 1), reduction=reduction)
        yield op, dict(labels=labels(2, 7, 9) * 0 + 255, reduction=reduction)
        yield op, dict(class_weight=torch.zeros(3), reduction=reduction)
        yield op, dict(class_weight=torch.tensor([1, 0, 2]), pixel_weight=labels(2, 7, 9) == 1)
    yield "upsample_cross_entropy", {"label_smoothing": 1}
    yield "upsample_confusion", dict(x=tensor(0, 3, 4, 5), labels=none)
    yield "upsample_confusion", dict(x=tensor(2, 1, 4, 5), **one_class)
    for settings in (
        {},
        {"per_image": True},
        {"from_logits": True},
        {"from_logits": True, "per_image": True},
    ):
        op = "lovasz_softmax"
        yield op, dict(x=tensor(0, 3, 4, 5), labels=labels(0, 4, 5), **settings)
        yield op, dict(x=torch.full((2, 1, 7, 9), 0.5), **one_class, **settings)
        yield op, dict(labels=labels(2, 4, 5) * 0 + 255, **settings)
    yield "lovasz_softmax", dict(x=tensor(1, 3, 1, 1), labels=labels(1, 2, 2), from_logits=True)
    for encode in ("source", "target"):
        for hard in (None, 0, 1):
            rest = dict(encode=encode, hard_threshold=hard)
            for b, k, h, w in ((0, 3, 4, 5), (2, 1, 4, 5), (1, 1, 1, 1)):
                d, z = tensor(b, 2 * k, h, w), tensor(b, k, h, w)
                yield "domain_cross_entropy", dict(domain_logits=d, seg_logits=z, **rest)
                yield "domain_cross_entropy", dict(domain_logits=d, seg_logits=z, size=[7, 9], **rest)
    yield "domain_cross_entropy", {"clip": 1}
    yield "domain_cross_entropy", {"seg_logits": tensor(2, 3, 4, 5, dtype=torch.float64)}
    yield "class_statistics", dict(features=tensor(0, 4), labels=labels(0))
    yield "class_statistics", dict(features=tensor(1, 1), labels=labels(1), num_classes=1)
    yield "class_statistics", dict(labels=labels(11) - 2)
    for kind in ("dist", "proto", "bank"):
        op, make = "prototype_contrast", bank if kind == "bank" else statistics
        yield op, dict(features=tensor(0, 4), labels=labels(0), prototypes=make(), kind=kind)
        yield op, dict(features=tensor(1, 4), labels=labels(1), prototypes=make(), kind=kind)
        yield op, dict(labels=torch.zeros(11).long(), prototypes=make(classes=1), kind=kind)
        yield op, dict(features=tensor(11, 1), prototypes=make(width=1), kind=kind)
        yield op, dict(labels=labels(11) * 0 + 255, prototypes=make(), kind=kind)
    yield from (
        ("prototype_contrast", dict(prototypes=bank(count=count), kind="bank"))
        for count in ([0, 0, 0], [5, 5, 5], [0, 1, 5])
    )
    yield from (("smooth_max_pool", dict(logits=tensor(*s))) for s in ((0, 3, 4, 5), (1, 1, 1, 1)))
    for b, n, c, k in ((0, 5, 4, 3), (1, 1, 1, 1), (2, 1, 4, 3), (2, 5, 4, 1)):
        yield "category_pool", dict(features=tensor(b, n, c), logits=tensor(b, n, k))
    for mixed in ({"logits": torch.float64}, {"features": torch.float64}, {"logits": torch.bfloat16}):
        yield "category_pool", {k: good("category_pool")[k].to(dtype) for k, dtype in mixed.items()}


@pytest.mark.parametrize(("op", "changes"), list(edges()))
def test_legal_edges_have_one_result(op, changes):
    assert_alike(op, {**good(op), **changes})


LOSSES = ("cycle_association_loss", "affinity_cleaning_loss", "upsample_cross_entropy", "lovasz_softmax")


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (4, 1)])
def test_one_key_is_matched_without_rounding(n, m, similarity):
    for seed in range(10):
        x, y = rows(3, n, 5, seed, similarity).float(), rows(3, m, 5, seed + 10, similarity).float()
        same = torch.zeros(3, n).long()
        assert_alike("cycle_association_loss", dict(source=x, target=y, labels=same, similarity=similarity))
        if n == 1:
            found = assert_alike("spatial_aggregate", dict(x=x, similarity=similarity))
            torch.testing.assert_close(found[0], x)


@pytest.mark.parametrize("op", (*LOSSES, "domain_cross_entropy", "prototype_contrast"))
def test_a_loss_of_no_images_is_zero(op):
    arguments = {
        name: x[:0] if isinstance(x, torch.Tensor) and name != "prototypes" else x
        for name, x in good(op).items()
    }
    assert run(op, "auto", arguments)[0].item() == 0


def strided(x):
    """The same values between others."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 1)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(op):
    arguments = good(op)
    for change in (strided, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
        turned = {k: change(x) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
        assert_alike(op, turned)
        for one, two in zip(run(op, "auto", turned), run(op, "auto", arguments), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("op", OPS)
def test_expanded_tensors_are_their_copies(op):
    expanded = {k: x[:1].expand(x.shape) if isinstance(x, torch.Tensor) else x for k, x in good(op).items()}
    assert_alike(op, expanded)
    copied = {k: x.contiguous() if isinstance(x, torch.Tensor) else x for k, x in expanded.items()}
    for one, two in zip(run(op, "auto", expanded), run(op, "auto", copied), strict=True):
        torch.testing.assert_close(one, two)


LABELLED = [op for op in OPS if "labels" in good(op)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
@pytest.mark.parametrize("op", LABELLED)
def test_labels_of_any_width(op, dtype):
    arguments = good(op)
    wide = arguments["labels"].clamp(max=3)
    found = assert_alike(op, {**arguments, "labels": wide.to(dtype), "ignore_index": 3})
    wanted = run(op, "reference", {**arguments, "labels": wide, "ignore_index": 3})
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("op", LABELLED)
def test_an_ignore_index_that_the_labels_cannot_hold(op):
    arguments = good(op)
    arguments["labels"] = arguments["labels"].clamp(max=2)
    wanted = run(op, "reference", arguments)
    for ignore_index in (-1, 258, -100):
        given = {**arguments, "labels": arguments["labels"].to(torch.uint8), "ignore_index": ignore_index}
        for one, two in zip(assert_alike(op, given), wanted, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("value", [3, -1, 2**40])
@pytest.mark.parametrize("op", ["upsample_cross_entropy", "lovasz_softmax"])
def test_labels_that_are_not_read_are_left_out(op, value, monkeypatch):
    monkeypatch.setattr(_checks, "may_read", lambda x: False)
    arguments = good(op)
    foreign = stray(arguments["labels"], value)
    wanted = run(op, "reference", {**arguments, "labels": stray(arguments["labels"], 255)})
    for one, two in zip(assert_alike(op, {**arguments, "labels": foreign}), wanted, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["dist", "proto", "bank"])
def test_a_contrast_with_a_label_that_is_not_read_is_nan(kind, monkeypatch):
    monkeypatch.setattr(_checks, "may_read", lambda x: False)
    prototypes = bank() if kind == "bank" else statistics()
    for value in (3, -1):
        y = stray(labels(11), value)
        loss = F.prototype_contrast(tensor(11, 4), y, prototypes, kind=kind, backend="reference")
        assert loss.isnan()


def test_a_count_that_is_not_read_counts_no_further_than_the_bank(monkeypatch):
    monkeypatch.setattr(_checks, "may_read", lambda x: False)
    given = {**good("prototype_contrast"), "kind": "bank"}
    found = assert_alike("prototype_contrast", {**given, "prototypes": bank(count=[9, 5, -2])})
    wanted = run("prototype_contrast", "reference", {**given, "prototypes": bank(count=[5, 5, 0])})
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("op", ["upsample_cross_entropy", "prototype_contrast", "cycle_association_loss"])
def test_checks_ask_nothing_of_tensors_without_values(op):
    backend = cpu_backends(op)[0].values[0]
    if backend == "reference":
        pytest.skip("the reference's boolean indices have no fake")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = good(op)
        given = {k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
        assert flat(getattr(F, op)(**given))[0].shape == ()


def test_shapes_are_worked_out_on_the_meta_device():
    x = torch.empty(2, 9, 5, device="meta").requires_grad_()
    assert F.spatial_aggregate(x).shape == x.shape
    loss, stats = F.cycle_association_loss(x, x[:, :4], torch.empty(2, 9, dtype=torch.int64, device="meta"))
    assert loss.is_meta and stats.forward_index.shape == (2, 9)
    loss.backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", cpu_backends("upsample_cross_entropy"))
def test_no_gradient_flows_to_labels_and_weights(backend, reduction):
    logits = tensor(2, 3, 4, 5).requires_grad_()
    soft, by_class, by_pixel = (x.requires_grad_() for x in (tensor(2, 3, 7, 9), tensor(3), tensor(2, 7, 9)))
    rest = dict(class_weight=by_class, pixel_weight=by_pixel, reduction=reduction, backend=backend)
    loss = F.upsample_cross_entropy(logits, soft, **rest).sum()
    found = torch.autograd.grad(loss, (logits, soft, by_class, by_pixel), allow_unused=True)
    assert found[0] is not None and found[1:] == (None, None, None)
    assert not F.upsample_cross_entropy(logits.detach(), soft, **rest).requires_grad


def test_more_classes_than_the_kernel_of_lovasz_takes():
    x, y = tensor(1, 255, 2, 2).softmax(1), torch.zeros(1, 2, 2).long()
    assert F.lovasz_softmax(x, y) == F.lovasz_softmax(x, y, backend="reference")
    if "cpu" in [x.id for x in cpu_backends("lovasz_softmax")]:
        with pytest.raises(ValueError, match="at most 254 classes, not 255"):
            F.lovasz_softmax(x, y, backend="cpu")
