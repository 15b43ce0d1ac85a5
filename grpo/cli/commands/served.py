"""A policy that another process serves by OpenAI's API, as `quartet eval http://...` samples from it."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from pathlib import Path
from typing import Any

from grpo.cli.config.inference import EvalConfig
from grpo.cli.config.serve import MOST_WAITING
from grpo.data.prompts import PromptTemplate
from grpo.source.policy_source import PolicySource
from rewards.config.data import is_chat
from rewards.config.json_file import parse_json
from rewards.data.examples import Example
from rewards.http_post import MOST_BYTES, Tries, Unusable, post
from rollout.faults import OnFinished, RolloutError
from rollout.group import Completion, DraftStats, FinishReason, Prompt, RolloutGroup
from rollout.sampling import SamplingParams

ANSWER_S, RETRIES, BACKOFF_S, LONGEST_WAIT_S = 600.0, 6, 1.0, 120.0
UNKNOWN = -1  # a token whose id the server does not tell
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "stop"}


def is_address(model: str) -> bool:
    return model.startswith(("http://", "https://"))


class ServedPool:
    """Samples from the server at an address such as `http://127.0.0.1:8000` or `.../v1`, `concurrency` prompts at once.
    A server of quartet is told the prompts' ids, so that its tokens are those of an evaluation in one process. Another
    one does not tell its token ids: each is then -1, and their number is the server's. `variables` are for its chat
    template; a server of quartet has its own. Raises ValueError where nothing answers there, or has others."""

    def __init__(self, address: str, key: str, concurrency: int, variables: Mapping[str, Any] | None = None) -> None:
        self.address, self.key, self.concurrency = address.rstrip("/").removesuffix("/v1"), key, concurrency
        self.versions: set[int] = set()
        try:
            [first, *_] = self._models()
            self.name, self.is_ours = str(first["id"]), first.get("owned_by") == "quartet"
        except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            why = why.replace(key, "[key]") if key else why
            raise ValueError(
                f"model={address!r}: {self.address}/v1/models does not answer as OpenAI's API does ({why}); begin a "
                "server with `quartet serve`, and give its key with --api_key_file where it has one"
            ) from None
        self.most_waiting = int(first.get("max_waiting", MOST_WAITING))
        self.meaning = str(first.get("meaning", "as the server has it"))
        self.variables, theirs = dict(variables or {}), first.get("chat_template_kwargs", variables)
        if self.is_ours and self.variables and self.variables != theirs:
            raise ValueError(
                f"data.chat_template_kwargs={self.variables}: the server at {self.address} shows its chat template "
                f"{theirs}; give both the same"
            )

    @property
    def source(self) -> PolicySource:
        """This is evaluated, with the versions that have answered so far."""
        meaning, versions = f"served as {self.name!r}: {self.meaning}", sorted(self.versions)
        if versions:
            meaning += f"; policy version {versions[0]}"
        if len(versions) > 1:
            meaning += f" to {versions[-1]}: IT WAS REPLACED WHILE IT WAS EVALUATED"
        meaning += "; what it was trained on is not known here"
        return PolicySource(self.address, meaning, self.address, step=versions[-1] if versions else None)

    def prompt(self, example: Example, template: PromptTemplate) -> Prompt:
        """Returns the prompt without token ids: the server has the tokenizer, and the chat template."""
        messages = template.messages(example)
        text = template.render(example) if messages is None else "".join(f"{m['content']}\n" for m in messages)
        return Prompt(example.example_id, text, [], example.columns, messages)

    def keep_weights(self) -> None:
        """Does nothing: its weights do not change."""

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        """Returns a group for each prompt. If some fail, it raises RolloutError at the end, with the groups of the
        others."""
        groups: dict[int, RolloutGroup] = {}
        faults = []
        most = max(1, self.most_waiting // params.group_size) if self.is_ours else self.concurrency
        with ThreadPoolExecutor(min(self.concurrency, most), "served") as threads:
            numbers = {threads.submit(self._group, prompt, params): number for number, prompt in enumerate(prompts)}
            for future in as_completed(numbers):
                number = numbers[future]
                try:
                    groups[number] = future.result()
                except (RuntimeError, ValueError) as error:
                    faults.append(f"prompt {prompts[number].prompt_id!r}: {error}")
                if on_finished:
                    on_finished(params.group_size)
        in_order = [groups[number] for number in sorted(groups)]
        if faults:
            raise RolloutError("\n".join(sorted(faults)), in_order)
        return in_order

    def _group(self, prompt: Prompt, params: SamplingParams) -> RolloutGroup:
        if self.is_ours:
            ours = {"n": params.group_size, "prompt_id": prompt.prompt_id, "return_token_ids": True}
            return RolloutGroup(prompt, self._ask(prompt, params, seed=params.seed, **ours))
        completions = []
        for sample in range(params.group_size):
            key = f"{params.seed}/{params.step}/{params.draw}/{sample}/{prompt.prompt_id}".encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1
            completions += self._ask(prompt, params, seed=seed)
        return RolloutGroup(prompt, completions)

    def _ask(self, prompt: Prompt, params: SamplingParams, **fields: Any) -> list[Completion]:
        request = {"model": self.name, "temperature": params.temperature, **fields}
        request["max_tokens"] = params.max_completion_tokens
        if params.stop_strings:
            request["stop"] = list(params.stop_strings)
        chat = prompt.messages is not None
        request |= {"messages": prompt.messages} if chat else {"prompt": prompt.text}
        if chat and self.variables and not self.is_ours:
            request["chat_template_kwargs"] = self.variables
        url = f"{self.address}/v1/{'chat/completions' if chat else 'completions'}"
        tries, expected = Tries(ANSWER_S, RETRIES, BACKOFF_S, LONGEST_WAIT_S), fields.get("n", 1)
        return post(url, json.dumps(request).encode(), lambda body: self._read(body, expected), tries, token=self.key)

    def _read(self, body: bytes, expected: int) -> list[Completion]:
        try:
            answer = parse_json(body)
            choices, usage = answer["choices"], answer.get("usage") or {}
            if len(choices) != expected:
                raise ValueError(f"{len(choices)} choices, not {expected}")
            forwards, fallbacks = usage.get("target_forwards", 0), usage.get("fallbacks", 0)
            completions = [self._completion(choice, usage.get("completion_tokens", 0)) for choice in choices]
            # The counts are of all choices together, and their sums are what an evaluation reports.
            completions[0].draft = DraftStats(int(forwards), fallbacks=int(fallbacks))
            return completions
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            why = f"{type(error).__name__}: {error}"
            raise Unusable(f"no completion in OpenAI's form ({why}): {body[:200]!r}") from None

    def _completion(self, choice: dict[str, Any], tokens: int) -> Completion:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        ids, version = choice.get("token_ids"), int(choice.get("policy_version", 0))
        if "policy_version" in choice:
            self.versions.add(version)
        reason = REASONS.get(choice["finish_reason"])
        if reason is None:
            raise ValueError(f"finish_reason={choice['finish_reason']!r}")
        ids = [UNKNOWN] * tokens if ids is None else [int(token) for token in ids]
        return Completion(ids, [0.0] * len(ids), str(text or ""), reason, version)

    def _models(self) -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(f"{self.address}/v1/models", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return parse_json(response.read(MOST_BYTES))["data"]


def open_served(config: EvalConfig) -> ServedPool:
    """Returns the server that `config.model` is the address of. Raises ValueError where it does not answer, and for
    options that only a policy in this process could follow. Drafts change no token, so `draft_tokens` has no effect."""
    ours = {"rollout.lossy_margin": config.rollout.lossy_margin is not None, "tools and environment": config.has_tools}
    if wrong := [name for name, is_set in ours.items() if is_set]:
        raise ValueError(
            f"{', '.join(wrong)}: the server at {config.model} decides that; give it to `quartet serve`, or evaluate "
            "the run itself"
        )
    key = key_of(config.api_key_file) if config.api_key_file else ""
    for name in ("NO_PROXY", "no_proxy"):  # no proxy knows a server of this machine
        known = [each for each in os.environ.get(name, "").split(",") if each]
        os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost"]))
    variables = config.data.chat_template_kwargs if is_chat(config.data.template) else {}
    return ServedPool(config.model, key, config.rollout.prompts_per_shard, variables)


def key_of(file: Path) -> str:
    """The key that a client sends. Raises ValueError if there is no such file, or if it has several keys."""
    key, *others = keys_in(file)
    if others:
        raise ValueError(f"api_key_file={file}: it has {1 + len(others)} keys; give a file with one key")
    return key


def keys_in(file: Path) -> list[str]:
    """The keys in a file, one a line. Raises ValueError if there is no such file."""
    if not file.is_file():
        raise ValueError(f"api_key_file={file}: there is no such file; write the key into it")
    return file.read_text(encoding="utf-8").strip().split("\n")
