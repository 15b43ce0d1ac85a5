"""Checkpoints as others make them: shards, several MTP layers, hub ids; and every way in which files can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import MtpModel

from policies.checkpoint import check_files
from policies.contradictions import check_tensors, contradictions
from policies.layout import WeightFiles
from policies.policy import Policy, PolicyError, read_config

TOKENS = torch.tensor([[5, 9, 2, 7, 7, 30]])
FINE_GRAINED = {
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "moe_intermediate_size": 4,
    "q_lora_rank": 10,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 64,
    },
}
IDLE = {"first_k_dense_replace": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 48}


def logits(trunk) -> torch.Tensor:
    with torch.no_grad():
        return trunk(TOKENS).logits


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, parts: int = 3) -> list[str]:
    """Spread a checkpoint over files with an index, as large ones are; returns the files' names."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files, weight_map = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)], {}
    for i, file in enumerate(files):
        names = sorted(state)[i::parts]
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


@pytest.fixture
def saved(random_policy, tmp_path) -> Path:
    random_policy(1).save(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def deep(saved) -> Path:
    """A checkpoint with three MTP layers of different values, the second with copies of embedding and head."""

    def add(state):
        first = {name: tensor for name, tensor in state.items() if name.startswith("model.layers.2.")}
        for layer in (3, 4):
            state.update({name.replace(".2.", f".{layer}.", 1): torch.randn_like(t) for name, t in first.items()})
        state["model.layers.3.embed_tokens.weight"] = torch.ones(262, 32)
        state["model.layers.3.shared_head.head.weight"] = torch.ones(262, 32)

    torch.manual_seed(0)
    change_tensors(saved, add)
    change_config(saved, num_nextn_predict_layers=3)
    return saved


def test_stock_shards_with_fine_grained_experts_load_and_give_equal_logits(random_policy, tmp_path, caplog):
    policy = random_policy(3, mtp=False, **FINE_GRAINED)
    stock = policy.trunk
    stock.config.num_nextn_predict_layers = 1  # transformers' default, written although it saves no such layer
    stock.save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    policy.tokenizer.save_pretrained(tmp_path / "stock")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 2
    loaded = Policy.load(tmp_path / "stock")
    assert torch.equal(logits(loaded.trunk), logits(stock))
    assert loaded.mtp is None
    assert "num_nextn_predict_layers=1, but no MTP layer is stored" in caplog.text
    caplog.clear()
    assert Policy.load(tmp_path / "stock", add_mtp=True).mtp is not None
    assert caplog.text == ""


def test_further_mtp_layers_are_kept_saved_and_named(deep, caplog):
    expected = load_file(deep / "model.safetensors")
    policy = Policy.load(deep)
    assert len(caplog.records) == 1
    assert "has 3 MTP layers: the first is trained and drafts at every depth" in caplog.text
    assert torch.equal(policy.mtp.eh_proj.weight, expected["model.layers.2.eh_proj.weight"])
    policy.save(deep.with_name("again"))
    again = load_file(deep.with_name("again") / "model.safetensors")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert read_config(deep.with_name("again")).num_nextn_predict_layers == 3
    assert not any(".3." in name or ".4." in name for name in policy.weights())  # samplers need the first alone


def test_a_hub_id_brings_its_mtp_layers(deep, tmp_path, monkeypatch, caplog):
    """The hub's cache as huggingface_hub lays it out; the machine is offline."""
    shard(deep)
    snapshot = tmp_path / "hub/models--somebody--tiny/snapshots/0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(deep, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    policy, local = Policy.load("somebody/tiny"), Policy.load(deep)
    assert all(torch.equal(tensor, local.weights()[name]) for name, tensor in policy.weights().items())
    assert policy.further_mtp.keys() == local.further_mtp.keys() != set()
    with pytest.raises(PolicyError, match=r"model='somebody/other' is neither"):
        Policy.load("somebody/other")


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path):
    marker = tmp_path / "ran"
    (saved / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    change_config(saved, auto_map=classes)
    tokenizer = saved / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": classes}))
    assert isinstance(Policy.load(saved).trunk, DeepseekV3ForCausalLM)
    assert not marker.exists()


def test_a_dense_head_is_stored_as_moe_and_transformers_own_module_takes_it(random_policy, tmp_path):
    policy = random_policy(5, **IDLE)
    policy.save(tmp_path / "policy")
    assert not hasattr(policy.mtp.block.mlp, "experts")
    state = load_file(tmp_path / "policy/model.safetensors")
    assert "model.layers.2.mlp.shared_experts.up_proj.weight" in state
    loaded = Policy.load(tmp_path / "policy")
    for name, tensor in policy.weights().items():
        assert torch.equal(loaded.weights()[name], tensor), name
    trunk = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "policy")
    trunk._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]
    stock = MtpModel.from_pretrained(trunk).eval()
    with torch.no_grad():
        hidden = trunk.model(TOKENS).last_hidden_state[:, :-1]
        positions = torch.arange(1, TOKENS.shape[1])[None]
        expected = stock.forward_layer(0, hidden, positions, None, input_ids=TOKENS[:, 1:])
        [ours] = policy.unroll(hidden, TOKENS[:, 1:], positions, torch.zeros_like(positions), 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_dense_policy_refuses_a_head_whose_experts_do_something(random_policy, tmp_path):
    random_policy(5, **IDLE).save(tmp_path / "policy")
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    change_tensors(tmp_path / "policy", lambda state: state[name][0, 0].fill_(1.0))
    with pytest.raises(PolicyError, match=f"{name} is not zero"):
        Policy.load(tmp_path / "policy")


@pytest.mark.parametrize("native", [True, False])
def test_an_adapter_beside_weights_is_refused(random_policy, tmp_path, native):
    """transformers would load both as one: other weights than the file's, and none of them would learn."""
    folder, policy = tmp_path / "policy", random_policy(1)
    if not native:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        policy = Policy(LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)), None, policy.tokenizer)
    policy.save(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    for refuses in (Policy.load, check_files):
        with pytest.raises(PolicyError, match=r"an adapter of peft \(adapter_config.json\) beside its weights"):
            refuses(folder)


def test_a_missing_shard_is_named_with_what_it_held(saved):
    lost = shard(saved)[1]
    (saved / lost).unlink()
    with pytest.raises(PolicyError, match=rf"lacks the file {lost}, in which .*index.json places \d+ tensors \(\w+"):
        Policy.load(saved)


def test_an_index_that_names_a_tensor_its_file_does_not_hold(saved):
    files = shard(saved)
    index = saved / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = next(
        f for f in files if f != content["weight_map"]["model.norm.weight"]
    )
    index.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match=r"index.json places model.norm.weight in .*, which does not hold it"):
        Policy.load(saved)


