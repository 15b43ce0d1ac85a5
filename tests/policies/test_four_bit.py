"""A base in 4 bits: the policy that samples is the one that learns, and what is saved is an ordinary policy."""

from importlib import util

import pytest
import torch

from policies import four_bit, lora
from policies.policy import Policy, checksum

TOKENS = torch.tensor([[5, 9, 2, 7, 7, 30, 11, 12], [4, 4, 100, 8, 61, 3, 90, 1]])
DTYPES = [torch.float32, torch.bfloat16]
TARGETS = {"all": None, "one": ["q_proj"], "every part": ["q_proj", "kv_b_proj", "experts", "router", "mtp"]}
pytestmark = pytest.mark.skipif(util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def folder(random_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "policy"
    random_policy(hidden_size=64, intermediate_size=96).save(folder)
    return folder


def adapted(folder, dtype=torch.float32, targets=None) -> Policy:
    policy = Policy.load(folder, dtype, in_4_bits=True)
    policy.add_lora(4, 8.0, targets)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.05)
    return policy


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.trunk(TOKENS).logits.float()


def held(policy: Policy) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in policy.named_parameters() if four_bit.is_held(weight)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_linear_modules_are_in_4_bits_and_take_what_was_foretold(folder, dtype):
    policy, plain = Policy.load(folder, dtype, in_4_bits=True), Policy.load(folder, dtype)
    foretold = {f"trunk.{name}": weight for name, weight in four_bit.chosen(plain.trunk).items()}
    assert held(policy).keys() == foretold.keys()
    assert {name.split(".")[-2] for name in foretold} == {
        *("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for name, weight in held(policy).items():
        state = weight.quant_state
        taken = weight.nbytes + state.absmax.nbytes + state.code.nbytes
        assert taken == four_bit.bytes_of(foretold[name])
        assert sum(part.nbytes for part in four_bit.parts(weight).values()) == taken - four_bit.CODE_BYTES
        assert (state.dtype, state.shape) == (dtype, foretold[name].shape)
    others = dict(plain.named_parameters())
    for name, weight in policy.named_parameters():
        assert name in foretold or (weight.dtype, weight.shape) == (others[name].dtype, others[name].shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_forward_writes_to_the_base(folder, dtype):
    """On a processor with AVX512-BF16 bitsandbytes would put other scales in place of the first ones."""
    policy = adapted(folder, dtype)
    before = {name: (weight.clone(), weight.quant_state.absmax.clone()) for name, weight in held(policy).items()}
    first = logits(policy)
    policy.trunk(TOKENS, labels=TOKENS).loss.backward()
    assert torch.equal(logits(policy), first)
    for name, weight in held(policy).items():
        assert torch.equal(weight, before[name][0])
        assert torch.equal(weight.quant_state.absmax, before[name][1])
    missed = [n for n, p in policy.trunk.named_parameters() if p.requires_grad and p.grad is None]
    assert missed == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", TARGETS)
def test_the_sampler_gets_what_the_learner_computes_with(folder, dtype, targets):
    """Dequantised W + ΔW, under the names, shapes and precisions of an ordinary policy."""
    policy, plain = adapted(folder, dtype, TARGETS[targets]), Policy.load(folder, dtype)
    published = policy.weights()
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in published.items()}
    assert kinds == {name: (tensor.shape, tensor.dtype) for name, tensor in plain.weights().items()}
    own = plain.weights()
    assert all(not torch.equal(own[name.replace(".base_layer", "")], published[name.replace(".base_layer", "")])
               for name in held(policy))  # fmt: skip
    sampler = Policy.from_skeleton(policy.skeleton(), dtype)
    sampler.load_weights(published)
    assert torch.equal(sampler.lm_head, policy.lm_head)
    for name, layer in linear(policy):
        if four_bit.is_held(layer.get_base_layer().weight):
            assert type(layer).__module__ == "peft.tuners.lora.bnb"
            assert torch.equal(lora.effective_weight(layer), published[f"trunk.{name}.weight"])
    if dtype == torch.float32:
        assert (logits(sampler).log_softmax(-1) - logits(policy).log_softmax(-1)).abs().max() < 1e-4


def linear(policy: Policy) -> list:
    """The adapted linear modules of the trunk."""
    return [(n, layer) for n, layer in lora.adapters(policy.trunk) if not isinstance(layer, lora.ParamWrapper)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_policy_is_an_ordinary_one(folder, tmp_path, dtype):
    policy = adapted(folder, dtype)
    policy.save(tmp_path / "policy")
    files = policy.skeleton()
    assert b"quant" not in files["config.json"]
    assert files["config.json"] == Policy.load(folder, dtype).skeleton()["config.json"]
    assert "quant" not in (tmp_path / "policy/config.json").read_text()
    again = Policy.load(tmp_path / "policy", dtype)
    assert checksum(again.weights()) == checksum(policy.weights())
    sampler = Policy.from_skeleton(files, dtype)
    sampler.load_weights(policy.weights())
    assert torch.equal(logits(again), logits(sampler))


def test_any_causal_model(hf_policy, tmp_path):
    """Also one with a tied LM head and biases."""
    hf_policy("qwen2", tie_word_embeddings=True, hidden_size=64).save(tmp_path / "qwen")
    policy = adapted(tmp_path / "qwen")
    assert len(held(policy)) == 3 * 7
    sampler = Policy.from_skeleton(policy.skeleton())
    sampler.load_weights(policy.weights())
    assert (logits(sampler).log_softmax(-1) - logits(policy).log_softmax(-1)).abs().max() < 1e-4
    policy.save(tmp_path / "saved")
    assert checksum(Policy.load(tmp_path / "saved").weights()) == checksum(policy.weights())
