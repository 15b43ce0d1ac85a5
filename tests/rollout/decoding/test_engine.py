"""The engine: speculation changes speed and nothing else; every number it reports is the policy's own."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from engine_cases import (
    PARAMS,
    PROMPTS,
    STOPS,
    assert_lossless,
    completions,
    drafts_in_training,
    enumerated,
    prompts_of,
    spied_drafts,
    taught,
    tokens,
)
from frequencies import z_score

from policies.logprobs import shifted_logprobs
from policies.policy import Policy
from rollout.decoding.engine import Engine
from rollout.draft_stats import tokens_per_forward
from rollout.faults import RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams


@pytest.fixture(scope="module")
def engine(policy) -> Engine:
    return Engine(policy)


@pytest.fixture(scope="module")
def plain(engine) -> list[RolloutGroup]:
    """What is sampled without drafts."""
    return engine.sample(PROMPTS, PARAMS)


# ---- contract 3: speculation is lossless ----


def stops_inside_blocks(engine: Engine, prompts: list[Prompt], params: SamplingParams) -> int:
    """Completions whose stop token was a drafted one: the last forward gave no bonus token."""
    found = 0
    for completion in completions(engine.sample(prompts, params)):
        given = 1 + completion.draft.target_forwards + sum(completion.draft.accepted)
        found += completion.finish_reason == "stop" and given > len(completion.token_ids)
    return found


def test_contract_3_speculation_is_lossless(engine, plain):
    compared = assert_lossless(engine, PROMPTS, PARAMS)
    assert compared > 1500
    ended = Counter(c.finish_reason for c in completions(plain))
    assert min(ended["stop"], ended["length"]) >= 3
    assert stops_inside_blocks(engine, PROMPTS, replace(PARAMS, draft_tokens=4)) >= 2


ALL = [pytest.param(temperature, (2, 3, 4), marks=pytest.mark.long) for temperature in (0.6, 1.0, 1.3)]


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "steps"), [(1.0, (2,)), *ALL])
def test_contract_3_speculation_is_lossless_over_20_000_tokens(random_policy, temperature, steps):
    """CI tries a third of them."""
    policy = taught(random_policy(12, q_lora_rank=10, n_routed_experts=8, n_group=4, topk_group=2), temperature, 40)
    engine = Engine(policy)
    prompts = prompts_of(*[1 + 7 * i % 40 for i in range(24)], seed=1)
    params = replace(PARAMS, temperature=temperature, group_size=8, max_completion_tokens=80, stop_token_ids=STOPS[::3])
    compared = sum(assert_lossless(engine, prompts, params.at(step)) for step in steps)
    assert compared >= 4 * 20_000 * len(steps) / 3  # for each k
    assert stops_inside_blocks(engine, prompts, replace(params, draft_tokens=4)) >= 10


def test_contract_3_greedy_decoding_is_the_same_with_and_without_drafts(engine):
    assert_lossless(engine, PROMPTS, replace(PARAMS, temperature=0.0, group_size=2), depths=(1, 4))


@torch.no_grad()
def test_greedy_decoding_is_the_stock_models(engine, policy):
    groups = engine.sample(
        PROMPTS[:3], replace(PARAMS, temperature=0.0, group_size=1, draft_tokens=2, stop_token_ids=())
    )
    for group in groups:
        ids = torch.tensor([group.prompt.token_ids + group.completions[0].token_ids])
        best = policy.trunk(ids, use_cache=False).logits[0].argmax(-1)
        assert group.completions[0].token_ids == best[len(group.prompt.token_ids) - 1 : -1].tolist()


@pytest.mark.slow
def test_contract_3_a_large_vocabulary_is_lossless_too(random_policy):
    """More than FULL_ROW tokens: noise for the top and for the tail."""
    engine = Engine(taught(random_policy(13, vocab_size=2000), 1.0, 25))
    assert_lossless(engine, PROMPTS, replace(PARAMS, temperature=1.0), depths=(1, 3))


def test_contract_3_a_head_that_knows_nothing_or_is_broken_costs_no_token(random_policy):
    """Drafts are only proposals: NaN from the head makes them worthless, never the tokens."""
    policy = random_policy(14)
    engine = Engine(policy)
    plain = tokens(engine.sample(PROMPTS, PARAMS))
    for k in (1, 3):
        assert tokens(engine.sample(PROMPTS, replace(PARAMS, draft_tokens=k))) == plain
    with torch.no_grad():
        policy.mtp.eh_proj.weight.fill_(math.nan)
    assert tokens(Engine(policy).sample(PROMPTS, replace(PARAMS, draft_tokens=3))) == plain


@pytest.mark.slow
def test_drafts_are_what_the_trained_head_says_behind_the_verified_tokens(engine, policy, monkeypatch):
    """Every draft of ragged rows that come and go, against the unrolled head as training sees it: same tokens, same
    noise. A wrong position, cache or hidden state would cost acceptance and no token, so nothing else would notice."""
    depth, asked = 3, spied_drafts(monkeypatch)
    rows = completions(engine.sample(PROMPTS, replace(PARAMS, draft_tokens=depth)))
    assert len(asked) > 150
    for row, count, drafts in asked:
        verified = rows[row].token_ids[:count]
        prompt, sample = PROMPTS[row // PARAMS.group_size], row % PARAMS.group_size
        assert drafts == drafts_in_training(policy, prompt, verified, drafts, PARAMS, sample)


def test_a_head_that_agrees_saves_forwards(random_policy):
    """Trunk and head both find every token equally likely: with the same noise, every draft is accepted."""
    policy = random_policy(15)
    with torch.no_grad():
        policy.lm_head.zero_()
    engine = Engine(policy)
    params = replace(PARAMS, stop_token_ids=(), max_completion_tokens=41, draft_tokens=4)
    for completion in completions(engine.sample(PROMPTS, params)):
        assert completion.draft.target_forwards == 8  # 1 token from the prefill, then 8 · 5
        assert completion.draft.accepted == completion.draft.drafted == [8] * 4
    assert tokens_per_forward(completions(engine.sample(PROMPTS, params))) == 5.0
    assert_lossless(engine, PROMPTS, PARAMS)


# ---- the distribution ----


@pytest.mark.parametrize("draft_tokens", [0, 1, 3])
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.7])
def test_contract_3_whole_completions_follow_the_enumerated_distribution(random_policy, draft_tokens, temperature):
    policy = random_policy(16, vocab_size=6)
    probabilities = enumerated(policy, [3, 4], temperature, length=3, stop=2)
    params = SamplingParams(20_000, temperature, 3, (2,), seed=1, draft_tokens=draft_tokens)
    [group] = Engine(policy).sample([Prompt("toy", "", [3, 4])], params)
    counts = Counter(tuple(completion.token_ids) for completion in group.completions)
    assert set(counts) <= set(probabilities)
    assert sum(p * params.group_size >= 8 for p in probabilities.values()) > 25
    assert abs(z_score(counts, probabilities)) < 4


# ---- contract 2: log-probabilities ----


@torch.no_grad()
def logprob_errors(engine: Engine, policy: Policy, params: SamplingParams, score_at: float) -> torch.Tensor:
    """|engine − stock model| of every sampled token, each completion in a row of its own."""
    errors = []
    for group in engine.sample(PROMPTS, params):
        for completion in group.completions:
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
            stock = shifted_logprobs(policy.trunk(ids, use_cache=False).logits, ids, score_at)
            assert len(completion.logprobs) == len(completion.token_ids)
            errors.append((stock[0, len(group.prompt.token_ids) - 1 :] - torch.tensor(completion.logprobs)).abs())
    return torch.cat(errors)


@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.8, 1.5])
def test_contract_2_logprobs_are_the_stock_models_at_the_same_temperature(engine, policy, temperature, draft_tokens):
    params = replace(PARAMS, temperature=temperature, draft_tokens=draft_tokens, group_size=2)
    errors = logprob_errors(engine, policy, params, temperature)
    assert errors.max() < 1e-4
    assert errors.mean() < 1e-5


def test_contract_2_greedy_tokens_are_scored_at_temperature_one(engine, policy):
    errors = logprob_errors(engine, policy, replace(PARAMS, temperature=0.0, group_size=1), 1.0)
    assert errors.max() < 1e-4


# ---- contract 1: token in, token out ----


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_contract_1_a_completion_ends_at_its_first_stop_token_and_includes_it(engine, draft_tokens):
    found = completions(engine.sample(PROMPTS, replace(PARAMS, draft_tokens=draft_tokens)))
    for completion in found:
        assert not set(completion.token_ids[:-1]) & set(STOPS)
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] in STOPS
            assert len(completion.token_ids) <= PARAMS.max_completion_tokens
        else:
            assert completion.finish_reason == "length"
            assert completion.token_ids[-1] not in STOPS
            assert len(completion.token_ids) == PARAMS.max_completion_tokens
    assert len({completion.token_ids[-1] for completion in found} & set(STOPS)) > 3


def test_contract_1_a_stop_token_in_the_very_last_place_is_a_stop(engine, plain):
    [shortest] = [min(len(ids) for ids in tokens(plain) if ids[-1] in STOPS)]
    again = completions(engine.sample(PROMPTS, replace(PARAMS, max_completion_tokens=shortest, draft_tokens=2)))
    assert any(len(c.token_ids) == shortest and c.finish_reason == "stop" for c in again)


def test_contract_1_padding_may_be_the_stop_token(engine, policy, random_policy):
    """Lengths are counted, never read off token values: 0 pads the engine's own rows, and may stop or be sampled."""
    params = replace(PARAMS, stop_token_ids=(0,), draft_tokens=3, group_size=8)
    with_zero = [[*p.token_ids[:-1], 0] for p in PROMPTS]
    prompts = [replace(p, token_ids=ids) for p, ids in zip(PROMPTS, with_zero, strict=True)]
    assert policy.tokenizer.eos_token_id == 0
    for completion in completions(engine.sample(prompts, params)):
        assert 0 not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == 0) == (completion.finish_reason == "stop")
    free = tokens(engine.sample(prompts, replace(params, stop_token_ids=())))
    assert all(len(ids) == params.max_completion_tokens for ids in free)
    assert any(0 in ids[:-1] for ids in free)  # an ordinary token now
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    try:
        assert tokens(engine.sample(prompts, params)) == tokens(Engine(policy).sample(prompts, params))
    finally:
        policy.tokenizer.pad_token = "<|pad|>"


