"""The benchmark's own arithmetic: needed operations, stamps, plain forms, yardstick tokeniser."""

import base64
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.benchmarks.dense_baseline import dense_loss, sample_every_hidden, sample_every_position
from pipeline.benchmarks.phases import PhaseTimer
from pipeline.benchmarks.preparation import byte_level_bpe
from pipeline.benchmarks.roofline import matmul_peak, roofline, seconds
from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig, SwapConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.data.tokenizers import load_tokenizer
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.partition import StepDraws
from pipeline.models import attention, build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.models.flops import Op, Work, flops, sampling_work, training_work
from pipeline.models.layers import ResidualLinear
from pipeline.models.pgm import PGM
from pipeline.sampling.orders import step_counts
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.flop_counter import flop_counter
from tests.support.small_models import random_rows, randomised

V, L, ROWS = 11, 16, 3
SIZES = {"hidden": 32, "heads": 4, "dropout": 0}
PGMS = [
    PGMConfig(encoder_blocks=2, decoder_blocks=3, **SIZES),
    PGMConfig(
        encoder_blocks=1,
        decoder_blocks=2,
        registers=2,
        swap=SwapConfig(query="mlp4", every_block=True),
        **SIZES,
    ),
    PGMConfig(encoder_blocks=1, decoder_blocks=1, swap=SwapConfig(pooling="mean"), **SIZES),
    PGMConfig(encoder="causal", encoder_blocks=2, decoder_blocks=3, **SIZES),
    PGMConfig(
        encoder="causal",
        encoder_blocks=1,
        decoder_blocks=2,
        registers=2,
        swap=SwapConfig(pooling="mean", every_block=True),
        **SIZES,
    ),
]  # fmt: skip
MDLMS = [
    MDLMConfig(kind="mdlm", blocks=2, **SIZES),
    MDLMConfig(kind="mdlm", blocks=2, registers=2, complementary=True, **SIZES),
]


def training_batch(model: Denoiser, tokens: torch.Tensor, groups: torch.Tensor) -> Batch:
    if model.left_to_right:
        objective = Objective(DiffusionConfig(), bos=False, both_groups=False, left_to_right=True)
        draws, present = StepDraws(np.ones(ROWS), groups.numpy()), np.ones(ROWS, bool)
        divisor, cpu = objective.normaliser(draws.groups), torch.device("cpu")
        return objective.batch(tokens.numpy(), draws, present, divisor=divisor, device=cpu)
    targets = torch.ones_like(groups) if model.both_groups else groups
    weights = torch.rand(groups.shape, generator=torch.Generator().manual_seed(1))
    return Batch(tokens, groups, targets, weights)


def causal_in_full(work: Work) -> int:
    """What the counter adds to causal attention, whose scores the plain kernel computes in full."""
    causal = {op: count for op, count in work.items() if op.kind == "causal"}
    return sum(count * (Op("attention", op.shape).flops - op.flops) for op, count in causal.items())


def flops_of_gates(model: Denoiser) -> int:
    """The gradient of every gate is a product of a weight and its gradient, which is not among the needed ones."""
    return sum(2 * part.weight.numel() for part in model.modules() if isinstance(part, ResidualLinear))


@pytest.mark.parametrize("config", [*PGMS, *MDLMS, ARConfig(kind="ar", blocks=2, **SIZES)])
def test_needed_flops_are_those_that_torch_counts(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)  # not the kernel that pads segments as short as these
    model = build(config, V, L)
    tokens, groups = random_rows(ROWS, L, V)
    batch = training_batch(model, tokens, groups)
    # Plain attention is made of products that the counter knows; it computes causal scores in full.
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        model(batch).sum().backward()
    counted = counter.get_total_flops()
    work = training_work(config, V, groups.numpy())
    needed = flops(work, backward=True)
    needed += 3 * causal_in_full(work)
    assert counted == needed + flops_of_gates(model)


SAMPLED = [(PGMS[0], 1), (PGMS[0], 3), (PGMS[1], 1), (PGMS[1], 3), (PGMS[3], 1), (PGMS[4], 1), (MDLMS[0], 1)]


