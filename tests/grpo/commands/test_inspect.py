"""`quartet policy inspect`: presets, folders, runs and hub ids; the table and its JSON."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from grpo.cli import main
from grpo.commands.inspect import inspect
from policies.policy import PolicyError


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
    (tmp_path / "run").mkdir()
    (tmp_path / "run/environment.json").write_text("{}")
    shutil.copytree(tmp_path / "policy", tmp_path / "run/policy")
    assert inspect(str(tmp_path / "run")) == counted


def test_the_configuration_alone_suffices(random_policy, tmp_path):
    policy = random_policy(1)
    policy.config.num_nextn_predict_layers = 2
    policy.config.save_pretrained(tmp_path)
    assert inspect(str(tmp_path)).mtp_depth == 2


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
