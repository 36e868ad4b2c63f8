"""Attention on a GPU against a dense mask in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.models.attention import Segments, attend
from tests.models.test_attention import dense

pytestmark = pytest.mark.gpu
HEADS = 3
# Largest difference relative to the largest entry.
NEAR = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}
LENGTHS = {
    "ragged": ([5, 130, 0, 64], [70, 9, 33, 0]),
    "equal": ([64, 64], [32, 32]),
    "short": ([3, 9, 0], [5, 2, 4]),
    "no keys": ([4, 2], [0, 0]),
    "long": ([700, 324], [324, 700]),
}


def causal_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention in every segment, one after the other."""
    outs = []
    for q_i, k_i, v_i in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qnd,knd->nqk", q_i, k_i) / q.shape[-1] ** 0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        outs.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(later, -torch.inf).softmax(-1), v_i))
    return torch.cat(outs)


def check(dtype: torch.dtype, q_lengths: Sequence[int], k_lengths: Sequence[int], causal: bool) -> None:
    """Compare output and gradients."""
    size = 4 if dtype != torch.bfloat16 else 64
    torch.manual_seed(0)
    totals = (sum(q_lengths), sum(k_lengths), sum(k_lengths), sum(q_lengths))
    made = [torch.randn(n, HEADS, size).to(dtype) for n in totals]
    *tensors, direction = [x.cuda() for x in made]
    *references, wanted_direction = [x.double() for x in made]
    for x in (*tensors, *references):
        x.requires_grad_()
    device = torch.device("cuda")
    out = attend(*tensors, Segments(q_lengths, device), Segments(k_lengths, device), causal=causal)
    if causal:
        expected = causal_reference(*references, q_lengths)
    else:
        scaled = references[0] * (4 / size) ** 0.5  # `dense` divides by the root of its own head size
        expected = dense(scaled, *references[1:], q_lengths, k_lengths)
    grads = torch.autograd.grad((out * direction).sum(), tensors)
    wanted = torch.autograd.grad((expected * wanted_direction).sum(), references)
    for found, value in zip((out, *grads), (expected, *wanted), strict=True):
        assert found.dtype == dtype
        largest = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(found.double().cpu(), value, atol=NEAR[dtype] * max(1.0, largest), rtol=0)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", NEAR)
def test_segments(dtype: torch.dtype, name: str) -> None:
    check(dtype, *LENGTHS[name], causal=False)


@pytest.mark.parametrize("lengths", [[5, 130, 64], [64, 64], [3, 9, 1]])
@pytest.mark.parametrize("dtype", NEAR)
def test_causal_segments(dtype: torch.dtype, lengths: list[int]) -> None:
    check(dtype, lengths, lengths, causal=True)
