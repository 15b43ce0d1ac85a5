"""The cache between turns: requests that go on with a text read what is new, and get the tokens that they would get."""

from dataclasses import replace

import pytest
import torch
from talks import BASE, TURNS, talked

from rollout.cost_table import CostTable
from rollout.decoding.engine import Engine
from rollout.group import Completion, Prompt
from rollout.request import Request
from rollout.requests.conversations import LEAST, Conversation, Conversations
from rollout.requests.serving import Serving

CHEAP = CostTable(rows=[1, 8], rounds=[[1.0, 1.01, 1.02], [1.0, 1.9, 2.8]], reading=0.01)


def served(engine: Engine, cache_tokens: int, **base) -> tuple[list[Completion], Serving]:
    serving = Serving(engine.decoder, replace(BASE, **base), cache_tokens)
    return talked(serving), serving


def compare(engine: Engine, **base) -> list[Completion]:
    plain, _ = served(engine, 0, **base)
    kept, serving = served(engine, 10_000, **base)
    assert [one.token_ids for one in kept] == [one.token_ids for one in plain]
    for one, other in zip(kept, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert other.cached == 0
    assert all(one.cached >= LEAST for turn, one in enumerate(kept) if turn % TURNS)
    assert not any(one.cached for one in kept[::TURNS])
    assert len(serving.batch.conversations.held) <= 7
    return kept


@pytest.mark.parametrize(
    ("draft_tokens", "costs"), [(0, None), (2, None), pytest.param(None, CHEAP, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("max_rows", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_contract_4_a_conversation_reads_its_beginning_once_and_gets_the_same_tokens(
    taught_policy, draft_tokens, costs, max_rows
):
    engine = Engine(taught_policy(), max_rows=max_rows, costs=costs)
    kept = compare(engine, draft_tokens=draft_tokens)
    drafts = [one.draft for one in kept]
    assert (sum(sum(draft.drafted) for draft in drafts) > 0) == (draft_tokens != 0)
    assert any(draft.cost for draft in drafts) == any(draft.plain_cost for draft in drafts) == (costs is not None)


@pytest.mark.slow
def test_contract_3_what_is_drafted_after_a_recalled_text_is_what_would_be_drafted(taught_policy):
    """The draft head goes on with its own entries: in each turn it drafts the same, and as much is accepted."""
    engine = Engine(taught_policy(), max_rows=1)
    (plain, _), (kept, _) = served(engine, 0, draft_tokens=3), served(engine, 10_000, draft_tokens=3)
    assert [one.draft.depths for one in kept] == [one.draft.depths for one in plain]
    assert sum(sum(one.draft.accepted) for one in kept) > 20


# One KV head for two; sinks and a short window; layers whose attention heads differ; linear attention.
GPT_OSS = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
GEMMA_4 = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8}
GEMMA_4 |= {"num_kv_shared_layers": 2, "global_head_dim": 16, "num_global_key_value_heads": 1, "sliding_window": 16}
GEMMA_4 |= {"attention_k_eq_v": True, "vocab_size_per_layer_input": 280, "hidden_size_per_layer_input": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
QWEN_3_5 = LINEAR | {"head_dim": 8, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        pytest.param("gpt_oss", GPT_OSS, marks=pytest.mark.slow),
        pytest.param("gemma4_text", GEMMA_4, marks=pytest.mark.slow),
    ],
)
def test_contract_4_models_of_transformers_keep_theirs_too(hf_policy, kind, config):
    compare(Engine(hf_policy(kind, 3, **config), max_rows=4), draft_tokens=0)


@torch.inference_mode()
def test_a_short_text_is_kept_without_the_padding_of_a_longer_one(hf_policy):
    """Both are decoded together; what is kept of each has no more entries than it has tokens."""
    engine = Engine(hf_policy("llama", 3), max_rows=4)
    serving = Serving(engine.decoder, replace(BASE, draft_tokens=0), 10_000)
    for length in (20, 150):
        serving.add(Request(Prompt(str(length), "", [5 + length] * length), serving.params, lambda news: None))
    while serving.busy:
        serving.round()
    serving.batch.keep_rows(torch.tensor([], dtype=torch.long))
    assert len(serving.batch.conversations.held) == 2
    for one in serving.batch.conversations.held:
        latents = one.trunk.latents
        entries = latents.prefix.longest + latents.capacity
        assert entries < len(one.token_ids)
        assert latents.prefix.latents_LPTE.untyped_storage().nbytes() == latents.prefix.latents_LPTE.nbytes


@pytest.mark.parametrize("kind", ["seen whole", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_what_cannot_be_kept_is_read_again(random_policy, hf_policy, kind):
    """A prompt that is seen whole would see an answer in another way; a state cannot be cut back."""
    if kind == "recurrent":
        policy = hf_policy("qwen3_5_text", 3, **QWEN_3_5)
    else:
        policy = random_policy(3, prompt_attention="bidirectional")
    kept, serving = served(Engine(policy, max_rows=4), 10_000, draft_tokens=0)
    assert not any(one.cached for one in kept)
    assert serving.batch.conversations.held == []


def of(*token_ids: int) -> Conversation:
    return Conversation(list(token_ids), len(token_ids) - 1, None, None)


def test_the_oldest_go_first_and_what_is_gone_on_with_is_replaced():
    one, two, three = (of(*range(start, start + 40)) for start in (0, 100, 200))
    kept = Conversations(100)
    kept.add(one)
    kept.add(two)
    assert kept.find([*range(40), 7, 8, 9]) == (one, 38)  # which is the youngest now
    kept.add(three)
    assert kept.held == [one, three]
    longer = of(*range(60))
    kept.add(longer)
    assert kept.held == [three, longer]
    kept.add(of(*range(300, 401)))  # more than there is room for
    assert kept.held == []


def test_as_many_tokens_as_both_caches_have_are_not_read_again():
    """Two at least are left, and the draft head has an entry of the first of them."""
    conversation = Conversation([*range(50)], 47, None, None)
    kept = Conversations(100)
    kept.add(conversation)
    for asked, there in (
        ([*range(50), 8, 9], 46),
        ([*range(50)], 46),
        ([*range(47)], 45),
        ([*range(30), 8, 8, 8], 29),
        ([*range(LEAST + 1), 88, 8], LEAST),
    ):
        assert kept.find(asked) == (conversation, there)
    assert kept.find([*range(LEAST), 88, 8]) is None
    assert kept.find([]) is None
    kept.add(of(*range(20), *range(90, 110)))
    assert kept.find([*range(20), 90, 91, 92])[1] == 21  # of the one that has more of it
