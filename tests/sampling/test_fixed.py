"""Steps of fixed shape: what they draw, how many shapes there are, and the compiled step."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig, SwapConfig
from pipeline.errors import CapabilityError
from pipeline.models import build
from pipeline.sampling import fixed
from pipeline.sampling.sampler import SamplingRequest, ragged_known, sample
from tests.support.small_models import PGM, randomised, shake

L, V = 16, 11
SIZES = {"hidden": 16, "heads": 2, "dropout": 0.0}
CAUSAL = PGMConfig(encoder="causal", encoder_blocks=2, decoder_blocks=2, **SIZES)
GUIDED = CAUSAL.model_copy(update={"classes": 3, "registers": 2, "swap": SwapConfig(every_block=True)})
AR = ARConfig(kind="ar", blocks=2, **SIZES)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Take the steps of fixed shape on a CPU, uncompiled; the shapes of every step's new tokens and positions."""
    seen: list[tuple[int, ...]] = []

    def step(*inputs: object) -> Tensor:
        _, _, _, new, positions, *_ = inputs
        seen.append((*new.ids.shape, *positions.shape))  # type: ignore[attr-defined]
        return fixed._step(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(fixed, "DEVICES", ("cpu",))
    monkeypatch.setattr(fixed, "compiled_step", lambda _: step)
    return seen


def both(config: PGMConfig | ARConfig, request: SamplingRequest) -> None:
    """Sample in steps of fixed shape and in the usual ones, and compare."""
    model = randomised(config, V, L).double()
    found, expected = (torch.zeros(request.num_samples, L, dtype=torch.int64) for _ in range(2))
    tokens = sample(model, replace(request, compile=True), revealed_at=found)
    assert torch.equal(tokens, sample(model, request, revealed_at=expected))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize(("order", "steps"), [("uniform", 5), ("binomial", 6), ("left_to_right", 15)])
def test_fixed_shapes_draw_the_same_tokens(
    order: str, steps: int, bos: int | None, shapes: list[tuple[int, ...]]
) -> None:
    both(CAUSAL, SamplingRequest(4, steps, seed=1, order=order, bos=bos))
    assert shapes


def test_arccos_counts_take_few_shapes(shapes: list[tuple[int, ...]]) -> None:
    both(CAUSAL, SamplingRequest(2, 6, seed=1, order="halton"))
    assert len(shapes) == 6
    assert len({*shapes}) <= 3


def test_prompts_of_different_lengths(shapes: list[tuple[int, ...]]) -> None:
    known = ragged_known([{0: 1, 5: 2, 9: 4}, {}, dict.fromkeys(range(16), 3), {15: 0}], L)
    both(CAUSAL, SamplingRequest(4, 7, seed=2, order="binomial", known=known))
    both(CAUSAL, SamplingRequest(4, 7, seed=2, known=known))
    assert shapes


def test_guidance_registers_and_repeated_swaps(shapes: list[tuple[int, ...]]) -> None:
    request = SamplingRequest(3, 5, seed=3, condition=torch.tensor([2, 0, 1]), guidance=1.5)
    both(GUIDED, request)
    assert {shape[0] for shape in shapes} == {6}, "every row with its class and without"


def test_an_autoregressive_model_that_starts_from_bos(shapes: list[tuple[int, ...]]) -> None:
    model = shake(build(AR.model_copy(update={"start": "bos"}), V, L, 3)).double()
    request = SamplingRequest(3, L - 1, seed=4, order="left_to_right", bos=3)
    assert torch.equal(sample(model, replace(request, compile=True)), sample(model, request))
    assert shapes


@pytest.mark.parametrize("bos", [None, 3])
def test_autoregressive_steps(bos: int | None, shapes: list[tuple[int, ...]]) -> None:
    both(AR, SamplingRequest(3, L - (bos is not None), seed=1, order="left_to_right", bos=bos))
    assert {*shapes} == {(3, 1, 3, 1)}


def test_autoregressive_prompts(shapes: list[tuple[int, ...]]) -> None:
    known = ragged_known([{0: 1, 1: 2}, {0: 5, 1: 5}], L)
    both(AR.model_copy(update={"registers": 2}), SamplingRequest(2, L - 2, 1, "left_to_right", known=known))
    assert shapes


def test_widths_are_few_and_below_twice_the_need() -> None:
    needed = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 33, 17, 16]
    chosen = fixed.widths(needed)
    assert all(need <= width < 2 * max(need, 1) for need, width in zip(needed, chosen, strict=True))
    assert len({*chosen}) <= 7
    assert fixed.widths([8, 7, 8, 8]) == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("config", "order", "message"),
    [
        (MDLMConfig(kind="mdlm", blocks=1, **SIZES), "uniform", "compile: True for MDLM"),
        (PGM, "uniform", "causal encoder"),
        (CAUSAL.model_copy(update={"swap": SwapConfig(pooling="mean")}), "uniform", "pooled swaps"),
        (CAUSAL, "entropy", "order 'entropy'"),
        (AR, "uniform", "order: 'uniform'; an autoregressive model"),
        (AR, "left_to_right", "steps: 4 for 16 positions; an autoregressive model"),
    ],
)
def test_models_and_orders_without_fixed_shapes_are_refused(
    config: PGMConfig | MDLMConfig | ARConfig, order: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed, "DEVICES", ("cpu",))
    with pytest.raises(CapabilityError, match=message):
        sample(randomised(config, V, L), SamplingRequest(2, 4, order=order, compile=True))


@pytest.mark.slow
def test_the_compiled_step_draws_the_same() -> None:
    """In a process of its own, where no hook checks shapes. Each shape is compiled once, and no cache is copied."""
    script = """
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from tests.sampling.test_fixed import CAUSAL, L, SamplingRequest, both, fixed
fixed.DEVICES = ("cpu",)
small = CAUSAL.model_copy(update={"encoder_blocks": 1, "decoder_blocks": 1})
_, code = run_and_get_code(both, small, SamplingRequest(4, 4, seed=1))
both(small, SamplingRequest(4, 4, seed=2))
assert counters["stats"]["unique_graphs"] == 1, counters
assert len(code) == 1 and "index_put" in code[0]
assert "empty_strided_cpu((4, 24, 2, 8)" not in code[0]
assert "empty_strided_cpu((96, 2, 8)" not in code[0]
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
