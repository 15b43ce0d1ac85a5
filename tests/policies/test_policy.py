"""A policy on disk and on the wire: the DeepSeek-V3 layout, nothing lost, nothing taken silently."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, XLNetConfig

from policies.policy import BOUNDLESS, Policy, PolicyError, checksum, context_of

TOKENS = torch.tensor([[5, 9, 2, 7, 7, 30]])
LAYER = "model.layers.2."  # the head's place after a trunk of two layers
CONFIGS = {
    "plain": {},
    "biases_and_query_latent": {"attention_bias": True, "q_lora_rank": 10},
    "tied": {"tie_word_embeddings": True},
    "dense": {"first_k_dense_replace": 2},
    "experts_everywhere": {"first_k_dense_replace": 0, "n_routed_experts": 12},  # two digits: 10 sorts before 2
}


def logits(trunk) -> torch.Tensor:
    with torch.no_grad():
        return trunk(TOKENS).logits


def tensors(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.weights().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def saved(random_policy, tmp_path) -> Path:
    random_policy(1).save(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_round_trip_changes_nothing_and_stock_transformers_loads_and_saves_the_trunk(
    random_policy, tmp_path, config, mtp
):
    policy = random_policy(1, mtp=mtp, **CONFIGS[config])
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert_same(tensors(loaded), tensors(policy))
    assert (loaded.mtp is not None) == mtp
    assert loaded.stop_token_ids == policy.stop_token_ids == [0]
    assert loaded.max_length == policy.max_length
    text = "3 + 4 = 7\nhow many apples are left?\n"
    assert loaded.tokenizer(text).input_ids == policy.tokenizer(text).input_ids
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    assert type(stock).__module__.startswith("transformers.")
    assert torch.equal(logits(stock), logits(policy.trunk))
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<|end|>"
    stock.save_pretrained(tmp_path / "again")
    said = json.loads((tmp_path / "policy/config.json").read_text())
    assert json.loads((tmp_path / "again/config.json").read_text()) == said
    assert (said["topk_method"], said["scoring_func"], said["moe_layer_freq"]) == ("noaux_tc", "sigmoid", 1)  # for vLLM


def test_the_checkpoint_has_the_deepseek_v3_layout(saved):
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json"}
    state = load_file(saved / "model.safetensors")
    head = {name.removeprefix(LAYER) for name in state if name.startswith(LAYER)}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= head
    assert {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"} <= head
    for layer in ("model.layers.1.", LAYER):  # experts one by one, gate and up apart
        for expert in range(4):
            gate, up, down = (
                state[f"{layer}mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            assert gate.shape == up.shape == (16, 32)
            assert down.shape == (32, 16)
    assert not [name for name in state if "gate_up" in name or name.startswith(("trunk", "mtp"))]
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (2, 1)


def test_weights_have_the_mode_that_the_umask_gives_every_file(random_policy, tmp_path):
    before = os.umask(0o027)
    try:
        random_policy(1).save(tmp_path / "policy")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "policy").iterdir()}
    assert set(modes.values()) == {0o640}
    assert ".mode" not in modes


def test_a_policy_without_head_says_so_and_gets_one_on_request(random_policy, tmp_path):
    random_policy(1, mtp=False).save(tmp_path / "policy")
    assert json.loads((tmp_path / "policy/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert Policy.load(tmp_path / "policy").mtp is None
    first, again, other = (Policy.load(tmp_path / "policy", add_mtp=True, seed=seed) for seed in (3, 3, 4))
    assert_same(tensors(first), tensors(again))
    assert not torch.equal(first.mtp.eh_proj.weight, other.mtp.eh_proj.weight)
    first.save(tmp_path / "policy")
    assert_same(tensors(Policy.load(tmp_path / "policy", add_mtp=True, seed=4)), tensors(first))  # it is kept


def test_loading_leaves_the_random_state_alone(random_policy, saved):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Policy.load(saved, add_mtp=True)
    Policy.from_skeleton(random_policy(1).skeleton())
    assert torch.rand(1) == expected


def test_a_save_that_fails_leaves_the_old_checkpoint(random_policy, saved, monkeypatch):
    expected = tensors(Policy.load(saved))
    newer = random_policy(9)
    monkeypatch.setattr(
        type(newer.tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(PolicyError, match="cannot write the policy to .*disk full.* what was saved before is intact"):
        newer.save(saved)
    monkeypatch.undo()
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert_same(tensors(Policy.load(saved)), expected)


def test_a_dense_model_is_a_policy_without_head(tmp_path, random_policy):
    config = LlamaConfig(
        vocab_size=262, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=7
    )
    dense = Policy(LlamaForCausalLM(config).eval(), None, random_policy(0).tokenizer)
    dense.save(tmp_path / "dense")
    loaded = Policy.load(tmp_path / "dense", add_mtp=True)  # MTP is for DeepSeek-V3 trunks
    assert loaded.mtp is None
    assert loaded.stop_token_ids == [7]
    loaded.trunk.generation_config.eos_token_id = []  # which names none: else no completion would ever end
    assert loaded.stop_token_ids == [loaded.tokenizer.eos_token_id]
    assert torch.equal(logits(loaded.trunk), logits(dense.trunk))


TRUNK_TENSORS = ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.gate.weight"]
HEAD_TENSORS = ["eh_proj.weight", "shared_head.norm.weight", "mlp.gate.weight", "mlp.experts.2.up_proj.weight"]
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"  # transformers would name the fused tensor alone
TENSORS = [*TRUNK_TENSORS, *(LAYER + name for name in HEAD_TENSORS), EXPERT]
UNKNOWN = ["model.layers.0.self_attn.extra.weight", "adapter.weight", LAYER + "self_attn.extra.weight"]


def test_tensors_that_are_missing_misshapen_or_unknown_are_named(saved, capfd):
    whole = load_file(saved / "model.safetensors")
    changes = [({name: None}, f"lacks.*{name}") for name in TENSORS]
    changes += [({name: whole[name][:1].clone()}, f"shape.*{name}") for name in TENSORS]
    changes += [({name: torch.zeros(2)}, f"does not explain.*{name}") for name in UNKNOWN]
    changes.append(({EXPERT: whole[EXPERT][:1].clone()}, rf"{EXPERT} \(expected \[16, 32\], found \[1, 32\]\)"))
    of_one = [name for name in whole if name.startswith("model.layers.1.mlp.experts.3.")]
    changes.append((dict.fromkeys(of_one), r"lacks.*model.layers.1.mlp.experts.3.down_proj.*3 in all"))
    for changed, message in changes:
        state = {name: tensor for name, tensor in (whole | changed).items() if tensor is not None}
        save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PolicyError, match=message):
            Policy.load(saved)
    assert capfd.readouterr().err == ""


def test_a_folder_that_is_no_checkpoint_is_refused_with_its_name(tmp_path):
    with pytest.raises(PolicyError, match=r"model='.*nowhere' is neither a preset, a checkpoint folder nor"):
        Policy.load(tmp_path / "nowhere")


def test_pickled_weights_are_not_read(random_policy, tmp_path):
    policy = random_policy(1, mtp=False)
    policy.save(tmp_path / "policy")
    (tmp_path / "policy/model.safetensors").unlink()
    torch.save(policy.trunk.state_dict(), tmp_path / "policy/pytorch_model.bin")
    with pytest.raises(PolicyError, match="safetensors"):
        Policy.load(tmp_path / "policy")


def test_contract_5_a_skeleton_and_published_weights_make_the_same_policy(random_policy):
    policy = random_policy(1, attention_bias=True)
    assert any(name.endswith("e_score_correction_bias") for name in policy.weights())
    files = policy.skeleton()
    assert not any(name.endswith((".safetensors", ".bin")) for name in files)
    other = Policy.from_skeleton(files)
    assert not torch.equal(logits(other.trunk), logits(policy.trunk))
    other.load_weights(policy.weights())
    assert_same(tensors(other), tensors(policy))
    assert torch.equal(logits(other.trunk), logits(policy.trunk))
    assert other.stop_token_ids == policy.stop_token_ids
    assert other.tokenizer.decode([5, 6, 7]) == policy.tokenizer.decode([5, 6, 7])
    with torch.no_grad():
        other.lm_head.zero_()  # and shares no memory with it
    assert policy.lm_head.any()
    assert Policy.from_skeleton(random_policy(1, mtp=False).skeleton()).mtp is None


def test_a_skeleton_has_every_chat_template_of_the_tokenizer(random_policy):
    """Hermes 3 and Command R have one for tools, which transformers saves in a folder of its own."""
    policy = random_policy(1, mtp=False)
    templates = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
    policy.tokenizer.chat_template = templates
    assert Policy.from_skeleton(policy.skeleton()).tokenizer.chat_template == templates


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False, "date_string": "26 Jul 2024"}])
def test_a_skeleton_has_what_the_run_hands_to_the_chat_template(random_policy, options):
    """Else a worker, or a sampler in another precision, would begin episodes with another prompt."""
    policy = random_policy(1, mtp=False)
    if options:
        policy.tokenizer.chat_template_kwargs = options
    assert Policy.from_skeleton(policy.skeleton()).tokenizer.chat_template_kwargs == options


def test_published_names_and_shapes_must_be_those_of_the_policy(random_policy):
    policy = random_policy(1)
    before = tensors(policy)
    weights = {name: tensor + 1 for name, tensor in before.items()}
    with pytest.raises(PolicyError, match="this policy lacks.*trunk.adapter"):
        policy.load_weights(weights | {"trunk.adapter": torch.zeros(2)})
    norm = "trunk.model.norm.weight"
    with pytest.raises(PolicyError, match=rf"{norm}.*\[1\].*\[32\]"):
        policy.load_weights(weights | {norm: torch.zeros(1)})  # would broadcast
    with pytest.raises(PolicyError, match=f"lack .*{norm}"):
        policy.load_weights({name: tensor for name, tensor in weights.items() if name != norm})
    assert_same(tensors(policy), before)  # refused means untouched


def test_the_digest_changes_with_a_bit_a_name_a_shape_and_a_type():
    weights = {"a": torch.arange(4.0), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    original = checksum(weights)
    assert checksum(dict(reversed(weights.items()))) == original  # their order does not matter
    assert checksum({name: tensor.clone() for name, tensor in weights.items()}) == original
    flipped = weights["a"].clone()
    flipped.view(torch.int32)[2] ^= 1
    changed = [
        weights | {"a": flipped},
        weights | {"b": -weights["b"]},  # minus zero equals zero, and is another bit
        {"a2" if name == "a" else name: tensor for name, tensor in weights.items()},
        weights | {"a": weights["a"].view(2, 2)},
        weights | {"a": weights["a"].view(torch.int32)},
        weights | {"d": torch.zeros(0)},
        {"a": weights["a"], "b": weights["b"]},
        {"a": weights["c"], "b": weights["b"], "c": weights["a"]},
    ]
    assert len({original, *map(checksum, changed)}) == 1 + len(changed)
    weight = torch.arange(6.0).view(2, 3)
    assert checksum({"w": weight.T}) == checksum({"w": weight.T.contiguous()}) != checksum({"w": weight.view(3, 2)})


@pytest.mark.parametrize(("prompt", "implementation"), [(5, "sdpa_packed"), (20, "sdpa")])
def test_packed_rows_of_a_model_with_an_indexer_are_right_also_where_it_leaves_tokens_out(
    hf_policy, prompt, implementation
):
    """The packed row is always longer than the 12 tokens that the indexer chooses, and its sequences only once."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 6}
    indexer = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 12}
    policy = hf_policy("deepseek_v32", 3, num_key_value_heads=4, first_k_dense_replace=3, **ranks, **indexer)
    given = torch.randint(2, 200, (prompt,), generator=torch.Generator().manual_seed(0))
    completions = torch.randint(2, 200, (4, 6), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([given, completions.flatten()])[None]
    places = torch.cat([torch.arange(prompt), *[torch.arange(prompt, prompt + 6)] * 4])[None]
    segment = torch.tensor([[0] * prompt + [number for number in (1, 2, 3, 4) for _ in range(6)]])
    with torch.no_grad():
        hidden = policy.hidden(ids, places, segment)[0, prompt:].view(4, 6, -1)
        assert policy.config._attn_implementation == implementation
        policy.config._attn_implementation = policy.own_attention
        rows = torch.cat([given.expand(4, -1), completions], dim=1)
        own = policy.trunk.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state[:, prompt:]
    torch.testing.assert_close(hidden, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "implementation"), [("gpt_oss", "sdpa_packed"), ("bloom", "eager")])
