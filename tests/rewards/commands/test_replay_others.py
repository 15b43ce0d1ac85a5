"""`quartet reward replay` of what other tools have recorded, in the forms that rewards/audit/traces.py reads."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from grpo.cli.parse import main
from rewards import RewardError
from rewards.commands.options import ReplayConfig
from rewards.commands.replay import replay
from rewards.config.options import load

REWARDS = """
def ends(completions, answer, **_):
    return [float(text.endswith(gold.rpartition("####")[2].strip())) for text, gold in zip(completions, answer)]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 2.0 * float(solution_str.endswith(ground_truth))}

def asks_for_ids(completions, completion_ids, trainer_state, **_):
    return [float(len(ids) + 10 * trainer_state.global_step) for ids in completion_ids]

def turns(prompts, completions, **_):
    return [float(len(turns)) for turns in completions]
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    return path


def again(rollouts, function, **options):
    return replay(rollouts, function, load(ReplayConfig, None, options))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verl_dump(path, steps=(1, 2)):
    """As `trainer.rollout_data_dir` has them: a file a step, the group's completions one after the other."""
    path.mkdir()
    for step in steps:
        rows = [
            {"input": "6 * 7?", "output": text, "gts": "42", "score": mark, "step": step}
            for text, mark in (("so 42", 1.0), ("so 41", 0.0), ("is 42", 0.0))
        ]
        jsonl(path / f"{step}.jsonl", rows)
    return path


def test_a_dump_of_verl_is_scored_again_by_verls_function_and_by_ours(mine, tmp_path, capsys):
    dump = verl_dump(tmp_path / "dump")
    result = again(dump, f"{mine}:ends")  # the ground truth is also `answer`
    assert result.against == "score"
    assert [(step.step, step.completions, step.before, step.after, step.groups) for step in result.steps] == [
        (1, 3, pytest.approx(1 / 3), pytest.approx(2 / 3), 1),
        (2, 3, pytest.approx(1 / 3), pytest.approx(2 / 3), 1),
    ]
    assert [(c.step, c.sample, c.before, c.after, c.completion) for c in result.changes] == [
        (1, 2, 0.0, 1.0, "is 42"),
        (2, 2, 0.0, 1.0, "is 42"),
    ]
    words = ["reward", "replay", str(dump), "--with", f"{mine}:compute_score", "--as", "verl", "--steps", "[2]"]
    assert main([*words, "--arguments", "{data_source: mine}"]) == 0
    shown = capsys.readouterr().out
    assert f"{dump}: verl:{mine}:compute_score against the recorded score" in shown
    assert "2 of 3 completions score differently" in shown
    assert main([*words[:-2], "--steps", "[3]", "--arguments", "{data_source: mine}"]) == 1
    assert f"steps=[3]: {dump} has no step 3; its steps are 1 to 2" in capsys.readouterr().err


def test_a_prompt_with_worked_examples_asks_its_last_question(mine, tmp_path):
    problems = [{"question": "How much is 6 * 7 in all?", "answer": "42"}, {"question": "2 + 3?", "answer": "5"}]
    problems.append({"question": "12 + 3?", "answer": "15"})
    data = jsonl(tmp_path / "data.jsonl", problems)
    shots = "How much is 6 * 7 in all?\n42\n\n"
    rows = [{"input": f"{shots}{asked}\nAnswer:", "output": f"so {gold}", "gts": gold, "score": 1.0, "step": 1}
            for asked, gold in (("2 + 3?", "5"), ("12 + 3?", "15"))]  # fmt: skip
    messages = [{"role": "user", "content": problems[0]["question"]}, {"role": "assistant", "content": "42"}]
    messages.append({"role": "user", "content": "2 + 3?"})
    chat = [{"prompt": messages, "completion": "so 5", "reward": 1.0}]
    for name, recorded in (("verl", rows), ("chat", chat)):
        result = again(jsonl(tmp_path / f"{name}.jsonl", recorded), f"{mine}:ends", data={"name": str(data)})
        assert result.changes == []


def test_a_mark_that_was_recorded_in_float32_is_the_same(mine, tmp_path):
    mine.write_text(REWARDS + "\ndef third(completions, **_): return [0.3 for _ in completions]\n")
    row = {"input": "6 * 7?", "output": "so 42", "gts": "42", "step": 1}
    (tmp_path / "dump").mkdir()
    jsonl(tmp_path / "dump/1.jsonl", [row | {"score": mark} for mark in (0.30000001192092896, 0.3001, None)])
    assert [change.sample for change in again(tmp_path / "dump", f"{mine}:third").changes] == [2, 1]


