"""verl's `compute_score` is a reward here, unchanged, with its columns and failures, and a reward of ours is one there.

Its form is that of verl/utils/reward_score/gsm8k.py and verl/workers/reward_manager/naive.py (volcengine/verl), which
passes every argument by keyword; the functions here are our own.
"""

import gc
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from reward_workers import reward_workers

from grpo.cli.parse import main
from rewards import RewardError, RewardSpec, Scorer
from rewards.forms.verl import as_verl
from rewards.registry import find_reward

SOURCE = """
import asyncio, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "raise":
        raise KeyError("no such answer")
    if solution_str == "nothing":
        return None
    if solution_str == "no score":
        return {"acc": 1.0}
    if solution_str == "late":
        time.sleep(60)
    right = solution_str.rpartition("####")[2].strip() == ground_truth
    return {"score": float(right), "source": data_source, "index": (extra_info or {}).get("index")}

def by_task(solution_str, ground_truth, method="strict", format_score=0.0, score=1.0):
    answer = solution_str.rpartition("####")[2].strip() if method == "strict" else solution_str.split()[-1]
    return score if answer == ground_truth else format_score

async def asynchronous(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    await asyncio.sleep(0)
    assert set(kwargs) == set()
    return float(solution_str == ground_truth)
"""
ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "6 * 7?"}],
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 3, "question": "6 * 7?", "answer": "6 * 7 = 42\n#### 42"},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("verl") / "theirs.py"
    path.write_text(SOURCE)
    return path


def score(spec: RewardSpec, completions: list[str], row: dict, **options):
    with Scorer([spec], columns=[*row], **options) as scorer:
        return scorer.score(["6 * 7?\n"], [completions], [row], prompt_ids=["a"])[0]


def test_a_row_of_verl_is_scored_as_verl_does_and_the_rest_of_the_dict_is_logged(file):
    result = score(RewardSpec(f"verl:{file}:compute_score"), ["so #### 42", "so #### 41"], ROW)
    assert result.rewards == [1.0, 0.0]
    assert result.parts == {"compute_score": [1.0, 0.0]}
    assert result.extras == {"source": ["openai/gsm8k"] * 2, "index": [3, 3]}
    assert score(RewardSpec(f"verl:{file}:asynchronous"), ["42", "41"], ROW).rewards == [1.0, 0.0]


def test_the_ground_truth_may_be_the_answer_and_options_are_bound_alone(file):
    ours = {"question": "6 * 7?", "answer": "42", "score": 7.0, "method": "other"}  # columns with names of options
    spec = RewardSpec(f"verl:{file}:by_task")
    assert score(spec, ["#### 42", "it is 42"], ours).rewards == [1.0, 0.0]
    spec = RewardSpec(f"verl:{file}:by_task", arguments={"method": "flexible", "score": 2.0})
    assert score(spec, ["#### 42", "it is 42"], ours).rewards == [2.0, 2.0]
    with pytest.raises(RewardError, match=r"no parameter 'metod' to bind \(did you mean 'method'"):
        score(RewardSpec(f"verl:{file}:by_task", arguments={"metod": "flexible"}), ["42"], ours)


def test_what_is_missing_is_named_with_the_way_out(file):
    row = {"gold": "42"}
    with pytest.raises(
        RewardError, match=r"asks for the column 'data_source', which is not there.*data_source: \.\.\."
    ):
        score(RewardSpec(f"verl:{file}:compute_score"), ["42"], row)
    spec = RewardSpec(f"verl:{file}:compute_score", arguments={"data_source": "mine"})
    with pytest.raises(RewardError, match=r"this row has none.*Name the column that holds it in data.solution_column"):
        score(spec, ["42"], row)
    assert score(spec, ["42"], {"answer": "42"}).extras["source"] == ["mine"]
    for function, message in {
        f"verl:{file}:compute_scores": "'compute_scores' is not there .did you mean 'compute_score'",
        f"verl:{file}": "is not an existing Python file",
        "verl:theirs.py": "name it as path/to/file.py:function",
    }.items():
        with pytest.raises(RewardError, match=message):
            score(RewardSpec(function), ["42"], ROW)


