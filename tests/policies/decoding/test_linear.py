"""Products with blocked weights against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from policies.decoding import linear
from policies.decoding.linear import FixedLinear


def operands(dtype, *batch, bias=True):
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((*batch, 96), (80, 96), (80,)))
    return x, weight, b if bias else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [(1,), (7,), (64,), (3, 5), (2, 1, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_equal_those_of_plain_weights(dtype, batch, bias):
    x, weight, b = operands(dtype, *batch, bias=bias)
    out, expected = FixedLinear(weight, b)(x), F.linear(x, weight, b)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-5 if dtype == torch.bfloat16 else 1e-4)


def test_parts_of_a_tensor_can_be_multiplied_and_be_weights():
    x, weight, _ = operands(torch.bfloat16, 6, bias=False)
    expected = F.linear(x[:, 16:48], weight[:, 16:48])
    torch.testing.assert_close(FixedLinear(weight[:, 16:48])(x[:, 16:48]), expected, rtol=2**-7, atol=2**-5)


def test_without_torchs_operators_the_products_are_plain(monkeypatch):
    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(linear, "_block", missing)
    linear._can_block.cache_clear()
    try:
        x, weight, b = operands(torch.bfloat16, 5)
        plain = FixedLinear(weight, b)
        assert not plain.blocked
        assert torch.equal(plain(x), F.linear(x, weight, b))
    finally:
        linear._can_block.cache_clear()
