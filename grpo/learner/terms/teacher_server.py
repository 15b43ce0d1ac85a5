"""A teacher that a server holds: `vllm serve TEACHER`, or another server with vLLM's `prompt_logprobs`.

Every completion is a request to `URL/completions`: prompt and completion as token ids, of which the server gives the
log-probabilities, and one token more that nobody reads. OpenAI's own endpoint gives none of given tokens. vLLM scores
them at temperature 1, whatever the request says. Our own vLLM server (rollout/backends/vllm) holds the policy that is
sampled from, so a teacher needs a server of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo.learner.batch import MicroBatch
from grpo.learner.likelihood import Likelihood
from rewards.http_post import Tries, Unusable, post

CONCURRENCY = 16  # requests at a time; vLLM batches them
TIMEOUT_S, RETRIES, BACKOFF_S = 300.0, 4, 1.0

Position = dict[int, float]  # token id: log-probability
TOKEN = "QUARTET_TEACHER_TOKEN"


class TeacherError(ConnectionError):
    """The server of the teacher has not scored what it was asked for."""


class TeacherServer:
    """The log-probabilities of a server at `url`. The environment variable QUARTET_TEACHER_TOKEN holds its
    key, where it wants one.

    >>> TeacherServer("http://127.0.0.1:8000/v1", "models/teacher").score([[5, 6, 7]], [1], k=0)
    [[{6: -0.25}, {7: -1.5}]]
    """

    reads_trees = True  # it reads each sample with its prompt

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model, self.token = f"{url.rstrip('/')}/completions", model, os.environ.get(TOKEN, "")

    def logprobs(self, likelihood: Likelihood, mini: MicroBatch) -> Tensor:
        """Scores the tokens that were sampled [C, L]."""
        ids = mini.token_ids[mini.scored].tolist()
        values = [position[token] for token, position in zip(ids, self._positions(mini, 0), strict=True)]
        return mini.by_completion(torch.tensor(values, device=mini.mask.device))

    def top(self, likelihood: Likelihood, mini: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens at every scored token, and their log-probabilities: [N, k] of both."""
        likeliest = [sorted(position.items(), key=lambda it: -it[1])[:k] for position in self._positions(mini, k)]
        ids_NK = torch.tensor([[token for token, _ in tokens] for tokens in likeliest], device=mini.mask.device)
        return ids_NK, torch.tensor([[value for _, value in tokens] for tokens in likeliest], device=mini.mask.device)

    def _positions(self, mini: MicroBatch, k: int) -> list[Position]:
        """Gives what the server says of every scored token, in the order of `mini.scored`."""
        pairs = [(row.prompt_token_ids, sample) for row in mini.rows for sample in row.samples]
        texts = [prompt + sample.token_ids for prompt, sample in pairs]
        scored = self.score(texts, [len(prompt) for prompt, _ in pairs], k)
        sampled = [sample.sampled or [True] * len(sample.token_ids) for _, sample in pairs]
        of_cells = [
            position
            for positions, flags in zip(scored, sampled, strict=True)
            for position, counts in zip(positions, flags, strict=True)
            if counts
        ]
        by_number = dict(zip(mini.numbers.tolist(), of_cells, strict=True))
        return [by_number[number] for number in range(len(by_number))]

    def score(self, texts: Sequence[list[int]], starts: Sequence[int], k: int) -> list[list[Position]]:
        """Every token from `starts` on gets its own log-probability and those of the k likeliest tokens.

        Raises TeacherError, without the key, where the server gives no usable answer.
        """
        with ThreadPoolExecutor(CONCURRENCY) as threads:
            return list(threads.map(partial(self._ask, k), texts, starts))

    def _ask(self, k: int, ids: list[int], start: int) -> list[Position]:
        asked = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": k}
        try:
            return post(
                self.url,
                json.dumps(asked).encode(),
                partial(_read, ids=ids, start=start, k=k),
                Tries(TIMEOUT_S, RETRIES, BACKOFF_S),
                token=self.token,
            )
        except (RuntimeError, ValueError) as error:
            raise TeacherError(
                f"distill.teacher: {error}. Its address must be an endpoint with vLLM's prompt_logprobs (`vllm serve "
                f"{self.model}`, with --max-logprobs {k} where distill.top_k is above 20)"
            ) from error


def _read(answer: bytes, ids: list[int], start: int, k: int) -> list[Position]:
    """Raises Unusable for an answer that does not score these tokens."""
    try:
        scores: list[dict[str, dict[str, Any]]] = json.loads(answer)["choices"][0]["prompt_logprobs"]
        positions = [{int(token): float(it["logprob"]) for token, it in place.items()} for place in scores[start:]]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Unusable(f"an answer without prompt_logprobs ({type(error).__name__}: {error})") from error
    if len(scores) != len(ids):
        raise Unusable(f"it has read {len(scores)} tokens, and {len(ids)} were given")
    for token, position in zip(ids[start:], positions, strict=True):
        if token not in position or len(position) < k:
            raise Unusable(
                f"it scores the tokens {sorted(position)} where {token} and the {k} likeliest were asked for"
            )
        if not all(math.isfinite(value) for value in position.values()):
            raise Unusable(f"a log-probability of token {token} that is not finite")
    return positions