def test_a_failure_is_counted_and_never_a_zero(file):
    failures = {
        "raise": ("raised", "KeyError: 'no such answer' (theirs.py:"),
        "nothing": ("raised", "compute_score returned None"),
        "no score": ("raised", "KeyError: 'score'"),
        "late": ("timeout", "no result after 0.5 s"),
    }
    spec = RewardSpec(f"verl:{file}:compute_score")
    result = score(spec, ["#### 42", *failures], ROW, on_error="drop_sample", timeout_s=0.5)
    assert result.rewards == [1.0, None, None, None, None]
    assert [failure.sample_index for failure in result.errors] == [1, 2, 3, 4]
    for failure, (kind, message) in zip(result.errors, failures.values(), strict=True):
        assert failure.kind == kind
        assert message in failure.message


def test_reward_test_reads_rows_of_verl(file, tmp_path, capsys):
    """The prompt is a chat, and the solution is inside a column."""
    data = tmp_path / "train.jsonl"
    rows = []
    for i in range(2, 6):
        about = {"index": i, "answer": f"#### {i * 7}"}
        prompt = [{"role": "user", "content": f"{i} * 7?"}]
        truth = {"style": "rule", "ground_truth": str(i * 7)}
        rows.append({"data_source": "mine", "prompt": prompt, "reward_model": truth, "extra_info": about})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["reward", "test", f"{file}:compute_score", "--as", "verl", "--data.name", str(data)]
    columns = ["--data.prompt_column", "prompt", "--data.solution_column", "extra_info.answer"]
    assert main([*words, *columns]) == 0
    shown = capsys.readouterr().out
    assert f"reward verl:{file}:compute_score, SHA-256" in shown
    assert " error" not in shown
    assert "warning" not in shown
    assert main([*words, "--data.prompt_column", "prompt", "--data.solution_column", "extra_info.anser"]) == 1
    assert "has no column 'extra_info.anser'" in capsys.readouterr().err


def test_a_module_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "theirs_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "scores.py").write_text("def one(completions, **_):\n    return [1.0 for _ in completions]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_reward("theirs_package.scores:one").path == str(package / "scores.py")
    (package / "__init__.py").write_text("")
    (package / "scores.py").write_text("from . import other\n" + (package / "scores.py").read_text())
    (package / "other.py").write_text("")
    assert score(RewardSpec("theirs_package.scores:one"), ["a"], {}).rewards == [1.0]
    with pytest.raises(RewardError, match="theirs_package.score is not an existing Python file"):
        find_reward("theirs_package.score:one")


def test_ours_is_a_compute_score_in_a_process_of_its_own(file):
    compute_score = as_verl("gsm8k")
    arguments = {"data_source": "openai/gsm8k", "extra_info": {"question": "6 * 7?"}}
    assert compute_score(solution_str="so #### 42", ground_truth="42", **arguments) == 1.0
    assert compute_score("openai/gsm8k", "so #### 41", "42", None) == 0.0  # as PrimeRewardManager calls it
    copy = pickle.loads(pickle.dumps(compute_score))
    assert [copy("openai/gsm8k", said, "#### 42") for said in ("#### 42", "#### 41")] == [1.0, 0.0]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(compute_score, ["mine"] * 4, ["#### 42"] * 4, ["42"] * 4)) == [1.0] * 4
    running = len(reward_workers())
    del compute_score
    gc.collect()
    assert len(reward_workers()) == running - 1  # the process of a function that nobody holds ends


def test_where_ours_fails_verl_gets_an_error_and_no_number(file):
    reward = as_verl(f"verl:{file}:compute_score", timeout_s=0.5)  # there and back
    assert reward("mine", "#### 42", "42") == 1.0
    with pytest.raises(RewardError, match="no result after 0.5 s"):
        reward("mine", "late", "42")
    with pytest.raises(RewardError, match="returned None"):
        reward("mine", "nothing", "42")
    assert reward("mine", "#### 41", "42") == 0.0
    abstains = file.with_name("abstains.py")
    abstains.write_text("def reward(completions, **_):\n    return [None for _ in completions]\n")
    with pytest.raises(RewardError, match="'reward' abstained on '42'; here it must give a number"):
        as_verl(f"{abstains}:reward")("mine", "42", "42")
