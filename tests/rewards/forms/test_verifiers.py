"""A Rubric of verifiers 0.1 and a Task of verifiers 0.4 are rewards here, alone, and a reward of ours is one there."""

import asyncio
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rewards import RewardError, RewardSpec, Scorer
from rewards.episode_trace import _in_its_form
from rewards.forms.verifiers import as_verifiers, reward_of
from tests.cases import rubric_form

RUBRIC = """
import asyncio
import verifiers as vf

def right(completion, answer) -> float:
    text = completion[-1]["content"]
    if text == "raise":
        raise KeyError("no such answer")
    return float(text == answer)

async def polite(prompt, completion, info, **kwargs) -> float:
    await asyncio.sleep(0)
    assert prompt[-1]["role"] == "user" and kwargs["state"]["input"]["level"] == kwargs["level"]
    return None if completion[-1]["content"] == "nothing" else float("please" in completion[-1]["content"])

rubric = vf.Rubric(funcs=[right, polite], weights=[1.0, 0.5])
both = vf.RubricGroup(rubrics=[vf.Rubric(funcs=[right]), vf.Rubric(funcs=[polite], weights=[0.5])])

class Environment:
    rubric = rubric

def load_environment():
    return Environment()

def a_reward(completions, **_):
    return [1.0] * len(completions)
"""
SAID = ["42", "please", "raise", "nothing"]


@pytest.fixture
def in_form(monkeypatch):
    """The package in form, where 0.1 is not installed."""
    try:
        installed = version("verifiers").startswith("0.1.")
    except PackageNotFoundError:
        installed = False
    if not installed:
        package, types = ModuleType("verifiers"), ModuleType("verifiers.types")
        package.Rubric, package.RubricGroup, types.State = (
            rubric_form.Rubric,
            rubric_form.RubricGroup,
            rubric_form.State,
        )
        monkeypatch.setitem(sys.modules, "verifiers", package)
        monkeypatch.setitem(sys.modules, "verifiers.types", types)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_env.py"
    path.write_text(RUBRIC)
    return path


@pytest.mark.usefixtures("in_form")
@pytest.mark.parametrize("name", ["rubric", "both", "load_environment"])
def test_a_rubric_alone_is_a_reward_and_what_it_makes_zero_of_is_a_failure(file, name):
    spec = RewardSpec(f"verifiers:{file}:{name}")
    row = {"answer": "42", "level": 1, "info": {}}
    with Scorer([spec], columns=[*row], on_error="drop_sample", isolated=False) as scorer:
        result = scorer.score(["6 * 7?"], [SAID], [row], prompt_ids=["a"])[0]
    assert result.rewards == [1.0, 0.5, None, None]
    assert result.extras == {"right": [1.0, 0.0, None, None], "polite": [0.0, 1.0, None, None]}
    assert [(failure.sample_index, failure.kind) for failure in result.errors] == [(2, "raised"), (3, "raised")]
    assert "KeyError: 'no such answer'" in result.errors[0].message
    assert "TypeError: float() argument" in result.errors[1].message


@pytest.mark.usefixtures("in_form")
def test_batches_share_a_loop_and_messages_stay_as_they_are(file):
    import verifiers as vf

    loops = []

    async def loop_of(completion) -> float:
        loops.append(asyncio.get_running_loop())
        return float(len(completion))

    def metric(completion) -> float:
        raise ValueError("of no weight, so that the reward is right")

    reward = reward_of(vf.Rubric(funcs=[loop_of, metric], weights=[1.0, 0.0]))
    logged = {}
    turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    kept = [{"role": "user", "content": "6 * 7?"}]
    assert reward(prompts=[kept], completions=[turns], log_extra=logged.__setitem__, answer=["42"]) == [2.0]
    assert reward(prompts=["6 * 7?"], completions=["42"], trainer_state=object(), answer=["42"]) == [1.0]
    assert loops[0] is loops[1]
    assert logged == {"loop_of": [2.0], "metric": [0.0]}


@pytest.mark.usefixtures("in_form")
def test_what_is_no_reward_of_one_completion_is_refused(file):
    group = SimpleNamespace(score_rollout=None, has_group_rewards=True)
    with pytest.raises(RewardError, match="functions of whole groups cannot be a reward: batches are cut anywhere"):
        reward_of(group)
    with pytest.raises(RewardError, match="an EnvGroup sends each row to one of its environments"):
        reward_of(SimpleNamespace(score_rollout=None, env_map={}))
    with pytest.raises(RewardError, match="is neither a Rubric, an Environment nor a v1.Task"):
        reward_of(SimpleNamespace())


