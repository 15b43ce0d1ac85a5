"""Conversations whose answers are followed by some tokens of the other side, for every kind of batch."""

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from engine_cases import STOPS, prompts_of

from rollout.group import Completion, Prompt
from rollout.relay import Relay
from rollout.request import News, Request
from rollout.requests.serving import Serving
from rollout.sampling import SamplingParams

BASE = SamplingParams(group_size=1, temperature=0.9, max_completion_tokens=9, stop_token_ids=STOPS)
TURNS = 4


class Talk:
    """One conversation: each answer is followed by some tokens of the other side. `turns` are what was answered."""

    def __init__(self, number: int, prompt: Prompt, serving: Serving | Relay) -> None:
        self.number, self.prompt, self.serving = number, replace(prompt, prompt_id=f"p/{number}"), serving
        self.turns: list[Completion] = []
        self.told: list[int] = []
        self.ask()

    def ask(self) -> None:
        self.told = []
        params = replace(BASE, seed=self.number, start=100 * len(self.turns))
        self.serving.add(Request(self.prompt, params, self.tell, home=self.number))

    def tell(self, news: News) -> None:
        self.told += news.token_ids
        if news.completion is None:
            return
        assert self.told == news.completion.token_ids
        self.turns.append(news.completion)
        if len(self.turns) < TURNS:
            rng = random.Random(self.number * TURNS + len(self.turns))
            says = [rng.randrange(2, 250) for _ in range(rng.choice([1, 2, 7]))]
            ids = self.prompt.token_ids + news.completion.token_ids + says
            self.prompt = replace(self.prompt, token_ids=ids)
            self.ask()


@torch.inference_mode()
def talked(serving: Serving | Relay, between: Callable[[int], None] = lambda rounds: None) -> list[Completion]:
    """All answers of seven conversations, which begin some rounds apart."""
    rng, rounds = random.Random(0), 0
    talks: list[Talk] = []
    coming = list(enumerate(prompts_of(30, 22, 40, 18, 25, 31, 19)))
    while coming or serving.busy:
        if coming and rng.random() < 0.4:
            talks.append(Talk(*coming.pop(0), serving))
        between(rounds)
        serving.round(join=rng.random() < 0.8)
        rounds += 1
    return [turn for talk in talks for turn in talk.turns]
