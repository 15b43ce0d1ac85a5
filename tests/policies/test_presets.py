"""Tiny policies: built anywhere, the same from the same seed, with a tokenizer that loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config.policy import ModelOptions
from grpo.source.policy_source import load_policy
from policies.policy import Policy, checksum
from policies.presets import PRESETS, build, small_tokenizer

CORPUS = [
    f"Ann has {a} apples and buys {a + 2} more.\n{a} + {a + 2} = {2 * a + 2}\n#### {2 * a + 2}\n" for a in range(99)
]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(CORPUS)


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return build("tiny", CORPUS, seed=3)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_seed_fixes_the_weights_and_the_random_state_is_left_alone(preset):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = checksum(build(preset, CORPUS, seed=3).weights())
    assert torch.rand(1) == expected
    assert checksum(build(preset, CORPUS, seed=3).weights()) == first
    assert checksum(build(preset, CORPUS, seed=4).weights()) != first


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_preset_is_the_same_for_learner_sampler_and_whoever_loads_it(micro_preset, tmp_path, dtype):
    """In bf16, too: a router and rotary frequencies that were rounded would compute something else."""
    options = ModelOptions(model=micro_preset, dtype=str(dtype).removeprefix("torch."), device="cpu")
    learner = load_policy(options, CORPUS)
    learner.save(tmp_path / "saved")
    sampler = Policy.from_skeleton(learner.skeleton(), dtype)
    sampler.load_weights(learner.weights())
    loaded = Policy.load(tmp_path / "saved", dtype)
    positions, causal = torch.arange(200)[None], torch.zeros(1, 200, dtype=torch.long)
    ids = positions % len(learner.tokenizer)
    expected = learner.hidden(ids, positions, causal)
    outputs = learner.unroll(expected, ids, positions, causal, 2)
    for other in (sampler, loaded):
        for own in (Policy.named_parameters, Policy.named_buffers):
            mine, theirs = dict(own(learner)), dict(own(other))
            assert {name: tensor.dtype for name, tensor in mine.items()} == {n: t.dtype for n, t in theirs.items()}
            assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
        assert torch.equal(other.hidden(ids, positions, causal), expected)
        assert all(map(torch.equal, other.unroll(expected, ids, positions, causal, 2), outputs))
    assert learner.lm_head.dtype == dtype


@settings(max_examples=30)
@given(st.text(max_size=60))
def test_every_text_survives_the_tokenizer(tokenizer, text):
    """Bytes are its alphabet: nothing is unknown. The names of its two special tokens are read as these tokens."""
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text
