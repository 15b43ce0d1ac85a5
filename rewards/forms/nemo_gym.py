"""The reward of a NeMo-Gym resources server, and a reward of ours as the `verify` of one.

A server scores a response by POST /verify: the row of the data with `responses_create_params` and `response`, in the
form of OpenAI's Responses API, is answered with `reward` (nemo_gym/base_resources_server.py). Before that,
POST /seed_session begins the session that a cookie names.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar
from typing import Any

from rewards.forms.ours import Isolated
from rewards.http_post import Tries, bearer, post
from rewards.isolation.child import as_messages
from rewards.protocol import PROVIDED, Completions, text_of


def nemo_gym(
    prompts: list,
    completions: Completions,
    url: str,
    concurrency: int = 16,
    request_timeout_s: float = 3.0,
    retries: int = 2,
    token_variable: str | None = None,
    **columns,
) -> list[float | Exception]:
    """The reward that the resources server at `url` gives each completion, or the exception that it failed with.

    All columns of the row are sent. Without the column `responses_create_params` its input is the prompt. An answer
    that says that the reward is no measurement (`mask_sample`, `_ng_failure_class`), and has 0.0 in its place, is a
    failure. For the other options see the reward `remote`.

    >>> nemo_gym(["6 * 7?"], ["42"], url="http://127.0.0.1:8000", expected_answer=["42"])  # doctest: +SKIP
    [1.0]
    """
    tries, token = Tries(request_timeout_s, retries, backoff_s=0.1), bearer(token_variable)

    def score(i: int) -> float | Exception:
        row = {name: values[i] for name, values in columns.items() if name not in PROVIDED}
        row["responses_create_params"] = row.get("responses_create_params") or {
            "input": as_messages([prompts[i]], "user")[0]
        }
        cookies = CookieJar()
        try:
            for path, body in (("seed_session", row), ("verify", row | {"response": response_of(completions[i])})):
                encoded = json.dumps(body).encode()
                answer = post(f"{url.rstrip('/')}/{path}", encoded, json.loads, tries, token=token, cookies=cookies)
            return _reward(answer)
        except (RuntimeError, ValueError) as error:
            return error

    with ThreadPoolExecutor(concurrency) as threads:
        return list(threads.map(score, range(len(completions))))


def _reward(answer: object) -> float:
    """The reward of an answer. Raises ValueError for one without, or where it stands for a failure of the server."""
    if not isinstance(answer, dict) or not isinstance(answer.get("reward"), int | float):
        raise ValueError(f"/verify answered {json.dumps(answer)[:200]} instead of a number as `reward`")
    if answer.get("mask_sample") or answer.get("_ng_failure_class"):
        names = ("_ng_failure_class", "_ng_failure_judge_error", "failure_kind", "failure_reason")
        why = ", ".join(str(answer[name]) for name in names if answer.get(name))
        raise ValueError(f"the server could not measure it, so that its reward of {answer['reward']} is none: {why}")
    return float(answer["reward"])


def response_of(completion: object) -> dict[str, Any]:
    """The completion, a text or chat messages with calls of tools and their results, as a response of NeMo-Gym.

    >>> response_of("42")["output"][0]["content"]
    [{'type': 'output_text', 'text': '42', 'annotations': []}]
    """
    [turns] = as_messages([completion], "assistant")
    about = {"id": "response", "object": "response", "created_at": 0, "model": "policy", "status": "completed"}
    tools = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    return about | tools | {"output": list(_items(turns))}


def _items(turns: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    calls: list[str] = []  # whose results follow
    for place, turn in enumerate(turns):
        text = text_of([turn])
        if turn["role"] == "tool":
            named = turn.get("tool_call_id")
            call = named if named in calls else calls[0] if calls else "none"
            calls = [other for other in calls if other != call]
            yield {"type": "function_call_output", "call_id": call, "output": text}
        elif turn["role"] == "assistant":
            if text or not turn.get("tool_calls"):
                content = [{"type": "output_text", "text": text, "annotations": []}]
                about = {"id": f"message_{place}", "role": "assistant", "status": "completed"}
                yield {"type": "message", **about, "content": content}
            asked = list(turn.get("tool_calls") or ())
            made = [call["function"] for call in asked]
            calls = [call.get("id") or f"call_{place}_{i}" for i, call in enumerate(asked)]
            for key, call in zip(calls, made, strict=True):
                arguments = call["arguments"]
                arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
                yield {"type": "function_call", "call_id": key, "name": call["name"], "arguments": arguments}


def as_verify(function: str, **options: Any) -> Any:
    """The method `verify` of a `SimpleResourcesServer` of NeMo-Gym, by a reward of ours.

    The reward's columns are the fields of the row, with `expected_answer` also as `answer`. Where it fails, the request
    fails with HTTP 500, in place of a 0. For the options see `rewards.forms.ours`.

    >>> class Server(SimpleResourcesServer):  # doctest: +SKIP
    ...     verify = as_verify("gsm8k")
    """
    from nemo_gym.base_resources_server import BaseVerifyRequest, BaseVerifyResponse
    from pydantic import ConfigDict

    class Request(BaseVerifyRequest):
        model_config = ConfigDict(extra="allow")  # theirs drops the fields of the row

    class Response(BaseVerifyResponse):
        model_config = ConfigDict(extra="allow")

    reward = Isolated(function, **options)

    async def verify(self: Any, body: Any) -> Any:
        row = body.model_dump()
        asked = row["responses_create_params"]["input"]
        said = [item for item in row["response"]["output"] if item["type"] == "message"]
        answer = "".join(part.get("text", "") for part in said[-1]["content"]) if said else ""
        columns = {"answer": row.get("expected_answer"), **row}
        prompt = asked if isinstance(asked, str) else text_of(asked[-1:])
        return Response(**row, reward=await asyncio.to_thread(reward.mark, prompt, answer, columns))

    verify.__annotations__ = {"body": Request, "return": Response}  # which FastAPI reads
    return verify
