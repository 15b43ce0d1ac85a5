"""Runs whose rollouts are an agent's: what is learned from, the same with any number of processes and after a stop,
what happens when an agent fails, and what is refused."""

import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from agents import ask
from safetensors.torch import load_file

from grpo.cli.parse import main
from grpo.cli.why.explain import explain
from grpo.config.environment import AgentOptions
from grpo.endpoint.agent_sampler import AgentSampler
from grpo.learner.learner import Learner
from grpo.run.stop import Stopped, signals
from grpo.train import train
from review.readers.run_folder import read_events, read_metrics
from rewards.commands.options import ReplayConfig
from rewards.commands.replay import replay
from rewards.group_score import RewardFailed
from rewards.protocol import RewardError
from rewards.records import read_rollouts
from rollout.group import Prompt
from rollout.sampling import SamplingParams
from rollout.workers.kinds import PoolOptions, open_pool

AGENTS = Path(__file__).parents[2] / "cases/agents.py"
ONCE, TWICE = f"{AGENTS}:once", f"{AGENTS}:twice"
SHORT = {"sft.steps": 0, "steps": 2, "prompts_per_step": 2, "rollout.prompts_per_shard": 1}


def learned(folder) -> dict[str, torch.Tensor]:
    [file] = (folder / "policy").glob("model*.safetensors")
    return load_file(file)


def sampled(folder, step) -> list[tuple]:
    """Without the engine's floats, which differ in their last bits with the batch."""
    return [
        (line["token_ids"], line["turns"], line.get("segments"), line["parts"], line["advantage"])
        for line in read_rollouts(folder, step)
    ]


