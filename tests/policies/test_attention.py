"""Packed attention against plain attention under a mask: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.learner.batch import PackedRow, Sample, collate
from policies.attention import attend, packed_attention

SCALE = 0.3


def inputs(mini, heads, kv_heads, key_width, value_width, dtype=torch.float64):
    batch, length = mini.token_ids.shape
    shapes = (heads, key_width), (kv_heads, key_width), (kv_heads, value_width)
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(batch, h, length, w, generator=generator, dtype=torch.float64) for h, w in shapes]
    return [(3 * x).to(dtype).requires_grad_() for x in made]


def by_mask(mini, query, key, value):
    """With every score: [B, T, H, V]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(~mini.visible[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def packed(mini, *tensors):
    return packed_attention(*tensors, mini.packing, SCALE)


def rows(*shapes):
    """Rows given as (prompt tokens, tokens of each completion)."""
    made = [PackedRow(list(range(prompt)), [Sample(0, [1] * n) for n in completions]) for prompt, completions in shapes]
    return collate(made, torch.device("cpu"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 8), min_size=1, max_size=4)), min_size=1, max_size=3
    ),
    widths=st.sampled_from([(8, 8), (12, 4), (4, 12)]),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_values_and_gradients_equal_those_under_a_mask(shapes, widths, kv_heads):
    mini = rows(*shapes)
    real = (mini.segment >= 0)[..., None, None]
    ours, theirs = (inputs(mini, 4, kv_heads, *widths) for _ in range(2))
    out, expected = packed(mini, *ours) * real, by_mask(mini, *theirs) * real
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_scores_far_apart_neither_overflow_nor_vanish():
    """Denominators of e^±300: merged by their logarithms."""
    mini = rows((3, [2, 5]), (6, [1]))
    for factor in (30.0, -30.0):
        ours, theirs = (inputs(mini, 2, 2, 8, 8) for _ in range(2))
        out, expected = (f(mini, q * factor, k, v) for f, (q, k, v) in ((packed, ours), (by_mask, theirs)))
        real = (mini.segment >= 0)[..., None, None]
        torch.testing.assert_close(out * real, expected * real)
        (out * real).sum().backward()
        (expected * real).sum().backward()
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x.grad, y.grad)


def test_bfloat16_is_as_near_as_torchs_own():
    mini = rows((40, [30, 25, 7]), (33, [50]))
    exact = by_mask(mini, *inputs(mini, 3, 3, 16, 16))
    rounded = inputs(mini, 3, 3, 16, 16, torch.bfloat16)
    mask = torch.zeros(mini.visible.shape, dtype=torch.bfloat16).masked_fill(~mini.visible, -torch.inf)[:, None]
    stock = F.scaled_dot_product_attention(*rounded, attn_mask=mask, scale=SCALE).transpose(1, 2)
    real = mini.segment >= 0
    ours, theirs = ((x.double() - exact)[real].square().mean().sqrt() for x in (packed(mini, *rounded), stock))
    assert ours < 1.2 * theirs


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((2, [3, 3, 3]), {"dropout": 0.1}),
        ((2, [3, 3, 3]), {"position_bias": torch.zeros(1, 1, 11, 11)}),
        ((9, [3]), {}),  # nothing to spare
    ],
)
def test_what_the_kernel_cannot_do_or_not_faster_goes_to_transformers(shape, given, monkeypatch):
    seen = []
    monkeypatch.setattr("policies.attention.sdpa_attention_forward", lambda *args, **options: seen.append(options))
    mini = rows(shape)
    attend(torch.nn.Module(), *inputs(mini, 1, 1, 4, 4), None, packing=mini.packing, **given)
    assert seen == [{"scaling": None, "dropout": 0.0} | given]


def test_a_group_is_attended_packed_and_scaled_as_usual():
    mini = rows((2, [3, 3, 3]))
    query, key, value = inputs(mini, 2, 1, 4, 6)
    out, _ = attend(torch.nn.Module(), query, key, value, torch.full((1, 1, 11, 11), torch.nan), packing=mini.packing)
    torch.testing.assert_close(out, packed_attention(query, key, value, mini.packing, 0.5))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policys_gradients_are_those_of_the_mask(random_policy, checkpointing):
    mini = rows((4, [5, 6, 6]), (3, [6, 6, 2]))
    assert mini.packing.pays
    gradients = []
    for packing in (mini.packing, None):
        policy = random_policy(0, mtp=False, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
        if checkpointing:
            policy.trunk.gradient_checkpointing_enable({"use_reentrant": False})
            policy.trunk.train()
        hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.visible, packing)
        scored = hidden[mini.scored]  # weighted: the gradient of a normalised vector's length is rounding alone
        weights = torch.randn(scored.shape, generator=torch.Generator().manual_seed(0))
        (scored * weights).sum().backward()
        gradients.append({n: p.grad for n, p in policy.trunk.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)