def test_trls_completions_get_their_columns_from_the_data(mine, tmp_path):
    """TRL records prompts, completions and marks; the answers are in the data."""
    data = jsonl(
        tmp_path / "train.jsonl",
        [{"question": "6 * 7?", "answer": "#### 42"}, {"question": "7?", "answer": "#### 7"}],
    )
    prompts = ["Solve: 6 * 7?", "Solve: 6 * 7?", "7?", "7?"]
    columns = {
        "step": [1] * 4,
        "prompt": prompts,
        "completion": ["42", "41", "7", "8"],
        "ends": [1.0, 1.0, float("nan"), 0.0],
        "short": [0.5] * 4,
        "label": ["of the file"] * 4,  # the data's answer is the one
        "advantage": [0.0] * 4,
    }
    (tmp_path / "completions").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "completions/completions_00001.parquet")
    result = again(tmp_path / "completions", f"{mine}:ends", data={"name": str(data)})
    assert result.against == "ends"
    [step] = result.steps
    assert (step.groups, step.before, step.after) == (2, pytest.approx(2 / 3), 0.5)
    assert [(c.completion, c.before, c.after) for c in result.changes] == [("7", None, 1.0), ("41", 1.0, 0.0)]
    for options in ({"against": "score"}, {"function": f"{mine}:turns"}):
        with pytest.raises(
            ValueError, match=r"sum of ends, short was not recorded; compare with one of them \(against="
        ):
            again(tmp_path / "completions", **{"function": f"{mine}:ends", "data": {"name": str(data)}} | options)
    del columns["label"]
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "completions/completions_00001.parquet")
    with pytest.raises(RewardError, match="asks for the column 'answer', which is not there"):
        again(tmp_path / "completions", f"{mine}:ends")
    jsonl(data, [{"question": "8?", "answer": "8"}])
    with pytest.raises(
        ValueError, match=r"no question of the data \(.*train.jsonl\) is in the prompt 'Solve: 6 \* 7\?'"
    ):
        again(tmp_path / "completions", f"{mine}:ends", data={"name": str(data)})


def test_rollouts_of_nemo_gym_and_verifiers_have_columns_and_messages(mine, tmp_path):
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "42"}]}
    call = {"type": "function_call", "name": "multiply", "arguments": "{}", "call_id": "a"}
    told = {"type": "function_call_output", "call_id": "a", "output": "42"}
    row = {
        "responses_create_params": {"input": [{"role": "user", "content": "6 * 7?"}]},
        "response": {"output": [call, told, message]},
        "reward": 0.0,
        "expected_answer": "42",
        "_ng_task_index": 0,
        "_ng_rollout_index": 0,
    }
    file = jsonl(tmp_path / "rollouts.jsonl", [row, row | {"_ng_rollout_index": 1, "reward": 1.0}])
    result = again(file, f"{mine}:ends")
    assert [(c.prompt_id, c.sample, c.before, c.after) for c in result.changes] == [("0", 0, 0.0, 1.0)]
    assert again(file, f"chat:{mine}:turns").steps[0].after == 3.0
    results = [
        {"example_id": 3, "prompt": [{"role": "user", "content": "6 * 7?"}], "answer": "42", "reward": reward}
        | {"completion": [{"role": "assistant", "content": text}], "metrics": {"right": reward}}
        for text, reward in (("42", 1.0), ("41", 1.0))
    ]
    result = again(jsonl(tmp_path / "results.jsonl", results), f"{mine}:ends")
    assert (result.against, [(c.completion, c.after) for c in result.changes]) == ("right", [("41", 0.0)])
    calls = {"role": "assistant", "content": None, "tool_calls": []}
    blocks = {"role": "assistant", "content": [{"type": "text", "text": "42"}]}
    jsonl(tmp_path / "results.jsonl", [results[0] | {"completion": [calls, blocks, calls | {"content": "41"}]}])
    assert again(tmp_path / "results.jsonl", f"{mine}:ends").steps[0].after == 0.0
    jsonl(tmp_path / "results.jsonl", [results[0] | {"completion": [calls, blocks]}])
    assert again(tmp_path / "results.jsonl", f"{mine}:ends").steps[0].after == 1.0


def test_ids_are_passed_where_all_were_recorded(mine, tmp_path):
    rows = [{"prompt": "6 * 7?", "completion": "42", "reward": 0.0, "step": 3, "token_ids": [5, 6]}] * 2
    file = jsonl(tmp_path / "common.jsonl", rows)
    assert again(file, f"{mine}:asks_for_ids").steps[0].after == 22.0  # the step before has been made
    jsonl(file, [rows[0], rows[0] | {"token_ids": []}])
    with pytest.raises(RewardError, match="asks for completion_ids"):
        again(file, f"{mine}:asks_for_ids")


def test_a_folder_of_runs_and_one_without_rollouts_are_refused(mine, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no rollouts"):
        again(tmp_path, f"{mine}:ends")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match="is no run folder: it has no config.yaml; name one of the runs in it"):
        again(tmp_path, f"{mine}:ends")
