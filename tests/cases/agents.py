"""Agents for tests, without a package: each is called once for each episode."""

import json
import os
import random
import time
import urllib.error
import urllib.request


def ask(base_url, api_key, path, **body):
    """The answer, or the error and its status."""
    data = json.dumps({"model": "any"} | body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(base_url + path, data, headers), timeout=60) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return json.loads(error.read()) | {"status": error.code}


def text(base_url, api_key, prompt, **body):
    return ask(base_url, api_key, "/completions", prompt=prompt, **body)["choices"][0]["text"]


def once(base_url, api_key, prompt):
    text(base_url, api_key, prompt)


def twice(base_url, api_key, prompt):
    """One text of two turns, then one of its own; the answer is the last one."""
    first = text(base_url, api_key, prompt)
    text(base_url, api_key, f"{prompt}{first}\nAgain: ", max_tokens=5)
    text(base_url, api_key, "In short: ", max_tokens=3)
    return len(first) / 10


def chats(base_url, api_key, question):
    """Three turns of a chat, in which the client sends back what it got."""
    messages = [{"role": "user", "content": question}]
    for word in ("And", "So", ""):
        answer = ask(base_url, api_key, "/chat/completions", messages=messages)["choices"][0]["message"]
        messages += [answer, {"role": "user", "content": word}]
    return len(answer["content"] or "") / 10


async def columns(base_url, api_key, question, level, id, **others):
    """Async, with columns; what it chooses by chance follows from its episode."""
    assert set(others) == {"answer", "prompt"}
    return len(text(base_url, api_key, f"{level}{question}{id}"[:40])) + random.random() / 1000


def fails(base_url, api_key, prompt, fate):
    """Does what its column says, after it has asked."""
    if fate != "silent":
        text(base_url, api_key, prompt, max_tokens=3)
    if fate == "raises":
        raise RuntimeError("no such tool")
    if fate == "hangs":
        time.sleep(60)
    if fate == "dies":
        os._exit(7)
    if fate == "leaves":
        raise SystemExit("enough")
    if fate == "words":
        return "good"
    if fate == "greedy":
        return [0] * 10**9
    return float("nan") if fate == "nan" else 1.0


def refused(base_url, api_key, prompt):
    """Never asks for anything that can be learned from, and does not notice."""
    ask(base_url, api_key, "/completions", prompt=prompt, top_p=0.5)


def waits(base_url, api_key, prompt):
    time.sleep(60)


def nowhere(api_key, prompt):
    pass
