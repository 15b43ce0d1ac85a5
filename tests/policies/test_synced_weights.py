"""What a policy publishes: merged when it is read, and of a policy with adapters what changes alone."""

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper

from policies import lora
from policies.policy import Policy, checksum

CONFIGS = {"plain": {}, "query_latent": {"q_lora_rank": 10}, "one_expert": {"n_routed_experts": 1}}


def adapted(policy: Policy) -> Policy:
    """With adapters on everything but the draft head, none of which is zero."""
    policy.add_lora(2, 3.0, sorted({target for each in lora.matrices(policy.trunk) for target in each.targets}))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    return policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CONFIGS)
def test_a_publication_merges_to_the_bits_of_pefts_layers(random_policy, shape, dtype):
    one = {"num_experts_per_tok": 1} if shape == "one_expert" else {}
    policy = adapted(random_policy(4, **CONFIGS[shape], **one).cast(dtype))
    publication, parameters = policy.synced_weights(), dict(policy.named_parameters(remove_duplicate=False))
    names = {id(parameter): name.replace(".base_layer", "") for name, parameter in parameters.items()}
    compared = 0
    for _, layer in lora.adapters(policy):
        kind = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        base = getattr(layer.get_base_layer(), kind)
        with torch.no_grad():
            expected = base + layer.get_delta_weight(lora.ADAPTER).to(base.dtype)
        assert torch.equal(publication[names[id(base)]], expected), names[id(base)]
        assert not torch.equal(expected, base)
        compared += 1
    assert compared == len(publication.adapters) > 10
    assert checksum(publication) == checksum(policy.weights())


def test_only_what_a_policy_with_adapters_learns_changes(random_policy):
    policy = adapted(random_policy(4))
    first, second = policy.synced_weights(), policy.synced_weights()
    assert first.changes(None) == first.tensors
    changes = second.changes(first)
    trunk = {name for name in changes if name.startswith("trunk.")}
    assert trunk == {"trunk.model.layers.1.mlp.gate.e_score_correction_bias"}  # balancing moves it
    assert len(changes) - len(trunk) == sum(name.startswith("mtp.") for name in first)  # the head is trained whole
    policy.trunk(torch.tensor([[5, 9, 2, 7]]), labels=torch.tensor([[5, 9, 2, 7]])).loss.backward()
    assert policy.synced_weights().changes(first).keys() == changes.keys()
    with torch.no_grad():
        policy.trunk.get_input_embeddings().weight.add_(1)  # somebody has written to what should stay
    assert policy.synced_weights().changes(first).keys() == first.keys()
    other = adapted(random_policy(4)).synced_weights()
    assert other.changes(first).keys() == first.keys()


def test_of_tied_weights_both_names_stay(random_policy):
    policy = random_policy(4, tie_word_embeddings=True)
    policy.add_lora(2, 4.0)
    first = policy.synced_weights()
    assert {"trunk.model.embed_tokens.weight", "trunk.lm_head.weight"} <= first.fixed
