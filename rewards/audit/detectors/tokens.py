"""Tokens, turns and ends: ids that are not the text, prefixes that broke, thoughts that went, limits called a stop."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence

from rewards.audit.findings import Rollouts, is_cut, most_common
from rewards.audit.traces import Call, Message, Trace, text_of
from rewards.finding import Finding, found

STOP_STRING = 12  # characters that engines leave out of the text
THOUGHT_LENGTH = 4  # tokens; the same text in other ids has a few more or less
THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>\s*|^.*?</think>\s*", re.DOTALL)
END_OF_THOUGHT = "</think"


def ids(rollouts: Rollouts) -> Iterator[Finding]:
    """Ids, log-probabilities and masks are of one length, and the ids are the text."""
    uneven = [t for t in rollouts.traces if len({len(t.token_ids), len(t.logprobs or t.token_ids)}) > 1 and t.token_ids]
    uneven += [t for t in rollouts.traces if t.loss_mask and len(t.loss_mask) != len(t.token_ids)]
    yield found("misaligned", f"{len(uneven)} rollouts have more or fewer log-probabilities than tokens", uneven)
    partly = [trace for trace in rollouts.traces if _is_partly_masked(trace)]
    yield found("misaligned", f"the loss masks of {len(partly)} rollouts leave out tokens of one turn", partly)
    texts: dict[tuple[int, ...], Trace] = {}
    other = []
    for trace in rollouts.traces:
        if not trace.token_ids:
            continue
        first = texts.setdefault(tuple(trace.token_ids), trace)
        decoded = rollouts.decode(trace.token_ids) if rollouts.decode else None
        same = _plain(first.completion) == _plain(trace.completion)
        if not same or (decoded and "\ufffd" not in decoded and not _same(decoded, trace)):  # of half a character
            other.append(trace)
    yield found("round-trip", f"{len(other)} rollouts have ids that are not their text", other)
    certain = {trace for group in rollouts.groups if len({t.completion for t in group}) == 1 for trace in group}
    bad = [trace for trace in rollouts.traces if _impossible(trace.logprobs, trace in certain)]
    what = f"{len(bad)} rollouts have log-probabilities above 0, that are no numbers, or all the same"
    yield found("bad-logprobs", what, bad)


def counts(rollouts: Rollouts) -> Iterator[Finding]:
    """The recorded number of tokens is that of the ids, or differs from it always alike, as where a stop counts."""
    rows = [trace for trace in rollouts.traces if trace.counted is not None and trace.token_ids]
    offsets = [((t.counted or 0) - len(t.token_ids)) / max(len(t.calls), 1) for t in rows]
    usual, share = most_common(offsets)
    off = [trace for trace, offset in zip(rows, offsets, strict=True) if offset != usual]
    if share >= 0.8:
        yield found("misaligned", f"{len(off)} rollouts have another number of tokens than ids", off)


def temperatures(rollouts: Rollouts) -> Iterator[Finding]:
    """The same token after the same context has the same log-probability, of one policy at one temperature."""
    seen: dict[object, float] = {}
    pairs = []
    for trace in rollouts.traces:
        start = 0
        for call in trace.calls if len(trace.logprobs) == len(trace.token_ids) else []:
            context = hash((trace.step, trace.version, *call.prompt_ids))
            for end in range(1, min(5, len(call.token_ids) + 1)):
                value = trace.logprobs[start + end - 1]
                first = seen.setdefault((context, *call.token_ids[:end]), value)
                if call.prompt_ids and first is not value:
                    pairs.append((trace, abs(value - first) > 0.05 + 0.05 * abs(first)))
            start += len(call.token_ids)
    other = [trace for trace, differs in pairs if differs]
    if len(pairs) >= 12 and len(other) > 0.1 * len(pairs):
        what = f"the same token after the same context has other log-probabilities {len(other)} of {len(pairs)} times"
        yield found("two-temperatures", f"{what}: of two temperatures or policies", list(dict.fromkeys(other)))


def _is_partly_masked(trace: Trace) -> bool:
    """Whether some tokens of a single turn are learned and others not. A truncated completion may be masked as a
    whole, and what tools wrote always is."""
    is_one_turn = len(trace.turns) < 2 and len(trace.calls) < 2
    return is_one_turn and len(set(map(bool, trace.loss_mask))) == 2


def _plain(text: str) -> str:
    return re.sub(r"<\|?[\w/]+\|?>|\s+", "", text)


def _same(decoded: str, trace: Trace) -> bool:
    """Returns whether the ids are the text; of several turns or thoughts, whether each text is among them."""
    if len(trace.turns) < 2 and not any(turn.get("reasoning_content") for turn in trace.turns):
        text, read = _plain(trace.completion), _plain(decoded)
        return read.startswith(text) and len(read) <= len(text) + STOP_STRING * bool(text)
    texts = [text_of(turn) for turn in trace.turns if turn.get("role") == "assistant"]
    return all(_plain(text) in _plain(decoded) for text in texts)


def _impossible(logprobs: Sequence[float], is_certain: bool) -> bool:
    """`is_certain`: the policy wrote nothing else, so all its tokens may have the probability 1."""
    if any(value is None or math.isnan(value) or value > 1e-3 for value in logprobs):
        return True
    return len(logprobs) >= 8 and len(set(logprobs)) == 1 and not (is_certain and logprobs[0] == 0)


def prefixes(rollouts: Rollouts) -> Iterator[Finding]:
    """A turn's prompt must begin with all that the model was shown and wrote before."""
    kinds: dict[str | None, list[Trace]] = {}
    for trace in rollouts.traces:
        broken = next(filter(None, itertools.starmap(_break, itertools.pairwise(trace.calls))), None)
        kinds.setdefault(broken, []).append(trace)
    rewritten, thoughtless = kinds.get("broken-prefix", []), kinds.get("thoughts-dropped", [])
    late = [(trace, thoughts) for trace in kinds.get(None, []) if (thoughts := _thoughts(trace))[1:] and thoughts[-1]]
    forgetful = [trace for trace, thoughts in late if not any(thoughts[:-1])]
    thoughtless += forgetful if len(forgetful) >= max(3, len(late) / 2) else []  # one may have begun without a thought
    what = f"{len(rewritten)} rollouts have a turn whose prompt does not begin with the turns before it"
    yield found("broken-prefix", what, rewritten)
    what = f"{len(thoughtless)} rollouts lost the thoughts of earlier turns: a later turn does not see them"
    yield found("thoughts-dropped", what, thoughtless)


