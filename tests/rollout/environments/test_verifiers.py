"""A task of the package verifiers as an environment in TRL's contract (pip install verifiers)."""

from pathlib import Path

import pytest

from policies.presets import small_tokenizer
from rewards.isolation.environments import LoadedEnvironments
from rollout.environments.format import TurnFormat
from rollout.environments.protocol import tools_of
from rollout.sampling import EnvironmentSpec

CASE = f"{Path(__file__).parents[2] / 'cases/verifiers_task.py'}:Count"


def said(content: str, **step) -> dict:
    call = {"type": "function", "function": {"name": "counter_add", "arguments": step}}
    return {"role": "assistant", "content": content} | ({"tool_calls": [call]} if step else {})


@pytest.mark.peer
def test_the_tools_of_a_task_are_called_and_its_rewards_read_the_episode():
    pytest.importorskip("verifiers.v1", reason="verifiers is not installed: pip install verifiers")
    spec = EnvironmentSpec(environments=(("", CASE),))
    form = TurnFormat(small_tokenizer(["<<counter_add 4=4>>"] * 20), tools_of(spec, ""))
    described = {schema["function"]["name"]: schema["function"] for schema in form.schemas}
    assert described.keys() == {"counter_add", "counter_read"}
    assert described["counter_add"]["parameters"]["properties"] == {
        "step": {"type": "integer", "description": "What to add."}
    }
    loaded = LoadedEnvironments("", [], {"": CASE})
    begin = {"environment": "", "columns": {"prompt": "Count.", "target": 7, "question": "Count."}, "seeds": [0, 0]}

    def ask(episode, history, calls, turns=None):
        return loaded.call(
            begin | {"episode": episode, "history": history, "calls": calls, "ends": turns is not None, "turns": turns}
        )

    [add3, add4] = [["counter_add", {"step": step}] for step in (3, 4)]
    assert ask("a", [], [add3])["results"] == [("3", False)]
    assert ask("b", [], [add4, ["counter_read", {}]])["results"] == [("4", False), ("4", False)]  # a state of its own
    assert ask("a", [add3], [add4])["results"] == [("7", False)]
    refused = ask("a", [add3, add4], [["counter_add", {"step": 9}]])["results"]
    assert refused == [("{'error': 'too much'}", True)]
    told = {"role": "tool", "name": "counter_add", "content": "7"}
    history = [add3, add4, ["counter_add", {"step": 9}]]
    assert ask("a", history, [], [said("", step=7), told, said("It is 7.")])["reward"] == 2.0 + 1.0
    assert ask("b", [add4], [], [said("", step=4), told, said("It is 7.")])["reward"] == 0.0
