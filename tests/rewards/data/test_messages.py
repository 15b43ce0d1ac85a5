"""A reward with `chat:` before its name gets the messages that the prompt was made from, wherever it is called."""

import json
import re

import pytest
from rich.console import Console

from grpo.cli.commands.eval import evaluate_model
from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.data.prompts import PromptTemplate
from grpo.task.task import Task
from grpo.train import train
from policies.policy import Policy
from rewards import RewardError, RewardSpec, Scorer, load_reward
from rewards.commands.check import check_reward
from rewards.commands.options import ReplayConfig, RewardTestConfig
from rewards.commands.replay import replay
from rewards.config.data import ProblemOptions, SourceOptions
from rewards.config.options import load
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.data.examples import Example, load_examples
from rewards.protocol import bind
from tests.rewards.data.test_leakage import EGGS

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
# Raises unless the prompt has these roles, and ends with the bare question.
SOURCE = """
def roles(prompts, completions, question, expected="system user assistant user", **_):
    for prompt, asked, completion in zip(prompts, question, completions, strict=True):
        assert " ".join(m["role"] for m in prompt) == expected, prompt
        assert prompt[-1]["content"] == asked, prompt
        assert [m["role"] for m in completion] == ["assistant"]
    return [sum(c.isalpha() for c in completion[0]["content"]) / 20 for completion in completions]

def indexes(completions, **_):
    return [float(len(completion[0]["content"])) for completion in completions]

def reads(completions, **_):
    return [float(len(completion[-1].get("content"))) for completion in completions]

def breaks(completions, **_):
    return [1 / 0 for _ in completions]
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.fixture(scope="module")
def chatty(micro_policy, tmp_path_factory) -> str:
    """A model with a chat template."""
    policy = micro_policy(0)
    policy.tokenizer.chat_template = CHAT
    folder = tmp_path_factory.mktemp("chatty") / "model"
    policy.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(micro_config, chatty, source, tmp_path_factory):
    """A run of which the reward is `roles`, with a system message and a worked example; its dry run has passed."""
    folder = tmp_path_factory.mktemp("messages") / "run"
    given = {
        "model": chatty,
        "steps": 1,
        "sft.steps": 0,
        "data.template": {"system": "Be brief."},
        "data.few_shot": 1,
        "eval.limit": 2,
        "rewards": [{"function": f"chat:{source}:roles"}],
    }
    train(micro_config(folder, **given))
    return folder


def test_in_training_and_evaluation_and_the_record_replays_them(run, source):
    """`roles` raises for anything else than the original messages, and the run aborts where it does."""
    given = {"model": str(run), "threads": 1, "eval.limit": 2}
    results = evaluate_model(load(EvalConfig, None, defaults_of_run(run) | given), Console(quiet=True)).results
    assert [result.without_mark for result in results.values()] == [0, 0]
    assert results["greedy"].groups[0].prompt.messages[0] == SYSTEM
    found = replay(run, f"chat:{source}:roles", ReplayConfig())
    assert (found.failures, found.changes) == ([], [])
    options = {"data.task_options.levels": [1], "data.limit": 3, "shaping": True, "arguments": {"expected": "user"}}
    config = load(RewardTestConfig, None, options)  # where the question is the user's message
    assert check_reward(f"chat:{source}:roles", config).faults == []


def test_the_dry_run_sees_the_rendered_format_string_and_the_messages_of_a_chat(source, tmp_path):
    path = tmp_path / "seen.py"
    path.write_text(
        "def seen(prompts, completions, **_):\n"
        "    assert prompts[0] == 'Q: 2 + 3 = ?\\nA: ', prompts\n    return [0.0] * len(completions)\n"
    )
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "2 + 3 = ?", "answer": "#### 5"}))
    data = {"name": str(tmp_path)}
    Task(
        SourceOptions(**data, template="Q: {question}\nA: "), [RewardOptions(function=f"{path}:seen")], ScoringOptions()
    ).close()
    with pytest.raises(RewardError, match="AssertionError"):
        Task(
            SourceOptions(**data, template="chat"),
            [RewardOptions(function=f"chat:{source}:roles")],  # expects a system message, and there is none
            ScoringOptions(),
        )


@pytest.mark.parametrize("function", ["indexes", "reads"])
def test_a_reward_that_takes_strings_for_messages_is_told_of_chat(source, function):
    columns = {"question": "2 + 3 = ?"}
    with (
        Scorer([RewardSpec(f"{source}:{function}")]) as scorer,
        pytest.raises(RewardError, match="write chat: before"),
    ):
        scorer.dry_run("2 + 3 = ?", "5", columns)
    with Scorer([RewardSpec(f"chat:{source}:{function}")]) as scorer:
        assert scorer.dry_run("2 + 3 = ?", "5", columns).rewards == [1.0, 1.0]
    with Scorer([RewardSpec(f"{source}:breaks")]) as scorer, pytest.raises(RewardError) as error:
        scorer.dry_run("2 + 3 = ?", "5", columns)
    assert "chat: before" not in str(error.value)


def _write(tmp_path, *prompts, **columns) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "answer": "#### 5"} | columns) for prompt in prompts))
    return str(path)


USER = {"role": "user", "content": "2 + 3 = ?"}
TALK = [SYSTEM, {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, USER]


def test_trls_conversational_data_are_accepted(tmp_path):
    options = {"prompt_column": "prompt"}
    talk, asked = load_examples(_write(tmp_path, TALK, [USER]), "train", ProblemOptions(**options))
    assert (talk.question, talk.messages) == ("2 + 3 = ?", TALK)
    assert talk.columns == {"question": "2 + 3 = ?", "prompt": TALK, "answer": "#### 5"}
    shot = Example("shot", "1 + 1 = ?", "#### 2", {}, [SYSTEM, {"role": "user", "content": "1 + 1 = ?"}])
    template = PromptTemplate("chat", few_shot=[shot])
    worked = [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "#### 2"}]
    assert template.messages(talk) == [SYSTEM, *worked, *TALK[1:]]
    assert PromptTemplate("chat").messages(talk) == TALK
    assert PromptTemplate({"system": "Add."}).messages(asked) == [
        {"role": "system", "content": "Add."},
        USER,
    ]
    assert PromptTemplate("{question}\n").render(asked) == "2 + 3 = ?\n"
    with pytest.raises(ValueError, match="is a chat of several messages; use template: chat"):
        PromptTemplate("{question}\n").render(talk)
    with pytest.raises(ValueError, match="begins with a system message of its own; leave one"):
        PromptTemplate({"system": "Add."}).messages(talk)
    path = _write(tmp_path, [USER], answer=[{"role": "assistant", "content": "It is <<2+3=5>>5.\n#### 5"}])
    [example] = load_examples(path, "train", ProblemOptions(**options))  # the solution is a message
    assert example.solution == "It is 5.\n#### 5"
    assert example.columns["answer"] == "It is <<2+3=5>>5.\n#### 5"


EGGS_INSIDE = [{"role": "user", "content": EGGS}, {"role": "assistant", "content": "18"}, USER]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([USER, {"role": "assistant", "content": "5"}], "is a chat that does not end with a message of the user"),
        ([{"role": "user"}], """'prompt' has a message that is not {"role": text, "content": text}"""),
        ([], "'prompt' is a list instead of text"),
        (["2 + 3 = ?"], "'prompt' is a list instead of text"),
        ([{"role": "user", "content": " "}], "'prompt' is empty"),
        (EGGS_INSIDE, "a question of GSM8K's test set"),
    ],
)
def test_a_broken_conversation_is_a_bad_row(tmp_path, prompt, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_examples(_write(tmp_path, prompt), "train", ProblemOptions(prompt_column="prompt"))


def test_a_run_on_conversational_data(micro_config, chatty, source, tmp_path):
    data = _write(tmp_path, *([SYSTEM, {"role": "user", "content": f"{i} + 1 = ?"}] for i in range(8)))
    given = {
        "model": chatty,
        "steps": 1,
        "sft.steps": 0,
        "data.name": data,
        "data.prompt_column": "prompt",
        "data.template": "chat",
        "data.limit": None,
        "rewards": [{"function": f"chat:{source}:roles", "arguments": {"expected": "system user"}}],
    }
    train(micro_config(tmp_path / "run", **given))
    assert Policy.load(tmp_path / "run/policy").tokenizer.chat_template == CHAT


def test_a_data_column_called_mode_does_not_break_gsm8k_in_trl_or_here():
    """TRL hands all columns over, as lists."""
    passed = {"prompts": ["?"] * 2, "completions": ["#### 42", "so 42"], "answer": ["42"] * 2}
    gsm8k = load_reward("gsm8k")
    assert gsm8k(**passed, mode=["easy", "flexible"]) == [1.0, 0.0]
    assert bind(gsm8k, {"mode": "flexible"})(**passed) == [1.0, 1.0]
    with pytest.raises(ValueError, match="is not a way to read an answer"):
        gsm8k(**passed, mode=["flexible"])
    with Scorer([RewardSpec("gsm8k")], columns=["answer", "mode"]) as scorer:
        assert scorer.dry_run("?", "#### 42", {"answer": "42", "mode": "easy"}).rewards == [1.0, 1.0]
