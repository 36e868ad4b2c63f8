"""The chunked loss against direct ones: values, gradients, memory; and the divergences themselves."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import head as head_module
from pipeline.models.head import (
    DistillTargets,
    Divergence,
    Head,
    chunked_loss,
    cross_entropy_rows,
    divergence,
    divergence_rows,
)

ROOT = Path(__file__).parents[2]
KINDS = get_args(Divergence)
TEACHER = (5, 13)  # hidden size of the teacher, V


def student(rows: int, dtype: torch.dtype, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden vectors, weight and bias of a student's head, all asking for gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, size), (TEACHER[1], size), (TEACHER[1],))
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias


def teacher_targets(rows: int, dtype: torch.dtype, kind: Divergence) -> DistillTargets:
    """A teacher of another width than the student."""
    generator = torch.Generator().manual_seed(1)
    size, vocab_size = TEACHER
    weight = torch.randn(vocab_size, size, generator=generator, dtype=dtype)
    hidden = torch.randn(rows, size, generator=generator, dtype=dtype)
    return DistillTargets(hidden, lambda chunk: F.linear(chunk, weight), kind)


def random_weights(rows: int, dtype: torch.dtype) -> Tensor:
    """Weights that differ from row to row, and have either sign."""
    return torch.linspace(-1, 2, rows, dtype=dtype)


def direct_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """PyTorch's chunked form, which computes four products."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    return F.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="none", options=options
    )


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("kind", [*KINDS, "cross_entropy"])
def test_chunks_equal_the_direct_form(
    kind: Divergence | Literal["cross_entropy"], chunk: int, dtype: torch.dtype, near: float
) -> None:
    rows, factor, results = 9, 65536.0, []
    weights, ids = random_weights(rows, dtype), torch.arange(rows) % TEACHER[1]
    for direct in (True, False):
        hidden, weight, bias = inputs = student(rows, dtype)
        if kind == "cross_entropy":
            row_losses = cross_entropy_rows(ids)
            values = direct_cross_entropy(hidden, weight, bias, ids, chunk)
        else:
            targets = teacher_targets(rows, dtype, kind)
            row_losses = divergence_rows(targets)
            values = divergence(F.linear(hidden, weight, bias), targets.head(targets.hidden), kind)
        values = values * weights if direct else chunked_loss(*inputs, weights, row_losses, chunk)
        gradients = [x / factor for x in torch.autograd.grad(values.sum() * factor, inputs)]
        results.append((values.detach(), *gradients))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        assert float((found - expected).abs().max()) < near * max(1.0, float(expected.abs().max()))
        assert float(expected.abs().max()) > 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_at_all(kind: Divergence) -> None:
    inputs, targets = student(0, torch.float32), teacher_targets(0, torch.float32, kind)
    values = chunked_loss(*inputs, torch.ones(0), divergence_rows(targets), 4)
    assert values.shape == (0,)
    gradients = torch.autograd.grad(values.sum(), inputs)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    assert all(not g.any() for g in gradients)


def test_only_the_gradient_of_the_sum_is_given() -> None:
    """Another is not a wrong number but NaN, and there is no second one."""
    inputs, weights = student(9, torch.float32), random_weights(9, torch.float32)
    values = chunked_loss(*inputs, weights, cross_entropy_rows(torch.arange(9)), 4)
    for gradient in torch.autograd.grad(values, inputs, torch.linspace(0, 1, 9), retain_graph=True):
        assert gradient.isnan().all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind: Divergence) -> None:
    """Numerically, so that an error that the direct form shares is found too."""
    row_losses = divergence_rows(teacher_targets(4, torch.float64, kind))
    inputs, weights, step = student(4, torch.float64), random_weights(4, torch.float64), 1e-5
    gradients = torch.autograd.grad(chunked_loss(*inputs, weights, row_losses, 3).sum(), inputs)
    with torch.no_grad():
        for x, gradient in zip(inputs, gradients, strict=True):
            for entry, found in zip(x.view(-1), gradient.flatten(), strict=True):
                ends = []
                for change in (step, -2 * step):
                    entry += change
                    ends.append(chunked_loss(*inputs, weights, row_losses, 3).sum())
                entry += step
                torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), atol=1e-8, rtol=1e-6)


def test_half_precision_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 operands with float32 sums, which CPUs do not have: the loss is float32's, gradients are rounded once."""
    monkeypatch.setattr(head_module, "operands", lambda *tensors: list(tensors))
    monkeypatch.setattr(head_module, "product", lambda a, b: a.float() @ b.float())
    rows, inputs = 300, [x.detach().bfloat16().requires_grad_() for x in student(300, torch.float32)]
    weights, ids = random_weights(rows, torch.float32), torch.arange(rows) % TEACHER[1]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    values = chunked_loss(*inputs, weights, cross_entropy_rows(ids), 128)
    expected = direct_cross_entropy(*exact, ids, 128) * weights
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=0)
    pairs = zip(
        torch.autograd.grad(values.sum(), inputs), torch.autograd.grad(expected.sum(), exact), strict=True
    )
    for found, wanted in pairs:
        assert found.dtype == torch.bfloat16
        assert float((found - wanted).abs().max()) < 0.01 * float(wanted.abs().max())


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
    student_logits, teacher_logits = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]], dtype=torch.float64).log()
    expected = {
        "reverse_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),  # KL(student || teacher)
        "forward_kl": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),  # KL(teacher || student)
        "total_variation": 0.25,
        "mse": (math.log(2) ** 2 + math.log(3 / 2) ** 2) / 2,
    }
    assert abs(expected["reverse_kl"] - expected["forward_kl"]) > 0.01
    for kind in KINDS:
        assert divergence(student_logits, teacher_logits, kind).item() == pytest.approx(
            expected[kind], abs=1e-12
        ), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_follows_the_gradient_becomes_its_teacher(kind: Divergence) -> None:
    targets = teacher_targets(6, torch.float64, kind)
    hidden = torch.eye(6, dtype=torch.float64)
    weight = torch.zeros(TEACHER[1], 6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(TEACHER[1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=0.1)
    target = targets.head(targets.hidden).softmax(-1)
    for step in range(250):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 250)
        loss = chunked_loss(hidden, weight, bias, torch.ones(6), divergence_rows(targets), 4).sum()
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
    loss = heads[0](vectors[0], DistillTargets(vectors[1], heads[1], "reverse_kl"))
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
from pipeline.models.head import Head
from pipeline.models.head import DistillTargets, divergence

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
hidden, teacher_hidden = torch.randn(ROWS, SIZE, requires_grad=True), torch.randn(ROWS, SIZE)
before = kib("VmRSS")
if sys.argv[1] == "direct":
    loss = divergence(student(hidden), teacher(teacher_hidden), "reverse_kl").mean()
else:
    loss = student(hidden, DistillTargets(teacher_hidden, teacher, "reverse_kl")).mean()
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
