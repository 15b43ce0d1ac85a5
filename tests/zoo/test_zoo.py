"""The zoo itself: every type is in it or is refused with a reason, and no model of it is neutral."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import zoo


def test_every_causal_type_is_here_or_is_refused_with_a_reason():
    assert {*zoo.kinds(), *zoo.refused()} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert all(zoo.refused().values())


@pytest.mark.parametrize("kind", ["llama", "qwen3_5", "gemma4_text/experts", "nemotron_h", "deepseek_v4"])
def test_a_model_is_tiny_always_the_same_and_far_from_uniform(kind):
    model, again = zoo.tiny(kind), zoo.tiny(kind)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    with torch.no_grad():
        logits = model(input_ids=torch.randint(2, zoo.VOCABULARY, (1, 40)), use_cache=False).logits
    assert 1 < logits.std(-1).mean() < 4
    assert all(p.std() > 0 for p in model.parameters() if p.numel() > 1)


@pytest.mark.parametrize("kind", ["llama", "sarvam_mla", "gemma3", "youtu", "zaya"])
def test_a_policy_of_the_zoo_has_been_read_from_its_folder_and_is_what_was_written(kind, tmp_path):
    written, read = zoo.tiny(kind).state_dict(), zoo.policy(kind).trunk.state_dict()
    assert {name for name, tensor in written.items() if not torch.equal(tensor, read[name])} == set()
    names = {path.name for path in zoo.folder(tmp_path, kind).iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
