"""A hostile config.json costs nothing: its numbers are read before anything is built."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from policies.bounds import MOST_BYTES, beyond
from policies.policy import Policy, PolicyError, read_config


def written(folder, fields):
    (folder / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "deepseek_v3", "n_routed_experts": 10**9}, "n_routed_experts=1000000000 is more than 100,000"),
        ({"model_type": "qwen3_moe", "num_experts": 10**9}, "num_experts=1000000000 is more than"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 1,000"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer=1000000000"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**8}}, "text_config.num_hidden_layers=10"),
        ({"model_type": "llama", "num_labels": 10**8}, "num_labels=100000000"),
        ({"model_type": "llama", "vocab_size": 10**13}, "vocab_size=10000000000000"),
        ({"model_type": "llama", "hidden_size": float("inf")}, "hidden_size=inf"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "config.json is nested too deeply"),
        (" " * (MOST_BYTES + 1), "config.json has 16,777,217 bytes, and no model needs"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "-".join(map(str, value)),
)
def test_what_no_model_has_is_refused_before_transformers_reads_it(tmp_path, monkeypatch, fields, said):
    monkeypatch.setattr("policies.checkpoint.AutoConfig", None)
    with pytest.raises(PolicyError, match=said):
        read_config(written(tmp_path, fields))


def test_what_models_have_passes():
    deepseek = {"num_hidden_layers": 61, "n_routed_experts": 256, "vocab_size": 129_280, "num_nextn_predict_layers": 1}
    long = {"max_position_embeddings": 10_485_760, "num_local_experts": 512, "depths": [2, 2, 18, 2], "use_cache": True}
    assert list(beyond(deepseek | long | {"vision_config": {"num_layers": 48, "image_size": 4096}})) == []


def test_experts_that_no_file_holds_are_not_named_one_by_one(micro_policy, tmp_path):
    micro_policy(0).save(tmp_path / "policy")
    config = json.loads((tmp_path / "policy/config.json").read_text())
    written(tmp_path / "policy", config | {"n_routed_experts": 99_999, "n_group": 1, "topk_group": 1})
    (tmp_path / "policy/digests.json").unlink(missing_ok=True)
    with pytest.raises(PolicyError, match=r"describes about 400,039 tensors, and the files hold \d+;"):
        Policy.load(tmp_path / "policy")


def test_a_larger_model_than_its_files_is_refused_before_it_is_made_up(tmp_path):
    config = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("cpu"):
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    written(tmp_path, fields | {"hidden_size": 1 << 16, "intermediate_size": 1 << 20})  # 800 GB
    with pytest.raises(PolicyError, match=r"describes [\d,]{15} parameters, and the files hold \d,\d{3};"):
        Policy.load(tmp_path)
