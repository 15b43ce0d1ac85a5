"""Every type of the zoo is read as docs/models.md says, and learns."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_learner import small_learner

import zoo
from grpo.config.learner import LearnerOptions
from grpo.source.agreement import by_learner, by_sampler, check_agreement
from policies.checkpoint import check_files
from policies.contradictions import refuse_type
from policies.policy import Policy, PolicyError
from rewards.group_score import GroupScore
from rollout.decoding.engine import Engine
from rollout.group import Prompt
from rollout.sampling import SamplingParams

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import write_models  # noqa: E402 - it is beside the pages

PAGE = (DOCS / "models.md").read_text(encoding="utf-8")


def types_of(text: str, column: int) -> dict[str, str]:
    """The types of a table of the page, each with the other cells of its row."""
    types = {}
    for row in re.findall(r"^\| (.*`.*) \|$", text, re.MULTILINE):
        cells = row.split(" | ")
        for kind in re.findall(r"`([^`]+)`", cells.pop(column)):
            types[kind] = " | ".join(cells)
    return types


TRAINED, REFUSED = PAGE.split("These types are refused")
WAYS, REASONS = types_of(TRAINED, column=2), types_of(REFUSED, column=0)
OFTEN = ("qwen3_5_text", "gemma4_text", "gpt_oss", "granitemoehybrid", "lfm2", "glm_moe_dsa", "bert", "rwkv")
TRAINS = list(WAYS)


def test_the_page_has_every_type():
    assert {*WAYS, *REASONS} == {*zoo.kinds(), *zoo.refused()}
    assert len(TRAINS) >= 150


def test_a_type_whose_folders_are_refused_is_refused_on_the_page(tmp_path):
    refused = {}
    for kind in zoo.kinds():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        try:
            refuse_type(tmp_path)
        except PolicyError as error:
            refused[kind] = str(error).partition(": ")[2]
    assert {"deepseek_v32", "deepseek_v4", "longcat_flash"} <= set(refused)
    assert refused.items() <= REASONS.items()


def told(act: Callable[[], object], folder: Path) -> str:
    """The words of a refusal, without the name of the folder."""
    try:
        act()
    except PolicyError as error:
        return str(error).replace(str(folder), "FOLDER")
    return ""


def put_lm_head(folder: Path, kind: str, tied: bool) -> None:
    """Adds an LM head that is not the embedding to a `tied` model, and takes it away from another one."""
    file, config = folder / "model.safetensors", folder / "config.json"
    stored = load_file(file)
    model = zoo.tiny(kind, tie_word_embeddings=False)
    [name] = [n for n, module in model.named_modules() if module is model.get_output_embeddings()]
    if tied:
        stored[f"{name}.weight"] = torch.randn(model.get_output_embeddings().weight.shape)
        fields = json.loads(config.read_text())
        config.write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    else:
        own = model.get_output_embeddings().weight
        stored = {name: tensor for name, tensor in stored.items() if tensor.shape != own.shape or "embed" in name}
    save_file(stored, file, metadata={"format": "pt"})


HEADS = ("llama", "gemma3", "sarvam_mla", "exaone", "cpmant")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_contract_20_an_lm_head_that_is_not_the_configurations_is_refused_in_the_same_words(kind, tied, tmp_path):
    folder = zoo.folder(tmp_path, kind, tie_word_embeddings=False)
    assert told(lambda: check_files(folder), folder) == told(lambda: Policy.load(folder), folder) == ""
    put_lm_head(folder, kind, tied)
    words = told(lambda: Policy.load(folder), folder)
    expected = "tie_word_embeddings=True in config.json" if tied else "lacks the tensors"
    assert words.startswith(f"model='FOLDER'{':' if tied else ''} {expected}")
    assert told(lambda: check_files(folder), folder) == words


@pytest.mark.slow
@pytest.mark.parametrize("kind", zoo.kinds())
def test_a_type_is_read_as_the_page_says(kind):
    assert write_models.way_of(kind) == ((True, WAYS[kind]) if kind in WAYS else (False, REASONS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.long) for kind in TRAINS]
)
def test_a_step_and_one_of_adapters_move_it_and_sampler_and_learner_agree_after_them(kind):
    policy = zoo.policy(kind)
    check_agreement(policy)
    params, scores = SamplingParams(group_size=3, max_completion_tokens=6), [GroupScore([0.0, 1.0, 2.0], {})]
    for step in (1, 2):
        if step == 2:
            policy.add_lora(4, 8.0)
        before = {name: p.detach().clone() for name, p in policy.trunk.named_parameters() if p.requires_grad}
        learner = small_learner(policy, LearnerOptions(learning_rate=1e-3))
        groups = Engine(policy.merged()).sample([Prompt(f"p/{step}", "", [3, 5, 7, 9])], params)
        learner.step(learner.prepare(groups, scores, step=step))
        assert any(not torch.equal(before[name], p) for name, p in policy.trunk.named_parameters() if name in before)
    merged = policy.merged()
    for scores_of in (by_sampler, by_learner):
        ours, own = scores_of(merged)
        assert (ours - own).abs().max() < 2e-3
