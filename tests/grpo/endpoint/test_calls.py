"""Calls in answers, with a generation that is written here: what a policy wrote is never tokenised again (contract 14),
and whatever it wrote reaches the agent and is counted."""

import json
import re
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl

from grpo.endpoint.answers import Answer
from grpo.endpoint.api_error import ApiError
from grpo.endpoint.asked import ChatAsked, read
from grpo.endpoint.batcher import Batcher, Counts
from grpo.endpoint.episode import Episode
from grpo.endpoint.served import Served
from policies.presets import small_tokenizer
from rollout.environments.format import BadCall, TurnFormat
from rollout.group import Completion, DraftStats, Prompt
from rollout.sampling import SamplingParams
from rollout.serving import News

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CORPUS = ["Each gets <<48/2=24>>24 apples.\n", "3 + 4 = 7 sold\n"] * 20
CALCULATE = {
    "type": "function",
    "function": {"name": "calculate", "parameters": {"properties": {"expression": {"type": "string"}}}},
}
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}},
}
TOOLS = [CALCULATE, ADD]
USER = {"role": "user", "content": "How many?"}


def tokenizer_of(template: str | None, **special: str):
    tokenizer = small_tokenizer(CORPUS)
    if template is not None:
        names = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]} | special
        tokenizer.add_special_tokens(names)
        file = TEMPLATES / f"{template}.jinja"
        tokenizer.chat_template = file.read_text() if file.is_file() else template
    return tokenizer


def engine_of(tokenizer):
    config = SimpleNamespace(prompt_attention="causal")
    policy = SimpleNamespace(tokenizer=tokenizer, max_length=100_000, config=config)
    return SimpleNamespace(policy=policy, version=7, check=lambda prompts, params: None, max_rows=8)


class Written:
    """A batcher whose completions are what the test wrote: the letters of a text, one token each."""

    def __init__(self, tokenizer) -> None:
        self.engine, self.counts, self.most_waiting = engine_of(tokenizer), Counts(), 8
        self._changed = threading.Lock()

    count = Batcher.count


def letters(tokenizer, text: str) -> list[int]:
    """The tokens of a policy that spells: never those that the tokenizer would choose."""
    marks = "|".join(re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values())
    pieces = re.findall(f"{marks}|.", text, re.DOTALL)
    known = {piece: tokenizer.encode(piece) for piece in set(pieces)}
    return [token for piece in pieces for token in known[piece]]


def completion_of(tokenizer, text: str, stops) -> Completion:
    ids = letters(tokenizer, text)
    end = "stop" if ids[-1:] and ids[-1] in stops else "length"
    visible = ids[:-1] if end == "stop" else ids
    return Completion(ids, [-0.5] * len(ids), tokenizer.decode(visible), end, 7, DraftStats(depths=[0] * len(ids)))


def asked_of(messages, **more):
    body = {"model": "policy", "messages": messages, "tools": TOOLS} | more
    return read(ChatAsked, json.dumps(body).encode())


def answer_to(served, asked, text):
    """The answer as a whole, and streamed: one choice each."""
    jobs = served.jobs(asked)
    completion = completion_of(served.tokenizer, text, served.defaults.stop_token_ids)
    whole = Answer(served, asked, jobs)
    whole.done[0] = completion
    streamed = Answer(served, asked, jobs)
    choices = []
    step = 3 if len(text) < 1000 else 997  # marks are cut in the middle
    for start in range(0, len(completion.token_ids), step):
        ids = completion.token_ids[start : start + step]
        last = start + step >= len(completion.token_ids)
        news = News(ids, [-0.5] * len(ids), completion if last else None, version=7)
        choices += [choice for chunk in streamed.pieces(0, news) for choice in chunk["choices"]]
    return whole.whole()["choices"][0], choices


def joined(choices):
    """A stream's message and its end, as OpenAI's client puts it together."""
    message, calls = {"content": ""}, {}
    for choice in choices:
        message["content"] += choice["delta"].get("content") or ""
        for piece in choice["delta"].get("tool_calls") or []:
            call = calls.setdefault(piece["index"], {"arguments": ""})
            call |= {name: piece[name] for name in ("id", "type") if name in piece}
            call["name"] = piece["function"].get("name", call.get("name"))
            call["arguments"] += piece["function"]["arguments"]
    return message["content"], [calls[i] for i in range(len(calls))], choices[-1]["finish_reason"]


