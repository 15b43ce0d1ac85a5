"""Tokens, turns and ends: ids that are not the text, prefixes that broke, thoughts that went, limits called a stop."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from statistics import median

from rewards.audit.findings import Finding, Rollouts, is_cut, most_common
from rewards.audit.traces import Call, Message, Trace, text_of

THOUGHT_LENGTH = 4  # tokens; the same text in other ids has a few more or less
THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>\s*|^.*?</think>\s*", re.DOTALL)


def ids(rollouts: Rollouts) -> Iterator[Finding]:
    """Ids, log-probabilities and masks are of one length, and the ids are the text."""
    uneven = [t for t in rollouts.traces if len({len(t.token_ids), len(t.logprobs or t.token_ids)}) > 1 and t.token_ids]
    uneven += [t for t in rollouts.traces if t.loss_mask and len(t.loss_mask) != len(t.token_ids)]
    if uneven:
        yield Finding("misaligned", f"{len(uneven)} rollouts have more or fewer log-probabilities than tokens", uneven)
    texts: dict[tuple[int, ...], Trace] = {}
    other = []
    for trace in rollouts.traces:
        if not trace.token_ids:
            continue
        first = texts.setdefault(tuple(trace.token_ids), trace)
        decoded = rollouts.decode(trace.token_ids) if rollouts.decode else None
        same = _plain(first.completion) == _plain(trace.completion)
        if not same or (decoded is not None and not _same(decoded, trace)):
            other.append(trace)
    if other:
        yield Finding("round-trip", f"{len(other)} rollouts have ids that are not their text", other)
    bad = [trace for trace in rollouts.traces if _impossible(trace.logprobs)]
    if bad:
        what = f"{len(bad)} rollouts have log-probabilities above 0, that are no numbers, or all the same"
        yield Finding("bad-logprobs", what, bad)


def counts(rollouts: Rollouts) -> Iterator[Finding]:
    """The recorded number of tokens is that of the ids, or differs from it always alike, as where a stop counts."""
    rows = [trace for trace in rollouts.traces if trace.counted is not None and trace.token_ids]
    usual, share = most_common((t.counted - len(t.token_ids)) / max(len(t.calls), 1) for t in rows)  # type: ignore[operator]
    off = [t for t in rows if (t.counted - len(t.token_ids)) / max(len(t.calls), 1) != usual]  # type: ignore[operator]
    if off and share >= 0.8:
        what = (
            f"{len(off)} rollouts have another number of tokens than ids: {off[0].counted} of {len(off[0].token_ids)}"
        )
        yield Finding("misaligned", what, off)


def temperatures(rollouts: Rollouts) -> Iterator[Finding]:
    """The same token after the same context has the same log-probability, of one policy at one temperature."""
    seen: dict[object, float] = {}
    pairs = []
    for trace in rollouts.traces:
        start = 0
        for call in trace.calls if len(trace.logprobs) == len(trace.token_ids) else []:
            for end in range(1, min(5, len(call.token_ids) + 1)):
                value = trace.logprobs[start + end - 1]
                key = (trace.step, trace.version, *call.prompt_ids, "", *call.token_ids[:end])
                first = seen.setdefault(key, value)
                if call.prompt_ids and first is not value:
                    pairs.append((trace, abs(value - first) > 0.05 + 0.05 * abs(first)))
            start += len(call.token_ids)
    other = [trace for trace, differs in pairs if differs]
    if len(pairs) >= 12 and len(other) > 0.1 * len(pairs):
        what = (
            f"the same token after the same context has other log-probabilities in {len(other)} of {len(pairs)} places"
        )
        yield Finding(
            "two-temperatures", f"{what}: of two temperatures or policies", list({id(t): t for t in other}.values())
        )


def _plain(text: str) -> str:
    return re.sub(r"<\|?[\w/]+\|?>|\s+", "", text)


def _same(decoded: str, trace: Trace) -> bool:
    """Returns whether the ids are the text; of several turns or thoughts, whether each text is among them."""
    if len(trace.turns) < 2 and not any(turn.get("reasoning_content") for turn in trace.turns):
        return _plain(decoded) == _plain(trace.completion)
    written = [text_of(turn) for turn in trace.turns if turn.get("role") == "assistant"]
    return all(_plain(text) in _plain(decoded) for text in written)


def _impossible(logprobs: Sequence[float]) -> bool:
    if any(value is None or math.isnan(value) or value > 1e-3 for value in logprobs):
        return True
    return len(logprobs) >= 8 and len(set(logprobs)) == 1


def prefixes(rollouts: Rollouts) -> Iterator[Finding]:
    """What the model was shown in a turn begins with all that it was shown and wrote before."""
    kinds: dict[str, list[Trace]] = {"broken-prefix": [], "thoughts-dropped": []}
    for trace in rollouts.traces:
        pairs = zip(trace.calls, trace.calls[1:], strict=False)
        kind = next((kind for before, after in pairs if (kind := _break(before, after))), None)
        kind = kind or ("thoughts-dropped" if _forgets(trace) else None)
        if kind:
            kinds[kind].append(trace)
    texts = {
        "broken-prefix": "rollouts have a turn whose prompt does not begin with the turns before it",
        "thoughts-dropped": "rollouts lost the thoughts of earlier turns: a later turn does not see them",
    }
    for kind, rows in kinds.items():
        if rows:
            yield Finding(kind, f"{len(rows)} {texts[kind]}", rows)


def _break(before: Call, after: Call) -> str | None:
    """The kind of what is wrong between two calls."""
    if before.prompt_ids and after.prompt_ids:
        past, shown = before.prompt_ids + before.token_ids, after.prompt_ids
        if shown[: len(past)] == past:
            return None
        same = next((i for i, (a, b) in enumerate(zip(past, shown, strict=False)) if a != b), len(shown))
        earlier = range(
            same, len(past) - THOUGHT_LENGTH - 2
        )  # where the end of the past stands, if something is missing
        removed = any(shown[place : place + 3] == past[-3:] for place in earlier)
        return "thoughts-dropped" if removed and same >= len(before.prompt_ids) else "broken-prefix"
    messages = before.prompt + before.completion
    if not messages or not after.prompt or after.prompt[: len(messages)] == messages:
        return None
    shown = after.prompt[: len(messages)]
    if [_said(message) for message in shown] != [_said(message) for message in messages]:
        return "broken-prefix"
    lost = sum(map(_thinks, messages)) > sum(map(_thinks, shown))
    return "thoughts-dropped" if lost else None


def _said(message: Message) -> tuple[str, str]:
    return message.get("role", ""), THOUGHT.sub("", text_of(message)).strip()


def _thinks(message: Message) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in text_of(message)


def _forgets(trace: Trace) -> bool:
    """Only the last of several turns has a thought."""
    written = [_thinks(turn) for turn in trace.turns if turn.get("role") == "assistant"]
    return len(written) > 1 and written[-1] and not any(written[:-1])


def ends(rollouts: Rollouts) -> Iterator[Finding]:
    """A rollout that ends at a limit, or within a thought, was cut, whatever its record says."""
    ended = [trace for trace in rollouts.traces if trace.finish_reason and not is_cut(trace) and not trace.error]
    within = [t for t in ended if t.at_limit or t.completion.count("<think>") > t.completion.count("</think>")]
    if within and len(within) <= len(ended) / 2:
        what = f"{len(within)} rollouts end at their limit or within a thought and are recorded as finished"
        yield Finding("cut-as-finished", what, within)
        return
    rows = [trace for trace in rollouts.traces if trace.token_ids and len(trace.calls) < 2]
    if not rows:
        return
    most, _ = most_common(len(trace.token_ids) for trace in rows if is_cut(trace))
    limit = most or max(len(trace.token_ids) for trace in rows)
    ending, share = most_common(trace.token_ids[-1] for trace in rows if len(trace.token_ids) < limit)
    full = [trace for trace in rows if len(trace.token_ids) >= limit]
    called = [t for t in full if not is_cut(t) and t.finish_reason and (share < 0.9 or t.token_ids[-1] != ending)]
    if called and (most or (len(full) >= 3 and share >= 0.9)):
        what = f"{len(called)} rollouts have the most tokens there are ({limit}) and are recorded as finished"
        yield Finding("cut-as-finished", what, called)


def denominators(rollouts: Rollouts) -> Iterator[Finding]:
    """What the loss of a rollout was divided by is a number of tokens that count, or the same for all."""
    wrong, masked = [], []
    recorded = [trace for trace in rollouts.trained if trace.loss_denominator]
    for step in {trace.step for trace in recorded}:
        rows = [trace for trace in recorded if trace.step == step]
        counted = sum(sum(trace.loss_mask) if trace.loss_mask else len(trace.token_ids) for trace in rows)
        every = sum(len(trace.token_ids) for trace in rows)
        for trace in rows:
            own = sum(trace.loss_mask) if trace.loss_mask else len(trace.token_ids)
            if trace.loss_denominator in (counted, own, own * len(rows)):
                continue
            if trace.loss_denominator in (every, len(trace.token_ids), len(trace.token_ids) * len(rows)):
                masked.append(trace)
            else:
                wrong.append(trace)
    if masked:
        what = f"the loss of {len(masked)} rollouts is divided by a number of tokens that counts masked ones"
        yield Finding("masked-in-denominator", what, masked)
    if len({trace.loss_denominator for trace in wrong}) > 1:
        yield Finding("denominator", f"the loss of {len(wrong)} rollouts is divided by no number of tokens", wrong)
    silent = [t for t in rollouts.trained if t.loss_mask and not any(t.loss_mask) and abs(t.advantage or 0.0) > 1e-6]
    if silent and median(sum(t.loss_mask) for t in rollouts.trained if t.loss_mask):
        rollouts.figures["fully masked rollouts"] = str(len(silent))
