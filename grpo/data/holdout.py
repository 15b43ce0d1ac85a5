"""`data.holdout`: a share of the training data is held out, where they have no split for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.config.data import DataOptions
from grpo.data.examples import Example
from grpo.data.leakage import in_holdout, problem_fingerprint
from grpo.data.prompts import PromptTemplate
from grpo.data.source import REASONING_GYM


def held_out_share(
    data: DataOptions, load: Callable[..., Sequence[Example]], template: PromptTemplate, heldout_split: str | None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """All examples of `data.split` in two, by the content of each problem."""
    assert data.holdout
    if data.name in ("word_problems", "word_game") or data.name.startswith(REASONING_GYM):
        raise ValueError(f"data.holdout={data.holdout}: {data.name} has a held-out split of its own; drop data.holdout")
    if heldout_split not in (None, data.split):
        raise ValueError(
            f"data.holdout={data.holdout} holds out a share of data.split={data.split}, and eval.split={heldout_split} "
            "names another split; drop one of the two"
        )
    train: list[Example] = []
    held: list[Example] = []
    for example in load(data.split, "train", limit=data.limit):
        fingerprint = problem_fingerprint(template.content(example))
        (held if in_holdout(fingerprint, data.holdout, data.holdout_seed) else train).append(example)
    if not train or not held:
        raise ValueError(
            f"data.holdout={data.holdout} holds out {len(held)} of {len(train) + len(held)} examples; use another "
            "share, or more data"
        )
    return train, held