@pytest.mark.usefixtures("in_form")
def test_ours_is_a_rubric_whose_failure_goes_on(file):
    from verifiers.types import State

    rubric = as_verifiers("gsm8k", weight=2.0)

    def score(rubric, text):
        said = [{"role": "assistant", "content": text}]
        asked = {"prompt": [{"role": "user", "content": "6 * 7?"}], "answer": "42", "info": {}, "example_id": 0}
        state = State(input=asked, completion=said, trajectory=[], task=None)
        asyncio.run(rubric.score_rollout(state))
        return state["reward"], state["metrics"]

    assert score(rubric, "so #### 42") == (2.0, {"gsm8k": 1.0})
    assert score(rubric, "so #### 41") == (0.0, {"gsm8k": 0.0})
    raises = file.with_name("raises.py")
    raises.write_text("def reward(completions, **_):\n    raise ValueError('boom')\n")
    with pytest.raises(RewardError, match="ValueError: boom"):
        score(as_verifiers(f"{raises}:reward"), "42")


TASK = """
import verifiers.v1 as vf

class SumData(vf.TaskData):
    answer: str

class Sum(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def right(self, task, trace) -> float:
        if trace.last_reply == "raise":
            raise KeyError("no such answer")
        return float(trace.last_reply == task.answer)

    @vf.reward
    async def asked(self, task, trace) -> float:
        return float(trace.num_turns == 1 and task.prompt == "6 * 7?")

class Ours(vf.Task[SumData]):
    gsm8k = __import__("rewards.forms.verifiers", fromlist=["_"]).as_verifiers("gsm8k")

class Prepared(Sum):
    async def setup(self, trace, runtime):
        pass
"""


@pytest.mark.peer
def test_a_task_of_verifiers_is_a_reward_and_ours_is_a_reward_of_a_task(tmp_path):
    pytest.importorskip(
        "verifiers.v1.trace", reason="verifiers 0.4 is not installed: pip install 'verifiers>=0.4,<0.5'"
    )
    file = tmp_path / "tasks.py"
    file.write_text(TASK)
    row = {"question": "6 * 7?", "answer": "42", "prompt": "6 * 7?"}

    def score(name, completions):
        spec = RewardSpec(f"verifiers:{file}:{name}")
        with Scorer([spec], columns=[*row], on_error="drop_sample", timeout_s=60) as scorer:
            return scorer.score(["6 * 7?"], [completions], [row], prompt_ids=["a"])[0]

    result = score("Sum", ["42", "41", "raise"])
    assert result.rewards == [3.0, 1.0, None]
    assert result.extras == {"right": [1.0, 0.0, None], "asked": [1.0, 1.0, None]}
    assert "KeyError" in result.errors[0].message
    assert score("Ours", ["so #### 42", "so #### 41"]).rewards == [1.0, 0.0]
    with pytest.raises(RewardError, match="task Prepared needs the method setup, which only verifiers itself has"):
        score("Prepared", ["42"])
    case = f"verifiers:{Path(__file__).parents[2] / 'cases/verifiers_task.py'}:CountTask"
    with pytest.raises(RewardError, match="task CountTask needs the state of its tools"):
        Scorer([RewardSpec(case)], timeout_s=60)


def test_results_of_tools_are_those_of_their_own_calls():
    """Whatever their order; arguments that are text already stay as they are."""
    calls = [{"id": name, "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}} for name in "ab"]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in "ba"]
    asked, *told = _in_its_form([{"role": "assistant", "content": "", "tool_calls": calls}, *results])
    assert [(call["id"], call["arguments"]) for call in asked["tool_calls"]] == [("a", '{"at": 1}'), ("b", '{"at": 1}')]
    assert [result["tool_call_id"] for result in told] == ["b", "a"]
    unnamed = [{"function": {"name": "look", "arguments": {"at": place}}} for place in (1, 2)]
    plain = [{"role": "tool", "content": text} for text in ("first", "second", "third")]
    asked, *told = _in_its_form([{"role": "assistant", "content": "", "tool_calls": unnamed}, *plain])
    assert [call["arguments"] for call in asked["tool_calls"]] == ['{"at": 1}', '{"at": 2}']
    made = [call["id"] for call in asked["tool_calls"]]
    assert [result["tool_call_id"] for result in told] == [*made, "none"]
