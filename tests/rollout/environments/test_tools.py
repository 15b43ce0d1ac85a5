"""Tools run in processes of their own: late, dying and greedy ones are ended, and their failures are theirs."""

import os
import re
from pathlib import Path

import pytest

from policies.presets import small_tokenizer
from rewards import RewardError
from rollout.environments.format import Call, TurnFormat
from rollout.environments.tools import ToolBox, ToolFailure, ToolResult

FILE = Path(__file__).parents[2] / "cases/some_tools.py"
NAMES = [f"{FILE}:{name}" for name in ("area", "slow_area", "fault")]


@pytest.fixture(scope="module")
def tools():
    with ToolBox(NAMES, workers=2, timeout_s=2.0, memory=512 << 20) as box:
        yield box


def test_a_tool_is_called_in_another_process(tools):
    calls = [Call("area", {"width": 3.0, "height": 4.0}), Call("slow_area", {"width": 3}), Call("area", {"width": 2.5})]
    results = tools.call([*calls, Call("fault", {"how": "pid"})])
    assert results[:3] == [ToolResult("12.0"), ToolResult("9 m2"), ToolResult("2.5")]
    assert int(results[3].text) != os.getpid()


def test_a_turn_of_the_model_reaches_a_tool(tools):
    form = TurnFormat(small_tokenizer(["3 + 4 = 7\n"]), list(tools.functions.values()))
    [call] = form.read(form._tokenizer.encode('<<area {"width": 3, "height": "4"}=')).calls
    assert tools.call([call]) == [ToolResult("12.0")]


def test_contract_6_a_failure_is_the_tools_own_and_is_told(tools):
    hang, die, memory, exits, raises, fine = tools.call(
        [Call("fault", {"how": how}) for how in ("hang", "die", "memory", "exit", "x" * 3000)]
        + [Call("area", {"width": 3})]
    )
    assert fine == ToolResult("3.0")
    assert hang.text == "error: the tool took too long"
    assert hang.failure is not None
    assert re.fullmatch(r"no result after 2 s, stuck at some_tools\.py:\d+ in fault", hang.failure.message)
    assert hang.failure.kind == "timeout"
    assert die.text == "error: the tool ended its process"
    assert die.failure == ToolFailure("fault", "died", "the process that ran it ended (exit code 3)")
    assert memory.failure is not None
    assert memory.text == "error: MemoryError"
    assert memory.failure.message.startswith("MemoryError (some_tools.py:")
    assert exits.failure is not None
    assert (exits.text, exits.failure.kind) == ("error: leaving", "raised")
    assert raises.text == "error: no way " + "x" * 1993
    assert raises.failure is not None
    assert raises.failure.tool == "fault"


def test_a_tool_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RewardError, match="tool 'nowhere.py:f': .*nowhere.py is not an existing Python file"):
        ToolBox(["nowhere.py:f"])
    with pytest.raises(RewardError, match=r"tool '.*:are': 'are' is not there \(did you mean 'area'\?\)"):
        ToolBox([f"{FILE}:are"])
    same = tmp_path / "same.py"
    same.write_text("def area(width: float):\n    return 1\n")
    with pytest.raises(ValueError, match="two of them have one name; rename one"):
        ToolBox([NAMES[0], f"{same}:area"])


def test_closing_ends_the_workers():
    with ToolBox(NAMES[2:]) as box:
        [result] = box.call([Call("fault", {"how": "pid"})])
    with pytest.raises(ProcessLookupError):
        os.kill(int(result.text), 0)
    with pytest.raises(RewardError, match="closed"):
        box.call([Call("fault", {"how": "pid"})])