def _break(before: Call, after: Call) -> str | None:
    """The kind of what is wrong between two calls."""
    if before.prompt_ids and after.prompt_ids:
        past, shown = before.prompt_ids + before.token_ids, after.prompt_ids
        if shown[: len(past)] == past:
            return None
        same = next((i for i, (a, b) in enumerate(zip(past, shown, strict=False)) if a != b), len(shown))
        places = range(same, len(past) - THOUGHT_LENGTH - 2)  # of the end of the past, if something is missing in it
        shorter = any(shown[place : place + 3] == past[-3:] for place in places)
        return "thoughts-dropped" if shorter and same >= len(before.prompt_ids) else "broken-prefix"
    messages = before.prompt + before.completion
    if not messages or not after.prompt or after.prompt[: len(messages)] == messages:
        return None
    repeated = after.prompt[: len(messages)]
    if [_said(message) for message in repeated] != [_said(message) for message in messages]:
        return "broken-prefix"
    lost = sum(map(_thinks, messages)) > sum(map(_thinks, repeated))
    return "thoughts-dropped" if lost else None


def _said(message: Message) -> tuple[str, str]:
    """Who said what, without thoughts. After the last end of a thought none is looked for, which takes a time that is
    quadratic in the number of beginnings."""
    text = text_of(message)
    length = text.rfind(END_OF_THOUGHT) + 1 and text.find(">", text.rfind(END_OF_THOUGHT)) + 1
    return message.get("role", ""), (THOUGHT.sub("", text[:length]) + text[length:]).strip()


def _thinks(message: Message) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in text_of(message)


def _thoughts(trace: Trace) -> list[bool]:
    """Whether each turn has a thought."""
    return [_thinks(turn) for turn in trace.turns if turn.get("role") == "assistant"]


def ends(rollouts: Rollouts) -> Iterator[Finding]:
    """A rollout that ends at a limit, or within a thought, was cut, whatever its record says."""
    finished_rows = [
        trace for trace in rollouts.traces if trace.finish_reason and not is_cut(trace) and not trace.error
    ]
    texts = {trace: text_of(trace.turns[-1:]) or trace.completion for trace in finished_rows}
    within = [
        trace for trace in finished_rows if trace.at_limit or re.match(r"\s*<think>(?!.*</think>)", texts[trace], re.S)
    ]
    if within and len(within) <= len(finished_rows) / 2:
        what = f"{len(within)} rollouts end at their limit or within a thought and are recorded as finished"
        yield found("cut-as-finished", what, within)
        return
    rows = [trace for trace in rollouts.traces if trace.token_ids and len(trace.calls) < 2]
    if not rows:
        return
    most, _ = most_common(len(trace.token_ids) for trace in rows if is_cut(trace))
    limit = most or max(len(trace.token_ids) for trace in rows)
    endings = [trace.token_ids[-1] for trace in rows if len(trace.token_ids) < limit]
    ending, share = most_common(endings)
    full = [trace for trace in rows if len(trace.token_ids) >= limit]
    unfinished = [
        trace for trace in full if not is_cut(trace) and trace.finish_reason and trace.token_ids[-1] != ending
    ]
    if unfinished and share >= 0.9 and len(endings) >= 8 and (most or len(full) >= 3):
        what = f"{len(unfinished)} rollouts have the most tokens there are ({limit}) and are recorded as finished"
        yield found("cut-as-finished", what, unfinished)


def denominators(rollouts: Rollouts) -> Iterator[Finding]:
    """What the loss of a rollout was divided by is a number of tokens that count, or the same for all."""
    wrong, masked = list[Trace](), list[Trace]()
    for rows in rollouts.steps.values() if rollouts.steps else [rollouts.trained]:
        every = {trace: len(trace.token_ids) for trace in rows}
        counted = {trace: sum(trace.loss_mask) if trace.loss_mask else every[trace] for trace in rows}
        for trace in rows:
            right, wide = (
                {sum(lengths.values()), lengths[trace], lengths[trace] * len(rows), None}
                for lengths in (counted, every)
            )
            if trace.loss_denominator not in right:
                (masked if trace.loss_denominator in wide else wrong).append(trace)
    what = f"the loss of {len(masked)} rollouts is divided by a number of tokens that counts masked ones"
    yield found("masked-in-denominator", what, masked)
    if len({trace.loss_denominator for trace in wrong}) > 1:
        yield found("denominator", f"the loss of {len(wrong)} rollouts is divided by no number of tokens", wrong)
