"""Folders as they are published: a model that also reads pictures learns to write, and keeps the rest."""

import json

import pytest
import torch
import zoo
from transformers import AutoModelForImageTextToText

from grpo.source.agreement import check_agreement
from policies import lora
from policies.checkpoint import check_files
from policies.contradictions import refuse_type
from policies.cut import quiet
from policies.policy import Policy, PolicyError

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
WHOLE = {"gemma3": {}, "mistral3": {}, "qwen2_5_vl": ROPE, "qwen3_vl": {}, "qwen3_5": {}, "internvl": {}, "gemma4": {}}


@pytest.fixture
def published(request, tmp_path):
    """A folder with a tiny model that reads pictures, as `transformers` saves it, and its files for pictures."""
    kind = request.param
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(zoo.tiny_config(kind, **WHOLE[kind]), dtype=torch.float32)
    model.generation_config.eos_token_id = 0
    folder = tmp_path / kind
    model.save_pretrained(folder)
    zoo.policy("llama").tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return folder


def other_tensors(before: torch.nn.Module, after: torch.nn.Module) -> set[str]:
    state = after.state_dict()
    assert state.keys() == before.state_dict().keys()
    return {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, state[name])}


@pytest.mark.parametrize(
    "published",
    ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in WHOLE if name != "qwen3_vl")],
    indirect=True,
)
def test_the_language_model_alone_learns_and_the_rest_is_saved_as_it_was(published, tmp_path):
    policy = Policy.load(published)
    check_agreement(policy)
    learning = {name for name, p in policy.trunk.named_parameters() if p.requires_grad}
    assert learning
    assert all("language_model" in name or name == "lm_head.weight" for name in learning)
    with torch.no_grad():
        for name, parameter in policy.trunk.named_parameters():
            if name in learning:
                parameter.add_(0.01)
    policy.save(tmp_path / "saved")
    before = AutoModelForImageTextToText.from_pretrained(published)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert type(after) is type(before)
    tied = set() if "lm_head.weight" in learning else {"lm_head.weight"}
    assert other_tensors(before, after) == learning | (tied & after.state_dict().keys())
    assert (tmp_path / "saved/preprocessor_config.json").read_text() == '{"size": 28}'
    copy = policy.merged()
    assert type(copy.trunk) is type(policy.trunk)
    assert other_tensors(policy.trunk, copy.trunk) == set()
    assert lora.reach(policy.trunk)[0] > 0.95


@pytest.mark.parametrize(
    ("file", "fields", "told"),
    [
        ("params.json", {"dim": 64, "n_layers": 2}, "is in Mistral's own layout, by params.json"),
        ("config.json", {"dim": 64, "inter_dim": 96, "n_layers": 2}, "is in DeepSeek's own layout, by inter_dim"),
    ],
)
def test_a_layout_of_a_maker_that_transformers_does_not_read_is_refused_with_the_way_out(tmp_path, file, fields, told):
    (tmp_path / file).write_text(json.dumps(fields))
    with pytest.raises(PolicyError, match=f"{told}.*use the files that were published for transformers"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("files", [{}, {"config.json": {"model_type": "llama"}}], ids=["alone", "with a configuration"])
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ('{"peft_type": "LORA", "base_model_name_or_path": "a/base"}', "the base model 'a/base'"),
        ('{"peft_type": "LORA"}', "a base model, which the file does not name"),
        ('{"peft_type": ', "a base model, which the file does not name"),
    ],
)
def test_an_adapter_without_weights_is_refused_with_the_base_model_that_it_needs(tmp_path, files, fields, told):
    """Some trainers write the configuration of the base model next to an adapter."""
    (tmp_path / "adapter_config.json").write_text(fields)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for refuses in (Policy.load, check_files):
        with pytest.raises(PolicyError, match=f"an adapter of peft .*The adapter needs {told}: merge"):
            refuses(tmp_path)


def test_a_classifier_that_is_an_adapter_is_refused_so_too(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    with pytest.raises(PolicyError, match="The adapter needs the base model 'a/base'"):
        refuse_type(tmp_path)


def test_an_adapter_next_to_a_gguf_file_is_not_read(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "model.gguf").touch()
    refuse_type(tmp_path)
