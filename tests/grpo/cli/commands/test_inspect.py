"""`quartet policy inspect`: presets, folders, runs and hub ids; the table and its JSON."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from grpo.cli.commands.inspect import inspect, table
from grpo.cli.parse import main
from policies.policy import Policy, PolicyError


def test_a_preset_as_table_and_json(capsys, tmp_path):
    assert main(["policy", "inspect", "tiny", "--context", "100", "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "deepseek_v3, 4 layers",
        "8 routed + 1 shared",
        "2 routed + 1 shared",
        "prompt of 100 tokens",
        "1,024",
    ):
        assert words in shown
    written = json.loads((tmp_path / "out.json").read_text())
    counted = inspect("tiny", 100)
    assert written["parameters"] == counted.parameters
    assert written["cache_bytes"] == {"float32": 1024, "bfloat16": 512}  # 4 layers of 48 + 16 numbers
    assert written["experts"]["routed"] == 8
    assert written["lora_share"] == counted.lora_share
    assert (written["context"], written["mtp_depth"], written["model"]) == (100, 1, "tiny")


@pytest.mark.parametrize(("mtp", "depth"), [(True, 1), (False, 0)])
def test_a_folder_is_counted_by_what_it_stores(random_policy, tmp_path, mtp, depth):
    policy = random_policy(1, mtp=mtp)
    policy.save(tmp_path / "policy")
    counted = inspect(str(tmp_path / "policy"))
    assert counted.mtp_depth == depth
    assert counted.mtp_parameters == (sum(p.numel() for p in policy.mtp.parameters()) if mtp else 0)
    assert counted.context == 256  # as far as this policy reaches
    policy.config.num_nextn_predict_layers = 2
    policy.config.save_pretrained(tmp_path / "bare")
    assert inspect(str(tmp_path / "bare")).mtp_depth == 2  # the configuration alone suffices
    (tmp_path / "run").mkdir()
    (tmp_path / "run/environment.json").write_text("{}")
    shutil.copytree(tmp_path / "policy", tmp_path / "run/policy")
    assert inspect(str(tmp_path / "run")) == counted


def test_a_hub_id_is_counted_from_its_index_without_its_weights(random_policy, tmp_path, monkeypatch):
    policy = random_policy(1)
    snapshot = tmp_path / "models--somebody--tiny/snapshots/0123456789abcdef0123456789abcdef01234567"
    policy.config.save_pretrained(snapshot)
    names = ["model.norm.weight", "model.layers.1.mlp.gate.weight", "model.layers.2.enorm.weight"]
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys([*names, "model.layers.3.enorm.weight"], "far-away.safetensors"),
    }
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    counted = inspect("somebody/tiny")
    assert counted.mtp_depth == 2
    assert counted.parameters == sum(p.numel() for p in policy.trunk.parameters())


def test_faults_are_named(random_policy, tmp_path, capsys):
    random_policy(1).save(tmp_path / "policy")
    file = tmp_path / "policy/model.safetensors"
    state = load_file(file)
    del state["model.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=r"lacks the tensors model.norm.weight \[32\]"):
        inspect(str(tmp_path / "policy"))
    assert main(["policy", "inspect", "tiny", "--context", "0"]) == 1
    assert "context=0" in capsys.readouterr().err
    assert main(["policy", "inspect", "tinny"]) == 1
    assert "tiny" in capsys.readouterr().err


TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
EYES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14}
KINDS = {
    "gemma3": {"text_config": TEXT, "vision_config": EYES},
    "gemma4": {"text_config": TEXT, "vision_config": None, "audio_config": None},
    "rwkv": {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
}


def _as_synced(kind: str, folder: Path, **options) -> str:
    AutoConfig.for_model(kind, **options).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_also_see_or_have_no_heads_are_counted(kind, tmp_path):
    folder = _as_synced(kind, tmp_path, **KINDS[kind])
    counted = inspect(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert (counted.layers, counted.heads) == (2, None if kind == "rwkv" else 4)
    assert (counted.cache_numbers, counted.prefill_flops, counted.decode_flops) == (None, None, None)
    shown = Console(record=True, file=StringIO(), width=200)
    shown.print(table(kind, counted))
    assert "cache and FLOPs" in shown.export_text()


def test_experts_whose_number_has_another_name_and_contexts_without_an_end_are_counted(tmp_path):
    sizes = TEXT | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    counted = inspect(_as_synced("aria_text", tmp_path / "aria", **sizes))
    assert counted.experts.per_token == 2
    assert counted.active_parameters < counted.parameters
    sizes = {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}
    assert inspect(_as_synced("xlnet", tmp_path / "xlnet", **sizes)).context == 4096  # it has no longest context


def test_a_model_that_writes_no_text_or_has_another_form_is_refused_in_a_sentence(tmp_path, capsys):
    clip = _as_synced("clip", tmp_path / "clip")
    for read in (inspect, Policy.load):
        with pytest.raises(
            PolicyError, match="is of type 'clip', of which transformers makes no causal language model"
        ):
            read(clip)
    assert main(["policy", "inspect", _as_synced("blt", tmp_path / "blt")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("quartet: a model of type 'blt' cannot be counted: ")
    assert len(said) < 500


def test_a_model_that_has_no_class_for_its_language_model_alone_is_counted_whole(tmp_path):
    aria = _as_synced("aria", tmp_path, text_config=TEXT, vision_config=EYES | {"model_type": "idefics3_vision"})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(aria))
    assert inspect(aria).parameters == sum(p.numel() for p in model.parameters())


def test_what_adapters_reach_is_said_with_the_rest_and_the_reason(tmp_path, capsys):
    small = _as_synced("gpt2", tmp_path, n_layer=1, n_embd=32, n_head=2, n_positions=64)
    assert main(["policy", "inspect", small]) == 0
    assert "100.0% of the matrices of the trunk" in capsys.readouterr().out
    counted = inspect(small)
    assert (counted.lora_reach, counted.lora_left) == (1.0, {})
    routed = inspect("tiny")
    assert 0.95 < routed.lora_reach < 1
    assert routed.lora_left == {"mlp.gate": "adapted where `router` is a target"}
