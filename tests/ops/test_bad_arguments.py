"""What no op may be given: every op, every argument, every backend that runs here; and the edges that are
legal.

A fault is refused with one message on every backend, which names the argument and what was given. Legal edges
give on every backend what the reference gives, and nothing that is not finite.
"""

import inspect
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastuda.ops as F
from fastuda.ops import _checks
from tests.cases import OPS, case, every, good
from tests.cases._inputs import bank, labels, statistics, stray, tensor
from tests.helpers import cpu_backends, flat, rows, run, tensors


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Waking a second thread costs more than these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_tensors(op):
    """The faults that every tensor can have."""
    any_rank = getattr(case(op), "ANY_RANK", False)
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
        if not any_rank:
            yield name, x[0], ValueError, str(tuple(x[0].shape))
            yield name, x[None], ValueError, str((1, *x.shape))
        for axis in range(1, x.dim()):
            if not any_rank or axis == x.dim() - 1:
                empty = x.narrow(axis, 0, 0)
                yield name, empty, ValueError, str(tuple(empty.shape))
        if position:
            yield name, x.to("meta"), ValueError, "meta"
            yield name, x[:-1], ValueError, str(tuple(x[:-1].shape))


WRONG = {  # by annotation: values of another type, values out of range
    "float": (("1", True, [1.0], torch.tensor(0.5)), (-0.1, math.nan, math.inf)),
    "int": (("1", True, 1.5, None, torch.tensor(4)), (10**30,)),
    "bool": ((None, 1, "no"), ()),
    "str": ((), ("dot", None, 3, ["kl"])),
}


def of_settings(op):
    """The faults that the signature tells, and those of ``BAD``."""
    for name, parameter in inspect.signature(getattr(F, op)).parameters.items():
        kind = str(parameter.annotation).removesuffix(" | None")
        if name == "backend" or kind not in WRONG:
            continue
        types, values = WRONG[kind]
        for value in types:
            yield name, value, TypeError, "Tensor" if isinstance(value, torch.Tensor) else repr(value)
        for value in (*values, *getattr(case(op), "BAD", {}).get(name, ())):
            yield name, value, ValueError, repr(value)


FAULTS = [
    *((op, {name: value}, *rest[:1], name, *rest[1:])
      for op in OPS for name, value, *rest in (*of_tensors(op), *of_settings(op))),
    *every("faults"),
]  # fmt: skip


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


def assert_alike(op, arguments):
    wanted = run(op, "reference", arguments)
    for backend in cpu_backends(op):
        found = run(op, backend.values[0], arguments)
        for one, two in zip(found, wanted, strict=True):
            assert one.dtype == two.dtype and torch.isfinite(one).all(), (backend.id, one)
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    return wanted


@pytest.mark.parametrize(("op", "changes"), every("edges"))
def test_legal_edges_have_one_result(op, changes):
    assert_alike(op, {**good(op), **changes})


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


@pytest.mark.parametrize("op", [op for op in OPS if flat(getattr(F, op)(**good(op)))[0].dim() == 0])
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
