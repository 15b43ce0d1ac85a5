"""Groups and texts: groups of several prompts, answers that changed, hacked rewards, prompts inside completions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from rewards.audit.detectors.advantages import factor_of
from rewards.audit.findings import Rollouts, answer_of, flatten, is_number, most_common, words
from rewards.audit.traces import Trace, groups_of, text_of
from rewards.built_in.notation import readable
from rewards.finding import Finding, found

MARKERS = re.compile(
    r"<\|(?:im_start|start_header_id|begin_of_text|user|system|assistant)\|>|<start_of_turn>|\[INST\]"
    r"|<\|(?:im_end|(?=\w*eot)\w+|end\w*)\|>(?=\s*\S)"
)
HOSTILE = re.compile(
    r"(?:ignore|disregard|forget) (?:all|any|the|your|every|previous|prior)\b.{0,40}\b(?:instruction|rule|rubric|grad)"
    r"|(?:give|award|assign|grant|deserve) .{0,40}(?:full|maximum|highest|perfect|max) (?:marks?|score|reward|credit)\b"
    r"|\A.{0,2000}(?:os\._exit\(|def __eq__\([^)]{0,80}\)[^:]{0,40}:\s{0,80}return True|pytest\.skip).{0,2000}\Z"
    r"|\A(?!.{0,4000}__main__).{0,2000}sys\.exit\(0\).{0,2000}\Z"  # an honest script may exit at its end
    r"|grader:|as the (?:judge|grader)",
    re.IGNORECASE | re.DOTALL,
)
NOTHING = re.compile(r"\\boxed\{\s*\}|####\s*\Z|<answer>\s*</answer>")
STATED = re.compile(r"\\boxed\{([^{}]*)\}|<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
MARK = "####"  # before an answer, and before a heading
MOST_OF_A_GROUP = 0.75
LONG = 40  # characters that two honest completions do not share by chance


def groups(rollouts: Rollouts) -> Iterator[Finding]:
    every = groups_of(rollouts.trained)
    size, share = most_common(len(group) + group[0].missing for group in every)
    prompts = [(group, len({trace.prompt for trace in group})) for group in rollouts.groups]
    mixed = [group for group, count in prompts if 1 < count < len(group)]  # an environment may draw each its own start
    mixed += _mixed_blocks(rollouts, size or 1)
    what = f"{len(mixed)} groups hold rollouts of different prompts, whose rewards are compared"
    yield found("mixed-group", what, flatten(mixed))
    other = [g for g in every if len(g) + g[0].missing != size and (g[0].group or len(g) % size)]
    other = [group for group in other if not _was_compared(group, size)]
    if other and not mixed and share >= 0.8 and size > 1:
        counts = ", ".join(map(str, sorted({len(group) for group in other})))
        yield found("group-size", f"{len(other)} groups have {counts} rollouts; the others have {size}", flatten(other))
    answers: dict[str, dict[str, Trace]] = {}
    for trace in rollouts.traces:
        if (answer := answer_of(trace)) is not None:
            answers.setdefault(trace.prompt, {}).setdefault(answer, trace)
    several = [list(rows.values()) for rows in answers.values() if len(rows) > 1]
    if several and len(several) <= len(answers) / 4:
        what = f"{len(several)} prompts have different answers in different rows"
        yield found("answer-changed", what, flatten(several))


def _was_compared(group: list[Trace], size: int) -> bool:
    """Whether a few failed rollouts were left out on purpose: the advantages are those of the others."""
    is_nearly_whole = MOST_OF_A_GROUP * size <= len(group) < size
    has_advantages = len(group) > 1 and all(is_number(trace.advantage) for trace in group)
    return is_nearly_whole and has_advantages and factor_of(group) is not None


def _mixed_blocks(rollouts: Rollouts, size: int) -> list[list[Trace]]:
    """Without recorded groups, the rollouts of a group are neighbours: nearly all blocks of a step have one prompt."""
    blocks: list[list[Trace]] = []
    for rows in rollouts.steps.values():
        if size > 1 and len(rows) % size == 0 and not any(row.group for row in rows):
            blocks += [rows[i : i + size] for i in range(0, len(rows), size)]
    mixed = [block for block in blocks if len({trace.prompt for trace in block}) > 1]
    return mixed if len(mixed) <= len(blocks) / 5 else []


def hacks(rollouts: Rollouts) -> Iterator[Finding]:
    """Completions that get a reward without an answer."""
    blank, idle = [], []
    for group in rollouts.groups:
        acting = any(map(_acts, group))
        quiet = [t for t in group if t.scored and not _acts(t) and (acting or not t.completion.strip())]
        lowest = min((t.value for t in group if t.scored and t not in quiet), default=None)
        better = [t for t in quiet if lowest is not None and t.value > lowest]
        blank += [trace for trace in better if not trace.completion.strip()]
        idle += [trace for trace in better if trace.completion.strip()]
    if len(idle) > 1 and {trace.reward for trace in idle} == {0.0}:  # a start value that nothing has changed
        blank += idle
    what = f"{len(blank)} rollouts that say or do nothing get more than others of their group"
    yield found("empty-rewarded", what, blank)
    hostile = [t for t in rollouts.high if HOSTILE.search(t.completion) and not HOSTILE.search(t.prompt)]
    hostile += [t for t in rollouts.high if _hedges(t) or _echoes(t)]
    what = f"{len(hostile)} completions have a high reward and address the grader, name many answers or copy"
    yield found("probe-rewarded", f"{what} the prompt", hostile)
    empty = [trace for trace in rollouts.high if NOTHING.search(trace.completion)]
    yield found("empty-answer", f"{len(empty)} completions have a high reward and an empty answer", empty)
    loops = [trace for trace in rollouts.high if _loops(trace.completion)]
    yield found("loop-rewarded", f"{len(loops)} completions have a high reward and repeat a sentence", loops)
    yield from _without_answer(rollouts)
    yield from _templates(rollouts)


def _acts(trace: Trace) -> bool:
    return any(turn.get("tool_calls") for turn in trace.turns)


def _hedges(trace: Trace) -> bool:
    return len(set(_stated(trace.completion))) >= 6 and len(_stated(trace.prompt)) < 6


def _stated(text: str) -> list[str]:
    """The answers that a text names. A heading is none: it has several words, and text follows it."""
    answers = ["".join(match).strip() for match in STATED.findall(text)]
    lines = list(filter(str.strip, text.splitlines()))
    for line, following in itertools.pairwise([*lines, MARK]):
        said = line.partition(MARK)[2].split()
        is_number = len(said) == 1 and any(map(str.isdigit, said[0]))
        if said and (is_number or MARK in following):
            answers.append(" ".join(said))
    return answers


def _echoes(trace: Trace) -> bool:
    """Returns whether the completion is a large part of the question; a short quotation may be the answer."""
    text, asked = (" ".join(each.split()) for each in (trace.completion, trace.prompt))
    question = " ".join(text_of(trace.messages[-1:]).split()) or asked
    return len(text) >= max(LONG, 0.3 * len(question)) and text in asked


def _loops(text: str) -> bool:
    """Returns whether one sentence is half of the text or more."""
    sentence, _share = most_common(part.strip() for part in re.split(r"[.!?\n]+", text) if len(part) > 24)
    return sentence is not None and text.count(sentence) >= 6 and text.count(sentence) * len(sentence) > len(text) / 2


def _without_answer(rollouts: Rollouts) -> Iterator[Finding]:
    """An answer that nearly all of the best completions name is missing in a few of them."""
    pairs = [(trace, answer_of(trace)) for trace in rollouts.high]
    pairs_with_answer = [(t, a) for t, a in pairs if a is not None and len(a) <= 60 and "\\" not in a and "\n" not in a]
    without = [trace for trace, answer in pairs_with_answer if not _names(trace.completion, answer)]
    if without and len(pairs_with_answer) >= 20 and len(without) <= len(pairs_with_answer) / 10:
        what = f"{len(without)} of {len(pairs_with_answer)} completions with a high reward do not contain the answer"
        yield found("answer-missing", what, without)


def _names(text: str, answer: str) -> bool:
    """Returns whether the text has the answer: as a number of the same value, or as the same words."""
    try:
        value = float(answer.replace(",", "").strip("$% "))
    except ValueError:
        return " ".join(words(answer)) in " ".join(words(text)) or answer.casefold() in text.casefold()
    plain = FRACTION.sub(r"\1/\2", readable(text))
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", plain)
    for number in numbers:
        top, _, bottom = number.replace(",", "").partition("/")
        if float(bottom or 1) and abs(float(top) / float(bottom or 1)) == abs(value):
            return True
    return False


def _templates(rollouts: Rollouts) -> Iterator[Finding]:
    """One long text is right for different prompts that have different answers."""
    copies: dict[str, dict[str, Trace]] = {}
    for trace in rollouts.high:
        if len(trace.completion) >= LONG:
            copies.setdefault(" ".join(trace.completion.split()), {}).setdefault(trace.prompt, trace)
    same = [list(rows.values()) for rows in copies.values() if len(rows) >= 3]
    same = [rows for rows in same if len({answer_of(row) for row in rows} - {None}) != 1]
    what = f"the same text has a high reward for several prompts ({len(same)} texts)"
    yield found("template-rewarded", what, flatten(same))


def leftovers(rollouts: Rollouts) -> Iterator[Finding]:
    """Completions that hold what the sampler should have left out: the prompt, or the marks of a chat template."""
    single = [t for t in rollouts.traces if sum(turn.get("role") == "assistant" for turn in t.turns) < 2]
    begins = [t for t in single if len(t.prompt) >= 20 and t.completion.lstrip().startswith(t.prompt.strip())]
    marks = [t for t in single if MARKERS.search(t.completion) and t not in begins]
    yield found("prompt-in-completion", f"{len(begins)} completions begin with their prompt", begins)
    if marks:
        what = f"{len(marks)} completions hold marks of a chat template"
        yield found("marks-in-completion", f"{what}: {MARKERS.findall(marks[0].completion)[0]}", marks)
