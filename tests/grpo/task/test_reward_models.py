"""Scores that models give: equal to those of one text at a time, and refused early where they would mean nothing."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.config.run import TrainConfig
from grpo.task.reward_models import ModelRewards
from grpo.task.task import Task
from grpo.train import train
from review.readers.run_folder import read_metrics
from rewards.config.data import SourceOptions
from rewards.config.options import load
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.config.yaml_file import ConfigError
from rewards.protocol import RewardError
from rewards.records import read_rollouts
from rollout.group import Completion, Prompt, RolloutGroup

CPU = torch.device("cpu")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folders(micro_policy, tmp_path_factory):
    """Random models on disk: `score` (a decoder, 1 label), `labels` (BERT, 3 labels), `policy`, `llama`."""
    root = tmp_path_factory.mktemp("reward_models")
    policy = micro_policy(3)
    policy.save(root / "policy")

    torch.manual_seed(0)
    policy.config.num_labels, policy.config.pad_token_id = 1, None  # which token pads, the tokenizer says
    score = DeepseekV3ForSequenceClassification(policy.config)
    torch.nn.init.normal_(score.score.weight)
    score.save_pretrained(root / "score")
    policy.tokenizer.chat_template = CHAT
    policy.tokenizer.save_pretrained(root / "score")

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789#?+=."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(words), max_position_embeddings=64, num_labels=3, initializer_range=0.5, pad_token_id=0, **small
    )
    BertForSequenceClassification(config).save_pretrained(root / "labels")
    tokenizer.save_pretrained(root / "labels")

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(policy.tokenizer), eos_token_id=0, max_position_embeddings=64, **small)
    )
    torch.nn.init.zeros_(llama.lm_head.weight)  # every token is as likely as any other
    llama.save_pretrained(root / "llama")
    policy.tokenizer.save_pretrained(root / "llama")
    return root


def group(prompt, *texts, reason="stop", **columns):
    completions = [Completion([1, 2], [0.0, 0.0], text, reason, 0) for text in texts]
    return RolloutGroup(Prompt(prompt, prompt, [1], columns), completions)


GROUPS = [
    group("What is 2 + 3?", " 2 + 3 = 5", " I do not know", " 5", question="2 + 3?"),
    group("And?", " a much longer completion than any other", question="and"),
]


def reward_model(name, model, weight=1.0, **arguments):
    return RewardOptions(function=f"model:{model}", name=name, weight=weight, arguments=arguments)


def columns(*options, groups=GROUPS):
    rewards = ModelRewards([reward_model(**option) for option in options])
    rewards.load(CPU)
    return rewards, rewards.columns(groups)


def flat(found, name):
    return [value for own in found for value in own[name]]


def test_a_classifiers_score_is_its_logit_whatever_the_batch(folders):
    options = {"name": "rm_score", "model": str(folders / "score")}
    rewards, found = columns(options, options | {"name": "chat", "kind": "chat_classifier"}, options | {"name": "one"})
    model, tokenizer = rewards.models[0].model, rewards.models[0].tokenizer
    chat = ["<user>2 + 3?<assistant> 2 + 3 = 5", "<user>2 + 3?<assistant> I do not know", "<user>2 + 3?<assistant> 5"]
    chat.append("<user>and<assistant> a much longer completion than any other")
    plain = [g.prompt.text + c.text for g in GROUPS for c in g.completions]
    for name, texts in (("rm_score", plain), ("chat", chat), ("one", plain)):
        with torch.no_grad():
            alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
        assert [len(own[name]) for own in found] == [3, 1]
        assert flat(found, name) == pytest.approx(alone, abs=1e-5)
        assert len({round(score, 3) for score in alone}) == 4


def test_a_classifier_without_a_longest_text_scores_every_text(folders, tmp_path):
    shutil.copytree(folders / "labels", tmp_path / "xlnet")
    config = XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=1, pad_token_id=0)
    XLNetForSequenceClassification(config).save_pretrained(tmp_path / "xlnet")  # its longest text is -1
    _, found = columns({"name": "rm", "model": str(tmp_path / "xlnet")})
    assert all(math.isfinite(score) for score in flat(found, "rm"))


@pytest.mark.slow
def test_a_hub_id_is_read_from_the_hubs_cache(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--score"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a1b2")
    shutil.copytree(folders / "score", repository / "snapshots/a1b2")
    groups = [group("2 + 3?", " 5")]
    _, of_hub = columns({"name": "rm", "model": "owner/score"}, groups=groups)
    _, found = columns({"name": "rm", "model": str(folders / "score")}, groups=groups)
    assert of_hub == found


def test_a_label_chooses_the_logit_and_special_tokens_are_the_tokenizers(folders):
    options = [{"name": f"label_{i}", "model": str(folders / "labels"), "label": i} for i in (0, 2)]
    rewards, found = columns(*options)
    model, tokenizer = rewards.models[0].model, rewards.models[0].tokenizer
    for i in (0, 2):
        for j, text in enumerate(g.prompt.text + c.text for g in GROUPS for c in g.completions):
            ids = [2, *tokenizer.encode(text, add_special_tokens=False), 3]
            with torch.no_grad():
                logit = model(input_ids=torch.tensor([ids])).logits[0, i].item()
            assert flat(found, f"label_{i}")[j] == pytest.approx(logit, abs=1e-5)


def test_perplexity_is_of_the_completion_given_the_prompt_its_end_included(folders):
    groups = [*GROUPS, group("Cut", " off here", " and here too", reason="length")]
    rewards, found = columns({"name": "ppl", "model": str(folders / "policy"), "kind": "perplexity"}, groups=groups)
    model, tokenizer = rewards.models[0].model, rewards.models[0].tokenizer
    expected = []
    for own in groups:
        for completion in own.completions:
            prompt = tokenizer.encode(own.prompt.text)
            ids = prompt + tokenizer.encode(completion.text)
            ids += [tokenizer.eos_token_id] if completion.finish_reason == "stop" else []
            with torch.no_grad():
                probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)
            logs = [math.log(probabilities[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
            expected.append(math.exp(-sum(logs) / len(logs)))
    assert flat(found, "ppl") == pytest.approx(expected, rel=1e-4)


def test_a_completion_without_tokens_or_beyond_the_context_has_no_score(folders):
    groups = [group("p", "", reason="length"), group("p", "7 " * 70), group("p", "", reason="stop")]
    _, found = columns({"name": "ppl", "model": str(folders / "llama"), "kind": "perplexity"}, groups=groups)
    assert [math.isnan(value) for value in flat(found, "ppl")] == [True, True, False]


def test_models_are_frozen_in_inference_mode_and_draw_nothing(folders):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    kinds = [{"name": "a", "model": str(folders / "score")}]
    kinds += [{"name": "b", "model": str(folders / name), "kind": "perplexity"} for name in ("policy", "llama")]
    rewards, _ = columns(*[kind | {"name": f"m{i}"} for i, kind in enumerate(kinds)])
    assert torch.equal(before, torch.get_rng_state())
    for scored in rewards.models:
        assert not scored.model.training
        assert not any(parameter.requires_grad for parameter in scored.model.parameters())


def test_what_would_mean_nothing_is_refused_before_training(folders, tmp_path):
    for name in ("pickled", "headless", "plain"):
        shutil.copytree(folders / "score", tmp_path / name)
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "plain/chat_template.jinja").unlink()
    tensors = load_file(tmp_path / "headless/model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "headless/model.safetensors", metadata={"format": "pt"})
    score, labels = folders / "score", folders / "labels"
    for given, message in (
        ({"model": folders / "missing"}, "rewards: model:.*missing: there is no such folder"),
        ({"model": "tiny"}, "model:tiny: there is no such folder"),
        ({"model": folders / "policy"}, "no sequence classifier but DeepseekV3ForCausalLM; .*kind: perplexity"),
        ({"model": labels}, "has 3 labels; arguments: .label: N. says which logit is .*: 0 = LABEL_0"),
        ({"model": labels, "label": 3}, "has no label 3; its labels are 0 = LABEL_0"),
        ({"model": score, "name": "question"}, "'question' is the name of another column"),
        ({"model": score, "name": "completions"}, "'completions' is the name of another column"),
        ({"model": tmp_path / "pickled"}, "model:.*pickled cannot be loaded: .*safetensors"),
        ({"model": tmp_path / "headless"}, "lacks the tensors score.weight"),
        ({"model": tmp_path / "plain", "kind": "chat_classifier"}, "but its tokenizer has no chat template"),
        ({"model": score, "kind": "perplexity"}, "model:.* cannot be loaded: "),
    ):
        data = SourceOptions(task_options={"levels": [1]}, limit=4)
        with pytest.raises(ValueError, match=message):
            Task(data, [reward_model(**{"name": "rm"} | given)], ScoringOptions())
    one = reward_model("a", score)
    with pytest.raises(ValueError, match="'a' is the name of another column"):
        ModelRewards([one, one])
    with pytest.raises(ConfigError, match="label is for classifiers"):
        ModelRewards([reward_model("a", "m", kind="perplexity", label=1)])
    with pytest.raises(ValueError, match="rewards: model:m: no argument 'size'"):
        ModelRewards([reward_model("a", "m", size=1)])


def _task(folders, on_error="abort"):
    return Task(
        SourceOptions(task_options={"levels": [1]}, limit=4),
        [reward_model("ppl", folders / "llama", weight=-0.5, kind="perplexity")],
        ScoringOptions(on_error=on_error),
    )


def test_contract_6_a_text_without_a_score_is_a_failure_of_its_own(folders):
    groups = [group("p", "fits", "7 " * 70)]
    with (
        _task(folders) as task,
        pytest.raises(RewardError, match="'ppl' failed on prompt 'p', sample 1.*'ppl' holds nan"),
    ):
        task.score(groups)
    with _task(folders, "drop_sample") as task:
        [score] = task.score(groups)
    vocabulary = task.models.models[0].model.config.vocab_size
    assert score.rewards == [pytest.approx(-0.5 * vocabulary), None]
    assert len(score.errors) == 1


def test_a_run_learns_from_a_reward_model_and_records_its_scores(folders, micro_config, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def own(completions, ppl, rm_score, answer):\n    return [a / 100 + b for a, b in zip(ppl, rm_score)]\n"
    )
    rewards = [
        {"function": f"model:{folders}/score", "name": "rm_score"},
        reward_model("ppl", folders / "policy", weight=0.0, kind="perplexity").model_dump(),
        {"function": f"{own}:own", "weight": 0.1},
    ]
    train(micro_config(tmp_path / "run", rewards=rewards, **{"steps": 2, "sft.steps": 0}))
    evaluated = load(EvalConfig, None, defaults_of_run(tmp_path / "run"))
    assert [reward.name for reward in evaluated.rewards] == ["rm_score", "ppl", None]
    metrics = {line["step"]: line for line in read_metrics(tmp_path / "run")}
    for step in (1, 2):
        lines = read_rollouts(tmp_path / "run", step)
        assert len({line["extras"]["rm_score"] for line in lines}) > len(lines) / 2
        for line in lines:
            extras, parts = line["extras"], line["parts"]
            assert (parts["rm_score"], parts["ppl"]) == (extras["rm_score"], extras["ppl"])
            assert parts["own"] == pytest.approx(extras["ppl"] / 100 + extras["rm_score"])
            assert line["reward"] == pytest.approx(parts["rm_score"] + 0.1 * parts["own"])
        mean = sum(line["extras"]["ppl"] for line in lines) / len(lines)
        assert metrics[step]["reward/part/ppl"] == pytest.approx(mean)
    again = [group(line["prompt"], line["text"], reason=line["finish_reason"]) for line in lines]
    _, found = columns({"name": "ppl", "model": str(folders / "policy"), "kind": "perplexity"}, groups=again)
    assert flat(found, "ppl") == pytest.approx([line["extras"]["ppl"] for line in lines], rel=1e-4)


def test_reward_models_of_version_0_2_are_rewards(folders, micro_config, tmp_path):
    """One that the reward `column` hands on takes its place, and one that only functions read weighs nothing."""
    saved = micro_config(tmp_path / "run").model_dump(mode="json")
    saved["rewards"] = [
        {"function": "column", "name": "liked", "weight": 0.5, "arguments": {"name": "rm"}, "columns": {}},
        {"function": "mine.py:reads", "weight": 1.0, "name": None, "arguments": {}, "columns": {}, "chat": True},
    ]
    saved["reward_models"] = [
        {"name": "rm", "model": "owner/rm", "kind": "classifier", "label": 1},
        {"name": "ppl", "model": "runs/a", "kind": "perplexity", "label": None},
    ]
    (tmp_path / "config.yaml").write_text(json.dumps(saved))
    told = []
    first, second, third = load(TrainConfig, tmp_path / "config.yaml", {}, on_removed=told.append).rewards
    assert (first.function, first.name, first.weight) == ("model:owner/rm", "rm", 0.5)
    assert first.arguments == {"kind": "classifier", "label": 1}
    assert second.function == "chat:mine.py:reads"
    assert (third.function, third.name, third.weight) == ("model:runs/a", "ppl", 0.0)
    assert told == []
