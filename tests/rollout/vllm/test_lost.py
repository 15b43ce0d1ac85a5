"""A server of our own that dies or hangs is replaced, with the same weights and the same canaries, and counted."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from copies import Copy
from engine_cases import completions, prompts_of
from talking import Talking
from vllm_cases import gone

from policies.policy import Policy
from rollout.faults import RolloutError
from rollout.group import Completion, RolloutGroup
from rollout.pool import PoolOptions
from rollout.request import Request
from rollout.sampling import EnvironmentSpec, SamplingParams
from rollout.vllm import pool as pool_module
from rollout.vllm.pool import VLLMPool
from rollout.vllm.process import VLLMProcess
from rollout.vllm.settings import VLLMSettings

PROMPTS, CANARIES = prompts_of(9, 1, 17), prompts_of(4)
PARAMS = SamplingParams(3, 0.7, 8, seed=5, step=2)
LIMIT_S = 3.0
CASES = Path(__file__).parents[2] / "cases"
GUESSING = CASES / "guessing.py"


class Case:
    """A pool with a fake server, the strikes that it still gets, and what was told of its losses."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        self.policy, self.file = policy, folder / "strikes"
        self.file.write_text("")
        self.told: list[tuple[str, ...]] = []
        self.settings = VLLMSettings(
            python=Path(sys.executable), log=folder / "vllm.log", silence_s=LIMIT_S, sync_s=LIMIT_S
        )
        self.pool = VLLMPool(policy, PoolOptions(vllm=self.settings, on_lost=lambda *what: self.told.append(what)))

    def strike(self, *lines: str) -> None:
        self.file.write_text("\n".join(lines))

    @property
    def pid(self) -> int:
        assert self.pool.process is not None
        return self.pool.process.process.pid

    def sample(self, on_finished: Callable[[int], None] | None = None) -> list[RolloutGroup]:
        return self.pool.sample(PROMPTS, PARAMS, on_finished)

    def move(self) -> None:
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(1.0)


@pytest.fixture(autouse=True)
def fake_servers(monkeypatch, tmp_path) -> list[dict]:
    """What a pool starts as its server is a copy of this process that runs the fake one. Gives their environments."""
    environments: list[dict] = []

    def popen(command: Sequence[str], **options: Any) -> Copy:
        environments.append(options["env"])
        return Copy([command[0], str(CASES / "vllm_fake.py"), str(tmp_path / "strikes"), *command[1:]], **options)

    replaced = SimpleNamespace(**vars(subprocess) | {"Popen": popen})
    monkeypatch.setattr("rollout.vllm.process.subprocess", replaced)
    return environments


@pytest.fixture
def case(random_policy, tmp_path) -> Iterator[Case]:
    case = Case(random_policy(3, mtp=False), tmp_path)
    yield case
    case.pool.close()


HOW = {
    "SIGKILL": "was ended by SIGKILL, perhaps since the host had no memory left",
    "SIGSTOP": f"has not answered /MOMENT for {LIMIT_S:g} s; its process PID still runs",
}


@pytest.mark.parametrize("number", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_one_that_is_lost_while_it_samples_is_replaced_and_gives_the_same(case, number):
    case.pool.sample_on_each(CANARIES, PARAMS)
    expected, former = case.sample(), case.pid
    case.pool.metrics()
    case.strike(f"sample {number}")
    heard: list[int] = []
    assert case.sample(heard.append) == expected
    assert sum(heard) == len(PROMPTS) * PARAMS.group_size
    [(what, why, action)] = case.told
    assert (what, action) == ("vLLM", "it is started again")
    assert HOW[number].replace("MOMENT", "sample").replace("PID", str(former)) in why
    assert str(case.settings.log) in why
    found = case.pool.metrics()
    assert (found["faults/vllm"], found["sync/bytes"] > 0) == (1, True)
    assert found["faults/sampling_seconds"] > (LIMIT_S if number == "SIGSTOP" else 0)
    assert gone(former)
    assert case.sample() == expected
    assert "faults/vllm" not in case.pool.metrics()


def test_one_that_is_lost_between_two_turns_gives_the_same_episodes(case, monkeypatch):
    monkeypatch.setattr("rollout.environments.episodes.TurnFormat", Talking)
    spec = EnvironmentSpec(environments=(("", f"{GUESSING}:Guess"),), max_turns=4)
    params = replace(PARAMS, max_completion_tokens=60, stop_token_ids=tuple(range(9, 250, 8)), environment=spec)
    prompts = [replace(prompt, text=str(i)) for i, prompt in enumerate(PROMPTS)]
    heard: list[int] = []
    expected = case.pool.sample(prompts, params, heard.append)
    made = completions(expected)
    assert sum(heard) == len(made)
    assert {c.finish_reason for c in made} >= {"stop", "max_turns"}
    for c in made:
        assert len(c.token_ids) == len(c.logprobs) == len(c.sampled) == len(c.draft.depths) <= 60
        assert c.draft.target_forwards == c.num_sampled - c.num_turns
        assert all(score == 0 for score, own in zip(c.logprobs, c.sampled, strict=True) if not own)
        assert c.tools is not None
        assert c.tools.reward is not None
    assert sum(c.num_sampled < len(c.token_ids) for c in made) > 3
    answer, turns = VLLMPool._turn, []

    def killed_in_the_third(pool, *arguments):
        turns.append(len(turns))
        if len(turns) == 3:
            os.kill(case.pid, signal.SIGKILL)
        return answer(pool, *arguments)

    monkeypatch.setattr(VLLMPool, "_turn", killed_in_the_third)
    assert case.pool.sample(prompts, params) == expected
    assert len(turns) == 3 + 4
    assert len(case.told) == 1


def test_one_that_has_died_while_nobody_asked_is_found_at_the_next_call(case):
    expected = case.sample()
    os.kill(case.pid, signal.SIGKILL)
    assert case.sample() == expected
    os.kill(case.pid, signal.SIGKILL)
    case.pool.sync_weights(case.policy.synced_weights(), 1)
    assert len(case.told) == 2


@pytest.mark.slow
def test_contract_5_with_adapters_a_new_one_gets_everything_and_the_next_publication_is_short_again(
    random_policy, tmp_path
):
    policy = random_policy(4, mtp=False)
    policy.add_lora(2, 4.0, ["q_proj", "experts"])
    case = Case(policy, tmp_path)
    try:
        whole = case.pool.metrics()["sync/bytes"]
        for version in (1, 2):
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.3)
            case.strike(*["publish SIGKILL"] * (version - 1))
            case.pool.sync_weights(policy.synced_weights(), version)
            sent = case.pool.metrics()["sync/bytes"]
            assert sent < whole / 3 if version == 1 else sent == whole
            expected = case.sample()
            case.strike("sample SIGKILL")
            assert case.sample() == expected
            assert case.pool.metrics()["sync/bytes"] == whole
        case.pool.sync_weights(policy.synced_weights(), 3)
        assert case.pool.metrics()["sync/bytes"] < whole / 3
    finally:
        case.pool.close()


