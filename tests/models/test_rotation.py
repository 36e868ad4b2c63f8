"""The rotary code: the formula in every precision and of slices, and a gradient that is the rotation back."""

import torch

from pipeline.models.layers import rotary, rotate


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
    assert rotate(x.bfloat16(), code).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x.bfloat16(), code).float(), expected, rtol=0.02, atol=0.02)


def test_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    code = rotary(torch.arange(4), 6).to(torch.complex128)
    assert torch.autograd.gradcheck(lambda y: rotate(y, code), (x,))
