"""Calls in answers, with a generation that is written here: what a policy wrote is never tokenised again (contract 14),
and whatever it wrote reaches the agent and is counted."""

import json
import re
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from tokenizers import processors

from grpo.endpoint.answers import Answer
from grpo.endpoint.api_error import ApiError
from grpo.endpoint.asked import ChatAsked, CompletionAsked
from grpo.endpoint.batcher import Batcher, Counts
from grpo.endpoint.body import read
from grpo.endpoint.endpoint import Endpoint
from grpo.endpoint.episode import Episode
from grpo.endpoint.served import Served
from policies.presets import small_tokenizer
from rollout.group import Completion, DraftStats, Prompt
from rollout.request import News
from rollout.sampling import SamplingParams
from rollout.stop_strings import StopStrings

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CORPUS = ["Each gets <<48/2=24>>24 apples.\n", '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'] * 20
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

    add_counts = Batcher.add_counts

    def submit(self, requests) -> None:
        """The policy calls once, and answers once it has read a result."""
        for request in requests:
            tokenizer = self.engine.policy.tokenizer
            text = "#### 24" if "<tool_response>" in tokenizer.decode(request.prompt.token_ids) else f"Hm. {ONE}"
            completion = completion_of(tokenizer, f"{text}<|im_end|>", (tokenizer.eos_token_id,))
            for token in completion.token_ids[:-1]:
                request.tell(News([token], [-0.5], version=7))
            request.tell(News(completion.token_ids[-1:], [-0.5], completion, version=7))

    def cancel(self, requests) -> None:
        pass


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
    if asked.stop:
        completion = replace(completion, text=StopStrings(served.tokenizer, asked.stop).cut(completion.text))
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


def added(value: str) -> str:
    return raw(f'{{"name": "add", "arguments": {{"a": {value}}}}}')


ONE, SOLVED = call("calculate", expression="48/2"), ("calculate", {"expression": "48/2"})
LETTERS = "½ × 4 — 𝟜 é\u202e"
DEEP = "[" * 3000 + "]" * 3000
# What the policy wrote; names and arguments of the calls that the agent gets, or None where the answer is text; what
# is counted besides the calls.
CASES = {
    "one": (ONE, [SOLVED], {}),
    "after a text": (f"Let me see.\n{ONE}", [SOLVED], {}),
    "two": (f"{ONE}\n{call('add', a=1, b=2)}", [SOLVED, ("add", {"a": 1, "b": 2})], {}),
    "the same twice": (f"{ONE}{ONE}", [SOLVED] * 2, {}),
    "not offered": (call("rm", path="/"), [("rm", {"path": "/"})], {"unknown_tools": 1}),
    "one of two not offered": (ONE + call("rm"), [SOLVED, ("rm", {})], {"unknown_tools": 1}),
    "without arguments": (raw('{"name": "add"}'), [("add", {})], {}),
    "null arguments": (raw('{"name": "add", "arguments": null}'), [("add", {})], {}),
    "unicode": (call("calculate", expression=LETTERS), [("calculate", {"expression": LETTERS})], {}),
    "braces and marks in strings": (
        call("calculate", expression='}{"}] <tool_call> \\" {"name": "add"}'),
        [("calculate", {"expression": '}{"}] <tool_call> \\" {"name": "add"}'})],
        {},
    ),
    "huge": (call("calculate", expression="1+" * 15_000), [("calculate", {"expression": "1+" * 15_000})], {}),
    "text after it": (f"{ONE}\nDone.", [SOLVED], {}),
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
    "nested too deeply": (added(DEEP), None, {"malformed_calls": 1}),
    "nested in 120 lists": (added("[" * 120 + "]" * 120), None, {"malformed_calls": 1}),
    "half a character": (added('"\\ud83d"'), None, {"malformed_calls": 1}),
    "infinite": (added('1e999'), None, {"malformed_calls": 1}),
    "not a number": (added('NaN'), None, {"malformed_calls": 1}),
    "an integer of 9,000 digits": (added("9" * 9000), None, {"malformed_calls": 1}),
    "an end without a beginning": ("3 apples</tool_call>", None, {"malformed_calls": 1}),
    "a call in a call": (f"<tool_call>{ONE}</tool_call>", None, {"malformed_calls": 1}),
    "two objects": (raw('{"name": "add"}{"name": "add"}'), None, {"malformed_calls": 1}),
    "single quotes": (raw("{'name': 'add', 'arguments': {}}"), None, {"malformed_calls": 1}),
    "a comma at the end": (raw('{"name": "add", "arguments": {"a": 1,}}'), None, {"malformed_calls": 1}),
    "a string without an end": (added('"1'), None, {"malformed_calls": 1}),
    "a line break in a string": (added('"1\n2"'), None, {"malformed_calls": 1}),
    "a program": (added('__import__("os").getcwd()'), None, {"malformed_calls": 1}),
    "null": (raw("null"), None, {"malformed_calls": 1}),
    "a text": ("There are 24 <tool> calls {}.", None, {}),
}  # fmt: skip
CUT = {"no end mark": (CASES["no end mark"][0], [SOLVED], {})}  # by a limit, just there


