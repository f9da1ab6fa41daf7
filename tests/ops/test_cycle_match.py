"""cycle_match against the literal definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import EPS, as_good_match, cpu_backends, rows, similarity, wave

BACKENDS = cpu_backends("cycle_match")
KINDS = ["cosine", "kl"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_matches(backend):
    source, target = (
        x.flatten(2).transpose(1, 2) for x in (wave((2, 6, 4, 5), 0.11), wave((2, 6, 3, 6), 0.23))
    )
    match = F.cycle_match(source, target, backend=backend)
    assert match.forward_index[0].tolist() == [
        17, 6, 10, 12, 12, 3, 6, 17, 14, 15, 16, 9, 14, 12, 12, 3, 10, 13, 0, 13,
    ]  # fmt: skip
    end = match.backward_index.gather(1, match.forward_index)
    assert end[0].tolist() == [7, 6, 16, 4, 4, 19, 6, 7, 8, 9, 18, 11, 8, 4, 4, 19, 16, 19, 18, 19]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("b", "n", "m", "c"), [(1, 1, 1, 1), (2, 63, 97, 19), (1, 97, 1, 5), (3, 128, 65, 64)]
)
def test_matches_the_definition(backend, kind, dtype, b, n, m, c):
    source, target = rows(b, n, c, 1, kind).to(dtype), rows(b, m, c, 2, kind).to(dtype)
    match = F.cycle_match(source, target, similarity=kind, backend=backend)
    sim = similarity(source.double(), target.double(), kind)
    back = similarity(target.double(), source.double(), kind)
    # fused kernels round the normalised rows (or the logarithms) to the input's dtype before the product
    slack = 8 * EPS[dtype] * max(1.0, sim.abs().max().item())
    as_good_match(match.forward_index, sim, slack)
    as_good_match(match.backward_index, back, slack)
    assert (match.forward_similarity.double() - sim.amax(-1)).abs().max() <= slack
    assert (match.backward_similarity.double() - back.amax(-1)).abs().max() <= slack
    assert match.forward_index.dtype == torch.int64
    assert match.forward_similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_lowest_index(backend, kind):
    one = rows(1, 1, 16, 3, kind).float()
    match = F.cycle_match(one.expand(1, 70, 16), one.expand(1, 300, 16), similarity=kind, backend=backend)
    assert match.forward_index.eq(0).all() and match.backward_index.eq(0).all()
    target = rows(1, 40, 16, 4, kind).float()
    doubled = torch.cat([target, target, target], 1)
    match = F.cycle_match(target, doubled, similarity=kind, backend=backend)
    assert match.forward_index.max() < 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend):
    source = torch.randn(2, 32, 50).transpose(1, 2)
    target = torch.randn(2, 80, 64)[:, ::2, ::2]
    found = F.cycle_match(source, target, backend=backend)
    wanted = F.cycle_match(source.contiguous(), target.contiguous(), backend=backend)
    assert torch.equal(found.forward_index, wanted.forward_index)
    assert torch.allclose(found.backward_similarity, wanted.backward_similarity, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3), n=st.integers(1, 70), c=st.integers(2, 40), seed=st.integers(0, 99))
def test_an_image_matched_to_itself_stays_where_it_is(backend, b, n, c, seed):
    x = rows(b, n, c, seed).float()
    match = F.cycle_match(x, x, backend=backend)
    assert (match.forward_similarity - 1).abs().max() < 1e-5
    same = x.gather(1, match.forward_index[..., None].expand_as(x))
    cosine = torch.cosine_similarity(same, x, dim=-1)
    assert (cosine - 1).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 60), m=st.integers(2, 60), seed=st.integers(0, 99))
def test_permuting_the_target_permutes_the_matches(backend, n, m, seed):
    source, target = rows(1, n, 24, seed), rows(1, m, 24, seed + 1)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    plain = F.cycle_match(source, target, backend=backend)
    moved = F.cycle_match(source, target[:, order], backend=backend)
    assert torch.equal(order[moved.forward_index[0]], plain.forward_index[0])
    assert torch.equal(moved.backward_index[0], plain.backward_index[0][order])


def test_bad_input_is_named():
    x = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match=r"source must be \[B, N, C\], got shape \(4, 3\)"):
        F.cycle_match(x[0], x)
    with pytest.raises(ValueError, match="must share batch and channels"):
        F.cycle_match(x, torch.randn(1, 4, 5))
    with pytest.raises(ValueError, match="must share dtype"):
        F.cycle_match(x, x.double())
    with pytest.raises(ValueError, match="similarity must be one of cosine, kl"):
        F.cycle_match(x, x, similarity="dot")
    with pytest.raises(ValueError, match="no pixels"):
        F.cycle_match(x[:, :0], x)
    with pytest.raises(TypeError, match="floating point"):
        F.cycle_match(x.long(), x.long())
