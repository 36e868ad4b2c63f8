"""The head's chunked loss against plain cross-entropy in float64, and the small layers' conventions."""

import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import build
from pipeline.models.head import CHUNK_LOGITS, Head
from pipeline.models.layers import GeluLinear, LayerNorm, ResidualLinear, rotary, rotate, sinusoid
from tests.support.small_models import PGM, randomised

H = 16
SIZES = [
    pytest.param(37, 50, id="one chunk"),
    pytest.param(CHUNK_LOGITS["cpu"] // 500, 1201, id="three chunks"),  # 500 rows, 500 rows, 201 rows
]


def random_head(vocab_size: int, dtype: torch.dtype = torch.float32) -> Head:
    head = Head(H, vocab_size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return head.to(dtype)


def losses_in_float64(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Cross-entropies written out, with the leaves that they were computed from."""
    x = hidden.detach().double().requires_grad_()
    leaves = [parameter.detach().double().requires_grad_() for parameter in head.parameters()]
    named = dict(zip([name for name, _ in head.named_parameters()], leaves, strict=True))
    logits = x @ named["weight"].T + named["bias"]
    losses = logits.logsumexp(-1) - logits.gather(1, targets[:, None]).squeeze(1)
    return x, leaves, losses


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize(("vocab_size", "rows"), SIZES)
def test_loss_is_cross_entropy(vocab_size: int, rows: int, dtype: torch.dtype, near: float) -> None:
    """Values, and gradients under a weight for each token, relative to the largest that exceeds 1."""
    head = random_head(vocab_size, dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, H, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) * (torch.arange(rows) % 3 > 0)  # a third weigh nothing
    losses = head(hidden, targets, weights)
    x, leaves, expected = losses_in_float64(head, hidden, targets)
    expected = expected * weights
    assert losses.shape == (rows,)
    assert losses.dtype == dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(losses.double(), expected, atol=near * max(scale, 1.0), rtol=0)
    grads = torch.autograd.grad(losses.sum(), [hidden, *head.parameters()])
    wanted = torch.autograd.grad(expected.sum(), [x, *leaves])
    for got, want in zip(grads, wanted, strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double(), want, atol=near * max(scale, 1.0), rtol=0)
    assert grads[0][weights == 0].eq(0).all()


@pytest.mark.parametrize(("vocab_size", "rows"), SIZES)
def test_logits_and_loss_agree(vocab_size: int, rows: int) -> None:
    head = random_head(vocab_size, torch.float64)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, H, generator=generator, dtype=torch.float64)
    targets = torch.arange(rows) % vocab_size
    with torch.no_grad():
        logits = head(hidden)
        assert logits.shape == (rows, vocab_size)
        torch.testing.assert_close(
            F.cross_entropy(logits, targets, reduction="none"), head(hidden, targets), atol=1e-10, rtol=0
        )


@pytest.mark.parametrize(("vocab_size", "rows"), SIZES)
def test_bf16_parameters_give_a_float32_loss(vocab_size: int, rows: int) -> None:
    """Only rounding of inputs and parameters may differ from float64, not the log-softmax."""
    head = random_head(vocab_size, torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, H, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    losses = head(hidden, targets)
    assert losses.dtype == torch.float32
    _, _, expected = losses_in_float64(head, hidden, targets)
    torch.testing.assert_close(losses.double(), expected, atol=1e-4, rtol=0)
    for gradient in torch.autograd.grad(losses.sum(), [hidden, *head.parameters()]):
        assert gradient.dtype == torch.bfloat16
        assert gradient.isfinite().all()


def test_no_rows() -> None:
    head = random_head(9)
    losses = head(torch.zeros(0, H), torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
    for gradient in torch.autograd.grad(losses.sum(), list(head.parameters())):
        assert gradient.eq(0).all()


def test_a_fresh_model_is_uniform() -> None:
    model = build(PGM, 11, 16)
    logits = model.logits(torch.randint(11, (2, 16)), torch.rand(2, 16) < 0.5)
    assert logits.eq(0).all()


def test_norm_and_modulation() -> None:
    norm = LayerNorm(H, bias=True).double()
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 + 1
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, H))
        norm.bias.copy_(torch.linspace(-1, 1, H))
        plain = norm(x)
        torch.testing.assert_close(plain, F.layer_norm(x, (H,), norm.weight, norm.bias, 1e-5))
        shift, scale = (torch.linspace(*ends, H, dtype=torch.float64) for ends in ((3, 4), (-0.5, 0.5)))
        torch.testing.assert_close(norm(x, shift, scale), plain * (1 + scale) + shift, atol=1e-10, rtol=0)
        for_each = [torch.outer(torch.arange(5.0).double(), vector) for vector in (shift, scale)]
        modulated = plain * (1 + for_each[1]) + for_each[0]
        torch.testing.assert_close(norm(x, *for_each), modulated, atol=1e-10, rtol=0)
    rows = [
        torch.linspace(*ends, 5, dtype=torch.float64)[:, None, None].expand(-1, 1, H)
        for ends in ((3, 4), (-0.5, 0.5))
    ]
    for_rows = [vector.repeat_interleave(2, 0).squeeze(1) for vector in rows]
    torch.testing.assert_close(norm(x.repeat(2, 1), *rows), norm(x.repeat(2, 1), *for_rows))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (6,), (2, 1)], ids=["all tokens", "each token", "each row"])
def test_gated_residual(shape: tuple[int, ...], bias: bool) -> None:
    """Values with and without gradients, and the gradients."""
    torch.manual_seed(7)
    layer = ResidualLinear(3, H, bias=bias).double()
    x, residual = (torch.randn(6, n, dtype=torch.float64).requires_grad_() for n in (3, H))
    gate = torch.randn(*shape, H, dtype=torch.float64).requires_grad_()
    each = gate.repeat_interleave(3, 0).squeeze(1) if gate.dim() == 3 else gate
    expected = residual + F.linear(x, layer.weight, layer.bias) * each
    inputs = [x, residual, gate, *layer.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (layer(x, residual, gate), expected)]
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(layer(x, residual, gate), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, residual.clone(), gate), expected)


def test_norm_gradients() -> None:
    norm = LayerNorm(H).double()
    shift, scale = torch.randn(2, H, dtype=torch.float64).requires_grad_().unbind(0)
    x, inputs = torch.randn(5, H, dtype=torch.float64), [shift, scale, norm.weight]
    expected = F.layer_norm(x, (H,), norm.weight) * (1 + scale) + shift
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (norm(x, shift, scale), expected)]
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_one_kernel_for_product_and_gelu(rows: int) -> None:
    """Without gradients it is another kernel, of contiguous rows and of others."""
    torch.manual_seed(6)
    layer = GeluLinear(H, 4 * H)
    x = torch.randn(rows, 2 * H)[:, ::2]
    expected = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    with torch.inference_mode():
        without = layer(x)
    torch.testing.assert_close(without.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(without, layer(x.contiguous()).detach())
    assert layer(x).requires_grad
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_rotary_code_turns_adjacent_entries() -> None:
    """Entry 2i turns with entry 2i + 1, by position / 10000^(2i/D)."""
    positions = torch.tensor([0, 1, 700])
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(4))
    turned = rotate(x, rotary(positions, 6))
    for token, position in enumerate(positions.tolist()):
        for i in range(3):
            angle = position * 10_000 ** (-2 * i / 6)
            even, odd = x[token, :, 2 * i], x[token, :, 2 * i + 1]
            cos, sin = math.cos(angle), math.sin(angle)
            torch.testing.assert_close(turned[token, :, 2 * i], even * cos - odd * sin, atol=1e-4, rtol=0)
            torch.testing.assert_close(turned[token, :, 2 * i + 1], odd * cos + even * sin, atol=1e-4, rtol=0)


def test_rotated_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(5))

    def product(a: int, b: int) -> Tensor:
        return (rotate(q, rotary(torch.tensor([a]), 8)) * rotate(k, rotary(torch.tensor([b]), 8))).sum()

    torch.testing.assert_close(product(3, 10), product(53, 60), atol=1e-5, rtol=0)
    assert abs(product(3, 10) - product(10, 3)) > 1e-3


def test_sinusoids_are_cosines_then_sines() -> None:
    code = sinusoid(torch.tensor([0, 2]), 8)
    assert code[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(code[1, 1], torch.tensor(math.cos(2 * 10_000**-0.25)))
    torch.testing.assert_close(code[1, 4], torch.tensor(math.sin(2.0)))


def test_dropout_acts_in_training_only() -> None:
    model = randomised(PGM.model_copy(update={"dropout": 0.5}))
    tokens, groups = torch.randint(11, (2, 16)), torch.rand(2, 16) < 0.5
    assert torch.equal(model.logits(tokens, groups), model.logits(tokens, groups))
    model.train()
    torch.manual_seed(0)
    first, second = model.logits(tokens, groups), model.logits(tokens, groups)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, model.logits(tokens, groups))


def test_shapes_are_checked() -> None:
    """The annotations are live in these tests: a wrong shape does not pass silently."""
    with pytest.raises(jaxtyping.TypeCheckError):
        LayerNorm(H)(torch.zeros(2, 3, H))
    with pytest.raises(jaxtyping.TypeCheckError):
        Head(H, 5)(torch.zeros(4, H), torch.zeros(3, dtype=torch.int64))
