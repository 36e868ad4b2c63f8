"""Attention inside segments against one dense mask over everything, in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.models import attention
from pipeline.models.attention import Segments, attend

HEADS, SIZE = 2, 4
Kernel = Callable[[Tensor, Tensor, Tensor, Segments, Segments], Tensor]
PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)
# Largest difference, relative to the largest entry where that exceeds 1.
NEAR = {torch.float64: 1e-10, torch.float32: 1e-5}
LENGTHS = st.one_of(st.sampled_from([0, 0, 1]), st.integers(0, 9))


def inputs(q_total: int, k_total: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v that want gradients, and a direction in which the output is differentiated."""
    generator = torch.Generator().manual_seed(1000 * q_total + k_total)
    totals = (q_total, k_total, k_total, q_total)
    made = [torch.randn(n, HEADS, SIZE, generator=generator).to(dtype) for n in totals]
    return [*(x.requires_grad_() for x in made[:3]), made[3]]


def dense(q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Tensor:
    """The oracle: softmax over one [Tq, Tk] mask, 0 where a query may see nothing."""
    numbers = torch.arange(len(q_lengths))
    q_ids = numbers.repeat_interleave(torch.tensor(q_lengths))
    k_ids = numbers.repeat_interleave(torch.tensor(k_lengths))
    mask = q_ids[:, None] == k_ids[None, :]  # [Tq, Tk]
    scores = torch.einsum("qnd,knd->nqk", q, k) / SIZE**0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    seen = mask.any(1)
    scores = torch.where(seen[:, None], scores, 0.0)  # rows that see nothing would be NaN
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v) * seen[:, None, None]


def agree(kernel: Kernel, q_segments: Segments, k_segments: Segments) -> None:
    """Output and all gradients of a kernel are the oracle's, and exactly 0 without keys."""
    for dtype in NEAR:
        agree_in(dtype, kernel, q_segments, k_segments)


def agree_in(dtype: torch.dtype, kernel: Kernel, q_segments: Segments, k_segments: Segments) -> None:
    *mine, direction = inputs(q_segments.total, k_segments.total, dtype)
    *theirs, _ = inputs(q_segments.total, k_segments.total, torch.float64)
    out = kernel(*mine, q_segments, k_segments)
    expected = dense(*theirs, q_segments.lengths, k_segments.lengths)
    close(out, expected)
    blind = torch.tensor(k_segments.lengths).eq(0)[q_segments.ids]
    assert out[blind].eq(0).all()
    grads = torch.autograd.grad((out * direction).sum(), mine)
    wanted = torch.autograd.grad((expected * direction).sum(), theirs)
    for got, want in zip(grads, wanted, strict=True):
        assert got.isfinite().all()
        close(got, want)


def close(found: Tensor, expected: Tensor) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected, atol=NEAR[found.dtype] * max(1.0, largest), rtol=0)


def sees_something(kernel: Kernel) -> Kernel:
    """The kernel as `attend` calls it: not where no query sees any key, which `attend` answers itself."""

    def guarded(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments) -> Tensor:
        pairs = zip(q_segments.lengths, k_segments.lengths, strict=True)
        chosen = kernel if any(queries and keys for queries, keys in pairs) else attend
        return chosen(q, k, v, q_segments, k_segments)

    return guarded


KERNELS = [
    pytest.param(attend, id="attend"),
    pytest.param(sees_something(attention._each), id="each"),
    pytest.param(sees_something(attention._masked), id="masked"),
]


@pytest.mark.parametrize("kernel", KERNELS)
@PROPERTY
@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=6))
@example([(3, 0), (0, 4), (0, 0), (2, 5)])
@example([(3, 0), (2, 0)])
@example([(0, 2), (0, 3)])
def test_cross_attention(kernel: Kernel, lengths: list[tuple[int, int]]) -> None:
    agree(kernel, Segments([q for q, _ in lengths]), Segments([k for _, k in lengths]))


@pytest.mark.parametrize("kernel", KERNELS)
@PROPERTY
@given(st.lists(LENGTHS, min_size=1, max_size=6))
@example([0, 5, 1])
@example([0, 0])
def test_self_attention(kernel: Kernel, lengths: list[int]) -> None:
    segments = Segments(lengths)
    agree(kernel, segments, segments)


@PROPERTY
@given(st.integers(1, 4), st.integers(0, 8), st.integers(0, 8))
def test_segments_of_one_length(count: int, q_length: int, k_length: int) -> None:
    q_segments, k_segments = Segments([q_length] * count), Segments([k_length] * count)
    agree(attend, q_segments, k_segments)
    if q_length and k_length:
        agree(lambda q, k, v, *_: attention._equal(q, k, v, count), q_segments, k_segments)


@pytest.mark.parametrize("kernel", KERNELS)
@PROPERTY
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4),
)
@example(6, 4, [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_windows(kernel: Kernel, q_window: int, k_window: int, cuts: list[tuple[float, float]]) -> None:
    """Two segments in each window, as training packs them; a segment may be empty and its partner full."""
    q_lengths, k_lengths = [], []
    for q_cut, k_cut in cuts:
        q_first, k_first = round(q_cut * q_window), round(k_cut * k_window)
        q_lengths += [q_first, q_window - q_first]
        k_lengths += [k_first, k_window - k_first]
    agree(kernel, Segments(q_lengths, window=q_window), Segments(k_lengths, window=k_window))


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths", "runs"),
    [
        ([20, 20], [300, 300], "_equal"),
        ([3, 9, 0], [5, 2, 4], "_masked"),
        ([1, 1, 2], [200, 100, 100], "_each"),
        ([200, 100, 100], [1, 1, 2], "_each"),
    ],
)
def test_the_kernel_suits_the_lengths(
    q_lengths: list[int], k_lengths: list[int], runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def recorded(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: (ran.append(name), kernel(*arguments))[1]

    for name in ("_equal", "_masked", "_each"):
        monkeypatch.setattr(attention, name, recorded(name, getattr(attention, name)))
    agree_in(torch.float32, attend, Segments(q_lengths), Segments(k_lengths))
    assert ran == [runs]


def test_no_pair_at_all_keeps_the_graph() -> None:
    """Long segments without one pair (a row whose tokens are all in one group): gradients are 0, not None."""
    agree(attend, Segments([0, 200]), Segments([200, 0]))


def test_segments_know_their_tokens() -> None:
    segments = Segments([2, 0, 3])
    assert segments.boundaries.tolist() == [0, 2, 2, 5]
    assert segments.boundaries.dtype == torch.int32
    assert segments.ids.tolist() == [0, 0, 2, 2, 2]
    assert segments.offsets.tolist() == [0, 1, 0, 1, 2]
    assert (len(segments), segments.total, segments.longest, segments.equal) == (3, 5, 3, False)
    assert Segments([4, 4]).equal
    assert Segments([]).total == 0


def test_partners_must_match() -> None:
    x = torch.zeros(3, HEADS, SIZE)
    with pytest.raises(AssertionError):
        attend(x, x, x, Segments([3]), Segments([1, 2]))
    with pytest.raises(AssertionError):
        attend(x, x, x, Segments([2]), Segments([3]))
    with pytest.raises(AssertionError):
        Segments([2, 3], window=4)
