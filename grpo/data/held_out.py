"""`data.held_out`: a share of the training data is held out, where they have no split for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.data.prompts import PromptTemplate
from rewards.config.data import SourceOptions
from rewards.data.examples import Example
from rewards.data.leakage import in_held_out, problem_fingerprint
from rewards.data.source import MADE, REASONING_GYM


def held_out_share(
    data: SourceOptions, load: Callable[..., Sequence[Example]], template: PromptTemplate, held_out_split: str | None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """All examples of `data.split` in two, by the content of each problem."""
    assert data.held_out
    if data.name in MADE or data.name.startswith(REASONING_GYM):
        raise ValueError(
            f"data.held_out={data.held_out}: {data.name} has a held-out split of its own; drop data.held_out"
        )
    if held_out_split not in (None, data.split):
        raise ValueError(
            f"data.held_out={data.held_out} holds out a share of data.split={data.split}, and "
            f"eval.split={held_out_split} names another split; drop one of the two"
        )
    train: list[Example] = []
    held: list[Example] = []
    for example in load(split=data.split, limit=data.limit):
        fingerprint = problem_fingerprint(template.content(example))
        (held if in_held_out(fingerprint, data.held_out) else train).append(example)
    if not train or not held:
        raise ValueError(
            f"data.held_out={data.held_out} holds out {len(held)} of {len(train) + len(held)} examples; use another "
            "share, or more data"
        )
    return train, held
