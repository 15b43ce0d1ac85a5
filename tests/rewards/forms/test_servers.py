"""Servers of NeMo-Gym and OpenEnv on loopback are rewards, and a reward of ours is the `verify` of a server.

The bodies follow nemo_gym/base_resources_server.py, nemo_gym/openai_utils.py and nemo_gym/judge.py (NVIDIA-NeMo/Gym).
"""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from pydantic import BaseModel

from rewards import RewardError, RewardSpec, Scorer
from rewards.forms.nemo_gym import as_verify, nemo_gym, response_of
from rewards.forms.openenv import openenv
from tests.cases.gym_server import gym_server

ROW = {"id": 7, "expected_answer": "42"}


def answers(body: dict) -> tuple[int, dict]:
    """As the server of math_with_judge answers: the text of all messages against the row's `expected_answer`."""
    items = [item for item in body["response"]["output"] if item["type"] == "message"]
    said = "".join(part["text"] for item in items for part in item["content"])
    assert body["responses_create_params"]["input"][-1]["role"] == "user"
    whole = body | {"reward": float(said == body["expected_answer"])}
    return {
        "down": (500, {}),
        "refused": (422, {"detail": "no such field"}),
        "judge failed": (200, whole | {"_ng_failure_class": "judge_failed", "_ng_failure_judge_error": "HTTP 503"}),
        "lost": (200, whole | {"mask_sample": True, "failure_kind": "sandbox", "failure_reason": "killed"}),
        "no reward": (200, body),
    }.get(said, (200, whole))


def score(spec: RewardSpec, completions, **options):
    with Scorer([spec], columns=[*ROW], **options) as scorer:
        return scorer.score(["6 * 7?"], [completions], [ROW], prompt_ids=["a"])[0]


def test_a_resources_server_scores_by_its_rows_in_a_session(monkeypatch):
    with gym_server(answers) as server:
        result = score(RewardSpec("nemo_gym", arguments={"url": server.url}), ["42", "41"])
        assert result.parts == {"nemo_gym": [1.0, 0.0]}
        seeded, verified = ([seen for seen in server.seen if seen[0] == path] for path in ("/seed_session", "/verify"))
        assert [len(seeded), len(verified)] == [2, 2]
        assert {cookie for _, cookie, _ in seeded} == {None}
        assert {cookie for _, cookie, _ in verified} == {"session=of-7"}
        assert verified[0][2]["expected_answer"] == "42"
        assert verified[0][2]["responses_create_params"] == {"input": [{"role": "user", "content": "6 * 7?"}]}
        columns = {name: [value] for name, value in (ROW | {"responses_create_params": None}).items()}
        assert nemo_gym(["6 * 7?"], ["42"], url=server.url + "/", **columns) == [1.0]


def test_what_the_server_could_not_measure_is_a_failure_and_never_its_zero():
    failures = {
        "down": "gave no usable answer after 1 tries: HTTP 500",
        "refused": "HTTP 422",
        "judge failed": "its reward of 0.0 is none: judge_failed, HTTP 503",
        "lost": "its reward of 0.0 is none: sandbox, killed",
        "no reward": "instead of a number as `reward`",
    }
    with gym_server(answers) as server:
        spec = RewardSpec("nemo_gym", arguments={"url": server.url, "retries": 0})
        result = score(spec, ["42", *failures], on_error="drop_sample")
    assert result.rewards == [1.0, *[None] * 5]
    for failure, message in zip(result.errors, failures.values(), strict=True):
        assert message in failure.message


def test_calls_of_tools_and_their_results_are_items_of_the_response():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Ulm"}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "content": "cold"},
        {"role": "assistant", "content": "It is cold."},
    ]
    called, told, said = response_of(turns)["output"]
    assert (called["type"], called["name"], called["arguments"]) == ("function_call", "get_weather", '{"city": "Ulm"}')
    assert (told["type"], told["output"]) == ("function_call_output", "cold")
    assert told["call_id"] == called["call_id"]
    assert (said["type"], said["role"], said["content"][0]["text"]) == ("message", "assistant", "It is cold.")
    calls = [call | {"id": name} for name in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("b", "a")]
    items = response_of([{"role": "assistant", "content": "", "tool_calls": calls}, *results])["output"]
    assert [(item["call_id"], item.get("output")) for item in items] == [
        *[("a", None), ("b", None), ("b", "of b"), ("a", "of a")],
    ]
    assert [item["type"] for item in response_of([{"role": "assistant", "content": ""}])["output"]] == ["message"]


