"""The head's products in bf16, with vocabularies that tensor cores take and others, against float64."""

import pytest
import torch

from pipeline.models.head import DistillTargets, Divergence, Head
from tests.gpu.test_models import apart

pytestmark = pytest.mark.gpu
H, ROWS = 64, 300


def heads(vocabulary: int) -> tuple[Head, Head]:
    """A head in bf16 on the GPU, and the same numbers in float64 on the CPU."""
    torch.manual_seed(0)
    head = Head(H, vocabulary)
    torch.nn.init.normal_(head.weight, std=0.3)
    torch.nn.init.normal_(head.bias)
    head.to(torch.bfloat16)
    reference = Head(H, vocabulary).double()
    reference.load_state_dict(head.state_dict())
    return head.cuda(), reference


@pytest.mark.parametrize("vocabulary", [1000, 1001, 1007])
def test_cross_entropy_and_logits(vocabulary: int) -> None:
    head, reference = heads(vocabulary)
    x = torch.randn(ROWS, H).bfloat16()
    targets, weights = torch.randint(vocabulary, (ROWS,)), torch.rand(ROWS)
    found, expected = x.cuda().requires_grad_(), x.double().requires_grad_()
    losses = head(found, targets.cuda(), weights.cuda())
    losses.sum().backward()
    wanted = torch.nn.functional.cross_entropy(reference(expected), targets, reduction="none") * weights
    wanted.sum().backward()
    assert apart(losses.detach().double().cpu(), wanted.detach()) < 1e-5
    pairs = (
        (found.grad, expected.grad),
        *zip((p.grad for p in head.parameters()), (p.grad for p in reference.parameters()), strict=True),
    )
    for grad, other in pairs:
        assert grad is not None
        assert other is not None
        assert apart(grad.double().cpu(), other) < 1e-2
    with torch.no_grad():
        logits = head(x.cuda())
        assert logits.shape == (ROWS, vocabulary)
        assert apart(logits.double().cpu(), reference(x.double())) < 1e-5


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "total_variation", "mse"])
def test_divergences(kind: Divergence) -> None:
    head, reference = heads(1001)
    x, teacher = torch.randn(2, ROWS, H).bfloat16()
    found, expected = x.cuda().requires_grad_(), x.double().requires_grad_()
    losses = head(found, DistillTargets(teacher.cuda(), head, kind))
    losses.sum().backward()
    wanted = reference(expected, DistillTargets(teacher.double(), reference, kind))
    wanted.sum().backward()
    assert apart(losses.detach().double().cpu(), wanted.detach()) < 1e-4
    assert found.grad is not None
    assert expected.grad is not None
    assert apart(found.grad.double().cpu(), expected.grad) < 1e-2
