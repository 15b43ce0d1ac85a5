"""The order in which training takes prompts from several sources of data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from grpo.data.prompts import PromptStream
from rewards.data.examples import Example


def next_source(shares: Sequence[Fraction], counts: Sequence[int]) -> int:
    """Tells which source the next prompt comes from, where `counts` have come from each.

    After any number n of prompts a source has had n times its share but for less than one, so no draw by chance is as
    close to the weights. Tijdeman 1980, "The chairman assignment problem": of the sources that may have another prompt,
    the one that must have it soonest.

    >>> counts = [0, 0]
    >>> for _ in range(6):
    ...     source = next_source([Fraction(2, 3), Fraction(1, 3)], counts)
    ...     counts[source] += 1
    >>> counts
    [4, 2]
    """
    if len(shares) == 1:
        return 0
    margin, number = Fraction(1, 2 * len(shares) - 2), sum(counts) + 1
    due = [i for i, share in enumerate(shares) if share * number - counts[i] >= margin]
    return min(due, key=lambda i: math.ceil((counts[i] + 1 - margin) / shares[i]))


class MixedStream(PromptStream):
    """Examples without end from several sources. Each source has the order and the epochs that it would have alone, so
    that a further source changes none of the others. The seed orders the examples of a source; which source comes next
    is a schedule (`next_source`), and depends on the weights and the number of prompts so far alone."""

    def __init__(self, sources: Mapping[str, Sequence[Example]], weights: Mapping[str, float], seed: int = 0) -> None:
        if empty := [label for label, examples in sources.items() if not examples]:
            raise ValueError(f"none of the examples of the source {empty[0]} is left to take; use more data of it")
        self.seed = seed
        self.streams = {label: PromptStream(examples, seed) for label, examples in sources.items()}
        self.weights, self.counts = dict(weights), dict.fromkeys(weights, 0)
        exact = [Fraction(str(weight)) for weight in weights.values()]
        self.shares = [weight / sum(exact) for weight in exact]

    def most(self, n: int) -> dict[str, int]:
        """Tells how many of n prompts in a row may come from each source."""
        slack = 2 - Fraction(1, max(len(self.shares) - 1, 1)) if len(self.shares) > 1 else 0
        return {label: min(n, int(n * share + slack)) for label, share in zip(self.weights, self.shares, strict=True)}

    def take_examples(self, n: int) -> list[Example]:
        """The next n examples, all different. Raises ValueError where a source has too few."""
        counts, turns = dict(self.counts), list[str]()
        labels = list(counts)
        for _ in range(n):
            turns.append(labels[next_source(self.shares, list(counts.values()))])
            counts[turns[-1]] += 1
        taken = Counter(turns)
        for label, count in taken.items():  # before a stream moves: a refusal takes nothing
            self.streams[label].refuse_too_many(count)
        chosen = {label: iter(self.streams[label].take_examples(count)) for label, count in taken.items()}
        self.counts = counts
        return [next(chosen[label]) for label in turns]

    def state_dict(self) -> dict[str, Any]:
        streams = {label: stream.state_dict() for label, stream in self.streams.items()}
        state = {"weights": dict(self.weights), "counts": dict(self.counts), "streams": streams}
        return state | {"seed": self.seed, "fingerprint": mix_in_words(self.weights)}  # which no single source has

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if the mix, the seed or the data are others."""
        then = state.get("weights", {})
        if then != self.weights:
            raise ValueError(
                f"data: the run began with {mix_in_words(then)}, and now has {mix_in_words(self.weights)}; "
                "resume with the same sources and weights, or start a new run"
            )
        for label, stream in self.streams.items():
            try:
                stream.load_state_dict(state["streams"][label])
            except ValueError as error:
                raise ValueError(f"source {label}: {error}") from error
        self.counts = dict(state["counts"])


def mix_in_words(weights: Mapping[str, float]) -> str:
    """
    >>> mix_in_words({"gsm8k": 2.0, "my.jsonl": 1.0})
    'gsm8k × 2, my.jsonl × 1'
    """
    return ", ".join(f"{label} × {weight:g}" for label, weight in weights.items()) or "one source"