@pytest.fixture(scope="module")
def qwen():
    return tokenizer_of("qwen2_5")


def params_of(tokenizer):
    return SamplingParams(1, 1.0, 90_000, (tokenizer.eos_token_id,), seed=5)


def served_by(tokenizer):
    return Served("policy", Written(tokenizer), params_of(tokenizer), "")


def test_the_same_prompt_twice_in_a_request_has_noise_of_its_own(qwen):
    asked = read(
        CompletionAsked, json.dumps({"model": "policy", "prompt": ["a", "b", "a"], "n": 2, "seed": 1}).encode()
    )
    jobs = served_by(qwen).jobs(asked)
    keys = [(job.prompt.text, job.prompt.first_sample) for job in jobs]
    assert keys == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]


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


def goes_on(tokenizer, text, **more):
    """An episode in which the agent sends an answer back, with results, or with a question where it got a text. Returns
    it, the message, the completion and the tokens that the policy reads after it."""
    episode = Episode(Prompt("1", "", [5]), 0, Written(tokenizer), params_of(tokenizer), temperature=1.0)
    asked = asked_of([USER], **more)
    [job] = episode.jobs(asked)
    completion = completion_of(tokenizer, text, params_of(tokenizer).stop_token_ids)
    job.keep_completion(completion)
    answer = Answer(episode, asked, [job])
    answer.done[0] = completion
    message = answer.whole()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "24"} for c in message.get("tool_calls", [])]
    [job] = episode.jobs(asked_of([USER, message, *(results or [USER])], **more))
    assert len(episode.segments) == 1
    begun = [*episode.segments[0].prompt.token_ids, *completion.token_ids]
    assert job.prompt.token_ids[: len(begun)] == begun
    job.keep_completion(completion_of(tokenizer, f"24{tokenizer.eos_token}", params_of(tokenizer).stop_token_ids))
    return episode, message, completion, job.prompt.token_ids[len(begun) :]


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_contract_14_a_call_that_an_agent_sends_back_keeps_its_tokens(qwen, name, ends):
    """The next prompt begins with the very tokens that were sampled, and goes on as the chat template writes it."""
    text, calls, counts = CASES[name] if ends else (CASES | CUT)[name]
    episode, _, completion, new = goes_on(qwen, text + ("<|im_end|>" if ends else ""))
    assert qwen.encode(qwen.decode(completion.token_ids)) != completion.token_ids
    shown = "\n<tool_response>\n24\n</tool_response>" * len(calls or []) or "\nHow many?"
    end = "" if ends else "<|im_end|>"
    assert qwen.decode(new) == f"{end}\n<|im_start|>user{shown}<|im_end|>\n<|im_start|>assistant\n"
    done = episode.finish({})
    assert done.tools.bad_calls == (1 if counts else 0)
    assert (done.turns[1]["content"] == text) is (calls is None)
    between = ["tool"] * len(calls or []) or ["user"]
    assert [turn["role"] for turn in done.turns[2:]] == [*between, "assistant"]