def test_attention_beyond_sdpa_is_ours_where_flex_attention_could_do_it(hf_policy, kind, implementation):
    policy = hf_policy(kind, **{"max_position_embeddings": 256, "num_local_experts": 2, "num_experts_per_tok": 1})
    assert (policy.own_attention, policy.config._attn_implementation) == ("eager", implementation)


def test_the_context_ends_where_layers_of_any_kind_change_their_rotation(hf_policy):
    """Gemma 3 rotates sliding and other layers by parameters of their own. Beyond 16 tokens longrope takes other
    factors for the whole row, so what a cache holds of it would be of another rotation."""
    long = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0}
    long |= {"rope_theta": 1e4, "original_max_position_embeddings": 16}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "head_dim": 8}
    for rope, length in ((plain, 256), (long, 16)):
        each = {"sliding_attention": plain, "full_attention": rope}
        assert hf_policy("gemma3_text", rope_parameters=each, **kinds).max_length == length


def test_no_limit_is_a_limit_of_the_context():
    """XLNet's is -1: `quartet quantize` took windows of -1 tokens."""
    assert context_of(XLNetConfig()) == BOUNDLESS
    assert context_of(LlamaConfig(max_position_embeddings=128)) == 128


def test_a_checkpoint_with_code_is_read_by_transformers_own_class_and_says_so_once(saved, caplog):
    Policy.load(saved)
    assert "auto_map" not in caplog.text
    again = saved.rename(saved.with_name("with_code"))
    file = again / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "configuration_own.Own"}}))
    for _ in range(2):
        Policy.load(again)
    assert caplog.text.count("brings code (auto_map in config.json), which is never run: transformers' own") == 1
