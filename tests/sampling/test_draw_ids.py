"""Draws without certainty are the draws with it."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.head import Head
from pipeline.sampling import logits as drawing
from pipeline.sampling.logits import Filters, Guidance, draw_tokens

V, H, ROWS = 13, 8, 200


def rows() -> tuple[Head, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = Head(H, V).double()  # products of other numbers of rows differ by rounding
    nn.init.normal_(head.weight, generator=generator)
    hidden, other = torch.randn(2, ROWS, H, generator=generator, dtype=torch.float64)
    return head, hidden, other, torch.rand(ROWS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("filters", [Filters(), Filters(0.7), Filters(top_k=3), Filters(1.3, None, 0.8)])
@pytest.mark.parametrize("guidance", [None, 1.5])
@torch.no_grad()
def test_the_same_tokens(filters: Filters, guidance: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, other, noise = rows()
    guided = None if guidance is None else Guidance(other, guidance)
    expected = draw_tokens(head, hidden, noise, filters, guided, certainty=True)
    assert draw_tokens(head, hidden, noise, filters, guided).tokens.tolist() == expected.tokens.tolist()
    # Neither how many rows the head takes, nor how many are drawn together, is to be seen in the result.
    monkeypatch.setattr(drawing, "CHUNK_LOGITS", {"cpu": 7 * V})
    monkeypatch.setattr(drawing, "_CHUNK_DOUBLES", {"cpu": 3 * V})
    assert draw_tokens(head, hidden, noise, filters, guided).tokens.tolist() == expected.tokens.tolist()
    cut = draw_tokens(head, hidden, noise, filters, guided, certainty=True)
    for part, whole in zip(cut, expected, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-10, rtol=0)


@torch.no_grad()
def test_by_the_cumulative_distribution_in_plain_form() -> None:
    head, hidden, _, noise = rows()
    cumulative = head(hidden).double().softmax(-1).cumsum(-1)
    expected = [next(i for i in range(V) if row[i] > u) for row, u in zip(cumulative, noise, strict=True)]
    assert draw_tokens(head, hidden, noise).tokens.tolist() == expected


def test_what_is_given_is_not_written_to() -> None:
    class Given(Head):
        def forward(self, hidden: Tensor, places: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return hidden

    logits, noise = torch.randn(5, V, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    before = logits.clone()
    draw_tokens(Given(V, V), logits, noise)
    draw_tokens(Given(V, V), logits, noise, certainty=True)
    assert torch.equal(logits, before)


def test_ids_of_probability_0_are_never_drawn() -> None:
    head = Head(1, 4)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]))
    noise = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    with torch.no_grad():
        drawn = draw_tokens(head, torch.zeros(4, 1), noise, certainty=True)
        ids = draw_tokens(head, torch.zeros(4, 1), noise).tokens
    assert drawn.tokens.tolist() == ids.tolist() == [1, 1, 2, 2]
    torch.testing.assert_close(drawn.entropy, torch.full((4,), 2.0, dtype=torch.float64).log())
