"""The predictions of the page on scaling: worked out by hand where that is possible, and the page itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.planning.memory import Activations
from pipeline.planning.scaling import (
    A100,
    A100_ETHERNET,
    HOP,
    Workload,
    break_even,
    paper_workloads,
    predict,
    report,
)
from pipeline.planning.step_time import LAUNCH, PRODUCTS, MicroBatch, Part

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
LOGITS = 8 * 2**28  # of a chunk, and log-probabilities, in float32


def work(rows: float) -> MicroBatch:
    """A row takes 1 TFLOP of products, and a micro-batch as much time as 1,000 launches at least."""
    return MicroBatch({PRODUCTS: Part(rows * 1e12, 1.0)}, 1000, half=True)


WORKLOAD = Workload("", 10**9, 1e12, Activations(per_row=1e9, logits=1e8), work, published=156)


def test_one_gpu_only_computes() -> None:
    step = predict(WORKLOAD, A100, gpus=1, rows=64)
    assert step.communication == 0
    assert step.compute == pytest.approx(64e12 / (312e12 * A100.gpu.products))
    assert predict(WORKLOAD, A100, gpus=64, rows=1).compute == pytest.approx(1000 * LAUNCH)
    # Weights and gradients, 16 bytes of float32 state, activations of one micro-batch of 32, a chunk of logits.
    assert step.memory == pytest.approx(4e9 + 16e9 + 32e9 + LOGITS)
    assert step.optimiser == pytest.approx(32e9 / 2039e9)
    assert step.largest == "compute"


def test_communication_by_hand() -> None:
    within = predict(WORKLOAD, A100, gpus=4, rows=1)
    assert within.communication == pytest.approx(2 * (2e9 * 3 / 4 / 300e9 + 2 * HOP))
    across = predict(WORKLOAD, A100, gpus=16, rows=1)
    assert across.communication == pytest.approx(2 * (2e9 * 15 / 16 / 200e9 + 4 * HOP))
    slow = predict(WORKLOAD, A100_ETHERNET, gpus=16, rows=1)
    assert slow.communication > 10 * across.communication
    assert slow.largest == "communication"
    assert slow.efficiency == pytest.approx(slow.compute / slow.step)


@pytest.mark.parametrize(("stage", "whole", "collectives"), [(0, 20, 2), (1, 4, 2), (2, 2, 2), (3, 0, 3)])
def test_zero_stages(stage: int, whole: int, collectives: int) -> None:
    """`whole`: bytes per parameter that every GPU holds, however many there are."""
    step = predict(WORKLOAD, A100, gpus=512, rows=32, stage=stage)  # type: ignore[arg-type]
    divided = (20 - whole) * 1e9 / 512
    assert step.memory == pytest.approx(whole * 1e9 + divided + 32e9 + LOGITS)
    each = 2e9 * 511 / 512 / 200e9 + 9 * HOP
    assert step.communication == pytest.approx(collectives * each)
    twice = predict(WORKLOAD, A100, gpus=512, rows=64, stage=stage)  # type: ignore[arg-type]
    assert twice.communication == pytest.approx(step.communication * (2 if stage == 3 else 1))


def test_few_logits_are_not_a_whole_chunk() -> None:
    small = replace(WORKLOAD, activations=Activations(per_row=1e9, logits=1e6))
    memory = predict(small, A100, gpus=1, rows=2).memory
    assert memory == pytest.approx(20e9 + 2e9 + 8 * 2e6)


def test_break_even_is_where_the_terms_meet() -> None:
    workload, _ = paper_workloads()
    rows = break_even(workload, A100_ETHERNET, gpus=64)
    step = predict(workload, A100_ETHERNET, gpus=64, rows=rows)
    assert step.compute == pytest.approx(step.communication, rel=1e-4)
    assert break_even(workload, A100, gpus=64) == 0, "launches take longer than communication"


def test_the_recipe_is_the_papers() -> None:
    workload, _ = paper_workloads()
    assert workload.parameters == pytest.approx(193.0e6, rel=0.001)
    assert 1 < 32 / workload.seconds(A100.gpu, 32) / workload.published < 3


def test_the_page_holds_what_is_computed() -> None:
    assert report().strip() in PAGE.read_text(encoding="utf-8"), "python -m pipeline.planning.scaling"
