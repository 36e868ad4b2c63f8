"""Training steps and sampling on a GPU against float64 on the CPU, and where the host waits."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.model import ModelConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.partition import draw
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import DistillTargets
from pipeline.sampling.rollout import roll_out
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.rehearsal import AR, BOS, CAUSAL, CLASSES, CODES, IMAGES, MDLM, PGM, L, V, batch_of
from tests.support.small_models import shake

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
TRAINED: dict[str, ModelConfig] = {"PGM": PGM, "causal": CAUSAL, "MDLM": MDLM, "AR": AR, "images": IMAGES}
# Norm of the difference over that of the float64 result.
NEAR = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 4e-2}  # position codes are float32
Step = tuple[Tensor, dict[str, Tensor]]


def model_of(config: ModelConfig, dtype: torch.dtype, device: str, seed: int = 0) -> Denoiser:
    """A random model, the same on every device up to rounding."""
    torch.manual_seed(0)
    config = config.model_copy(update={"dropout": 0.0})
    vocabulary, bos = (CODES, CODES + 1) if config.classes else (V, BOS)
    return shake(build(config, vocabulary, L, bos), 0.1, seed).to(device, dtype)


def step(model: Denoiser, batch: Batch) -> Step:
    """Losses and gradients."""
    losses = model(batch)
    losses.sum().backward()
    grads = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return losses.detach().double().cpu(), grads


def apart(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((one - other).norm() / other.norm().clamp(min=1e-9))


@contextmanager
def no_waits() -> Iterator[None]:
    """Fail where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("name", TRAINED)
def test_training_steps(name: str, dtype: torch.dtype) -> None:
    reference, model = (
        model_of(TRAINED[name], kind, device).train()
        for kind, device in ((torch.float64, "cpu"), (dtype, "cuda"))
    )
    losses, grads = step(reference, replace(batch_of(reference), device=torch.device("cpu")))
    found, found_grads = step(model, batch_of(model))
    assert apart(found, losses) < NEAR[dtype]
    assert found_grads.keys() == grads.keys()
    whole = torch.cat([grads[name].flatten() for name in grads])
    assert apart(torch.cat([found_grads[name].flatten() for name in grads]), whole) < 2 * NEAR[dtype]


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_does_not_wait(name: str) -> None:
    model = model_of(TRAINED[name], torch.bfloat16, "cuda").train()
    model(batch_of(model)).sum().backward()
    batch = batch_of(model)
    with no_waits():
        model(batch).sum().backward()
    torch.cuda.synchronize()


REQUESTS = {
    "uniform": SamplingRequest(3, 7, 1, bos=BOS),
    "binomial": SamplingRequest(3, 7, 1, "binomial", bos=BOS),
    "entropy": SamplingRequest(3, 7, 1, "entropy", bos=BOS),
}


@pytest.mark.parametrize("order", REQUESTS)
@pytest.mark.parametrize("name", ["PGM", "causal", "MDLM"])
def test_samples_are_those_of_the_cpu(name: str, order: str) -> None:
    found, expected = (
        sample(model_of(TRAINED[name], torch.float64, device), REQUESTS[order]) for device in ("cuda", "cpu")
    )
    assert torch.equal(found.cpu(), expected)


def test_samples_with_a_cache_with_reuse_and_with_guidance() -> None:
    cases = [
        (AR, SamplingRequest(3, L - 1, 1, "left_to_right", bos=BOS)),
        (PGM, SamplingRequest(3, 8, 1, bos=BOS, refresh_every=3)),
    ]
    for encoder in ("bidirectional", "causal"):
        guided = SamplingRequest(3, 7, 1, bos=CODES + 1, guidance=1.5)
        labels = torch.arange(3) % CLASSES
        cases.append((IMAGES.model_copy(update={"encoder": encoder}), replace(guided, condition=labels)))
    for config, request in cases:
        found, expected = (
            sample(model_of(config, torch.float64, device), request) for device in ("cuda", "cpu")
        )
        assert torch.equal(found.cpu(), expected), config


@pytest.mark.parametrize("name", ["PGM", "causal", "MDLM"])
def test_sampling_steps_do_not_wait(name: str) -> None:
    """The host waits before the first step and for the samples alone, however many steps there are."""
    model = model_of(TRAINED[name], torch.bfloat16, "cuda")
    waits = []
    for steps in (4, 12):
        request = SamplingRequest(4, steps, 0, bos=BOS)
        sample(model, request)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            sample(model, request)
            torch.cuda.set_sync_debug_mode("default")
        waits.append([f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)])
    assert len(waits[0]) >= len(waits[1]), waits


def in_a_process(script: str) -> None:
    """Run code where no hook checks shapes, since such code cannot be compiled."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_cuda_graphs_draw_the_same() -> None:
    in_a_process("""
import torch
from dataclasses import replace
from pipeline.models import build
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.gpu.test_models import AR, BOS, CAUSAL, L, model_of
for config, order, steps in ((CAUSAL, "uniform", 9), (CAUSAL, "binomial", 9), (AR, "left_to_right", L - 1)):
    model = model_of(config, torch.float32, "cuda")
    for seed in (1, 2):
        request = SamplingRequest(4, steps, seed, order, bos=BOS)
        found, expected = sample(model, replace(request, compile=True)), sample(model, request)
        same = (found == expected).float().mean()
        assert same == 1, (config, seed, same)
""")


def test_compiled_blocks_train_the_same() -> None:
    in_a_process("""
import torch
from dataclasses import replace
from tests.gpu.test_models import CAUSAL, IMAGES, PGM, apart, batch_of, model_of, step
for config in (PGM, CAUSAL, IMAGES):
    eager, compiled = (model_of(config, torch.float32, "cuda").train() for _ in range(2))
    compiled.compile_blocks()
    batch = batch_of(eager)
    (loss, grads), (found, found_grads) = step(eager, batch), step(compiled, batch)
    assert apart(found, loss) < 1e-5, config
    for name, grad in grads.items():
        assert apart(found_grads[name], grad) < 1e-4, (config, name)
""")


def test_distillation() -> None:
    """A teacher's roll-out of two steps, and the student's step."""
    (losses, grads), (expected, wanted) = (
        _distil(*(model_of(PGM, torch.float64, device, seed) for seed in (0, 1)))
        for device in ("cuda", "cpu")
    )
    assert apart(losses, expected) < 1e-9
    assert all(apart(grads[name], wanted[name]) < 1e-6 for name in wanted)


def _distil(teacher: Denoiser, student: Denoiser) -> Step:
    """Learn what a teacher predicts after two steps."""
    dt, batch = 0.125, replace(batch_of(student.train()), device=student.head.weight.device)
    rows = len(batch.tokens)
    draws = draw(DiffusionConfig(), seed=0, step=0, shape=(rows, L), bos=True, least=2 * dt)
    hidden, time = torch.from_numpy(draws.groups), torch.from_numpy(draws.t)
    noise = torch.from_numpy(np.random.default_rng(0).random((rows, 2, L)))
    with torch.no_grad():
        vectors = roll_out(teacher.eval(), batch.tokens, hidden, time=time, dt=dt, noise=noise)
    targets = DistillTargets(vectors, teacher.head, "reverse_kl")
    return step(student, replace(batch, groups=hidden, targets=hidden, distill_targets=targets))