@pytest.fixture(scope="module")
def whole(micro_config, tmp_path_factory):
    """An agent of three requests, two of them in one text, and a reward of its own."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(micro_config(folder, agent=TWICE, **SHORT, **{"eval.limit": 2}))
    return folder


@pytest.mark.slow
def test_contract_4_an_agent_that_asks_once_is_the_run_without_it(micro_config, tmp_path):
    train(micro_config(tmp_path / "plain", **SHORT))
    train(micro_config(tmp_path / "agent", agent=ONCE, **SHORT))
    for step in (1, 2):
        plain, acted = read_rollouts(tmp_path / "plain", step), read_rollouts(tmp_path / "agent", step)
        for name in ("prompt_id", "token_ids", "text", "policy_logprobs", "advantage", "finish_reason"):
            assert [line[name] for line in plain] == [line[name] for line in acted]
        assert not any("segments" in line for line in acted)
    plain, acted = learned(tmp_path / "plain"), learned(tmp_path / "agent")
    assert all(torch.equal(plain[name], acted[name]) for name in plain)


@pytest.mark.slow
def test_contract_1_the_learner_scores_what_was_sampled(whole):
    """Its log-probabilities are those of the sampler, token by token: it has read the same ids before each of them."""
    for step in (1, 2):
        for line in read_rollouts(whole, step):
            assert len(line["segments"]) == 2
            assert [turn["role"] for turn in line["turns"]] == ["assistant", "user", "assistant", "user", "assistant"]
            assert line["policy_logprobs"] == pytest.approx(line["logprobs"], abs=1e-4)
            assert 0 < sum(not own for own in line["sampled"]) < len(line["sampled"])
            assert line["parts"]["agent"] == len(line["turns"][0]["content"]) / 10
            assert line["policy_version"] == step - 1
    metrics = read_metrics(whole)
    assert metrics[1]["mismatch/logprob_abs_max"] < 1e-4
    assert (metrics[1]["agent/branches_mean"], metrics[1]["tools/calls_mean"]) == (2, 3)
    assert metrics[0]["eval/part/agent"] > 0  # held-out problems are the agent's too


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "patched"),
    [
        ({"rollout.workers": 2}, {}),
        pytest.param({}, {"agents.WORKERS": 1, "agent_sampler.WORKERS": 1}, marks=pytest.mark.long),
        pytest.param({}, {"agent_sampler.CACHE_TOKENS": 0}, marks=pytest.mark.long),
        pytest.param({"rollout.draft_tokens": None}, {}, marks=pytest.mark.long),
    ],
)
def test_contract_4_workers_processes_and_the_cache_between_turns_change_no_bit(
    micro_config, whole, tmp_path, given, patched, monkeypatch
):
    monkeypatch.setattr("grpo.learner.terms.draft_head.PAYS", 0.0)  # a head that gains nothing yet learns all the same
    for name, value in patched.items():
        monkeypatch.setattr(f"grpo.endpoint.{name}", value)
    before = set(psutil.Process().children(recursive=True))
    train(micro_config(tmp_path / "other", agent=TWICE, **SHORT | given))
    left = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=10)[1]
    assert not left, [process.cmdline() for process in left]
    assert [sampled(tmp_path / "other", step) for step in (1, 2)] == [sampled(whole, step) for step in (1, 2)]
    other, one = learned(tmp_path / "other"), learned(whole)
    assert all(torch.equal(other[name], one[name]) for name in one)
    metrics = read_metrics(tmp_path / "other")[1]
    assert ("agent/cached_tokens" in metrics) == ("agent_sampler.CACHE_TOKENS" not in patched)
    assert ("draft/gain" in metrics) == ("rollout.draft_tokens" in given)


@pytest.mark.long
@pytest.mark.parametrize("ahead", [1, 2])
def test_contract_12_agents_ahead_are_on_schedule_and_resume_to_the_same_tokens(micro_config, tmp_path, ahead):
    """Whatever the number of workers, the age of the weights is the schedule's; what was in flight is resumed. Weights
    agree to rounding: the importance correction reads the sampler's floats, whose last bits follow from its batches."""
    given = {"agent": TWICE, "rollout.staleness": ahead, "sft.steps": 0, "steps": 4}
    train(micro_config(tmp_path / "one", **given))
    with pytest.raises(BaseException, match="stopped after step 2"):
        train(micro_config(tmp_path / "two", **given), stop_after=2)
    train(micro_config(tmp_path / "two", **given, **{"rollout.workers": 2}), resume="auto", force=True)
    assert [sampled(tmp_path / "one", step) for step in range(1, 5)] == [
        sampled(tmp_path / "two", step) for step in range(1, 5)
    ]
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)
    ages = [step - 1 - line["policy_version"] for step in range(1, 5) for line in read_rollouts(tmp_path / "one", step)]
    assert set(ages) == set(range(ahead + 1))


@pytest.mark.slow
def test_an_agent_gets_columns_and_its_number_is_a_reward(micro_config, tmp_path):
    given = {"agent": f"{AGENTS}:columns", "rewards": [], "rollout.max_completion_tokens": 6, "prompts_per_step": 4}
    for name in ("a", "b"):
        train(micro_config(tmp_path / name, **SHORT | given))
    lines = read_rollouts(tmp_path / "a", 1)
    assert all(line["parts"].keys() == {"agent"} and line["reward"] == line["parts"]["agent"] for line in lines)
    assert len({line["reward"] % 1 for line in lines}) > 8  # every episode has random numbers of its own,
    assert sampled(tmp_path / "a", 2) == sampled(tmp_path / "b", 2)  # and the same ones in the same run


FATES = {
    "raises": r"raised: RuntimeError: no such tool \(line \d+ in fails\)",
    "hangs": r"timeout: no result after 3 s, stuck at agents.py",
    "dies": "died: the process that ran it ended",
    "leaves": "raised: SystemExit: enough",
    "words": "not_a_number: returned 'good'; return a number or None",
    "nan": "",
    "silent": "asked_nothing: it got no answer of the policy",
    "greedy": "memory: it needs more memory",
}


def _write_data(file, fates, **more):
    rows = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} | more | {"fate": f} for i, f in enumerate(fates)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.name": str(file), "data.limit": None}


