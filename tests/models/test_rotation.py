"""The rotary code: the formula in every precision and of slices, and a gradient that is the rotation back."""

import pytest
import torch

from pipeline.models.layers import HeadsLinear, rotary, rotate


def test_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, generator=generator)
    code = rotary(torch.arange(6), 8)
    even, odd = x[..., ::2], x[..., 1::2]
    expected = torch.stack(
        [even * code.real - odd * code.imag, odd * code.real + even * code.imag], -1
    ).flatten(-2)
    # Also of a slice, as queries and keys are of one product.
    wide = torch.cat([x, x], 1)
    torch.testing.assert_close(rotate(x, code), expected)
    torch.testing.assert_close(rotate(wide[:, 3:], code), expected)


def halves(x: torch.Tensor) -> torch.Tensor:
    """The order of entries in half precision: what turns together is D/2 apart."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("compiling", [False, True])
def test_half_precision_turns_halves(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of pairs, in another order; also in the form that is made for compilers."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    generator, positions = torch.Generator().manual_seed(0), torch.arange(6)
    x, upstream = torch.randn(2, 6, 3, 8, generator=generator).bfloat16()
    wide = torch.cat([x, halves(x)], 1).requires_grad_()
    turned = rotate(wide[:, 3:], rotary(positions, 8, torch.bfloat16))
    pairs = x.float().requires_grad_()
    expected = rotate(pairs, rotary(positions, 8))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float(), halves(expected), rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(turned, wide, halves(upstream))
    (wanted,) = torch.autograd.grad(expected, pairs, upstream.float())
    torch.testing.assert_close(gradient[:, 3:].float(), halves(wanted), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rotated", [1, 2, 3])
def test_projections_give_the_order_of_their_precision(rotated: int) -> None:
    torch.manual_seed(2)
    layer, x = HeadsLinear(5, 8, 3, rotated, bias=True), torch.randn(4, 5)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias).unflatten(-1, (3, 8))
    torch.testing.assert_close(layer(x), plain)
    found = layer.bfloat16()(x.bfloat16())
    expected = torch.cat([halves(plain[:, :rotated]), plain[:, rotated:]], 1)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    code = rotary(torch.arange(4), 6).to(torch.complex128)
    assert torch.autograd.gradcheck(lambda y: rotate(y, code), (x,))
