"""`quartet serve` as clients meet it: OpenAI's own, and those that send half a request or go away."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_cases import Running, until

from grpo.cli.commands.policy_in_use import PolicyInUse
from grpo.cli.commands.served import key_of
from grpo.cli.config.serve import ServeConfig
from grpo.cli.parse import main
from grpo.cli.serve import server as serving
from grpo.cli.serve.server import Follower, load_engine, read_keys
from grpo.source.policy_source import find_policy, load_found
from grpo.train import train
from rewards.config.options import load
from rollout.decoding.engine import Engine
from rollout.decoding.shard import Decoding
from rollout.group import Prompt
from rollout.sampling import SamplingParams


@pytest.fixture
def slow(monkeypatch):
    """Rounds take long enough for the test to act in between, and nothing ends at a stop token."""
    forward = Decoding.decode_round

    def slowly(self):
        time.sleep(0.02)
        forward(self)

    monkeypatch.setattr(Decoding, "decode_round", slowly)


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    policy = load_found(find_policy(model), load(ServeConfig, None, {"model": model, "threads": 1}))
    return Engine(policy)


def alone(engine: Engine, text: str, seed: int, sample: int = 0, limit: int = 40, temperature: float = 1.0):
    """What the engine gives without any server."""
    ids = engine.policy.tokenizer.encode(text)
    stops = tuple(engine.policy.stop_token_ids)
    params = SamplingParams(1, temperature, limit, stops, seed)
    return engine.sample([Prompt("", text, ids, first_sample=sample)], params)[0].completions[0]


@pytest.mark.slow
def test_contract_4_the_same_seed_gives_the_same_tokens_alone_in_a_batch_streamed_and_without_drafts(
    model, running, engine
):
    texts = [f"{i} + {i * 7 % 10} = " for i in range(16)]
    expected = [alone(engine, text, seed=i).text for i, text in enumerate(texts)]
    assert len(set(expected)) > 8

    def ask(server: Running, i: int) -> str:
        return server.complete(texts[i], seed=i)["choices"][0]["text"]

    def stream(i: int) -> str:
        chunks = running.stream("/v1/completions", {"prompt": texts[i], "seed": i})
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    assert [ask(running, i) for i in range(4)] == expected[:4]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(lambda i: ask(running, i), range(16))) == expected
        assert list(threads.map(stream, range(16))) == expected
    assert running.batcher.counts.row_rounds > running.batcher.counts.rounds  # some were decoded together
    assert running.batcher.counts.drafted > 0
    plain = Running(model, **{"rollout.draft_tokens": 0})
    try:
        assert [ask(plain, i) for i in range(4)] == expected[:4]
        assert plain.batcher.counts.drafted == 0
    finally:
        plain.end()


def test_n_and_several_prompts_are_choices_in_order(running, engine):
    answer = running.complete(["1 + 1 = ", "2 + 2 = "], n=3, seed=4, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice in answer["choices"]:
        text, sample = ("1 + 1 = ", "2 + 2 = ")[choice["index"] // 3], choice["index"] % 3
        one = alone(engine, text, 4, sample)
        assert (choice["text"], choice["token_ids"]) == (one.text, one.token_ids)
    prompts = sum(len(engine.policy.tokenizer.encode(text)) for text in ("1 + 1 = ", "2 + 2 = "))
    assert answer["usage"]["prompt_tokens"] == prompts
    assert answer["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in answer["choices"])


def test_the_same_prompt_as_a_text_and_as_ids_has_two_samples(running, engine):
    """They are tokens of one prompt: with the same noise the second answer would be the first one again."""
    text = "1 + 1 = "
    prompts = [text, engine.policy.tokenizer.encode(text)]
    answer = running.complete(prompts, seed=4)
    expected = [alone(engine, text, 4, sample).text for sample in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert expected[0] != expected[1]


def test_an_answer_names_its_policy_and_without_a_seed_the_one_that_was_drawn(running):
    first, second = (running.complete("7 + 5 = ", seed=None, max_tokens=30) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = running.complete("7 + 5 = ", seed=first["seed"], max_tokens=30)
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert (again["policy_version"], again["accept"]) == (0, "exact")
    assert again["system_fingerprint"] == "policy-version-0-exact"
    assert again["choices"][0]["policy_version"] == 0
    chunks = running.stream("/v1/completions", {"prompt": "1", "max_tokens": 2})
    assert {chunk["policy_version"] for chunk in chunks} == {0}


def test_token_ids_temperature_stop_and_limit(running, engine):
    ids = engine.policy.tokenizer.encode("4 + 4 = ")
    greedy = alone(engine, "4 + 4 = ", 1, temperature=0.0, limit=12)
    for prompt in (ids, [ids], "4 + 4 = "):
        [choice] = running.complete(prompt, temperature=0, max_tokens=12)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (greedy.text, greedy.finish_reason)
    text = alone(engine, "4 + 4 = ", 1).text
    stop = next(text[i : i + 2] for i in range(2, len(text)) if text[i : i + 2].isascii())
    for answer in (
        running.complete("4 + 4 = ", stop=stop)["choices"][0]["text"],
        "".join(
            c["choices"][0]["text"] for c in running.stream("/v1/completions", {"prompt": "4 + 4 = ", "stop": [stop]})
        ),
    ):
        assert answer == text[: text.index(stop)]


def test_a_chat_gets_what_its_template_makes_of_messages_and_tools(running, engine):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "48/2"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "48 / 2 "}, {"type": "text", "text": "= ?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "24"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = {"model": "micro", "messages": messages, "tools": tools, "seed": 1, "max_completion_tokens": 20}
    text = 'tools: [{"type": "function", "function": {"name": "f"}}]\nuser: 48 / 2 = ?\nassistant: <<48/2=\ntool: 24\n'
    expected = alone(engine, text, 1, limit=20)
    status, answer, _ = running.ask("/v1/chat/completions", asked)
    assert status == 200, answer
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == expected.text
    chunks = running.stream("/v1/chat/completions", asked | {"stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == expected.text
    assert chunks[-2]["choices"][0]["finish_reason"] == expected.finish_reason
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], answer["usage"])
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)


def test_log_probabilities_are_those_of_the_sampler(running, engine):
    one = alone(engine, "3 + 3 = ", 1, limit=6)
    whole = running.complete("3 + 3 = ", max_tokens=6, logprobs=0)["choices"][0]["logprobs"]
    length = len(one.token_ids) - (one.finish_reason == "stop")
    assert whole["token_logprobs"] == pytest.approx(one.logprobs[:length], abs=1e-4)
    assert "".join(whole["tokens"]) == one.text
    assert [one.text[at:].startswith(t) for at, t in zip(whole["text_offset"], whole["tokens"], strict=True)]
    chunks = running.stream("/v1/completions", {"prompt": "3 + 3 = ", "max_tokens": 6, "logprobs": 0})
    streamed = [x for c in chunks for x in (c["choices"][0]["logprobs"] or {}).get("token_logprobs", [])]
    assert streamed == whole["token_logprobs"]
    offsets = [x for c in chunks for x in (c["choices"][0]["logprobs"] or {}).get("text_offset", [])]
    assert offsets == whole["text_offset"]
    asked = {"model": "micro", "messages": [{"role": "user", "content": "3"}], "logprobs": True, "max_tokens": 4}
    content = running.ask("/v1/chat/completions", asked)[1]["choices"][0]["logprobs"]["content"]
    for entry in content:
        assert entry["logprob"] <= 0
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "said"),
    [
        (b"{", 400, None, "invalid_json", "the body is not JSON"),
        (b"[]", 400, None, "invalid_json", "send an object"),
        (b'{"model": "micro", "model": "b"}', 400, None, "invalid_json", "there twice"),
        (b"[" * 100_000, 400, None, "invalid_json", "nested"),
        ({"model": "gpt-5", "prompt": "a"}, 404, "model", "model_not_found", "does not exist"),
        ({"prompt": "a"}, 400, "model", "missing_required_parameter", "model is missing"),
        ({"model": "micro"}, 400, "prompt", "missing_required_parameter", "prompt is missing"),
        ({"model": "micro", "prompt": ""}, 400, "prompt", "invalid_value", "not empty"),
        ({"model": "micro", "prompt": [[1], 2]}, 400, "prompt", "invalid_value", "a text or a list of token ids"),
        ({"model": "micro", "prompt": [10**9]}, 400, "prompt", "invalid_value", "outside the vocabulary"),
        ({"model": "micro", "prompt": "\ud800"}, 400, None, "invalid_value", "lone surrogate"),
        ({"model": "micro", "prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "invalid_value", "max_tokens='5'"),
        ({"model": "micro", "prompt": "a", "max_tokens": 0}, 400, "max_tokens", "invalid_value", "greater than"),
        ({"model": "micro", "prompt": "a", "temperature": -1}, 400, "temperature", "invalid_value", "temperature=-1"),
        ({"model": "micro", "prompt": "a", "temperature": 1e-9}, 400, "temperature", "invalid_value", "1e-06 or more"),
        ({"model": "micro", "prompt": "a", "stop": "a" * 1001}, 400, "stop.0", "invalid_value", "at most 1000"),
        (b'{"model": "micro", "prompt": "a", "temperature": NaN}', 400, "temperature", "invalid_value", "finite"),
        ({"model": "micro", "prompt": "a", "n": 129}, 400, "n", "invalid_value", "less than or equal to 128"),
        ({"model": "micro", "prompt": "a", "seed": 1.5}, 400, "seed", "invalid_value", "seed=1.5"),
        ({"model": "micro", "prompt": "a", "stop": [""]}, 400, "stop.0", "invalid_value", "at least 1"),
        ({"model": "micro", "prompt": "a", "top_p": 0.9}, 400, "top_p", "unsupported_value", "whole distribution"),
        ({"model": "micro", "prompt": "a", "echo": True}, 400, "echo", "unsupported_value", "not repeated"),
        ({"model": "micro", "prompt": "a", "logprobs": 5}, 400, "logprobs", None, "use 0"),
        ({"model": "micro", "prompt": "a", "logprob": 0}, 400, "logprob", "unknown_parameter", "no field logprob"),
        ({"model": "micro", "prompt": "a b " * 200}, 400, "prompt", "context_length_exceeded", "context is 256 tokens"),
        ({"model": "micro", "prompt": "a", "max_tokens": 999}, 400, "prompt", "context_length_exceeded", "shorten one"),
        ({"model": "micro", "prompt": "word " * 200_000}, 400, "prompt", "context_length_exceeded", "1,000,000"),
    ],
)
def test_a_wrong_request_gets_an_error_in_openais_form(running, body, status, param, code, said):
    found, answer, _ = running.ask("/v1/completions", body)
    assert found == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert said in error["message"]
    assert len(error["message"]) < 400


def test_a_wrong_message_is_named(running):
    for message, said in (
        ("hello", "a message is an object"),
        ({"role": "robot", "content": "a"}, "one of system, developer"),
        ({"role": "user"}, "content is missing"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "parts of type text alone"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "a part of type text has a `text`"),
        ({"role": "user", "content": [{"type": "text"}]}, "a part of type text has a `text`"),
        ({"role": "assistant", "tool_calls": [{"function": 3}]}, "a call of a tool is"),
    ):
        status, answer, _ = running.ask("/v1/chat/completions", {"model": "micro", "messages": [message]})
        assert (status, answer["error"]["param"]) == (400, "messages.0")
        assert said in answer["error"]["message"]


def test_models_and_health_are_told(running):
    assert running.ask("/v1/models/micro/")[0] == 404  # not a redirection
    assert running.ask("/v1/models/other")[1]["error"]["code"] == "model_not_found"
    assert running.ask("/v1/models/micro")[1]["id"] == "micro"
    assert [one["id"] for one in running.ask("/v1/models")[1]["data"]] == ["micro"]
    assert running.ask("/health")[:2] == (200, {"status": "ok", "policy_version": 0})


def test_clients_that_go_away_free_their_rows_and_too_many_get_429(model, engine, slow, monkeypatch):
    """All others get their tokens."""
    monkeypatch.setattr(serving, "MOST_WAITING", 2)
    server = Running(model, max_batch_size=1, **{"rollout.draft_tokens": 0})
    try:
        for cancelled, stream in enumerate((True, False), start=1):
            sent = server.begins({"stream": stream})
            until(lambda: server.batcher.rows == 1)
            sent.close()
            until(lambda: server.batcher.rows == 0)
            assert server.batcher.counts.cancelled == cancelled
        busy = server.begins({"max_tokens": 200})
        until(lambda: server.batcher.rows == 1)
        with ThreadPoolExecutor(2) as threads:
            waiting = [threads.submit(server.complete, "5 + 5 = ", max_tokens=5, seed=i) for i in range(2)]
            until(lambda: server.batcher.waiting == 2)
            status, answer, headers = server.ask("/v1/completions", {"model": "micro", "prompt": "6"})
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer["error"]["type"] == "rate_limit_error"
            assert int(headers["retry-after"]) >= 1
            busy.close()
            texts = [future.result()["choices"][0]["text"] for future in waiting]
        assert texts == [alone(engine, "5 + 5 = ", i, limit=5).text for i in range(2)]
        many = {"model": "micro", "prompt": ["a"] * 3}
        assert server.ask("/v1/completions", many)[1]["error"]["message"].startswith("3 completions in one request")
        status = server.ask("/v1/completions", many | {"prompt": ["a"] * 2, "max_tokens": 2})[0]
        assert status == 200
        with urllib.request.urlopen(f"http://{server.address}/metrics") as response:
            counted = response.read().decode()
        assert 'quartet_refused{accept="exact"} 1\n' in counted
        assert 'quartet_rows{accept="exact"} 0\n' in counted
    finally:
        server.end()


def test_a_fault_of_the_engine_is_told_and_the_next_request_is_served(running, monkeypatch):
    def broken(self):
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "decode_round", broken)
        status, answer, _ = running.ask("/v1/completions", {"model": "micro", "prompt": "1 + 1", "seed": 1})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "MemoryError: none left" in answer["error"]["message"]
    assert running.complete("1 + 1")["choices"]


def test_another_address_needs_keys(tmp_path, model, capsys):
    key = tmp_path / "key"
    assert read_keys(None, "LOCALHOST") == []
    assert main(["serve", model, "--host", "0.0.0.0"]) == 1
    assert "lets other machines in; give a file with a key, --api_key_file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no such file"):
        read_keys(key, "0.0.0.0")
    key.write_text("short\n")
    with pytest.raises(ValueError, match="8 printable ASCII characters"):
        read_keys(key, "0.0.0.0")
    key.write_text("secret-of-ours\nand-of-yours\n")
    assert read_keys(key, "0.0.0.0") == ["secret-of-ours", "and-of-yours"]


def test_margin_says_so_and_is_counted(model):
    server = Running(model, **{"rollout.lossy_margin": 0.5})
    try:
        answer = server.complete("8 + 8 = ", max_tokens=40)
        assert (answer["accept"], answer["system_fingerprint"]) == ("margin", "policy-version-0-margin")
        usage = answer["usage"]
        assert usage["fallbacks"] + usage["completion_tokens_details"]["accepted_prediction_tokens"] > 0
        assert server.batcher.counts.fallbacks == usage["fallbacks"]
    finally:
        server.end()


@pytest.mark.slow
def test_a_run_that_goes_on_is_followed_and_an_answer_is_of_one_policy(tmp_path, micro_config, slow):
    run = tmp_path / "run"
    train(micro_config(run))
    (run / "policy").rename(tmp_path / "policy")
    (run / "checkpoints/step_000003").rename(tmp_path / "step_000003")
    use = PolicyInUse(
        load(ServeConfig, None, {"model": str(run), "threads": 1, "rollout.draft_tokens": 0, "name": "micro"})
    )
    with pytest.raises(ValueError, match="is no run folder"):
        Follower(str(tmp_path), 2, load_engine, print)
    server = Running(str(run), name="micro", **{"rollout.draft_tokens": 0})
    served, said = server.served, []
    follower = Follower(str(run), 2, lambda source: load_engine(use, source, served.batcher.engine), said.append)
    answers = []
    try:
        assert not follower.look(served)
        with ThreadPoolExecutor(1) as threads:
            before = threads.submit(server.complete, "2 + 2 = ", max_tokens=100, seed=5)
            until(lambda: served.batcher.rows == 1)
            (tmp_path / "step_000003").rename(run / "checkpoints/step_000003")
            assert follower.look(served)
            after = server.complete("2 + 2 = ", max_tokens=30, seed=5)
            answers = [before.result(), after]
        assert [answer["policy_version"] for answer in answers] == [2, 3]
        for answer, step in zip(answers, (2, 3), strict=True):
            engine = load_engine(use, find_policy(str(run / f"checkpoints/step_{step:06d}")))
            limit = 100 if step == 2 else 30
            assert answer["choices"][0]["text"] == alone(engine, "2 + 2 = ", 5, limit=limit).text
        assert "policy version 3 is served from now on" in said[0]
        (run / "checkpoints/step_000003").rename(run / "checkpoints/step_000004")
        (run / "checkpoints/step_000004/state.json").write_text("{")
        assert not follower.look(served)
        assert not follower.look(served)
        assert "the policy from before stays" in said[1]
        assert (len(said), served.batcher.counts.not_loaded) == (2, 1)  # it is said once
        assert server.ask("/health")[1]["policy_version"] == 3
    finally:
        server.end()


@pytest.mark.long
def test_sigterm_lets_running_requests_finish(model):
    command = [
        sys.executable,
        "-m",
        "grpo",
        "serve",
        model,
        "--port",
        "0",
        "--threads",
        "1",
        "--rollout.draft_tokens",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        address = re.search(r"micro \(policy version 0, as given\) at http://(\S+)/v1", said)[1]
        asked = {"model": "micro", "prompt": "2", "max_tokens": 250, "stream": True, "seed": 3}
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        first = answer.readline()
        process.send_signal(signal.SIGTERM)
        rest = answer.read()
        assert first.startswith(b"data: {")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(60) == 143
        assert process.stderr.read().strip() == "quartet: ended by SIGTERM"
    finally:
        process.kill()


def test_openais_own_clients(running, engine):
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    one = alone(engine, "9 + 1 = ", 6, limit=20)
    options = {"base_url": f"http://{running.address}/v1", "api_key": "none", "max_retries": 0}
    asked = {"model": "micro", "prompt": "9 + 1 = ", "seed": 6, "max_tokens": 20}
    chat = {"model": "micro", "messages": [{"role": "user", "content": "9 + 1"}], "seed": 6, "max_tokens": 20}
    expected = alone(engine, "user: 9 + 1\n", 6, limit=20)
    with openai.OpenAI(**options) as client:
        assert [entry.id for entry in client.models.list()] == ["micro"]
        assert client.completions.create(**asked).choices[0].text == one.text
        assert "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True)) == one.text
        answer = client.chat.completions.create(**chat, logprobs=True)
        assert (answer.choices[0].message.content, answer.policy_version) == (expected.text, 0)
        parts = client.chat.completions.create(**chat, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(**asked | {"model": "other"})
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**asked, top_p=0.5)
        assert (refused.value.param, refused.value.code) == ("top_p", "unsupported_value")


def test_a_client_sends_one_key_and_never_shows_several(tmp_path):
    file = tmp_path / "keys"
    file.write_text("secret-of-ours\nand-of-yours\n")
    with pytest.raises(ValueError, match="it has 2 keys; give a file with one key") as refused:
        key_of(file)
    assert "secret" not in str(refused.value)
    file.write_text("secret-of-ours\n")
    assert key_of(file) == "secret-of-ours"
