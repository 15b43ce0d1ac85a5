"""Caps and sinks against attention written out with loops: one row, one attention head, one query at a time."""

import itertools
import math

import pytest
import torch
from transformers import AutoConfig

from policies.scoring import has_indexer, sdpa

ROWS, HEADS, KV_HEADS, QUERIES, KEYS = 2, 4, 2, 3, 5
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, QUERIES, 6), (KV_HEADS, KEYS, 6), (KV_HEADS, KEYS, 4)
    return [2 * torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_hand(query, key, value, seen, cap, sinks):
    out = torch.zeros(ROWS, QUERIES, HEADS, value.shape[-1], dtype=torch.float64)
    for r, h, q in itertools.product(range(ROWS), range(HEADS), range(QUERIES)):
        terms, total = torch.zeros(value.shape[-1], dtype=torch.float64), 0.0
        for k in range(KEYS):
            score = float(query[r, h, q] @ key[r, h // 2, k]) * 6**-0.5
            score = score if cap is None else cap * math.tanh(score / cap)
            if seen[q, k]:
                terms, total = terms + math.exp(score) * value[r, h // 2, k], total + math.exp(score)
        out[r, q, h] = terms / (total if sinks is None else total + math.exp(sinks[h]))
    return out


@pytest.mark.parametrize(("cap", "sinks"), [(None, SINKS), (1.5, None), (1.5, SINKS)])
@pytest.mark.parametrize("form", ["none", "boolean", "added"])
def test_capped_scores_and_sinks_are_those_of_loops(form, cap, sinks):
    query, key, value = inputs()
    seen = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    if form != "none":
        seen[:, 1] = False
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    mask = {"none": None, "boolean": seen, "added": added}[form]
    out, _ = sdpa(torch.nn.Module(), query, key, value, mask, softcap=cap, s_aux=sinks)
    torch.testing.assert_close(out, by_hand(query, key, value, seen, cap, sinks))


def test_which_models_have_an_indexer():
    assert [has_indexer(AutoConfig.for_model(kind)) for kind in ("glm_moe_dsa", "deepseek_v32", "llama")] == [1, 1, 0]
