"""The rotary code: the formula, and a gradient that is the rotation back."""

import torch

from pipeline.models.layers import rotary, rotate


def test_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, generator=generator)
    cos, sin = rotary(torch.arange(6), 8)
    low, high = x[..., :4], x[..., 4:]
    expected = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    # Also of a slice, as queries and keys are of one product.
    wide = torch.cat([x, x], 1)
    torch.testing.assert_close(rotate(x, (cos, sin)), expected)
    torch.testing.assert_close(rotate(wide[:, 3:], (cos, sin)), expected)
    assert rotate(x.bfloat16(), (cos, sin)).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x.bfloat16(), (cos, sin)).float(), expected, rtol=0.02, atol=0.02)


def test_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    code = tuple(part.double() for part in rotary(torch.arange(4), 6))
    assert torch.autograd.gradcheck(lambda y: rotate(y, code), (x,))
