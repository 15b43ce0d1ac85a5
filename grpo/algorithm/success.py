"""How likely a prompt is to be solved, predicted from its words by a logistic regression that learns in the run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

RATE = 0.5  # of AdaGrad
PASSES = 2  # over the outcomes of a draw
WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")


class SuccessModel:
    """Predicts the share of a prompt's completions that are right, also for a prompt that was never sampled.

    z = b + Σ w over the distinct words of the prompt and its pairs of neighbouring words, and p = 1 / (1 + exp(-z)).
    The weights follow the gradient p − rate by AdaGrad (Duchi et al. 2011), whose step shrinks as a word is met again;
    each word's step is divided by √n, n words and pairs, so that long prompts learn as fast as short ones.
    The idea to predict before sampling is that of VIP (arXiv:2602.01601), which has a Gaussian process over embeddings.

    >>> model = SuccessModel()
    >>> model.learn([("3 + 4", 1.0), ("31 * 47", 0.0)])
    >>> model.predict("3 + 5") > 0.5 > model.predict("31 * 49")
    True
    """

    def __init__(self) -> None:
        self.bias = [0.0, 1.0]  # as the weights
        # Of words and pairs: the weight, and 1 + the sum of its squared gradients.
        self.weights: dict[str, list[float]] = {}
        self._words: dict[str, list[str]] = {}  # of texts, so that each is read once

    def predict(self, text: str) -> float:
        weights = self.weights
        z = self.bias[0] + sum(weights[word][0] for word in self._words_of(text) if word in weights)
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, z))))

    def learn(self, outcomes: Sequence[tuple[str, float]]) -> None:
        """`outcomes` are prompts and the share of their completions that were right."""
        for _ in range(PASSES):
            for text, rate in outcomes:
                words = self._words_of(text)
                gradient, scale = self.predict(text) - rate, 1 / math.sqrt(max(1, len(words)))
                _step(self.bias, gradient, 1.0)
                for word in words:
                    _step(self.weights.setdefault(word, [0.0, 1.0]), gradient, scale)

    def _words_of(self, text: str) -> list[str]:
        if text not in self._words:
            self._words[text] = words_of(text)
        return self._words[text]

    def state_dict(self) -> dict[str, Any]:
        return {"bias": list(self.bias), "weights": {word: list(pair) for word, pair in self.weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bias = list(state["bias"])
        self.weights = {word: list(pair) for word, pair in state["weights"].items()}


def words_of(text: str) -> list[str]:
    """The distinct words, numbers and signs of a text, and its pairs of neighbours, in the order of the text.

    >>> words_of("3 + 3")
    ['3', '+', '3 +', '+ 3']
    """
    words = WORD.findall(text)
    pairs = [f"{first} {second}" for first, second in pairwise(words)]
    return list(dict.fromkeys([*words, *pairs]))


def _step(pair: list[float], gradient: float, scale: float) -> None:
    pair[1] += gradient * gradient
    pair[0] -= RATE * scale * gradient / math.sqrt(pair[1])