def test_the_text_is_that_of_the_tokens_without_the_stop_token(plain, policy):
    for completion in completions(plain):
        visible = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
        assert completion.text == policy.tokenizer.decode(visible)


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_one_token_is_enough(engine, plain, draft_tokens):
    groups = engine.sample(PROMPTS, replace(PARAMS, max_completion_tokens=1, draft_tokens=draft_tokens))
    assert tokens(groups) == [ids[:1] for ids in tokens(plain)]
    assert all(c.draft.target_forwards == 0 for c in completions(groups))


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_the_context_can_be_filled_to_its_last_place(engine, draft_tokens):
    """Drafts may reach past the last position; the tokens before it are those of a longer context."""
    prompts = prompts_of(256 - 12, 256 - 20, seed=3)
    params = replace(PARAMS, stop_token_ids=(), max_completion_tokens=12, draft_tokens=draft_tokens)
    groups = engine.sample(prompts, params)
    assert [len(ids) for ids in tokens(groups)] == [12] * 8
    roomy = engine.sample(prompts, replace(params, max_completion_tokens=11, draft_tokens=0))
    assert [ids[:11] for ids in tokens(groups)] == tokens(roomy)


# ---- contract 4: a function of its key ----


def test_contract_4_the_same_call_gives_the_same_bits(engine, policy):
    params = replace(PARAMS, draft_tokens=2)
    first, second = engine.sample(PROMPTS, params), Engine(policy).sample(PROMPTS, params)
    assert first == second  # tokens, log-probabilities, statistics