@pytest.fixture
def nemo_gym_form(monkeypatch):
    """The two classes of NeMo-Gym that a server's `verify` is about, which drop the fields that they do not know."""

    class BaseVerifyRequest(BaseModel):
        responses_create_params: dict
        response: dict

    class BaseVerifyResponse(BaseVerifyRequest):
        reward: float

    module = ModuleType("nemo_gym.base_resources_server")
    module.BaseVerifyRequest, module.BaseVerifyResponse = BaseVerifyRequest, BaseVerifyResponse
    monkeypatch.setitem(sys.modules, "nemo_gym", ModuleType("nemo_gym"))
    monkeypatch.setitem(sys.modules, "nemo_gym.base_resources_server", module)


@pytest.mark.usefixtures("nemo_gym_form")
def test_ours_is_the_verify_of_a_server_and_an_error_is_no_zero(tmp_path):
    class Server:
        verify = as_verify("gsm8k")

    request = Server.verify.__annotations__["body"]

    def verify(server, text):
        asked = {"input": [{"role": "user", "content": "6 * 7?"}]}
        return asyncio.run(
            server.verify(request(responses_create_params=asked, response=response_of(text), expected_answer="42"))
        )

    answer = verify(Server(), "so #### 42")
    assert (answer.reward, answer.expected_answer) == (1.0, "42")
    assert verify(Server(), "so #### 41").reward == 0.0
    raises = tmp_path / "raises.py"
    raises.write_text("def reward(completions, expected_answer, **_):\n    raise ValueError(expected_answer)\n")

    class Broken:
        verify = as_verify(f"{raises}:reward")

    with pytest.raises(RewardError, match="ValueError: "):
        verify(Broken(), "42")


class Session:
    """A session of GenericEnvClient (openenv/core/generic_client.py of openenv 0.10), in form."""

    def __init__(self, base_url, message_timeout_s):
        self.base_url = base_url

    def sync(self):
        return self

    def __enter__(self):
        if self.base_url.endswith(":1"):
            raise ConnectionError("Failed to connect")
        return self

    def __exit__(self, *_):
        pass

    def reset(self, **row):
        self.answer = row["answer"]

    def step(self, action):
        if action["message"] == "raise":
            raise RuntimeError("Server error: no such action (code: EXECUTION_ERROR)")
        reward = None if action["message"] == "nothing" else action["message"] == self.answer
        return SimpleNamespace(reward=reward, done=True)


def test_an_openenv_server_scores_its_step_with_the_completion(monkeypatch):
    client = ModuleType("openenv.core.generic_client")
    client.GenericEnvClient = Session
    for name in ("openenv", "openenv.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "openenv.core.generic_client", client)
    url, action = "http://127.0.0.1:8000", {"message": "{completion}", "metadata": {}}
    said = ["42", 'a "quote"', "nothing", "raise"]
    answer = ["42"] * 4
    right, wrong, nothing, raised = openenv(["6 * 7?"] * 4, said, url=url, action=action, answer=answer)
    assert (right, wrong) == (1.0, 0.0)
    assert isinstance(nothing, ValueError)
    assert "the step had no reward" in str(nothing)
    assert "EXECUTION_ERROR" in str(raised)
    [refused] = openenv(["6 * 7?"], ["42"], url="http://127.0.0.1:1", action=action, answer=["42"])
    assert isinstance(refused, ConnectionError)
    with pytest.raises(ValueError, match="every completion would get the same reward"):
        openenv(["6 * 7?"], ["42"], url=url, action={"message": "completion"}, answer=["42"])
    monkeypatch.setitem(sys.modules, "openenv.core.generic_client", None)
    with pytest.raises(RewardError, match="needs the package: pip install openenv"):
        openenv(None, ["42"], url=url, action=action)


@pytest.mark.peer
def test_a_server_of_the_package_openenv_scores_a_guess():
    pytest.importorskip("openenv.core.generic_client", reason="OpenEnv is not installed: pip install openenv")
    case = Path(__file__).parents[2] / "cases/openenv_server.py"
    with socket.create_server(("127.0.0.1", 0)) as listening:  # whoever connects before it serves waits for it
        port, number = listening.getsockname()[1], listening.fileno()
        server = subprocess.Popen([sys.executable, str(case), str(number)], pass_fds=[number])
    try:
        action = {"type": "call_tool", "tool_name": "guess", "arguments": {"number": "{completion}"}}
        arguments = {"url": f"http://127.0.0.1:{port}", "action": action, "request_timeout_s": 60.0}
        with Scorer([RewardSpec("openenv", arguments=arguments)], columns=["number"], timeout_s=120) as scorer:
            [result] = scorer.score(["Guess."], [["5", "4"]], [{"number": 5}], prompt_ids=["a"])
    finally:
        server.kill()
        server.wait()
    assert result.rewards == [1.0, -0.1]
