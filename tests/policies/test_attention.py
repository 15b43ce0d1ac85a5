"""Packed attention, by blocks and by flex attention, against plain attention under a mask: values and gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex
from transformers.integrations import flex_attention as flex_in_transformers

from grpo.learner.batch import collate
from grpo.learner.row import PackedRow, Sample
from policies import attention
from policies.attention import Packing, attend, packed_attention

SCALE = 0.3


def inputs(mini, heads, kv_heads, key_width, value_width, dtype=torch.float64):
    batch, length = mini.token_ids.shape
    shapes = (heads, key_width), (kv_heads, key_width), (kv_heads, value_width)
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(batch, h, length, w, generator=generator, dtype=torch.float64) for h, w in shapes]
    return [(3 * x).to(dtype).requires_grad_() for x in made]


def dense(segment, first=0, both_ways=False):
    """[B, Q, T] by the words of `Packing`, pair by pair."""
    visible = [
        [
            [
                m == n or (m < n and of_m >= 0 and of_m in (0, of_n)) or (both_ways and of_m == of_n == 0)
                for m, of_m in enumerate(row)
            ]
            for n, of_n in enumerate(row)
        ]
        for row in segment.tolist()
    ]
    return torch.tensor(visible)[:, first:]


def by_mask(mini, query, key, value, both_ways=False):
    """With every score: [B, T, H, V] and [B, H, T]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(~dense(mini.segment, 0, both_ways)[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1)


def packed(mini, *tensors, both_ways=False):
    return packed_attention(*tensors, Packing(mini.segment, both_ways=both_ways), SCALE)


def rows(*shapes):
    """Rows given as (prompt tokens, tokens of each completion)."""
    made = [
        PackedRow(list(range(prompt)), [Sample(i, [1 + i] * n) for i, n in enumerate(completions)])
        for prompt, completions in shapes
    ]
    return collate(made, torch.device("cpu"))


SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 8), min_size=1, max_size=4)), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=SHAPES,
    widths=st.sampled_from([(8, 8), (12, 4), (4, 12)]),
    kv_heads=st.sampled_from([1, 2, 4]),
    piece=st.sampled_from([3, 2048]),
    both_ways=st.booleans(),
)
def test_values_and_gradients_equal_those_under_a_mask(shapes, widths, kv_heads, piece, both_ways):
    """Also those of the denominators, and of rows that are cut into pieces."""
    mini = rows(*shapes)
    real = mini.segment >= 0
    ours, theirs = (inputs(mini, 4, kv_heads, *widths) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PIECE", piece)
        out, total = packed(mini, *ours, both_ways=both_ways)
        expected, logsumexp = by_mask(mini, *theirs, both_ways)
        pairs = (out[real], expected[real]), (total.transpose(1, 2)[real], logsumexp.transpose(1, 2)[real])
        for x, y in pairs:
            torch.testing.assert_close(x, y)
        for side in (0, 1):
            weigh = torch.Generator().manual_seed(1)
            sum(
                (pair[side] * torch.randn(pair[side].shape, generator=weigh, dtype=pair[side].dtype)).sum()
                for pair in pairs
            ).backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("given", [{"dropout": 0.1}, {"position_bias": torch.zeros(1, 1, 11, 11)}])
@pytest.mark.parametrize("handed_on", [True, False])
def test_what_the_kernel_cannot_do_goes_to_transformers_with_a_dense_mask(given, handed_on, monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "sdpa", lambda *args, **options: seen.append((args[4], options)))
    mini = rows((2, [3, 3, 3]))
    packing = Packing(mini.segment)
    mask = packing.mask_for(attention.ATTENTION, torch.float64)
    assert isinstance(mask, flex.BlockMask)
    attend(torch.nn.Module(), *inputs(mini, 1, 1, 4, 4), mask, packing=packing if handed_on else None, **given)
    [(mask, options)] = seen
    assert options == {"scaling": None, "dropout": 0.0} | given
    assert torch.equal(mask == 0, dense(mini.segment)[:, None])


def test_a_model_that_does_not_hand_the_packing_on_attends_to_the_same():
    mini = rows((2, [3, 3, 3]))
    tensors, packing = inputs(mini, 2, 1, 4, 6), Packing(mini.segment)
    mask = packing.mask_for(attention.ATTENTION, torch.float64)
    outs = [attend(torch.nn.Module(), *tensors, mask, packing=given)[0] for given in (packing, None)]
    torch.testing.assert_close(*outs)
    assert torch.equal(outs[0], packed_attention(*tensors, packing, 0.5)[0])  # scaled as usual


def test_rows_with_nothing_to_spare_and_other_kernels_get_a_dense_mask():
    mini = rows((9, [3]), (5, [7]))
    for packing, name in ((Packing(mini.segment), attention.ATTENTION), (Packing(rows((2, [3] * 4)).segment), "eager")):
        mask = packing.mask_for(name, torch.float32)
        assert torch.equal(mask == 0, dense(packing.segment)[:, None])
        assert packing.mask_for(name, torch.float32) is mask  # one for all layers
    assert mask.unique().tolist() == [torch.finfo(torch.float32).min, 0.0]


def test_long_rows_never_get_a_dense_mask(monkeypatch):
    monkeypatch.setattr(attention, "PIECE", 5)
    packing = Packing(rows((9, [3])).segment)
    assert isinstance(packing.mask_for(attention.ATTENTION, torch.float32), flex.BlockMask)
    assert max(block.queries.stop - block.queries.start for block in packing.blocks) == 5


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("cap", "sinks"), [(None, [0.5, -1.0, 2.0, 0.0]), (1.5, None), (1.5, [0.5, -1.0, 2.0, 0.0])])
def test_capped_scores_and_sinks_have_the_values_and_gradients_of_all_scores(cap, sinks, window):
    mini = rows((2, [6, 5, 6]), (4, [3]))
    packing, real = Packing(mini.segment), mini.segment >= 0
    results = []
    for mask in (packing.mask_for(attention.ATTENTION, torch.float64), packing.within(window).mask(torch.float64)):
        tensors = inputs(mini, 4, 2, 8, 6)
        if sinks is not None:
            tensors.append(torch.tensor(sinks, dtype=torch.float64, requires_grad=True))
        given = {"softcap": cap, "s_aux": None if sinks is None else tensors[-1], "sliding_window": window}
        by_blocks = {"packing": packing} if isinstance(mask, flex.BlockMask) else {}
        out, _ = attend(torch.nn.Module(), *tensors[:3], mask, scaling=SCALE, **given, **by_blocks)
        weights = torch.randn(out[real].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (out[real] * weights).sum().backward()
        results.append([out[real], *(x.grad for x in tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def gradients_of(policy, mini, segment, checkpointing):
    if checkpointing:
        policy.trunk.gradient_checkpointing_enable({"use_reentrant": False})
        policy.trunk.train()
    hidden = policy.hidden(mini.token_ids, mini.position_ids, segment)
    scored = hidden[mini.scored]  # weighted: the gradient of a normalised vector's length is rounding alone
    weights = torch.randn(scored.shape, generator=torch.Generator().manual_seed(0))
    (scored * weights).sum().backward()
    return scored.detach(), {n: p.grad for n, p in policy.trunk.named_parameters() if p.grad is not None}


SMALL = {"mtp": False, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


@pytest.mark.parametrize("kernel", ["blocks", "flex"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policys_states_and_gradients_are_those_of_the_mask(random_policy, checkpointing, kernel, monkeypatch):
    mini = rows((4, [5, 6, 6]), (3, [6, 6, 2]))
    assert Packing(mini.segment).pays
    results = []
    for implementation in (attention.ATTENTION, "sdpa"):
        policy = random_policy(0, **SMALL)
        policy.trunk.config._attn_implementation = implementation  # "sdpa": transformers', under the dense mask
        with monkeypatch.context() as patch:
            calls = flex_on_cpu(patch) if kernel == "flex" else []
            results.append(gradients_of(policy, mini, mini.segment, checkpointing))
        assert bool(calls) == (kernel == "flex" and implementation == attention.ATTENTION)
    (hidden, gradients), (expected, wanted) = results
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=5e-5)  # 2.4e-5 with AVX2 alone


def flex_on_cpu(patch):
    """What happens on CUDA, except that nothing is compiled. torch refuses the backward pass on a CPU because it has no
    compiled one there; its plain one computes the same. Returns a list that gets one entry for every call."""
    calls = []

    def plain(*tensors, training=False, **given):
        calls.append(given["block_mask"])
        return flex.flex_attention(*tensors, **given)

    patch.setattr(attention, "_by_tiles", lambda tensor: True)
    patch.setattr(attention, "kernel_options", lambda *_: {})
    patch.setattr(attention, "compile_friendly_flex_attention", plain)
    patch.setattr(flex_in_transformers, "compile_friendly_flex_attention", plain)
    patch.setattr(flex, "_validate_device", lambda *tensors: None)
    patch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return calls


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes=SHAPES, first=st.integers(0, 2), head=st.booleans(), long=st.booleans(), both_ways=st.booleans())
def test_block_mask_mask_and_blocks_are_the_dense_mask(shapes, first, head, long, both_ways):
    """`long`: of several tiles, found in several strips."""
    if long:
        shapes = [(12 * prompt, [10 * n for n in completions]) for prompt, completions in shapes[:1]]
    mini = rows(*shapes)
    segment = mini.head_segment if head else mini.segment
    expected = dense(segment, first, both_ways)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "STRIP", 128)
        packing = Packing(segment, first, both_ways)
        tiles, count = packing.tiles, math.ceil(packing.shape[2] / 128)
    assert torch.equal(packing.visible, expected)
    assert torch.equal(packing.mask(torch.float32)[:, 0] == 0, expected)
    assert torch.equal(packing.mask(torch.float32)[:, 0] < -1e38, ~expected)
    # Whole tiles are seen wholly, and those that are left out not at all. In the others the function decides.
    batch, queries, length = expected.shape
    assert tiles.shape == (batch, 1, queries, length)
    asked = flex.create_mask(tiles.mask_mod, batch, None, queries, length, device="cpu")[:, 0]
    assert torch.equal(asked, expected)
    rebuilt = torch.zeros_like(expected)
    for b, i in itertools.product(range(batch), range(math.ceil(queries / 128))):
        at = slice(128 * i, 128 * i + 128)
        for j in tiles.full_kv_indices[b, 0, i, : tiles.full_kv_num_blocks[b, 0, i]].tolist():
            rebuilt[b, at, 128 * j : 128 * j + 128] = True
        for j in tiles.kv_indices[b, 0, i, : tiles.kv_num_blocks[b, 0, i]].tolist():
            keys = slice(128 * j, 128 * j + 128)
            rebuilt[b, at, keys] = asked[b, at, keys]
    assert torch.equal(rebuilt, expected)
    assert tiles.kv_indices.shape[-1] == count
    # The same in blocks, of which padding is in none.
    by_blocks = torch.zeros_like(expected)
    for block in packing.blocks:
        part = by_blocks[block.row, block.queries, block.keys]
        part |= torch.ones_like(part).tril(block.ahead)
    real = (segment >= 0)[:, first:, None]
    assert torch.equal(by_blocks, expected & real)


@pytest.mark.parametrize("window", [1, 3, 6, 40])
def test_a_window_hides_by_positions(window):
    """A completion continues the positions of its prompt, whatever completion lies between them."""
    packing = Packing(rows((5, [4, 7]), (8, [2, 6])).segment)
    expected, windowed = packing.visible.clone(), packing.within(window)
    positions = [[*range(5), *range(5, 9), *range(5, 12)], [*range(8), 8, 9, *range(8, 14)]]
    for b, of_row in enumerate(positions):
        for q, k in itertools.product(range(len(of_row)), repeat=2):
            expected[b, q, k] &= of_row[q] - of_row[k] < window
    assert torch.equal(windowed.visible, expected)
    assert (windowed is packing) == (window == 40)
    assert packing.within(window) is windowed


@settings(max_examples=6, deadline=None, derandomize=True)
@given(shapes=SHAPES, both_ways=st.booleans())
def test_flex_attention_equals_blocks(shapes, both_ways):
    mini = rows(*shapes)
    real = (mini.segment >= 0)[..., None, None]
    results = []
    for by_flex in (True, False):
        tensors = [(x.detach() / 3).float().requires_grad_() for x in inputs(mini, 4, 2, 12, 8)]
        with pytest.MonkeyPatch.context() as patch:
            calls = flex_on_cpu(patch) if by_flex else []
            out, total = packed(mini, *tensors, both_ways=both_ways)
            assert len(calls) == by_flex
            total = total.transpose(1, 2)[..., None].where(real, 0.0)
            loss = (out * real).square().sum() + total.square().sum()
            results.append([out * real, total, *torch.autograd.grad(loss, tensors)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