def test_contract_6_an_agent_that_fails_is_named_and_never_a_zero(micro_config, tmp_path):
    fates = [*FATES, "", ""]
    given = {"agent": f"{AGENTS}:fails", "rewards": [], "program_memory_mb": 2000, "program_timeout_s": 3}
    given |= {"steps": 1, "prompts_per_step": len(fates), "rollout.group_size": 2, "sft.steps": 0}
    data = _write_data(tmp_path / "data.jsonl", fates)
    train(micro_config(tmp_path / "drop", **given, **data, **{"reward.on_error": "drop_sample"}))
    rewards, said = {}, {}
    for line in read_rollouts(tmp_path / "drop", 1):
        rewards.setdefault(fates[int(line["prompt_id"].rpartition("/")[2])], []).append(line["reward"])
    assert rewards == {fate: [None, None] for fate in FATES} | {"": [1.0] * 4}
    for event in read_events(tmp_path / "drop"):
        if event["event"] == "reward_error":
            said.setdefault(fates[int(event["prompt_id"].rpartition("/")[2])], []).append(event["message"])
    assert {fate: len(messages) for fate, messages in said.items()} == dict.fromkeys(FATES, 2)
    assert [fate for fate, words in FATES.items() if not re.search(words, said[fate][0])] == []
    assert read_metrics(tmp_path / "drop")[0]["tools/failures"] == 2 * (len(FATES) - 1)  # and a number that is none
    data = _write_data(tmp_path / "data.jsonl", ["", "raises", ""])
    given |= {"prompts_per_step": 3}
    with pytest.raises(RewardFailed, match=rf"reward 'agent' failed on prompt '.*1', sample 0: .*{FATES['raises']}"):
        train(micro_config(tmp_path / "abort", **given, **data))


def test_an_agent_whose_requests_are_refused_is_told_of(micro_config, tmp_path):
    """It swallows the errors, and the run says what they were."""
    config = micro_config(tmp_path / "run", agent=f"{AGENTS}:refused", **SHORT)
    with pytest.raises(RewardFailed, match=r"its last request was refused: top_p=0.5: tokens are drawn"):
        train(config)


def test_what_cannot_begin_is_refused_before_a_policy_is_loaded(micro_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "__init__", lambda *_: pytest.fail("loaded a policy"))
    monkeypatch.setattr("grpo.steps.opening.load_policy", lambda *_: pytest.fail("loaded a policy"))
    for given, words in (
        ({"agent": "nowhere.py:agent"}, "nowhere.py is not an existing Python file"),
        ({"agent": f"{AGENTS}:other"}, "'other' is not there"),
        ({"agent": f"{AGENTS}:nowhere"}, "has no parameter `base_url`"),
        ({"environment": "calculator"}, "environment=calculator with agent=.*: an agent has its tools itself"),
        ({"tools": ["a.py:b"]}, "an agent has its tools itself"),
        ({"rollout.backend": "vllm"}, "with rollout.draft_tokens=2 of vLLM: .*; set rollout.draft_tokens to 0"),
        ({"learner.routing_replay": True}, "learner.routing_replay=true with agent"),
        ({"loss.advantage": "gae"}, "loss.advantage=gae with agent"),
        ({"prompt_attention": "bidirectional"}, "would be seen whole too"),
    ):
        with pytest.raises((ValueError, RewardError), match=words):
            train(micro_config(tmp_path / "run", **({"agent": ONCE} | given)))


def test_a_column_with_a_name_of_the_agents_own_is_refused(micro_config, tmp_path):
    data = _write_data(tmp_path / "data.jsonl", [""] * 8, api_key="x")
    with pytest.raises(ValueError, match="column 'api_key' has the name of what every agent gets"):
        train(micro_config(tmp_path / "run", agent=ONCE, **data))