def test_a_server_by_url_is_not_ours_to_start(case):
    server = VLLMProcess(case.settings.python, case.settings.log, 1, lambda: None)
    other = VLLMPool(case.policy, PoolOptions(vllm=replace(case.settings, url=server.url, token=server.token)))
    os.kill(server.process.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match="is lost.*start it again at the address in rollout.vllm.url"):
        other.sample(PROMPTS, PARAMS)
    assert other.metrics().keys() == {"sync/bytes"}
    server.close()


def test_contract_13_a_new_one_passes_the_canaries_that_the_lost_one_has_passed(case):
    case.pool.sample_on_each(CANARIES, PARAMS)
    case.strike("sample SIGKILL", "sample odd")
    with pytest.raises(RolloutError, match=r"vLLM, which was started again, samples other canaries .*\(version 0\)"):
        case.sample()


def test_weights_that_the_learner_changes_while_they_are_sent_again_are_sent_once_more(case, monkeypatch):
    """rollout.staleness: a thread samples, and the learner makes its copy while that sends."""
    expected = case.sample()

    def stream(tensors):
        if not moved:
            moved.append(True)
            case.pool.keep_weights()
            case.move()
        return whole(tensors)

    moved: list[bool] = []
    whole = pool_module.wire.stream
    monkeypatch.setattr(pool_module.wire, "stream", stream)
    case.strike("sample SIGKILL")
    assert case.sample() == expected
    assert moved


def test_a_stop_ends_the_start_of_a_new_one(case):
    class Stop(Exception):
        pass

    def stop() -> None:
        if case.told:
            raise Stop

    case.pool.check_stop = case.pool.client.while_waiting = stop
    case.strike("sample SIGKILL", "start odd")
    with pytest.raises(Stop):
        case.sample()


def test_it_leaves_a_gpu_that_it_shares_until_the_next_publication(case, monkeypatch):
    """As far as no GPU shows it: a fake server that says that it is on one."""
    expected = case.sample()
    monkeypatch.setattr("rollout.places.Places.taken", lambda *_: (True, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,8")
    pool = VLLMPool(case.policy, PoolOptions(vllm=case.settings, colocate=True))
    try:
        arguments = pool.state["load"]["arguments"]
        assert (arguments["gpu_memory_utilization"], arguments["enable_sleep_mode"]) == (0.4, True)
        case.strike("sleep SIGKILL")
        pool.sleep()
        with pytest.raises(RolloutError, match="has not confirmed the last weight sync"):
            pool.sample(PROMPTS, PARAMS)
        pool.sync_weights(case.policy.synced_weights(), 0)
        assert pool.sample(PROMPTS, PARAMS) == expected
    finally:
        pool.close()


def answers(case: Case, cancelled: int | None = None) -> list[tuple[int, Completion]]:
    """What requests of agents are told, in the order of the requests."""
    params, told = replace(PARAMS, group_size=1), {}
    relay = case.pool.relay(params, 0, 8)
    requests = [Request(prompt, params, partial(told.setdefault, number)) for number, prompt in enumerate(PROMPTS)]
    for request in requests:
        relay.add(request)
    while relay.busy:
        relay.round()
        if cancelled is not None and len(told) == 1:
            relay.drop(requests[cancelled])
    return [(number, told[number].completion) for number in sorted(told)]


def test_requests_of_agents_outlive_a_server(case):
    case.pool.sample_on_each(CANARIES, PARAMS)
    expected = answers(case)
    assert [number for number, _ in expected] == [0, 1, 2]
    for (_, completion), group in zip(expected, case.pool.sample(PROMPTS, PARAMS), strict=True):
        assert (completion.token_ids, completion.cached) == (group.completions[0].token_ids, 7)
    case.strike("answer SIGKILL")
    assert answers(case) == expected
    assert case.pool.metrics()["faults/vllm"] == 1
    assert answers(case, cancelled=2) == expected[:2]
    case.pool.synced = None
    with pytest.raises(RolloutError, match="has not confirmed the last weight sync"):
        answers(case)