def test_contract_4_tokens_do_not_depend_on_the_batch(engine, plain):
    together = {group.prompt.prompt_id: tokens([group]) for group in plain}
    for draft_tokens in (0, 3):
        params = replace(PARAMS, draft_tokens=draft_tokens)
        for prompt in PROMPTS[:4]:
            assert tokens(engine.sample([prompt], params)) == together[prompt.prompt_id]
        for group in engine.sample(PROMPTS[::-1], params) + engine.sample(PROMPTS[2:5], params):
            assert tokens([group]) == together[group.prompt.prompt_id]


def test_contract_4_the_random_state_of_the_process_plays_no_part(engine, plain):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert tokens(engine.sample(PROMPTS, PARAMS)) == tokens(plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", [{"seed": 6}, {"step": 3}, {"draw": 1}])
def test_contract_4_another_seed_step_or_draw_is_another_rollout(engine, change):
    params = replace(PARAMS, stop_token_ids=())
    first, second = tokens(engine.sample(PROMPTS, params)), tokens(engine.sample(PROMPTS, replace(params, **change)))
    assert not any(a == b for a, b in zip(first, second, strict=True))


def test_contract_4_samples_of_a_group_and_prompts_of_another_name_differ(engine):
    groups = engine.sample(PROMPTS, replace(PARAMS, stop_token_ids=()))
    assert len({tuple(ids) for ids in tokens(groups)}) == len(tokens(groups))
    renamed = [replace(prompt, prompt_id=f"other/{prompt.prompt_id}") for prompt in PROMPTS]
    others = engine.sample(renamed, replace(PARAMS, stop_token_ids=()))
    assert not {tuple(ids) for ids in tokens(groups)} & {tuple(ids) for ids in tokens(others)}


# ---- contract 5: publications ----


def test_contract_5_what_is_published_is_taken_over_and_not_shared(random_policy):
    source, engine = random_policy(1), Engine(random_policy(2))
    engine.sync_weights(source.weights(), 1)
    before = tokens(engine.sample(PROMPTS, PARAMS))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert tokens(engine.sample(PROMPTS, PARAMS)) == before


def test_contract_5_a_publication_that_is_refused_changes_nothing(random_policy):
    engine = Engine(random_policy(2))
    before = tokens(engine.sample(PROMPTS, PARAMS))
    weights = random_policy(1).weights()
    weights.pop("trunk.model.norm.weight")
    with pytest.raises(ValueError, match="lack tensors.*trunk.model.norm.weight"):
        engine.sync_weights(weights, 1)
    assert engine.version == 0
    assert tokens(engine.sample(PROMPTS, PARAMS)) == before


# ---- statistics ----


@pytest.mark.parametrize("draft_tokens", [0, 1, 4])
def test_draft_statistics_add_up(engine, draft_tokens):
    """Every forward gives its accepted drafts and one token more, except a last one that ends inside its drafts."""
    for completion in completions(engine.sample(PROMPTS, replace(PARAMS, draft_tokens=draft_tokens))):
        draft, length = completion.draft, len(completion.token_ids)
        assert len(draft.drafted) == draft_tokens
        # Every forward has all its drafts, except where the longest row's last tokens leave no use for them.
        assert all(draft.target_forwards - draft_tokens <= made <= draft.target_forwards for made in draft.drafted)
        assert [draft.depths.count(d + 1) for d in range(draft_tokens)] == draft.accepted
        assert len(draft.depths) == length
        assert all(more >= fewer for more, fewer in itertools.pairwise(draft.accepted))  # d needs d − 1
        assert all(accepted <= made for accepted, made in zip(draft.accepted, draft.drafted, strict=True))
        missing = 1 + draft.target_forwards + sum(draft.accepted) - length
        assert missing in (0, 1)
        assert draft.fallbacks == 0
        if draft_tokens == 0:
            assert draft.target_forwards == length - 1


def test_finished_completions_are_announced_once_each_also_those_that_end_with_their_first_token(engine):
    heard = []
    assert engine.sample([], PARAMS, heard.append) == heard == []
    engine.sample(PROMPTS, replace(PARAMS, max_completion_tokens=1), heard.append)
    assert heard == [32]
    heard.clear()
    groups = engine.sample(PROMPTS, replace(PARAMS, group_size=16, draft_tokens=2), heard.append)
    at_once = sum(len(ids) == 1 for ids in tokens(groups))
    assert at_once > 2
    assert heard[0] == at_once
    assert len(heard) > 2
    assert all(count > 0 for count in heard)
    assert sum(heard) == 8 * 16


# ---- bad input ----


BAD = [
    ([Prompt("gsm8k/7", "", [])], {}, RolloutError, "prompt 'gsm8k/7' has no tokens"),
    (prompts_of(217), {}, RolloutError, r"'p/0' has 217 tokens.*max_completion_tokens=40.*context of 256: shorten"),
    ([Prompt("p/0", "", [3, 280])], {}, RolloutError, r"'p/0'.*token 280.*vocabulary of 280"),
    ([Prompt("p/0", "", [3, -1])], {}, RolloutError, r"'p/0'.*token -1.*vocabulary of 280"),
    ([], {"stop_token_ids": (7, 280)}, ValueError, "rollout.stop_token_ids: 280 is outside the vocabulary of 280"),
    ([], {"stop_token_ids": (7, -1)}, ValueError, "rollout.stop_token_ids: -1 is outside the vocabulary of 280"),
    ([], {"group_size": 0}, ValueError, "rollout.group_size=0"),
]


def test_what_cannot_be_sampled_is_named(engine):
    for prompts, change, error, words in BAD:
        with pytest.raises(error, match=words):
            engine.sample(prompts or PROMPTS, replace(PARAMS, **change))
    engine.check(prompts_of(216), PARAMS)


def test_drafts_without_a_head_are_refused(random_policy):
    engine = Engine(random_policy(1, mtp=False))
    with pytest.raises(RolloutError, match=r"rollout.draft_tokens=2, but this policy has no MTP head; set it to 0"):
        engine.sample(PROMPTS, replace(PARAMS, draft_tokens=2))
    assert engine.sample(PROMPTS, PARAMS)


def test_weights_that_are_not_finite_name_the_prompts_that_met_them(random_policy):
    policy = random_policy(1)
    with torch.no_grad():
        policy.trunk.get_input_embeddings().weight[PROMPTS[2].token_ids[0]] = math.nan
    engine, others = Engine(policy), [PROMPTS[0], PROMPTS[1]]
    for draft_tokens in (0, 2):
        params = replace(PARAMS, draft_tokens=draft_tokens, max_completion_tokens=1)
        with pytest.raises(
            RolloutError, match=r"not finite.*of 1 of 3 prompts, \['p/2'\].*lower learner.learning_rate"
        ):
            engine.sample([*others, PROMPTS[2]], params)
        assert len(engine.sample(others, params)) == 2  # the engine is none the worse for it
    with torch.no_grad():
        policy.lm_head.mul_(1e38)
    with pytest.raises(RolloutError, match="not finite"):
        Engine(policy).sample(others, PARAMS)


# ---- types ----


def test_bfloat16_samples_whole_completions_with_and_without_drafts(policy):
    """bf16 rounds differently by shape, so tokens may part; every log-probability stays near the fp32 policy's."""
    engine = Engine(policy, torch.bfloat16)
    for draft_tokens in (0, 3):
        params = replace(PARAMS, draft_tokens=draft_tokens, group_size=1)
        errors = logprob_errors(engine, policy, params, PARAMS.temperature)
        assert errors.median() < 0.1