@pytest.fixture
def pool(micro_policy):
    policy = micro_policy(1)
    opened = []

    def begin(agent: str, **options):
        given = AgentOptions(agent=f"{AGENTS}:{agent}", **options)
        opened.append(AgentSampler(open_pool(policy, PoolOptions(check_stop=signals.check)), given, 1.0))
        return (
            opened[-1],
            [Prompt("a", "3 + 4 = ?", policy.tokenizer.encode("3 + 4 = ?"))],
            SamplingParams(2, max_completion_tokens=9),
        )

    yield begin
    for one in opened:
        one.close()


def test_a_stop_ends_the_agents_at_once(pool, monkeypatch):
    agents, prompts, params = pool("waits", program_timeout_s=600)
    threading.Timer(2, lambda: monkeypatch.setattr(signals, "number", 15)).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        agents.sample(prompts, params)
    assert time.monotonic() - started < 200
    signals.number, agents.agent = 0, AgentOptions(agent=ONCE)
    assert len(agents.sample(prompts, params)[0].completions) == 2


def test_contract_4_the_last_sample_of_a_group_is_the_same_without_the_first(pool):
    agents, prompts, params = pool("once")
    [both] = agents.sample(prompts, params)
    [last] = agents.sample([replace(prompts[0], first_sample=1)], replace(params, group_size=1))
    assert last.completions[0].token_ids == both.completions[1].token_ids != both.completions[0].token_ids


def test_other_keys_and_episodes_get_errors_in_openais_form(pool):
    agents, prompts, params = pool("once")
    agents.sample(prompts, params)
    base = f"http://{agents.endpoint._address}/episodes/3/v1"
    assert ask(base, "wrong", "/completions", prompt="a")["status"] == 401
    gone = ask(base, agents.endpoint.key, "/chat/completions", messages=[])
    assert (gone["status"], gone["error"]["code"]) == (404, "episode_not_found")


@pytest.mark.slow
def test_a_run_of_an_agent_is_evaluated_replayed_and_explained(whole, tmp_path):
    assert main(["eval", str(whole), "--eval.limit", "2", "--output", str(tmp_path), "--threads", "1"]) == 0
    written = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {"agent", "letters"} == set(written[0]["parts"])
    assert main(["sample", str(whole), "--prompt", "3 + 4 = ?", "--threads", "1"]) == 0  # without the agent
    again = replay(whole, "agent", ReplayConfig())
    assert (again.changes, again.failures, again.against) == ([], [], "agent")
    found = explain(whole, 2, group=0, tokens=5, held_out=2, say=lambda text: None)
    assert found.difference < 1e-4
    assert len(found.tokens) == 10  # of both rows


OPENAI = """
from openai import AsyncOpenAI, OpenAI

async def chat(base_url, api_key, question):
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        messages = [{"role": "user", "content": question}]
        for _ in range(2):
            answer = await client.chat.completions.create(model="any", messages=messages, max_tokens=4)
            messages += [answer.choices[0].message, {"role": "user", "content": "sure?"}]
        chunks = await client.chat.completions.create(model="any", messages=messages, stream=True)
        return len([chunk async for chunk in chunks])
"""


def test_the_official_client_is_an_agent_and_asks_no_proxy(tmp_path, micro_policy, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    (tmp_path / "mine.py").write_text(OPENAI)
    policy = micro_policy(1)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    agents = AgentSampler(open_pool(policy), AgentOptions(agent=f"{tmp_path}/mine.py:chat"), 1.0)
    prompt = Prompt("a", "3?", policy.tokenizer.encode("user: 3?\n"), {"question": "3?"})
    try:
        [group] = agents.sample([prompt], SamplingParams(2, max_completion_tokens=6))
    finally:
        agents.close()
    for completion in group.completions:
        assert completion.tools.failure is None
        assert completion.tools.reward >= 2
        assert completion.segments == []  # one text, which begins with the prompt of the data
        assert [turn["role"] for turn in completion.turns] == ["assistant", "user", "assistant", "user", "assistant"]