@pytest.mark.parametrize(("config", "refresh_every"), SAMPLED)
def test_needed_flops_of_sampling(config: PGMConfig | MDLMConfig, refresh_every: int) -> None:
    model = build(config, V, L).eval()
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        sample(model, SamplingRequest(ROWS, 5, 0, refresh_every=refresh_every))
    counts = step_counts(L, 5, "linear").tolist()
    work = sampling_work(config, V, L, ROWS, counts, refresh_every)
    assert counter.get_total_flops() == flops(work) + causal_in_full(work)


def test_roofline_is_the_sum_of_its_operations() -> None:
    big, small = Op("gemm", (256, 256, 256)), Op("gemm", (8, 8, 8))
    alone = seconds(big, backward=False, now=time.perf_counter)
    assert 0 < alone < 1
    assert seconds(big, backward=True, now=time.perf_counter) > 0
    ticks = itertools.count()  # every call takes one
    assert roofline({big: 50, small: 1}, False, lambda: float(next(ticks))) == 51  # type: ignore[arg-type]
    for kind, shape in (("gelu", (8, 16)), ("norm", (8, 16)), ("attention", (2, 4, 8, 6, 8))):
        for backward in (False, True):
            assert seconds(Op(kind, shape), backward, time.perf_counter) > 0  # type: ignore[arg-type]
    assert matmul_peak(time.perf_counter) > 1e8


def test_the_dense_form_is_the_same_model() -> None:
    model = randomised(PGMS[0]).double()
    assert isinstance(model, PGM)
    batch = training_batch(model, *random_rows(ROWS, L, V))
    results = []
    for loss in (model(batch), dense_loss(model, batch)):
        model.zero_grad()
        loss.sum().backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (own, gradients), (dense, expected) = results
    torch.testing.assert_close(own.double(), dense, rtol=2e-7, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9)


def test_the_plain_samplers_draw_the_same_distribution() -> None:
    """Against the one loop in the same order: shares of all tokens at every position of many rows."""
    model = randomised(MDLMS[0], length=4)
    rows = 3000
    for plain, order in ((sample_every_position, "binomial"), (sample_every_hidden, "uniform")):
        drawn = [plain(model, rows, 2, seed=1), sample(model, SamplingRequest(rows, 2, 0, order))]
        assert all(x.shape == (rows, 4) and x.min() >= 0 and x.max() < V for x in drawn)
        ours, theirs = (torch.nn.functional.one_hot(x, V).double().mean(0) for x in drawn)
        error = ((ours * (1 - ours) + theirs * (1 - theirs)) / rows).sqrt()
        assert ((ours - theirs).abs() < 4 * error + 1 / rows).all()


def test_phases_sum_to_the_whole_in_both_passes() -> None:
    clock = iter(range(10**6))
    model = build(PGMS[0], V, L)
    timer = PhaseTimer(model, lambda: float(next(clock)))
    batch = training_batch(model, *random_rows(ROWS, L, V))
    plain = model(batch).sum().item()
    began = next(clock)
    timer.start()
    loss = model(batch).sum()
    loss.backward()
    timer.mark("embedding")
    phases = timer.stop("optimiser")
    assert loss.item() == plain
    assert sum(phases.values()) == next(clock) - began - 2
    # A tick per mark: blocks have two phases, each marked forward and backward; beside them swap, head, embedding.
    blocks = 5
    assert phases == {
        "batch": 1, "embedding": 2, "attention": 2 * (blocks + 1), "MLP": 2 * blocks, "head + loss": 3, "optimiser": 1
    }  # fmt: skip


def test_the_yardstick_tokeniser_gives_the_same_ids(tmp_path: Path) -> None:
    tokens = [bytes([b]) for b in range(256)] + [
        b"th",
        b"he",
        b"the",
        b" the",
        b"re",
        b"lo",
        b"hello",
        b"\xe6\x9d",
    ]
    ranks = {token: rank for rank, token in enumerate(tokens)} | {b"hel": 300, b"hello": 301}
    file = tmp_path / "small.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    ours = load_tokenizer(str(file))
    theirs = tokenizers.Tokenizer(byte_level_bpe(ranks))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = ["the then there the", "naïve — 東京 \n\n tabs\tthe", "hello world"]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert theirs.encode(text).ids == ids.tolist()