LLAMA = {"eos_token": "<|eot_id|>", "additional_special_tokens": ["<|start_header_id|>", "<|python_tag|>"]}
GLM = {"eos_token": "<|observation|>"}
DEEPSEEK = {
    "eos_token": "<｜end▁of▁sentence｜>",
    "additional_special_tokens": ["<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"],
}
V3 = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 3}\n```<｜tool▁call▁end｜>'
V31 = '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 3}<｜tool▁call▁end｜>'
CODER = "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("template", "known", "special", "text"),
    [
        ("qwen3", True, {}, "<think>\nAs in <tool_call>\n</think>\n\n" + call("add", a=3)),
        ("qwen3", False, {}, call("add", a=3)),
        ("qwen3_5_think", False, {}, f"Hm.\n</think>\n\n{CODER}"),
        ("llama3_1", True, LLAMA, '{"name": "add", "parameters": {"a": 3}}'),
        ("llama3_1", False, LLAMA, '{"name": "add", "parameters": {"a": 3}}'),
        ("llama3_1", False, LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 3}}'),
        ("deepseekv3", False, DEEPSEEK, f"{V3}<｜tool▁calls▁end｜>"),
        ("deepseekv3", False, DEEPSEEK, f"<｜tool▁calls▁begin｜>{V31}<｜tool▁calls▁end｜>"),
        ("gemma4", False, {"eos_token": "<turn|>"}, "<|tool_call>call:add{a:3}<tool_call|>"),
        ("glm4moe", False, GLM, "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"),
        ("lfm2_2_5", False, {}, "<|tool_call_start|>[add(a=3)]<|tool_call_end|>"),
    ],
)
def test_families_of_models_write_calls_in_forms_of_their_own(template, known, special, text):
    """Also where the chat template is not, word for word, one that TRL knows."""
    tokenizer = tokenizer_of(template, **special)
    if not known:
        tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    _, message, _, new = goes_on(tokenizer, f"{text}{tokenizer.eos_token}")
    [made] = message["tool_calls"]
    assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == ("add", {"a": 3})
    assert (message["content"] or "") == text[: text.index("</think>") + 8 if "</think>" in text else 0]
    assert "24" in tokenizer.decode(new)
    served = Served("policy", Written(tokenizer), params_of(tokenizer), "")
    _, streamed, _ = joined(answer_to(served, asked_of([USER]), f"{text}{tokenizer.eos_token}")[1])
    assert [call["arguments"] for call in streamed] == [made["function"]["arguments"]]


def test_a_base_model_calls_in_the_marks_of_its_solutions():
    """Without a chat template the conversation is in lines, as an environment writes it, so that an SFT stage in an
    environment is one for an agent."""
    tokenizer = tokenizer_of(None)
    episode, message, _, new = goes_on(tokenizer, "Each gets <<48/2=<|end|>", tools=[CALCULATE])
    assert tokenizer.decode(episode.segments[0].prompt.token_ids) == "How many?\n"
    assert message["content"] == "Each gets "
    [made] = message["tool_calls"]
    assert made["function"] == {"name": "calculate", "arguments": '{"expression": "48/2"}'}
    assert tokenizer.decode(new) == "24>>"
    again = asked_of([USER, message, {"role": "tool", "content": "2<|end|>4"}, USER], tools=[CALCULATE])
    [job] = Served("policy", Written(tokenizer), params_of(tokenizer), "").jobs(again)
    assert job.prompt.text == "How many?\nEach gets <<48/2=<|end|>2< |end|>4>>How many?\n"
    _, message, _, new = goes_on(tokenizer, "Each gets <<48/2<|end|>", tools=[CALCULATE])
    assert message["content"] == "Each gets <<48/2"
    assert tokenizer.decode(new).startswith("\n")  # as the lines of the whole conversation have it
    *_, new = goes_on(tokenizer, "Each gets <<48/2", tools=[CALCULATE])
    assert tokenizer.decode(new).startswith("<|end|>\n")  # of an answer that a limit has cut
    with pytest.raises(ApiError, match="no chat template"):
        episode.jobs(asked_of([USER], tools=None))


def test_a_base_models_chat_begins_as_its_prompts_do():
    """With the token that its tokenizer writes before a text, where it writes one."""
    tokenizer = tokenizer_of(None)
    specials = [("<|end|>", tokenizer.convert_tokens_to_ids("<|end|>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=specials)
    [job] = served_by(tokenizer).jobs(asked_of([USER], tools=[CALCULATE]))
    assert job.prompt.token_ids == tokenizer.encode("How many?\n")
    assert job.prompt.token_ids[0] == specials[0][1]


def test_what_a_request_says_of_calls_is_heeded(qwen):
    two = f"{ONE}\n{call('add', a=1)}<|im_end|>"
    served = served_by(qwen)
    whole, choices = answer_to(served, asked_of([USER], parallel_tool_calls=False), two)
    assert [c["function"]["name"] for c in whole["message"]["tool_calls"]] == ["calculate"]
    assert len(joined(choices)[1]) == 1
    assert served.batcher.counts.dropped_calls == 2
    shown = served.jobs(asked_of([USER], tool_choice="auto"))[0].prompt.token_ids
    assert served.jobs(asked_of([USER], tool_choice="none"))[0].prompt.token_ids == shown
    whole, _ = answer_to(served, asked_of([USER], tool_choice="none"), two)
    assert (whole["message"]["content"], whole["finish_reason"]) == (two.removesuffix("<|im_end|>"), "stop")


@pytest.mark.parametrize(
    ("text", "stop", "content"),
    [
        (f"{ONE}\nObservation:", "Observation:", None),
        (f"{ONE}\nObservation:", "\nObservation:", None),
        (f"Hm.\n{ONE}\nSo.\nObservation: 3", "Observation:", "Hm.So.\n"),
        (f"Hm.\n{ONE}\nSo.\nObservation: ", "\nObservation:", "Hm.So."),
        (f"Hm>\n{ONE}", "</tool_call>", "Hm>"),
    ],
)
def test_a_stop_text_ends_an_answer_with_calls_and_is_no_part_of_it(qwen, text, stop, content):
    """Of a call that ends with it, it is a part."""
    whole, choices = answer_to(served_by(qwen), asked_of([USER], stop=[stop]), text)
    assert whole["message"]["content"] == content
    assert [call["function"]["name"] for call in whole["message"]["tool_calls"]] == ["calculate"]
    streamed, calls, _ = joined(choices)
    assert (streamed or None, len(calls)) == (content, 1)


def test_what_would_change_the_distribution_is_refused_by_name():
    for body, why in (
        ({"tool_choice": "required"}, "a forced call would not be drawn from its distribution"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "leave it out"),
        ({"response_format": {"type": "json_object"}}, "a grammar would draw from another"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "ask for JSON"),
        ({"tools": [ADD, ADD]}, "two tools have one name"),
        ({"tools": [{"type": "function"}]}, "a tool is"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "a tool is"),
        ({"parallel_tool_calls": "no"}, "bool"),
    ):
        with pytest.raises(ApiError, match=why) as refused:
            asked_of([USER], **body)
        assert [refused.value.param] == list(body)


def test_a_schema_that_is_none_does_no_harm(qwen):
    wrong = [{"properties": 3}, {"properties": {"a": 3}}, {"properties": {"a": {"anyOf": [{"type": 3}]}}}]
    for parameters in (None, 3, [], *wrong):
        tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
        whole, _ = answer_to(served_by(qwen), asked_of([USER], tools=tools), f"{call('add', a='3')}<|im_end|>")
        assert json.loads(whole["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": "3"}


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.mark.parametrize("streams", [False, True])
def test_the_official_client_makes_a_call_and_sends_it_back(qwen, endpoint, streams):
    """One segment: the client sends a streamed call back with fields of its own, which mean nothing."""
    openai = pytest.importorskip("openai")
    episode = Episode(Prompt("1", "", [5]), 0, Written(qwen), params_of(qwen), temperature=1.0)
    with openai.OpenAI(base_url=endpoint.open(episode), api_key=endpoint.key) as client:
        messages: list = [USER]
        for _ in range(2):
            asked = {"model": "policy", "messages": messages, "tools": TOOLS}
            if streams:
                with client.chat.completions.stream(**asked) as stream:
                    answer = stream.get_final_completion()
            else:
                answer = client.chat.completions.create(**asked)
            [choice] = answer.choices
            messages = [*messages, choice.message]
            for made in choice.message.tool_calls or []:
                assert (made.function.name, made.function.arguments) == ("calculate", '{"expression": "48/2"}')
                assert (choice.message.content, choice.finish_reason) == ("Hm.", "tool_calls")
                messages.append({"role": "tool", "tool_call_id": made.id, "content": "24"})
        assert (len(messages), messages[-1].content, choice.finish_reason) == (4, "#### 24", "stop")
    assert (len(episode.segments), len(episode.answers)) == (1, 2)
