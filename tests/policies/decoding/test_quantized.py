"""Matrices in few bits: their numbers, and that every kernel computes with the same ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policies.decoding import quantized
from policies.decoding.experts import held, run_experts
from policies.decoding.linear import FixedLinear
from policies.decoding.quantized import ALWAYS, grid, held_as, most_rows

KINDS = ("int8", "int4")
DTYPES = (torch.float32, torch.bfloat16)


def matrix(dtype: torch.dtype, rows: int = 64, width: int = 96) -> Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(1)).to(dtype)


def numbers(linear: FixedLinear, width: int, dtype: torch.dtype) -> Tensor:
    """The matrix that a product multiplies by."""
    return linear(torch.eye(width, dtype=dtype)).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 100])  # the second is no multiple of a group
def test_every_number_is_at_most_half_a_step_off(kind, dtype, width):
    weight = matrix(dtype, width=width)
    codes, scales = grid(weight, kind)
    steps = scales.repeat_interleave(width if kind == "int8" else quantized.GROUP, 1)[:, :width]
    with held_as(kind):
        found = numbers(FixedLinear(weight), width, dtype).float()
    rounding = 2**-8 * weight.float().abs() if dtype == torch.bfloat16 and kind == "int8" else 1e-6
    assert ((found - weight.float()).abs() <= steps / 2 + rounding).all()
    assert codes.abs().max() == (127 if kind == "int8" else 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("bias", [True, False])
def test_contract_2_both_kernels_multiply_the_same_matrix(monkeypatch, kind, rows, bias):
    """The codes by torch's packed kernel, and the matrix that larger batches are multiplied by, in bfloat16."""
    weight, x = matrix(torch.bfloat16), matrix(torch.bfloat16, rows)
    b = matrix(torch.bfloat16, 1, 64)[0] if bias else None
    products = {}
    for most in (2, ALWAYS):
        monkeypatch.setattr(quantized, "most_rows", lambda *_, most=most: most)
        with held_as(kind):
            linear = FixedLinear(weight, b)
        products[most] = linear(x), linear.packed.codes
    monkeypatch.setattr(quantized, "most_rows", lambda *_: 2)
    exact = numbers_of(weight, kind)
    for product, codes in products.values():
        assert codes is not None
        expected = F.linear(x.float(), exact, None if b is None else b.float())
        torch.testing.assert_close(product.float(), expected, rtol=2**-7, atol=2**-4)
    # The numbers themselves are the same to the last bit where they are exact in bfloat16.
    with held_as(kind):
        linear = FixedLinear(weight)
    plain = linear.packed.plain.float() * (
        1 if linear.packed.scale_O is None else linear.packed.scale_O.float()[:, None]
    )
    assert torch.equal(plain, exact)


def numbers_of(weight: Tensor, kind: str) -> Tensor:
    codes, scales = grid(weight, kind)
    return codes.float() * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)


def test_the_rule_follows_from_size_and_kind_of_processor(monkeypatch):
    monkeypatch.setattr(quantized, "_can_multiply", lambda kind: True)
    small, large = torch.empty(64, 96, dtype=torch.bfloat16), torch.empty(49152, 576, dtype=torch.bfloat16)
    assert [most_rows(kind, small, blocks=True) for kind in KINDS] == [0, 0]
    assert [most_rows(kind, large, blocks=True) for kind in KINDS] == [1, 4]
    assert [most_rows(kind, small, blocks=False) for kind in KINDS] == [ALWAYS, ALWAYS]
    assert [most_rows(kind, large.float(), blocks=False) for kind in KINDS] == [0, 0]
    assert [most_rows(kind, torch.empty(64, 100, dtype=torch.bfloat16), blocks=False) for kind in KINDS] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_those_of_the_rounded_stack(kind, dtype):
    generator = torch.Generator().manual_seed(2)
    gate_up, down, x = (
        (torch.randn(shape, generator=generator) / 4).to(dtype) for shape in ((4, 64, 32), (4, 32, 32), (7, 32))
    )
    experts = torch.tensor([[0, 2], [1, 2], [0, 1], [2, 0], [1, 0], [2, 1], [0, 2]])  # nobody chooses the last one
    weights = torch.rand((7, 2), generator=generator)
    with held_as(kind):
        found = run_experts(x, weights, experts, held(gate_up), held(down))
    exact = [torch.stack([numbers_of(expert, kind) for expert in stack]) for stack in (gate_up, down)]
    expected = run_experts(x.float(), weights, experts, *exact)
    tight = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(found.float(), expected, **tight)
