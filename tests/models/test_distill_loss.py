"""The chunked divergence against the direct one: values, gradients, memory; and the divergences themselves."""

import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.distill_loss import DistillTargets, Divergence, chunked_divergence, divergence
from pipeline.models.layers import Head

ROOT = Path(__file__).parents[2]
KINDS = get_args(Divergence)
TEACHER = (5, 13)  # hidden size of the teacher, V


def student(rows: int, dtype: torch.dtype, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden vectors, weight and bias of a student's head, all asking for gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, size), (TEACHER[1], size), (TEACHER[1],))
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias


def teaching(rows: int, dtype: torch.dtype, kind: Divergence) -> DistillTargets:
    """A teacher of another width than the student."""
    generator = torch.Generator().manual_seed(1)
    size, vocab_size = TEACHER
    weight = torch.randn(vocab_size, size, generator=generator, dtype=dtype)
    hidden = torch.randn(rows, size, generator=generator, dtype=dtype)
    return DistillTargets(hidden, lambda chunk: F.linear(chunk, weight), kind)


def upstream(rows: int, dtype: torch.dtype) -> Tensor:
    """A gradient that differs from row to row, and has either sign."""
    return torch.linspace(-1, 2, rows, dtype=dtype)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_the_direct_form(kind: Divergence, chunk: int, dtype: torch.dtype, near: float) -> None:
    rows = 9
    told, results = teaching(rows, dtype, kind), []
    for direct in (True, False):
        hidden, weight, bias = inputs = student(rows, dtype)
        if direct:
            values = divergence(F.linear(hidden, weight, bias), told.head(told.hidden), kind)
        else:
            values = chunked_divergence(hidden, weight, bias, told, chunk)
        gradients = torch.autograd.grad(values, inputs, upstream(rows, dtype))
        results.append((values.detach(), *gradients))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        assert float((found - expected).abs().max()) < near * max(1.0, float(expected.abs().max()))
        assert float(expected.abs().max()) > 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_at_all(kind: Divergence) -> None:
    inputs = student(0, torch.float32)
    values = chunked_divergence(*inputs, teaching(0, torch.float32, kind), 4)
    assert values.shape == (0,)
    gradients = torch.autograd.grad(values.sum(), inputs)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind: Divergence) -> None:
    """Numerically, so that an error that the direct form shares is found too."""
    told = teaching(4, torch.float64, kind)
    assert torch.autograd.gradcheck(lambda *x: chunked_divergence(*x, told, 3), student(4, torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_at_equality_and_positive_elsewhere(kind: Divergence) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(50, 11, generator=generator, dtype=torch.float64)
    shifted = logits + torch.randn(50, 1, generator=generator, dtype=torch.float64)  # the same distribution
    assert float(divergence(logits, shifted, kind).abs().max()) < 1e-12
    others = logits + torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    assert float(divergence(logits, others, kind).min()) > 1e-3


def test_directions_and_scales() -> None:
    """Student (1/2, 1/2), teacher (1/4, 3/4)."""
    ours, theirs = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]], dtype=torch.float64).log()
    expected = {
        "reverse_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),  # KL(student || teacher)
        "forward_kl": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),  # KL(teacher || student)
        "total_variation": 0.25,
        "mse": (math.log(2) ** 2 + math.log(3 / 2) ** 2) / 2,
    }
    assert abs(expected["reverse_kl"] - expected["forward_kl"]) > 0.01
    for kind in KINDS:
        assert divergence(ours, theirs, kind).item() == pytest.approx(expected[kind], abs=1e-12), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_follows_the_gradient_becomes_its_teacher(kind: Divergence) -> None:
    told = teaching(6, torch.float64, kind)
    hidden = torch.eye(6, dtype=torch.float64)
    weight = torch.zeros(TEACHER[1], 6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(TEACHER[1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=0.1)
    target = told.head(told.hidden).softmax(-1)
    for step in range(250):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 250)
        loss = chunked_divergence(hidden, weight, bias, told, 4).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    found = F.linear(hidden, weight, bias).softmax(-1).detach()
    assert float((1 / TEACHER[1] - target).abs().sum(-1).min()) > 0.4
    assert float((found - target).abs().sum(-1).max()) < 0.04


def test_the_head_matches_in_float32() -> None:
    """bf16 vectors and weights of student and teacher, float32 logits and loss."""
    heads = [Head(8, 13).bfloat16() for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    for head in heads:
        torch.nn.init.normal_(head.weight, generator=generator)
    vectors = [torch.randn(6, 8, generator=generator).bfloat16() for _ in range(2)]
    loss = heads[0](vectors[0], distill_targets=DistillTargets(vectors[1], heads[1], "reverse_kl"))
    assert loss.dtype == torch.float32
    wide = [
        F.linear(x.float(), h.weight.float(), h.bias.float()) for x, h in zip(vectors, heads, strict=True)
    ]
    assert torch.allclose(loss, divergence(*wide, "reverse_kl"), atol=1e-5)
    loss.sum().backward()
    assert heads[0].weight.grad is not None
    assert heads[1].weight.grad is None


STEP = """
import sys
import torch
import torch.nn.functional as F
from pipeline.models.layers import Head
from pipeline.models.distill_loss import DistillTargets, divergence

ROWS, SIZE, V = 1536, 64, 50257


def kib(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


torch.set_num_threads(1)
torch.manual_seed(0)
student, teacher = Head(SIZE, V), Head(SIZE, V).requires_grad_(False)
for head in (student, teacher):
    torch.nn.init.normal_(head.weight, std=0.2)
student.weight.grad = torch.zeros_like(student.weight)
hidden, theirs = torch.randn(ROWS, SIZE, requires_grad=True), torch.randn(ROWS, SIZE)
before = kib("VmRSS")
if sys.argv[1] == "direct":
    loss = divergence(student(hidden), teacher(theirs), "reverse_kl").mean()
else:
    loss = student(hidden, distill_targets=DistillTargets(theirs, teacher, "reverse_kl")).mean()
loss.backward()
print(kib("VmHWM") - before, loss.item(), student.weight.grad.norm().item(), hidden.grad.norm().item())
"""


def step(form: str) -> list[float]:
    """Peak growth in MiB, loss, and gradient norms of one forward and backward pass in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, form], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    peak, *rest = map(float, done.stdout.split())
    return [peak / 1024, *rest]


@pytest.mark.slow
def test_peak_memory_at_a_large_vocabulary() -> None:
    peak, *found = step("chunked")
    direct, *expected = step("direct")
    assert found == pytest.approx(expected, rel=1e-3)
    assert direct > 2 * 1536 * 50257 * 4 / 2**20, "the logits of both"
    assert peak <= 0.4 * direct, f"{peak:.0f} MiB, direct {direct:.0f} MiB"
