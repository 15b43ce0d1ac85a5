"""The MTP head: training's unrolled form against step-by-step drafting, against transformers', and by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from grpo.learner.batch import MicroBatch, collate
from grpo.learner.row import PackedRow, Sample
from policies.decoding.absorbed import AbsorbedTrunk
from policies.decoding.draft_head import AbsorbedHead
from policies.logprobs import logprobs_from_hidden
from policies.mtp import DEPTH_DECAY, draft_loss
from policies.policy import Policy, PolicyError, checksum

CPU = torch.device("cpu")
CONFIGS = {
    "plain": {},
    "biases_and_query_latent": {"attention_bias": True, "q_lora_rank": 10},
    "rope_in_halves": {"rope_interleave": False},
    "rotary_keys_only": {"qk_nope_head_dim": 0},
    "expert_groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "dense": {"first_k_dense_replace": 2},
}


@pytest.fixture(params=CONFIGS)
def policy(request, random_policy):
    return random_policy(7, **CONFIGS[request.param])


def packed(*shapes: tuple[int, list[int]]) -> MicroBatch:
    """Rows of random tokens: (prompt length, completion lengths)."""
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, 250, (length,), generator=generator).tolist()

    rows = [PackedRow(tokens(prompt), [Sample(0, tokens(n)) for n in lengths]) for prompt, lengths in shapes]
    return collate(rows, CPU)


def preceding(policy, mini: MicroBatch) -> torch.Tensor:
    """[B, T, D] the trunk's hidden state that precedes each token; differentiable."""
    hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
    return hidden.gather(1, mini.before[..., None].expand_as(hidden))


def unrolled(policy, mini: MicroBatch, depth: int) -> list[torch.Tensor]:
    """`outputs[d - 1][b, n]`: depth d of the chain that starts at token n of row b."""
    with torch.no_grad():
        return policy.unroll(preceding(policy, mini), mini.token_ids, mini.position_ids, mini.head_segment, depth)


def drafted(policy, prompt_token_ids: list[int], completion: list[int], start: int, depth: int) -> list[torch.Tensor]:
    """Outputs [D] of depths 1 … depth of the chain that starts at `completion[start]`, as the engine makes them:
    entries of the prompt, then of the verified tokens one by one, then the chain, fed with the tokens that follow."""
    trunk = AbsorbedTrunk(policy.trunk, torch.float32, 64)
    head = AbsorbedHead(policy.mtp, trunk)
    ids = torch.tensor([prompt_token_ids + completion])
    positions = torch.arange(ids.shape[1])[None]
    hidden = trunk(ids, positions, trunk.cache(1, ids.shape[1]))
    before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
    end = len(prompt_token_ids)
    cache = head.cache(1, end)
    head(ids[:, :end], before[:, :end], positions[:, :end], cache)
    cache.advance(end)
    cache = cache.fan_out(1, 32)
    for at in range(end, end + start + 1):
        out = head(ids[:, at : at + 1], before[:, at : at + 1], positions[:, at : at + 1], cache)
        cache.advance(1)
    outputs = [out[0, 0]]
    for at in range(end + start + 1, end + start + depth):
        out = head(ids[:, at : at + 1], out, positions[:, at : at + 1], cache)
        cache.advance(1)
        outputs.append(out[0, 0])
    return outputs


@torch.no_grad()
def test_the_unrolled_head_is_the_drafting_head_at_every_depth_and_position(policy):
    depth = 4
    mini = packed((5, [6, 3, 1]), (1, [2, 4]))  # the second prompt makes no entry
    outputs = unrolled(policy, mini, depth)
    compared = 0
    for b, row in enumerate(mini.rows):
        at = len(row.prompt_token_ids)
        for sample in row.samples:
            length = len(sample.token_ids)
            for start in range(length):
                chain = drafted(policy, row.prompt_token_ids, sample.token_ids, start, min(depth, length - start))
                for d, expected in enumerate(chain):
                    torch.testing.assert_close(outputs[d][b, at + start], expected, rtol=0, atol=1e-4)
                    compared += 1
            at += length
    assert compared == sum(min(depth, n - s) for n in (6, 3, 1, 2, 4) for s in range(n))


