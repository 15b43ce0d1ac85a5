"""The profile of a step adds up, and counts what a step has to do: by hand, for tiny policies."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import profile
from rollout.engine import Engine
from rollout.group import Prompt
from rollout.sampling import SamplingParams

ROWS, TOKENS = 3, 6
PROMPTS = [Prompt(f"p/{i}", "", [3 + i, 5, 7, 9, 11]) for i in range(ROWS)]
MACHINE = {"gb_s": 1.0, "gflops": {"torch.float32": 1e9}}
# Llama: q and o [32, 32], k and v [16, 32], a feed-forward of 3 [48, 32], in three layers.
DENSE = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
# MLA, absorbed: two attention heads of a latent of 12 and a rotated part of 8 make 40 queries, beside the 20 numbers of
# a cached vector, and 24 attended numbers go back. One layer is dense; in the other one a router [4, 32], a shared
# expert and two chosen ones of 3 [16, 32] compute.
ABSORBED = 2 * ((40 + 20) * 32 + 24 * 32) + 3 * 48 * 32 + 4 * 32 + 3 * 3 * 16 * 32


@pytest.fixture(scope="module")
def found(hf_policy, random_policy):
    """The profiles of both forms, and what they sampled before and after."""
    results = {}
    for form, policy in (("dense", hf_policy("llama", 1)), ("MLA", random_policy(1, mtp=False))):
        engine, params = Engine(policy), SamplingParams(1, max_completion_tokens=TOKENS)
        before, plain = engine.sample(PROMPTS, params), (F.linear, torch.einsum)
        made = profile.profiled(engine, PROMPTS, params, MACHINE)
        assert [g.completions[0].token_ids for g in engine.sample(PROMPTS, params)] == [
            g.completions[0].token_ids for g in before
        ]
        assert (F.linear, torch.einsum) == plain  # no range is left
        results[form] = made, len(engine.trunk.embedding)
    return results


@pytest.mark.parametrize("form", ["dense", "MLA"])
def test_shares_are_of_the_whole_step(found, form):
    made, _ = found[form]
    assert sum(made[kind]["share"] for kind in profile.KINDS) == pytest.approx(1, abs=0.02)
    assert sum(made[kind]["ms"] for kind in profile.KINDS) == pytest.approx(made["ms"], rel=0.02)
    for kind in ("products", "attention", "cache", "norms", "gates", "sampling", "rows"):
        assert made[kind]["share"] > 0, kind


@pytest.mark.parametrize(("form", "weights"), [("dense", DENSE), ("MLA", ABSORBED)])
def test_products_are_those_of_the_weights(found, form, weights):
    made, vocabulary = found[form]
    assert made["products"]["operations"] == 2 * ROWS * (weights + 32 * vocabulary)


def test_attention_reads_the_cache_once(found):
    """Two layers; two queries of a row, of 20 numbers, by 12 cached vectors (5 of the prompt, room for 7) whose values
    have 12 numbers; in and out are float32, and of each query the sum of its softmax goes out, too."""
    made, _ = found["MLA"]
    assert made["attention"]["operations"] == 2 * ROWS * 2 * 2 * 12 * (20 + 12)
    assert made["attention"]["bytes"] == 2 * ROWS * 4 * (2 * 20 + 12 * 20 + 2 * (12 + 1))
    assert made["cache"]["bytes"] == 2 * ROWS * 4 * 2 * 20  # a new vector is read and written


def test_a_perfect_kernel_takes_the_longer_of_bytes_and_operations(found):
    made, _ = found["MLA"]
    assert made["cache"]["perfect_ms"] == pytest.approx(2 * ROWS * 4 * 2 * 20 / 1e6)  # at one GB/s
    assert made["perfect_ms"] == pytest.approx(sum(made[kind]["perfect_ms"] for kind in profile.KINDS))
    assert made["python"]["perfect_ms"] == made["rows"]["perfect_ms"] == 0


def test_operators_belong_to_the_range_around_them_by_hand():
    """A range's own time is Python's, and a write inside of attention is the cache's."""

    def event(name, ms, *children):
        return SimpleNamespace(name=name, self_cpu_time_total=1e3 * ms, cpu_children=children)

    attention = event("kind: attention", 2, event("aten::index_copy_", 3, event("aten::as_strided", 8)), event("mm", 4))
    step = event(profile.STEP, 1, attention, event("aten::stack", 5, event("kind: norms", 6, event("aten::mul", 7))))
    assert profile.parts_of(step) == {"python": 1 + 2 + 6, "cache": 3 + 8, "attention": 4, "rows": 5, "norms": 7}
