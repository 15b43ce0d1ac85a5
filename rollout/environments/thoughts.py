"""What a server would show of a conversation whose chat template rewrites earlier answers: Qwen3's drops thoughts.

Each turn of an agent is then sampled in that context, and learned from there. Where the template still
shows the text of an answer, its ids are those that were sampled (contract 14); all else is the template's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from rewards.isolation.chat_template import render
from rollout.group import RolloutGroup, common

PLACE = "\ue000answer\ue000"  # stands for an answer, to find where the template shows it
BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no whole character
THOUGHT = "adding both"
USER, TOOL = "a user's message", "a tool's result"
METRICS = {
    "branches/rows": "trajectory branches after the first of an episode: a template or an agent rewrote history, count",
    "branches/tokens": "prompt tokens of these branches that are not a prefix of an earlier branch, count",
}


def shown(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Callable[[list[dict[str, Any]]], str],
    messages: Sequence[Mapping[str, Any]],
    answers: Mapping[int, Sequence[int]],
    stops: Sequence[int],
) -> list[int]:
    """The ids of the next prompt: the text that `rendered` makes of the messages. `answers` are the ids that were
    sampled, by the places of their messages; each may end with one of `stops`. Raises ValueError where the template
    refuses the messages."""
    said: list[dict[str, Any]] = [dict(message) for message in messages]
    text, at, ids, written = rendered(said), 0, list[int](), ""
    for number in sorted(answers):
        body, stop = list(answers[number]), list[int]()
        if body[-1:] and body[-1] in stops:
            body, stop = body[:-1], body[-1:]
        mark = {"role": "assistant", "content": PLACE}
        try:
            start, end = _region(text, rendered([*said[:number], mark, *said[number + 1 :]]))
        except ValueError:  # results without their calls
            start = -1
        if start < at:  # nobody knows where the template shows it, if at all
            continue
        first, last, middle = _kept(tokenizer, body, text[start:end])
        ends = str(tokenizer.decode(stop))
        if not text.startswith(ends, end):
            stop, ends = [], ""
        for piece, kept in ((text[at:start], body[:first]), (middle, [*body[len(body) - last :], *stop])):
            written += piece
            if kept:
                ids, written = [*ids, *_encode(tokenizer, written), *kept], ""
        at = end + len(ends)
    ids += _encode(tokenizer, written + text[at:])
    whole = _encode(tokenizer, text)  # for tokenizers whose tokens read otherwise at a beginning
    return ids if BROKEN in text or tokenizer.decode(ids) == tokenizer.decode(whole) else whole


def _region(text: str, other: str) -> tuple[int, int]:
    """From where to where a text has the answer in whose place the other one has PLACE; -1 where it has none."""
    before, place, after = other.partition(PLACE)
    if not place:
        return -1, -1
    start = common(text, before)
    return start, max(start, len(text) - common(text[::-1], after[::-1]))


def _kept(tokenizer: PreTrainedTokenizerBase, body: list[int], text: str) -> tuple[int, int, str]:
    """How many tokens of an answer at its beginning and at its end are in this text, and what is between them."""

    def tail(count: int) -> str:
        return str(tokenizer.decode(body[len(body) - count :]))

    def beginning(count: int) -> str:
        return str(tokenizer.decode(body[:count]))

    whole = tail(len(body))
    if whole == text:
        return 0, len(body), ""
    alike = common(whole[::-1], text[::-1])
    last = bisect_right(range(len(body) + 1), alike, key=lambda count: len(tail(count))) - 1
    while not text.endswith(tail(last)):  # it cuts a character of several tokens
        last -= 1
    rest = text.removesuffix(tail(last))
    alike = common(whole, rest)
    first = bisect_right(range(len(body) - last + 1), alike, key=lambda count: len(beginning(count))) - 1
    while not rest.startswith(beginning(first)):
        first -= 1
    return first, last, rest.removeprefix(beginning(first))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def dropping(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Says after what the chat template drops the thoughts of earlier answers, or all that stood before a call.

    >>> dropping(qwen3)
    ["a user's message"]
    """
    call = {"type": "function", "function": {"name": "add", "arguments": {"summand": 2}}}
    answer: dict[str, Any] = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\nFour"}
    said = {USER: [answer, {"role": "user", "content": "Sure?"}]}
    said[TOOL] = [answer | {"tool_calls": [call]}, {"role": "tool", "name": "add", "content": "4"}]
    after = []
    for what, messages in said.items() if tokenizer.chat_template else ():
        with suppress(ValueError):  # of a template that knows no tools
            text = render(tokenizer, [{"role": "user", "content": "2 + 2?"}, *messages], add_generation_prompt=True)
            if THOUGHT not in text and ("Four" in text or "summand" in text):  # some show nothing of such an answer
                after.append(what)
    return after


def costs(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """The metrics of groups whose episodes are learned from in several texts.

    >>> segments = [Segment(0, [1, 2]), Segment(2, [1, 2, 6, 4])]
    >>> one = Completion([5, 6, 7], [-0.1, -0.3, -0.2], "", "stop", 0, segments=segments)
    >>> costs([RolloutGroup(Prompt("a", "", [1, 2]), [one])])
    {'branches/rows': 1, 'branches/tokens': 2}
    """
    rows = tokens = 0
    for group in groups:
        for completion in group.completions:
            texts = [[*prompt_ids, *completion.token_ids[at]] for prompt_ids, at in completion.parts(group.prompt)]
            prompts = [prompt_ids for prompt_ids, _ in completion.parts(group.prompt)]
            rows += max(len(texts) - 1, 0)
            for number, prompt_ids in enumerate(prompts[1:], start=1):
                alike = max(common(text, prompt_ids) for text in texts[:number])
                tokens += len(prompt_ids) - alike
    return {"branches/rows": rows, "branches/tokens": tokens}