def call(name: str, **arguments) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"


def raw(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


ONE = call("calculate", expression="48/2")
DEEP = "[" * 3000 + "]" * 3000
# What the policy wrote; names and arguments of the calls that the agent gets, or None where the answer is text; what
# is counted besides the calls.
CASES = {
    "one": (ONE, [("calculate", {"expression": "48/2"})], {}),
    "after a text": (f"Let me see.\n{ONE}", [("calculate", {"expression": "48/2"})], {}),
    "two": (f"{ONE}\n{call('add', a=1, b=2)}", [("calculate", {"expression": "48/2"}), ("add", {"a": 1, "b": 2})], {}),
    "the same twice": (f"{ONE}{ONE}", [("calculate", {"expression": "48/2"})] * 2, {}),
    "not offered": (call("rm", path="/"), [("rm", {"path": "/"})], {"unknown_tools": 1}),
    "one of two not offered": (f"{ONE}{call('rm')}", [("calculate", {"expression": "48/2"}), ("rm", {})], {"unknown_tools": 1}),
    "without arguments": (raw('{"name": "add"}'), [("add", {})], {}),
    "null arguments": (raw('{"name": "add", "arguments": null}'), [("add", {})], {}),
    "unicode": (call("calculate", expression="½ × 4 — 𝟜 é\u202e"), [("calculate", {"expression": "½ × 4 — 𝟜 é\u202e"})], {}),
    "braces and marks in strings": (
        call("calculate", expression='}{"}] <tool_call> \\" {"name": "add"}'),
        [("calculate", {"expression": '}{"}] <tool_call> \\" {"name": "add"}'})],
        {},
    ),
    "huge": (call("calculate", expression="1+" * 15_000), [("calculate", {"expression": "1+" * 15_000})], {}),
    "text after it": (f"{ONE}\nDone.", [("calculate", {"expression": "48/2"})], {}),
    "no end mark": (ONE.removesuffix("\n</tool_call>"), None, {"malformed_calls": 1}),
    "an end mark in a string": (call("calculate", expression="</tool_call>"), None, {"malformed_calls": 1}),
    "no JSON": (raw("calculate(48/2)"), None, {"malformed_calls": 1}),
    "empty": (raw(""), None, {"malformed_calls": 1}),
    "cut": ('<tool_call>\n{"name": "calculate", "argum', None, {"malformed_calls": 1}),
    "cut before the JSON": ("Hm.\n<tool_call>", None, {"malformed_calls": 1}),
    "a list": (raw("[1, 2]"), None, {"malformed_calls": 1}),
    "a string": (raw('"calculate"'), None, {"malformed_calls": 1}),
    "no name": (raw('{"arguments": {"a": 1}}'), None, {"malformed_calls": 1}),
    "a number for a name": (raw('{"name": 3, "arguments": {}}'), None, {"malformed_calls": 1}),
    "an empty name": (raw('{"name": "", "arguments": {}}'), None, {"malformed_calls": 1}),
    "arguments in a list": (raw('{"name": "add", "arguments": [1, 2]}'), None, {"malformed_calls": 1}),
    "arguments in a string": (raw('{"name": "add", "arguments": "{}"}'), None, {"malformed_calls": 1}),
    "the second is bad": (f"{ONE}\n{raw('{')}", None, {"malformed_calls": 1}),
    "the first is bad": (f"{raw('{')}\n{ONE}", None, {"malformed_calls": 1}),
    "nested too deeply": (raw('{"name": "add", "arguments": {"a": %s}}' % DEEP), None, {"malformed_calls": 1}),
    "nested a hundred levels": (
        raw('{"name": "add", "arguments": {"a": %s1%s}}' % ("[" * 120, "]" * 120)), None, {"malformed_calls": 1}
    ),
    "half a character": (raw('{"name": "add", "arguments": {"a": "\\ud83d"}}'), None, {"malformed_calls": 1}),
    "infinite": (raw('{"name": "add", "arguments": {"a": 1e999}}'), None, {"malformed_calls": 1}),
    "not a number": (raw('{"name": "add", "arguments": {"a": NaN}}'), None, {"malformed_calls": 1}),
    "an integer of 9,000 digits": (raw('{"name": "add", "arguments": {"a": %s}}' % ("9" * 9000)), None, {"malformed_calls": 1}),
    "an end without a beginning": ("3 apples</tool_call>", None, {"malformed_calls": 1}),
    "a call in a call": (f"<tool_call>{ONE}</tool_call>", None, {"malformed_calls": 1}),
    "a text": ("There are 24 <tool> calls {}.", None, {}),
}  # fmt: skip
CUT = {"no end mark": (CASES["no end mark"][0], [("calculate", {"expression": "48/2"})], {})}  # by a limit, just there


@pytest.fixture(scope="module")
def qwen():
    return tokenizer_of("qwen2_5")


def served_by(tokenizer, **more):
    stops = (tokenizer.eos_token_id,)
    params = SamplingParams(1, 1.0, 90_000, stops, seed=5)
    return Served("policy", Written(tokenizer), params, "")


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_calls_of_all_kinds_reach_the_client_and_are_counted(qwen, name, ends):
    """Streamed as a whole, without a crash; what cannot be read is text, to the letter."""
    text, calls, counts = CASES[name] if ends else (CASES | CUT)[name]
    served = served_by(qwen)
    whole, choices = answer_to(served, asked_of([USER]), text + ("<|im_end|>" if ends else ""))
    json.dumps([whole, choices], ensure_ascii=False, allow_nan=False).encode()
    message = whole["message"]
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]
    assert found == (calls or [])
    if calls is None:
        assert message == {"role": "assistant", "content": text, "refusal": None}
    ids = [c["id"] for c in message.get("tool_calls", [])]
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 9 and i.isalnum() for i in ids)
    end = "stop" if ends else "length"
    assert whole["finish_reason"] == ("tool_calls" if calls else end)
    content, streamed, reason = joined(choices)
    assert (content or None, reason) == (message["content"] or None, whole["finish_reason"])
    flat = [c["function"] | {"id": c["id"], "type": "function"} for c in message.get("tool_calls", [])]
    assert streamed == flat
    expected = {"tool_calls": len(calls or [])} | counts
    counted = {k: v for k, v in asdict(served.batcher.counts).items() if v and k != "policies"}
    assert counted == {name: 2 * n for name, n in expected.items() if n}  # whole, and streamed


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_contract_14_a_call_that_an_agent_sends_back_keeps_its_tokens(qwen, name, ends):
    """The agent goes on with results, or with a question where it got text; the next prompt begins with the very
    tokens that were sampled, and goes on as the chat template writes it."""
    text, calls, counts = CASES[name] if ends else (CASES | CUT)[name]
    batcher, prompt = Written(qwen), Prompt("1", "", [5])
    params = SamplingParams(1, 1.0, 90_000, (qwen.eos_token_id,), seed=5)
    episode = Episode(prompt, 0, batcher, params, temperature=1.0)
    [job] = episode.jobs(asked_of([USER]))
    completion = completion_of(qwen, text + ("<|im_end|>" if ends else ""), params.stop_token_ids)
    job.keep(completion)
    answer = Answer(episode, asked_of([USER]), [job])
    answer.done[0] = completion
    message = answer.whole()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "24"} for c in message.get("tool_calls", [])]
    [job] = episode.jobs(asked_of([USER, message, *(results or [USER])]))
    assert len(episode.segments) == 1
    begun = [*episode.segments[0].prompt.token_ids, *completion.token_ids]
    assert job.prompt.token_ids[: len(begun)] == begun
    new = qwen.decode(job.prompt.token_ids[len(begun) :])
    shown = "\n<tool_response>\n24\n</tool_response>" * len(results) if results else "\nHow many?"
    assert new == f"{'' if ends else '<|im_end|>'}\n<|im_start|>user{shown}<|im_end|>\n<|im_start|>assistant\n"
    job.keep(completion_of(qwen, "24<|im_end|>", params.stop_token_ids))
    done = episode.finish({})
    assert done.tools.bad_calls == (1 if counts else 0)
    assert (done.turns[1]["content"] == text) is (calls is None)
    assert [turn["role"] for turn in done.turns[2:]] == ["tool" if results else "user"] * max(1, len(results)) + ["assistant"]
