"""LoRA: every part of the policy learns, the base stays, and merging is a sum computed elsewhere."""

import pytest
import torch

from policies import lora
from policies.mtp import draft_loss
from policies.policy import Policy, checksum
from rollout.workers.kinds import open_pool

TOKENS = torch.tensor([[5, 9, 2, 7, 7, 30], [4, 4, 100, 8, 61, 3]])
CONFIGS = {
    "plain": {},
    "biases_and_query_latent": {"attention_bias": True, "q_lora_rank": 10},
    "dense": {"first_k_dense_replace": 2},
    "experts_everywhere": {"first_k_dense_replace": 0},
}


@pytest.fixture(params=CONFIGS)
def policy(request, random_policy):
    return random_policy(4, **CONFIGS[request.param])


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.trunk(TOKENS).logits


def step(policy: Policy, learning_rate: float = 0.02) -> None:
    """One step of gradient descent on everything that wants a gradient."""
    policy.trunk(TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        for parameter in policy.trunk.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad / (parameter.grad.norm() + 1e-9)
                parameter.grad = None


def adapted(policy: Policy, **given) -> Policy:
    """With adapters that do something: B starts at zero, so two steps."""
    policy.add_lora(rank=2, alpha=4.0, **given)
    step(policy)
    step(policy)
    return policy


def adapted_modules(policy: Policy) -> set[str]:
    names = {name for name, _ in lora.adapters(policy.trunk)}
    return {name.replace(".base_layer", "").rsplit(".", 1)[-1] for name in names}


def test_an_adapter_starts_as_nothing_and_only_it_and_the_head_learn(policy):
    before = logits(policy)
    policy.add_lora(rank=2, alpha=4.0)
    assert torch.equal(logits(policy), before)
    assert adapted_modules(policy) == expected_targets(policy)
    learning = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.startswith("mtp.") for name in learning)
    assert {name for name, _ in policy.named_parameters() if name.startswith("mtp.")} <= learning


def everything(policy: Policy) -> list[str]:
    """All that `lora.targets` may name."""
    return [*sorted({target for each in lora.matrices(policy.trunk) for target in each.targets}), "mtp"]


def test_every_target_has_a_gradient_after_one_step(policy):
    """Every part at once, router and draft head too. B starts at zero: A's first gradient is zero, B's is not."""
    policy.add_lora(2, 4.0, everything(policy))
    for name, buffer in policy.named_buffers():
        if "correction_bias" in name:
            buffer.zero_()  # every expert is chosen by some token
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in parameters)

    def gradients(letter: str) -> dict[str, bool]:
        """Which of the factors A or B move; of routed experts, whether every expert's own part does."""
        chosen = {name: p.grad for name, p in parameters.items() if f".lora_{letter}." in name}
        for name, grad in chosen.items():
            if ".experts." in name:  # A is [experts · rank, in], B is [out, rank · experts]
                by_expert = grad.reshape(4, -1) if letter == "A" else grad.reshape(-1, 4).T
                chosen[name] = by_expert.any(1).all()
        return {name: bool(grad.any()) for name, grad in chosen.items()}

    both_steps(policy)
    first_a, first_b = gradients("A"), gradients("B")
    assert len(first_a) == len(first_b) == len(parameters) / 2
    assert [name for name, moves in first_b.items() if not moves] == []
    assert [name for name, moves in first_a.items() if moves] == []
    with torch.no_grad():
        for p in parameters.values():
            p -= 0.02 * p.grad / (p.grad.norm() + 1e-9)
    both_steps(policy)
    assert [name for name, moves in (gradients("A") | gradients("B")).items() if not moves] == []
    expected = expected_targets(policy) | {"lm_head"}
    assert adapted_modules(policy) == expected | ({"gate"} if "experts" in expected else set())


