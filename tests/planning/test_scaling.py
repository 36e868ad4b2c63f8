"""The predictions of the page on scaling: worked out by hand where that is possible, and the page itself."""

from pathlib import Path

import pytest

from pipeline.planning.scaling import A100, A100_ETHERNET, HOP, PGM_8_8, break_even, predict, report

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
LOGITS = 2 * 4 * 2**27  # two chunks of float32
FACTS = (10**9, 1e12, 1e9, 1e8)  # parameters, FLOP a row, bytes kept of a row, logits of a row


def test_one_gpu_only_computes() -> None:
    found = predict(*FACTS, rows=64, gpus=1, gpu=A100, share=0.5)
    assert found.communication == 0
    assert found.compute == pytest.approx(64e12 / 156e12)
    # Weights and gradients, 16 bytes of float32 state, activations of one micro-batch of 32, chunks of logits.
    assert found.memory == pytest.approx(4e9 + 16e9 + 32e9 + LOGITS)
    assert found.optimiser == pytest.approx(32e9 / 2039e9)
    assert found.largest == "compute"


def test_communication_by_hand() -> None:
    within = predict(*FACTS, rows=1, gpus=4, gpu=A100, share=0.5)
    assert within.communication == pytest.approx(2 * (2e9 * 3 / 4 / 300e9 + 2 * HOP))
    across = predict(*FACTS, rows=1, gpus=16, gpu=A100, share=0.5)
    assert across.communication == pytest.approx(2 * (2e9 * 15 / 16 / 200e9 + 4 * HOP))
    slow = predict(*FACTS, rows=1, gpus=16, gpu=A100_ETHERNET, share=0.5)
    assert slow.communication > 10 * across.communication
    assert slow.largest == "communication"
    assert slow.efficiency == pytest.approx(slow.compute / slow.step)


@pytest.mark.parametrize(("stage", "whole", "collectives"), [(0, 20, 2), (1, 4, 2), (2, 2, 2), (3, 0, 3)])
def test_zero_stages(stage: int, whole: int, collectives: int) -> None:
    """`whole`: bytes a parameter that every GPU holds, however many there are."""
    found = predict(*FACTS, rows=32, gpus=512, gpu=A100, share=0.5, stage=stage)  # type: ignore[arg-type]
    parts = (20 - whole) * 1e9 / 512
    assert found.memory == pytest.approx(whole * 1e9 + parts + 32e9 + LOGITS)
    each = 2e9 * 511 / 512 / 200e9 + 9 * HOP
    assert found.communication == pytest.approx(collectives * each)
    twice = predict(*FACTS, rows=64, gpus=512, gpu=A100, share=0.5, stage=stage)  # type: ignore[arg-type]
    assert twice.communication == pytest.approx(found.communication * (2 if stage == 3 else 1))


def test_break_even_is_where_the_terms_meet() -> None:
    rows = break_even(PGM_8_8, A100_ETHERNET, PGM_8_8.share, 64)
    facts = (PGM_8_8.parameters, PGM_8_8.flops_of_a_row, 0.0, 0.0)
    found = predict(*facts, rows, 64, A100_ETHERNET, PGM_8_8.share)
    assert found.compute == pytest.approx(found.communication)


def test_the_recipe_is_the_papers() -> None:
    assert PGM_8_8.parameters == pytest.approx(193.0e6, rel=0.001)
    assert 0.1 < PGM_8_8.share < 0.6


def test_the_page_holds_what_is_computed() -> None:
    assert report().strip() in PAGE.read_text(encoding="utf-8"), "python -m pipeline.planning.scaling"
