"""`quartet rehearse` names what would end or spoil a run, by option and number, without the model's weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from grpo.cli.commands import rehearse as module
from grpo.cli.commands import rehearse_steps
from grpo.cli.commands.rehearsal import Rehearsal, key_of
from grpo.cli.commands.rehearse import rehearse
from grpo.cli.parse import main
from grpo.config.run import TrainConfig
from grpo.run.stop import Stopped
from policies.cut import cut
from rewards.config.options import load
from rewards.kinds import NOTE
from rollout.group import Prompt

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LOOK_UP = '''
def look_up(name: str) -> str:
    """Look up.

    Args:
        name: a name
    """
    return {}[name]
'''


@pytest.fixture(scope="module")
def bare_model(model, tmp_path_factory) -> Path:
    """A folder with configuration and tokenizer, and without weights."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "digests*"))
    return folder


@pytest.fixture
def chat_model(bare_model, tmp_path) -> Path:
    folder = tmp_path / "chat"
    shutil.copytree(bare_model, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture
def no_steps(monkeypatch) -> None:
    """What is found before the steps."""
    monkeypatch.setattr(module, "take_steps", lambda *arguments: None)


def _config(folder_of_model: Path, folder: Path, **options) -> TrainConfig:
    usual = {
        "model": str(folder_of_model),
        "output_dir": folder / "run",
        "data.task_options.levels": [1],
        "data.limit": 60,
        "eval.limit": 8,
        "steps": 10,
        "prompts_per_step": 4,
        "checkpoint.every": 10,
        "rollout.max_completion_tokens": 100,
        "threads": 1,
        "log.trackers": [],
    }
    if "data" in options or "data.name" in options:
        usual = {key: value for key, value in usual.items() if not key.startswith("data.")}
    return load(TrainConfig, None, usual | options)


def _worst(result: Rehearsal) -> list[str]:
    return [f"{found.severity} {found.where[0]}: {found.evidence}" for found in result.faults]


def _reward(folder: Path, text: str, name: str = "reward") -> list[dict[str, str]]:
    (folder / "own_rewards.py").write_text(text)
    return [{"function": f"{folder / 'own_rewards.py'}:{name}"}]


def test_a_run_of_several_sources_is_rehearsed(bare_model, tmp_path):
    """Each with the rewards that score it."""
    rows = [{"question": f"{a} + {b} = ?", "answer": f"#### {a + b}"} for a in range(8) for b in range(8)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {"name": "word_problems", "task_options": {"levels": [1]}, "limit": 60, "rewards": ["gsm8k"]},
        {"name": str(tmp_path / "own.jsonl"), "held_out": 0.2, "rewards": ["gsm8k"]},
    ]
    config = {"data": sources, "rewards": [{"function": "gsm8k"}]}
    result = rehearse(_config(bare_model, tmp_path, **config))
    assert [found for found in _worst(result) if found.startswith("error")] == []
    assert len(result.steps) == 2


@pytest.mark.parametrize(("prompts", "late"), [(32, True), (4, False)])
def test_a_slow_reward_ends_nothing_and_matters_for_large_batches(bare_model, tmp_path, prompts, late):
    result = Rehearsal("tiny")
    config = _config(bare_model, tmp_path, **{"prompts_per_step": prompts, "rollout.group_size": 8})
    module.look_at_time(result, config, (1000, 1000), [Prompt("a", "", [1] * 20)], (0.025, 0.025))
    found = [each for each in result.findings if "batch takes" in each.evidence]
    assert [each.severity for each in found] == [NOTE] * late


def test_a_sound_run_takes_two_steps_without_weights_and_nothing_is_wrong(bare_model, tmp_path):
    result = rehearse(_config(bare_model, tmp_path))
    assert _worst(result) == []
    assert [step["learner/updates"] for step in result.steps] == [1, 1]
    assert not (tmp_path / "run").exists()
    assert result.facts["scores"] == {"right": 1.0, "wrong": 0.0, "empty": 0.0, "written": "as it is"}
    assert result.facts["data"]["epochs"] == pytest.approx(40 / 60)
    assert set(result.facts) >= {"tokens", "template", "plan", "memory", "time on H100s, of a step", "reward gsm8k"}


def test_numbers_that_spoil_a_run_are_named_all_at_once(bare_model, tmp_path, no_steps):
    options = {
        "rollout.max_completion_tokens": 8,
        "steps": 4000,
        "learner.warmup_steps": 4000,
        "rollout.temperature": 0.01,
    }
    assert {line.partition(";")[0] for line in _worst(rehearse(_config(bare_model, tmp_path, **options)))} == {
        "warning rollout.max_completion_tokens: 60 of 60 gold solutions have more than 8 tokens (the longest 25)",
        "warning steps: 4000 steps read the data 267 times",
        "warning learner.warmup_steps: 4000 steps of warm-up in a run of 4000 never end at 1e-06",
        "warning rollout.temperature: at 0.01 a group has zero variance, and teaches nothing",
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rollout.max_completion_tokens": 250}, "error rollout.max_completion_tokens: .*pass the policy's context"),
        ({"data.limit": 3}, "error prompts_per_step: .*there are 3 training examples"),
        (
            {"eval.every": 5, "eval.limit": 0},
            "error eval.limit: eval.limit=0 with eval.every=5: that evaluates nothing",
        ),
        ({"model": "OWNER/nowhere"}, "error model: .*nor a reachable hub id"),
        (
            {"device": "cuda:7", "rollout.backend": "vllm", "rollout.workers": 1},
            "error rollout.workers: .*vLLM is one server",
        ),
        pytest.param(
            {"rollout.backend": "vllm", "rollout.vllm.engine": {"max_model_len": 90}},
            r"error rollout.vllm.engine: max_model_len=90 holds no prompt of \d+ tokens and a completion of 100",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_would_end_a_run_is_named_by_key(bare_model, tmp_path, no_steps, options, expected):
    found = _worst(rehearse(_config(bare_model, tmp_path, **options)))
    assert any(re.match(expected, line) for line in found), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def reward(completions, reference, **_):\n    return [1.0] * len(completions)\n", "reference"),
        (
            "def reward(completions, **_):\n    return [0.0] * len(completions)\n",
            "error rewards: a right answer scores 0",
        ),
        ("def reward(completions, **_):\n    return [float(len(c)) for c in completions]\n", "error "),
        (
            "def reward(completions, **_):\n    return [1 / len(c) for c in completions]\n",
            "error rewards: reward 'reward' f",
        ),
        ("def reward(completions, **_):\n    return [1.0]\n", "error "),
        pytest.param(
            "import re\ndef reward(completions, answer, **_):\n"
            "    found = [re.search(r'<answer>(.*?)</answer>', c) for c in completions]\n"
            "    return [float(bool(f) and f[1] == a.split('#### ')[1]) for f, a in zip(found, answer)]\n",
            "warning data.template: right answers score 1 with <answer> and 0 as the data have them",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_rewards_that_teach_nothing_are_named(bare_model, tmp_path, no_steps, text, expected):
    result = rehearse(_config(bare_model, tmp_path, rewards=_reward(tmp_path, text)))
    assert any(line.startswith(expected) or expected in line for line in _worst(result)), result.findings


THINKS = """
import re

def thinks(completions, **_):
    return [float(bool(re.match(r"<think>.*</think>", text, re.DOTALL))) for text in completions]

def right(completions, gold, **_):
    return [float(text.endswith(answer)) for text, answer in zip(completions, gold)]

def brief(completions, **_):
    return [0.0 if len(text) > 9 else 1.0 for text in completions]
"""


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["thinks", "right"], {"data.solution_column": "gold", "data.template": "Use <think>. {question}\n"}),
        (["brief"], {"data.solution_column": None}),
        (["thinks"], {"data.solution_column": None}),
        (["right"], {"data.solution_column": "gold", "tools": ["look_up"]}),
    ],
)
def test_a_reward_that_needs_a_form_or_several_turns_is_no_constant(bare_model, tmp_path, no_steps, names, options):
    """The form is one that another reward of the run asks for, as in TRL's gspo.py."""
    rows = [{"question": f"{n} plus {n}?", "gold": str(2 * n)} for n in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "look_up.py").write_text(LOOK_UP)
    (tmp_path / "own_rewards.py").write_text(THINKS)
    if "tools" in options:
        options = options | {"tools": [f"{tmp_path / 'look_up.py'}:look_up"]}
    rewards = [{"function": f"{tmp_path / 'own_rewards.py'}:{name}"} for name in names]
    usual = {"data.name": str(tmp_path / "own.jsonl"), "data.held_out": 0.2, "rewards": rewards}
    assert _worst(rehearse(_config(bare_model, tmp_path, **usual | options))) == []


def test_a_template_that_is_applied_twice_and_a_model_that_thinks(chat_model, tmp_path, no_steps):
    rows = [{"question": f"<|im_start|>user\n{n} + 1 = ?", "answer": f"#### {n + 1}"} for n in range(10)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(chat_model)
    (chat_model / "chat_template.jinja").write_text(CHATML + "{# <think> #}")
    options = {"data.name": str(data), "data.template": "chat", "eval.limit": 0, "data.limit": None}
    found = _worst(rehearse(_config(chat_model, tmp_path, **options)))
    assert any("10 of 10 questions hold marks of the chat template" in line for line in found), found
    assert any(line.startswith("warning rollout.max_completion_tokens: the model thinks") for line in found), found


def test_a_sentence_that_is_said_twice_and_a_tool_that_always_raises(bare_model, tmp_path, no_steps):
    file = tmp_path / "own_tools.py"
    either = LOOK_UP.replace("look_up(name: str", "say(name: int | str").replace("{}[name]", "str(name)")
    file.write_text(LOOK_UP + either)
    said = "Write the number after four hashes."
    options = {"tools": [f"{file}:look_up", f"{file}:say"], "data.template": f"{said} {{question}} {said}\n"}
    result = rehearse(_config(bare_model, tmp_path, **options))
    assert "raised 0 of 3" in result.facts["tools"]["say"]
    lines = [f"{each.severity} {each.where}: {each.evidence}" for each in result.findings]
    assert f"note ('data.template',): every prompt says twice '{said}'" in lines
    assert any(line.startswith("note ('tools',): look_up raised at every one of 3 calls: {'error': ") for line in lines)


def test_a_message_names_its_option():
    assert key_of("rollout.workers=2 with rollout.backend=vllm: vLLM is one server") == "rollout.workers"
    assert key_of("x.jsonl has no column 'q' (choose with prompt_column and solution_column)") == "data.prompt_column"
    assert key_of("rewards[0].weight=x: expected a number") == "rewards"
    assert key_of("the disk is full") == ""


def test_the_command_prints_the_worst_first_and_ends_with_1(bare_model, tmp_path, no_steps, capsys):
    words = ["rehearse", "--model", str(bare_model), "--output_dir", str(tmp_path / "run")]
    words += [
        "--data.task_options.levels",
        "[1]",
        "--data.limit",
        "60",
        "--rollout.max_completion_tokens",
        "8",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "1. warning gold-truncated: " in shown
    assert "   At: rollout.max_completion_tokens" in shown
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["findings"]) == len(re.findall(r"^[0-9]+\. ", shown, re.MULTILINE))
    assert main(["rehearse", "--output_dir", "x", "--rollout.groupsize", "4"]) == 1
    assert "did you mean rollout.group_size?" in capsys.readouterr().out


def test_an_interrupted_rehearsal_offers_no_resume(bare_model, tmp_path, monkeypatch, capsys):
    def interrupted(config: TrainConfig) -> None:
        raise Stopped('stopped before step 1; go on with resume="auto"')

    monkeypatch.setattr(rehearse_steps, "train", interrupted)
    words = ["rehearse", "--model", str(bare_model), "--output_dir", str(tmp_path), "--data.task_options.levels", "[1]"]
    assert main([*words, "--data.limit", "60", "--rollout.max_completion_tokens", "100"]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")


def test_all_tokens_of_a_tokenizer_stay_in_a_small_model():
    config = AutoConfig.for_model("llama", vocab_size=32_000, eos_token_id=31_999)
    small = cut(config, whole_vocabulary=True)
    assert (small.vocab_size, small.eos_token_id, small.num_hidden_layers) == (32_000, 31_999, 2)
    assert small.hidden_size < 512


@pytest.mark.long
@pytest.mark.slow
def test_a_run_goes_on_after_every_fault(bare_model, tmp_path):
    """With tools, whose processes are among those that die and hang."""
    options = {"environment": "calculator", "rollout.max_completion_tokens": 40, "data.template": "{question}\n"}
    result = rehearse(_config(bare_model, tmp_path, **options), faults=True)
    assert set(result.disturbed) == set(rehearse_steps.FAULTS)
    assert all(words.endswith("and the steps have the same numbers") for words in result.disturbed.values()), (
        result.disturbed
    )
    assert result.disturbed["a full disk"].startswith("the run ends: cannot write checkpoint")
    assert "--resume auto goes on after step 1" in result.disturbed["a full disk"]