def both_steps(policy: Policy) -> None:
    """Backward of the trunk's loss and of the draft loss, over 64 tokens."""
    policy.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = torch.randint(2, 200, (4, 16))
    positions = torch.arange(16).expand(4, 16)
    causal = torch.zeros_like(tokens)
    policy.trunk(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        hidden = policy.hidden(tokens, positions, causal)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
    outputs = policy.unroll(hidden, tokens, positions, causal, depth=2)
    draft_loss(outputs, hidden, torch.ones_like(tokens), policy.lm_head.detach(), 1.0).backward()


def test_contract_5_adapters_of_every_part_reach_the_sampler(policy):
    """W + ΔW and the expert bias of trunk and draft head, in the sampler's own copy, under the learner's digest."""
    policy.add_lora(2, 4.0, everything(policy))
    with torch.no_grad():
        for name, tensor in policy.state_dict(keep_vars=True).items():
            if ".lora_B." in name:
                tensor.normal_(0, 0.1)
    pool = open_pool(policy)
    with torch.no_grad():
        for name, tensor in policy.state_dict(keep_vars=True).items():
            if ".lora_" in name or "e_score_correction_bias" in name:
                tensor.add_(0.05 * torch.randn_like(tensor))
    published = policy.weights()
    assert checksum(pool.engine.policy.weights()) != checksum(published)
    pool.sync_weights(published, 1)
    assert checksum(pool.engine.policy.weights()) == checksum(published)
    engine, base = pool.engine, random_weights(policy)
    changed = {name for name, tensor in published.items() if not torch.equal(tensor, base[name])}
    assert {"trunk.model.layers.0.self_attn.o_proj.weight", "mtp.eh_proj.weight", "trunk.lm_head.weight"} <= changed
    if "router" in everything(policy):
        assert {"trunk.model.layers.1.mlp.gate.weight", "mtp.block.mlp.gate.weight"} <= changed
        assert torch.equal(engine.trunk.blocks[1].gate, published["trunk.model.layers.1.mlp.gate.weight"])
        assert torch.equal(engine.head.block.gate, published["mtp.block.mlp.gate.weight"])
        bias = "trunk.model.layers.1.mlp.gate.e_score_correction_bias"
        assert torch.equal(engine.trunk.blocks[1].gate_bias, published[bias])
    # And the sampler computes what the learner computes, trunk and head.
    tokens = torch.tensor([[5, 9, 2, 7, 7, 30]])
    positions, causal = torch.arange(6)[None], torch.zeros_like(tokens)
    with torch.no_grad():
        hidden = policy.hidden(tokens, positions, causal)
        drafted = policy.unroll(hidden, tokens, positions, causal, depth=1)[0]
        got = engine.trunk(tokens, positions, engine.trunk.cache(1, 8))
        cache = engine.trunk.cache_of(1, 1, 8)
        got_drafted = engine.head(tokens, hidden, positions, cache)
    torch.testing.assert_close(got, hidden, rtol=0, atol=1e-4)
    torch.testing.assert_close(got_drafted, drafted, rtol=0, atol=1e-4)


def random_weights(policy: Policy) -> dict[str, torch.Tensor]:
    """The weights without adapters, under the names of published ones."""
    return {n.replace(".base_layer", ""): t for n, t in policy.state_dict().items() if ".lora_" not in n}


def test_the_head_is_trained_whole_unless_it_is_a_target(random_policy):
    whole, adapted, routed = random_policy(4), random_policy(4), random_policy(4)
    whole.add_lora(2, 4.0, ["o_proj"])
    assert all(p.requires_grad for p in whole.mtp.parameters())
    adapted.add_lora(2, 4.0, ["o_proj", "mtp"])
    names = {name.split(".base_layer")[0] for name, _ in lora.adapters(adapted.mtp)}
    attention = {f"block.self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    shared = {f"block.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert names == attention | shared | {"eh_proj", "block.mlp.experts"}
    assert all((".lora_" in name) == p.requires_grad for name, p in adapted.mtp.named_parameters())
    routed.add_lora(2, 4.0, ["o_proj", "router", "mtp"])
    assert {name for name, _ in lora.adapters(routed.mtp)} - {name for name, _ in lora.adapters(adapted.mtp)} == {
        "block.mlp.gate"
    }


def expected_targets(policy: Policy) -> set[str]:
    expected = {"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    expected |= {"gate_proj", "up_proj", "down_proj", "experts"}
    expected -= {"q_proj"} if policy.config.q_lora_rank else {"q_a_proj", "q_b_proj"}
    return expected - ({"experts"} if policy.config.first_k_dense_replace == 2 else set())


def test_named_targets_are_the_only_ones(random_policy):
    for targets in (["o_proj", "experts"], ["experts"], ["lm_head"]):
        policy = adapted(random_policy(4), targets=targets)
        assert adapted_modules(policy) == set(targets)
    assert not torch.equal(policy.weights()["trunk.lm_head.weight"], random_policy(4).lm_head)


REFUSED = [
    ({}, ["q_proj", "o_pro"], r"lora.targets: 'o_pro' matches no module of this policy; it has o_proj"),
    ({"first_k_dense_replace": 2}, ["experts"], r"'experts' matches no module.*q_proj"),
    ({"tie_word_embeddings": True}, ["lm_head"], r"'lm_head' is also the embedding"),  # merged, it would change both
    ({}, ["q_a_proj"], r"'q_a_proj' matches no module"),
    ({}, ["gate"], r"'gate' matches no module of this policy; it has router, gate_proj"),
    ({"first_k_dense_replace": 2}, ["router"], r"'router' matches no module"),
    ({"mtp": False}, ["o_proj", "mtp"], r"'mtp' matches no module"),
    ({}, ["mtp"], r"'mtp' alone leaves the trunk nothing to learn with"),
    ({}, [], r"lora.targets: an empty list leaves the trunk nothing to learn with"),  # peft's words named no option
]


def test_a_target_that_matches_nothing_is_named_with_its_neighbours(random_policy):
    for config, targets, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            random_policy(4, **config).add_lora(2, 4.0, targets)


def test_merged_weights_compute_what_the_adapted_model_computes_also_when_saved(policy, tmp_path):
    assert not lora.has_adapter(policy.trunk)
    names, base = set(policy.weights()), logits(policy)
    adapted(policy)
    assert lora.has_adapter(policy.trunk)
    expected = logits(policy)
    assert (expected - base).abs().max() > 0.05  # the adapters do something
    merged = policy.weights()
    assert set(merged) == names
    plain = Policy.from_skeleton(policy.skeleton())
    plain.load_weights(merged)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-4)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert not lora.has_adapter(loaded.trunk)
    assert checksum(loaded.weights()) == checksum(merged)
    assert lora.has_adapter(policy.trunk)  # and goes on learning


def test_with_the_adapter_off_the_policy_is_its_own_reference(policy):
    base = logits(policy)
    adapted(policy)
    with_adapter = logits(policy)
    with lora.adapter_off(policy.trunk):
        assert torch.equal(logits(policy), base)
    assert torch.equal(logits(policy), with_adapter)
    with pytest.raises(KeyError), lora.adapter_off(policy.trunk):  # on again after an error too
        raise KeyError
    assert torch.equal(logits(policy), with_adapter)
    step(policy)  # and still learning
    assert not torch.equal(logits(policy), with_adapter)


def test_alpha_over_rank_scales_the_update(random_policy):
    def delta(alpha: float) -> torch.Tensor:
        policy = random_policy(4)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            policy.add_lora(rank=2, alpha=alpha, targets=["o_proj"])
        for _, layer in lora.adapters(policy.trunk):
            torch.nn.init.ones_(layer.lora_B[lora.ADAPTER].weight)
        name = "trunk.model.layers.0.self_attn.o_proj.weight"
        return policy.weights()[name] - random_policy(4).weights()[name]

    torch.testing.assert_close(delta(6.0), 3 * delta(2.0), rtol=1e-4, atol=1e-6)
