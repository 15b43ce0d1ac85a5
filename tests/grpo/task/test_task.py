import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from reward_workers import reward_workers

from grpo.config.run import SftConfig, TrainConfig
from grpo.sft import sft
from grpo.task.check import check_plan, task_of
from grpo.task.parts import check_lengths, check_prompts
from grpo.task.task import Task
from policies.presets import small_tokenizer
from rewards.config.data import SourceOptions
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.protocol import RewardError
from rollout.group import Completion, RolloutGroup

GSM8K = [RewardOptions(function="gsm8k")]
ROWS = [
    {"question": "2 + 3 = ?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5", "topic": "sums"},
    {"question": "6 - 1 = ?", "answer": "6 - 1 = <<6-1=5>>5\n#### 5", "topic": "sums"},
    {"question": "2 * 3 = ?", "answer": "2 * 3 = <<2*3=6>>6\n#### 6", "topic": "products"},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    for split in ("train", "test"):
        rows = ROWS if split == "train" else [{**row, "question": f"Once more: {row['question']}"} for row in ROWS]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _task(data: SourceOptions, rewards=GSM8K, **options) -> Task:
    return Task(data, rewards, ScoringOptions(), **options)


def test_built_in_problems_are_split_by_purpose():
    with _task(SourceOptions(task_options={"levels": [1]}, limit=50), held_out=20) as task:
        assert (len(task.train), len(task.held_out)) == (50, 20)
        assert not {e.question for e in task.train} & {e.question for e in task.held_out}
        assert "".join(task.corpus(limit=2)).count("####") == 2
    with _task(SourceOptions(task_options={"levels": [1]}, limit=50)) as task:
        assert not task.held_out


def test_a_run_config_makes_its_task(folder):
    config = TrainConfig(
        output_dir=folder / "run",
        prompts_per_step=2,
        data=SourceOptions(name=str(folder), few_shot=1),
        rewards=[RewardOptions(function="gsm8k", weight=2.0), RewardOptions(function="gsm8k_format", name="form")],
        eval={"limit": 2},
    )
    with Task.of(config) as task:
        assert [example.question for example in task.held_out] == [f"Once more: {r['question']}" for r in ROWS[:2]]
        assert task.reward_weights == {"gsm8k": 2.0, "form": 1.0}
        assert task.first_reward == "gsm8k"
        # A worked example goes in front of every prompt, and is not trained on.
        assert [example.question for example in task.train] == ["6 - 1 = ?", "2 * 3 = ?"]
        tokenizer = small_tokenizer(task.corpus())
        prompt = task.prompt(task.train[0], tokenizer)
        assert prompt.text == "2 + 3 = ?\n2 + 3 = 5\n#### 5\n\n6 - 1 = ?\n"
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        assert prompt.columns["topic"] == "sums"


def test_a_solution_ends_with_the_stop_token_and_has_no_calculator_marks(folder):
    with _task(SourceOptions(name=str(folder))) as task:
        tokenizer = small_tokenizer(task.corpus())
        row = task.solution(task.train[0], tokenizer, stop=tokenizer.eos_token_id)
        [sample] = row.samples
        assert tokenizer.decode(row.prompt_token_ids) == "2 + 3 = ?\n"
        assert tokenizer.decode(sample.token_ids[:-1]) == "2 + 3 = 5\n#### 5"
        assert sample.token_ids[-1] == tokenizer.eos_token_id


def test_solutions_come_from_the_chosen_column(tmp_path):
    row = {"question": "2 + 3 = ?", "answer": "no solution", "worked": "<<2+3=5>>5\n#### 5"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = SourceOptions(name=str(tmp_path), solution_column="worked")
    with _task(data, [RewardOptions(function="gsm8k_format")]) as task:
        assert task.train[0].solution == "5\n#### 5"


@pytest.mark.parametrize("options", [{"data": {"few_shot": 1}}, {"sft": {"steps": 1, "batch_size": 2}}])
def test_data_without_solutions_shows_none(tmp_path, options):
    (tmp_path / "train.jsonl").write_text('{"question": "Say a."}\n{"question": "Say b."}\n{"question": "Say c."}\n')
    data = {"name": str(tmp_path / "train.jsonl"), "solution_column": None}
    config = TrainConfig(
        output_dir=tmp_path / "r", **options | {"data": SourceOptions(**data | options.get("data", {}))}
    )
    with pytest.raises(ValueError, match="data.solution_column=null: supervised steps and few_shot show solutions"):
        Task.of(config)


def test_what_can_be_refused_is_refused_before_a_policy_is_loaded(folder):
    (folder / "wants.py").write_text(
        "def wants_gold(completions, gold): return [0.0] * len(completions)\n"
        "def fails(completions, **_): raise ValueError('boom')\n"
    )
    unknown, wants, fails = (
        [RewardOptions(function=name)]
        for name in ("gsm8q", f"{folder}/wants.py:wants_gold", f"{folder}/wants.py:fails")
    )
    for data, rewards, message in (
        ({"template": "{qestion}"}, GSM8K, r"asks for \{qestion\}; the columns are"),
        ({"prompt_column": "problem"}, GSM8K, "no column 'problem'; its columns are question, answer, topic"),
        ({"split": "test"}, GSM8K, "is for evaluation and must not be trained on"),
        ({}, unknown, "gsm8k"),
        ({}, GSM8K * 2, "two rewards are called 'gsm8k'"),
        ({}, wants, "asks for the column 'gold'"),
        ({}, fails, "boom"),
    ):
        with pytest.raises((ValueError, RewardError), match=message):
            _task(SourceOptions(name=str(folder), **data), rewards)
    assert not reward_workers()


def test_scores_come_by_group_with_the_columns_of_its_prompt(folder):
    (folder / "own.py").write_text(
        "def count_ids(completions, completion_ids, topic):\n"
        "    assert set(topic) <= {'sums', 'products'}\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    rewards = [RewardOptions(function="gsm8k"), RewardOptions(function=f"{folder}/own.py:count_ids", weight=0.1)]
    with _task(SourceOptions(name=str(folder)), rewards) as task:
        assert reward_workers()
        tokenizer = small_tokenizer(task.corpus())
        groups = [
            RolloutGroup(
                task.prompt(example, tokenizer),
                [Completion(ids, [0.0] * len(ids), text, "stop", 0) for ids, text in (([1, 2], "#### 5"), ([3], "6"))],
            )
            for example in task.train[:2]
        ]
        first, second = task.score(groups)
        assert first.parts == {"gsm8k": [1.0, 0.0], "count_ids": [2.0, 1.0]}
        assert first.rewards == pytest.approx([1.2, 0.1])
        assert second.rewards == pytest.approx([1.2, 0.1])
    deadline = time.monotonic() + 5
    while reward_workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not reward_workers()


def test_real_gsm8k_is_a_task(gsm8k_folder):
    with _task(SourceOptions(name=str(gsm8k_folder), limit=20), held_out=10) as task:
        assert (len(task.train), len(task.held_out)) == (20, 10)
        assert all("<<" not in example.solution and "####" in example.solution for example in task.train)
        assert all("<<" in example.columns["answer"] for example in task.train)


def test_a_step_that_asks_for_more_examples_than_there_are_is_refused_at_once(tmp_path):
    data = SourceOptions(task_options={"levels": [1]}, limit=8)
    for given, message in (
        ({"prompts_per_step": 9}, "prompts_per_step=9, but there are 8 training examples"),
        ({"prompts_per_step": 8, "sft": {"steps": 1}}, "sft.batch_size=16, but there are 8"),
    ):
        with pytest.raises(ValueError, match=message):
            Task.of(TrainConfig(output_dir=tmp_path, data=data, **given))
    assert not reward_workers()


def test_supervised_training_needs_no_number_in_its_data_where_nothing_is_scored(tmp_path):
    (tmp_path / "words.jsonl").write_text("".join(f'{{"question": "Say {w}.", "answer": "{w}"}}\n' for w in "abcdefgh"))
    given = {"output_dir": tmp_path / "r", "data": SourceOptions(name=str(tmp_path / "words.jsonl"), held_out=0.25)}
    supervised, sft_stage = {"steps": 1, "prompts_per_step": 2}, {"sft": {"steps": 1, "batch_size": 2}}
    with Task.of(SftConfig(**given, **supervised)) as task:
        assert {example.solution for example in task.train} <= set("abcdefgh")
        assert (task.describe_rewards(), task.lost(), reward_workers()) == ([], {}, [])
    for config in (
        SftConfig(**given, **supervised, eval={"limit": 2}),
        TrainConfig(**given, **sft_stage),
    ):  # both score
        with pytest.raises(ValueError, match="the gold answer 'a' has no number"):
            Task.of(config)
    with pytest.raises(RewardError, match="'nonsense'"):  # one that was asked for is checked
        Task.of(SftConfig(**given, rewards=[RewardOptions(function="nonsense")]))


def test_max_score_are_what_the_gold_solution_gets(tmp_path):
    """A reward may give more than 1: correct is what is marked like the gold solution, not what is marked 1."""
    reward = tmp_path / "generous.py"
    reward.write_text("def generous(completions, **_): return [1.5 if '####' in c else 1.0 for c in completions]\n")
    data = SourceOptions(task_options={"levels": [1]}, limit=4)
    with _task(data, [RewardOptions(function=f"{reward}:generous")]) as task:
        assert task.max_score == 1.5


def test_prompts_that_leave_no_room_for_a_completion_are_refused_before_the_first_step(folder, random_policy):
    """To the token: 256 are the policy's context. Characters of several bytes must not hide a long prompt."""
    policy, data = random_policy(0), SourceOptions(name=str(folder), template="{question}")
    with _task(data, held_out=3) as task:
        prompts = [task.prompt(example, policy.tokenizer) for example in (*task.train, *task.held_out)]
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        room = 256 - len(longest.token_ids)
        task.check_lengths(policy, room)
        with pytest.raises(ValueError, match=rf"{longest.prompt_id!r} with {256 - room} tokens, pass .*={room + 1};"):
            task.check_lengths(policy, room + 1)


def test_solutions_that_pass_the_context_are_refused_before_the_first_supervised_step(folder, random_policy):
    """To the token, with prompt and stop token. Learned positions end there: torch raised an IndexError in the middle
    of the run. Other positions were learned that no rollout reaches."""
    data, one = SourceOptions(name=str(folder), template="{question}"), {"max_completion_tokens": 1}
    policy = SimpleNamespace(tokenizer=random_policy(0).tokenizer, stop_token_ids=[0])
    supervises, samples = (TrainConfig(model="tiny", sft={"steps": steps}, rollout=one) for steps in (1, 0))
    with _task(data, held_out=3) as task:
        lengths = [task.solution(example, policy.tokenizer, 0).length for example in task.solved]
        policy.max_length = max(lengths)
        check_lengths(task, policy, supervises)
        policy.max_length -= 1
        alike = lengths.count(max(lengths))
        words = rf"{alike} solutions with their prompts, the first of them '.*' with {max(lengths)} tokens, pass the"
        with pytest.raises(ValueError, match=words):
            check_lengths(task, policy, supervises)
        check_lengths(task, policy, supervises, begins=False)
        check_lengths(task, policy, samples)


def test_quartet_sft_refuses_them_too_though_it_samples_nothing(micro_config, tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"{'one more ' * 400}#### {i + 1}"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = micro_config(tmp_path).model_dump(include={"model", "threads", "rewards"})
    data = {"name": str(tmp_path / "train.jsonl")}
    config = SftConfig(output_dir=tmp_path / "run", steps=1, prompts_per_step=2, data=data, **given)
    with pytest.raises(ValueError, match="4 solutions with their prompts, .* pass the policy's context of 256; take"):
        sft(config)
    with task_of(config) as task, pytest.raises(ValueError, match="pass the policy's context of 256"):
        check_prompts(check_plan(config), task)


def test_a_chat_prompt_of_a_model_without_a_template_is_refused_before_it_is_loaded(
    micro_config, micro_policy, tmp_path
):
    micro_policy().save(tmp_path / "m")
    config = micro_config(tmp_path / "r", **{"data.template": "chat", "model": str(tmp_path / "m")})
    said = r"template=chat with model=.* .no chat template.: use a format string such as .{question}\\n."
    with pytest.raises(ValueError, match=said):
        check_plan(config)