@torch.no_grad()
@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "dense"])  # transformers' is always MoE
def test_depth_one_equals_transformers_own_head(random_policy, config):
    policy = random_policy(8, **CONFIGS[config])
    stock = MtpModel(policy.trunk, 1).eval()
    renamed = {
        {"norm": "post_norm", "block": "mtp_block"}.get(name.split(".")[0], name.split(".")[0])
        + name[len(name.split(".")[0]) :]: tensor
        for name, tensor in policy.mtp.state_dict().items()
    }
    stock.layers[0].load_state_dict(renamed)
    mini = packed((1, [11]))
    before = preceding(policy, mini)[:, 1:]
    expected = stock.forward_layer(0, before, mini.position_ids[:, 1:], None, input_ids=mini.token_ids[:, 1:])
    [ours] = unrolled(policy, mini, 1)
    difference = policy.trunk.lm_head(ours[:, 1:]) - policy.trunk.lm_head(expected)
    assert difference.abs().max() < 1e-4


def test_a_token_that_neither_can_say_leaves_the_draft_loss_finite():
    """In half precision 300 · -300 is -∞ for trunk and head; of the other two p = (1/2, 1/2) and so is q: no loss."""
    lm_head = torch.tensor([[-300.0], [0.0], [0.0]], dtype=torch.float16)
    teacher = torch.full((1, 2, 1), 300.0, dtype=torch.float16)
    draft = teacher.clone().requires_grad_()
    loss = draft_loss([draft], teacher, torch.tensor([[1, 1]]), lm_head, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert not draft.grad.any()


@pytest.mark.parametrize("draft_ids", [None, [0, 2, 3, 8]])
def test_the_draft_loss_and_its_own_gradient_are_those_of_loops(draft_ids):
    torch.manual_seed(0)
    ids = None if draft_ids is None else torch.tensor(draft_ids)
    lm_head, temperature = torch.randn(9, 4), 0.7
    segment = torch.tensor([[0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, -1, -1, -1]])
    outputs, teacher = [torch.randn(2, 7, 4, requires_grad=True) for _ in range(3)], torch.randn(2, 7, 4)
    rows = lm_head if ids is None else lm_head[ids]
    expected = torch.zeros(())
    for d in (1, 2, 3):
        weight = DEPTH_DECAY ** (d - 1) / (1 + DEPTH_DECAY + DEPTH_DECAY**2)
        for b in range(2):
            for n in range(7 - d):
                if segment[b, n] > 0 and segment[b, n] == segment[b, n + d]:
                    p = (rows @ teacher[b, n + d] / temperature).softmax(0)
                    q = (rows @ outputs[d - 1][b, n] / temperature).softmax(0)
                    expected = expected + weight * (p * (p / q).log()).sum()
    wanted = torch.autograd.grad(3.0 * expected, outputs)
    for chunk in (1, 2, 100):
        loss = draft_loss(outputs, teacher, segment, rows, temperature, chunk)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
        for got, gradient in zip(torch.autograd.grad(3.0 * loss, outputs), wanted, strict=True):
            torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_entries_that_start_no_chain_are_read_and_not_computed(policy):
    mini = packed((5, [6, 3, 1]), (7, [2, 4]))
    before = preceding(policy, mini)
    arguments = before, mini.token_ids, mini.position_ids, mini.head_segment, 3
    for whole, short in zip(policy.unroll(*arguments), policy.unroll(*arguments, first=5), strict=True):
        assert not short[:, :5].any()
        torch.testing.assert_close(short[mini.scored], whole[mini.scored], rtol=0, atol=1e-5)


def trimmed(policy, every: int = 3) -> torch.Tensor:
    return torch.tensor(sorted({*range(0, policy.config.vocab_size, every), *policy.stop_token_ids}))


@torch.no_grad()
def test_the_drafting_head_scores_its_vocabulary_alone(random_policy):
    policy = random_policy(4)
    ids, trunk = trimmed(policy), AbsorbedTrunk(policy.trunk, torch.float32, 64)
    whole, short = AbsorbedHead(policy.mtp, trunk), AbsorbedHead(policy.mtp, trunk, ids)
    hidden = torch.randn(2, policy.config.hidden_size)
    torch.testing.assert_close(short.logits(hidden), whole.logits(hidden)[:, ids])
    assert short.draft_ids is ids


def test_a_checkpoint_keeps_the_draft_vocabulary_and_stock_transformers_loads_it(random_policy, tmp_path):
    policy = random_policy(4)
    policy.draft_ids = trimmed(policy)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert torch.equal(loaded.draft_ids, policy.draft_ids)
    loaded.save(tmp_path / "again")
    assert torch.equal(Policy.load(tmp_path / "again").draft_ids, policy.draft_ids)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(stock(ids).logits, policy.trunk(ids).logits)
    policy.draft_ids = None
    policy.save(tmp_path / "policy")
    assert Policy.load(tmp_path / "policy").draft_ids is None


def test_a_damaged_draft_vocabulary_is_refused_with_the_way_out(random_policy, tmp_path):
    random_policy(4).save(tmp_path / "policy")
    for text in ("{", "{}", '{"token_ids": [3, 2]}', '{"token_ids": [2, 2]}', '{"token_ids": [100000]}'):
        (tmp_path / "policy/draft_vocabulary.json").write_text(text)
        with pytest.raises(PolicyError, match=r"draft_vocabulary\.json .*delete it to draft from the whole"):
            Policy.load(tmp_path / "policy")


def test_contract_5_a_publication_carries_the_draft_vocabulary(random_policy):
    policy, other = random_policy(4), random_policy(5)
    plain = checksum(policy.weights())
    policy.draft_ids = trimmed(policy)
    published = policy.weights()
    assert checksum(published) != plain
    other.load_weights(published)
    assert torch.equal(other.draft_ids, policy.draft_ids)
    policy.draft_ids[0] = 1  # no memory is shared
    assert other.draft_ids[0] == 0
    other.load_weights(random_policy(4).weights())
    assert other.draft_ids is None


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_contract_7_the_draft_head_never_touches_the_trunks_gradient(random_policy, tied, trims):
    policy, mini = random_policy(3, tie_word_embeddings=tied), packed((4, [5, 3]), (2, [4, 4]))

    def gradients(weight: float | None) -> dict[str, torch.Tensor]:
        policy.zero_grad(set_to_none=True)
        before = preceding(policy, mini)
        logprobs, _ = logprobs_from_hidden(before[mini.scored], policy.lm_head, mini.token_ids[mini.scored], 0.9)
        loss = -logprobs.mean()
        if weight is not None:
            outputs = policy.unroll(before, mini.token_ids, mini.position_ids, mini.head_segment, 3)
            lm_head = policy.lm_head[trimmed(policy)] if trims else policy.lm_head
            loss = loss + weight * draft_loss(outputs, before, mini.segment, lm_head, 0.9)
        loss.backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    without, beside = gradients(None), gradients(10.0)
    assert all(name.startswith("trunk.") for name in without)
    assert {name for name in beside if name.startswith("trunk.")} == set(without)
    assert any(beside[name].any() for name in beside if name.startswith("mtp."))
    for name, gradient in without.items():
        assert torch.equal(gradient, beside[name]), name
    # The policy's own loss gives all of the trunk gradients, so the comparison above compares something.
    assert len(without) == len(dict(policy.trunk.named_parameters()))