def test_a_damaged_index_is_named(saved):
    shard(saved)
    for content in ("{", "[]", "{}", '{"weight_map": 3}'):
        (saved / "model.safetensors.index.json").write_text(content)
        with pytest.raises(PolicyError, match=r"index.json is damaged"):
            Policy.load(saved)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_named(saved, sharded):
    file = saved / (shard(saved)[2] if sharded else "model.safetensors")
    raw = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    damaged = [raw[: len(raw) // 2], raw[:-1], b"", raw[:20] + b"\xff" * 20 + raw[40:], pointer]
    for content in damaged:
        why = "git lfs pull" if content == pointer else "copy or download it again"
        file.write_bytes(content)
        with pytest.raises(PolicyError, match=rf"{file.name} \([\d,]+ bytes\) is damaged.*{why}"):
            Policy.load(saved)


def test_another_number_of_mtp_layers_than_promised_and_a_further_one_that_is_damaged(saved, deep):
    change_tensors(deep, lambda state: state.pop("model.layers.4.mlp.experts.3.up_proj.weight"))
    for promised, message in (
        (3, r"lacks the tensors model.layers.4.mlp.experts.3.up_proj.weight \[16, 32\]"),
        (4, r"lacks the tensors model.layers.4.* contradicts 3 stored MTP layers"),
        (0, r"does not explain: model.layers.2.* num_nextn_predict_layers=0 contradicts 3 .*set it to 3"),
    ):
        change_config(deep, num_nextn_predict_layers=promised)
        with pytest.raises(PolicyError, match=message):
            Policy.load(deep)


def test_old_checkpoints_rotary_frequencies_and_a_stored_tied_head_are_no_fault(random_policy, tmp_path):
    random_policy(1, tie_word_embeddings=True).save(tmp_path / "policy")

    def add(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change_tensors(tmp_path / "policy", add)
    check_tensors(WeightFiles(tmp_path / "policy"), read_config(tmp_path / "policy"))
    Policy.load(tmp_path / "policy")


CONTRADICTIONS = [
    ({"num_experts_per_tok": 5}, r"num_experts_per_tok=5 contradicts topk_group=1: .* hold 4 of n_routed_experts=4"),
    ({"n_routed_experts": 8, "n_group": 4, "num_experts_per_tok": 3}, "hold 2 of n_routed_experts=8; use 2 or less"),
    ({"n_group": 3}, r"n_routed_experts=4 is not a multiple of n_group=3; use one of 3, 6, or"),
    ({"n_group": 4}, r"n_group=4 leaves 1 of n_routed_experts=4 .* use n_group=2 or less"),
    ({"topk_group": 2}, r"topk_group=2 contradicts n_group=1"),
    ({"topk_group": 0}, r"topk_group=0 must be 1 or more"),
    ({"n_group": None}, r"n_group=None must be 1 or more"),
    ({"kv_lora_rank": 0}, r"kv_lora_rank=0 must be 1 or more"),
    ({"kv_lora_rank": 10}, r"kv_a_layernorm.weight \(expected \[10\], found \[12\]\)"),
    ({"q_lora_rank": 0}, r"q_lora_rank=0 must be 1 or more, or null"),
    ({"qk_rope_head_dim": 7, "head_dim": 8}, r"qk_rope_head_dim=7 is odd.*head_dim=8 contradicts qk_rope_head_dim=7"),
    ({"head_dim": 6}, r"head_dim=6 contradicts qk_rope_head_dim=8"),
    ({"qk_head_dim": 9}, r"qk_head_dim=9 contradicts qk_nope_head_dim=8 \+ qk_rope_head_dim=8"),
    ({"qk_nope_head_dim": -1}, r"qk_nope_head_dim=-1 must be 0 or more"),
    ({"num_key_value_heads": 1}, r"num_key_value_heads=1 contradicts num_attention_heads=2"),
    ({"num_nextn_predict_layers": -1}, r"num_nextn_predict_layers=-1 must be 0 or more"),
    ({"num_hidden_layers": 0}, r"num_hidden_layers=0 must be 1 or more"),
    ({"scoring_func": "softmax"}, r"scoring_func='softmax': .*'sigmoid' only"),
    ({"hidden_act": "gelu"}, r"hidden_act='gelu'"),
    ({"quantization_config": {"quant_method": "fp8"}}, r"'fp8'\): packed weights cannot be trained"),
    ({"n_group": "many"}, r"config.json is not usable.*n_group"),
    ({"rms_norm_eps": -1.0}, r"rms_norm_eps=-1.0 must be greater than 0"),
    ({"pad_token_id": 9999}, r"pad_token_id=9999 contradicts vocab_size=280: ids run from 0 to 279"),
    ({"eos_token_id": [0, 280]}, r"eos_token_id=\[0, 280\] contradicts vocab_size=280"),
    ({"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4}}, r"rope_type='yarm' is not one that .*yarn"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"config.json is not usable.*yarn.*factor"),
    # transformers would load both, and whoever builds the model from its config would have one
    ({"tie_word_embeddings": True}, r"tie_word_embeddings=True .* contradicts .*set it to false"),
]


def test_contradictions_name_the_field_its_value_and_the_way_out(saved):
    plain = (saved / "config.json").read_text()
    for fields, message in CONTRADICTIONS:
        (saved / "config.json").write_text(json.dumps(json.loads(plain) | fields))
        before = {file: file.read_bytes() for file in saved.iterdir()}
        with pytest.raises(PolicyError, match=f"(?s){message}"):
            Policy.load(saved)
        assert {file: file.read_bytes() for file in saved.iterdir()} == before


def test_a_small_file_that_is_damaged_is_named(saved):
    for file, named in (("generation_config.json", "generation_config.json"), ("tokenizer.json", "its tokenizer")):
        whole = (saved / file).read_text()
        (saved / file).write_text("{")
        with pytest.raises(PolicyError, match=rf"policy': {named} is missing or damaged"):
            Policy.load(saved)
        (saved / file).write_text(whole)


def test_sound_configurations_have_no_contradictions(random_policy):
    assert list(contradictions(DeepseekV3Config())) == []  # DeepSeek-V3's own
    released = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1}
    assert list(contradictions(DeepseekV3Config(**released))) == []
    dense = random_policy(1, first_k_dense_replace=2, n_routed_experts=2, n_group=8)  # a router that nothing uses
    assert list(contradictions(dense.config)) == []


RELATIVES = {
    "kimi_k2": "The architecture is DeepSeek-V3's: a folder with dequantised weights, model_type: deepseek_v3",
    "deepseek_v32": "DeepSeek Sparse Attention",
    "deepseek_v4": "hyper-connections",
    "longcat_flash": "two attention blocks",
    "longcat_flash_ngram": "two attention blocks",
    "no_such_type": "does not know; code from a model's repository is never run",
}


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 4, "auto_map": {"AutoConfig": "configuration_k.KConfig"}}])
def test_a_relative_of_deepseek_v3_is_refused_by_name_with_the_reason(saved, fields):
    for kind, why in RELATIVES.items():
        change_config(saved, model_type=kind, **fields)
        for read in (read_config, Policy.load):
            with pytest.raises(PolicyError) as error:
                read(saved)
            assert str(error.value).startswith(f"model='{saved}' is of type {kind!r}")
            assert why in str(error.value)
            assert "neither a preset" not in str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_an_mtp_layer_whose_embedding_or_head_is_not_the_trunks_says_so(random_policy, tmp_path, caplog, tied):
    random_policy(1, tie_word_embeddings=tied).save(tmp_path / "policy")
    expected = Policy.load(tmp_path / "policy", torch.bfloat16).weights()

    def copied(state):
        state["model.layers.2.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
        lm_head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
        state["model.layers.2.shared_head.head.weight"] = lm_head.clone()

    for changed in ([], ["embed_tokens"], ["shared_head.head"], ["embed_tokens", "shared_head.head"]):
        change_tensors(tmp_path / "policy", copied)
        for name in changed:
            change_tensors(
                tmp_path / "policy", lambda state, name=name: state[f"model.layers.2.{name}.weight"][3, 5].add_(0.5)
            )
        caplog.clear()
        policy = Policy.load(tmp_path / "policy", torch.bfloat16)
        said = [record.getMessage() for record in caplog.records if "differ from the trunk's" in record.getMessage()]
        assert len(said) == bool(changed)
        assert all(f"model.layers.2.{name}.weight" in said[0] for name in changed)
        assert "does not hold them" in "".join(said) or not changed
        assert all(torch.equal(tensor, expected[name]) for name, tensor in policy.weights().items())
    policy.save(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert not [name for name in again if "layers.2.embed" in name or "head.head" in name]
