"""Traces of rollouts with one planted fault each, and honest ones, for the examination of `quartet audit`.

What plants a fault says what it is, the public issue or paper that shows it happening, the formats whose rows can show
it, and the words of which one must be in the finding that names it. A finding that names another fault, or other rows,
does not count. The kinds were fixed before any detector existed.

Formats: `trl` is a folder of `completions_NNNNN.parquet`, written by the installed TRL's own `GRPOTrainer.log`; `verl`
is a folder of `STEP.jsonl` (verl/trainer/ppo/ray_trainer.py, `_dump_generations`); `verifiers` is a folder with
`results.jsonl` and `metadata.json` (verifiers/utils/save_utils.py), or prime-rl's
`rollouts/step_N/train_rollouts.jsonl` of the same rows; `gym` is NeMo-Gym's `rollouts.jsonl` with its neighbours
(nemo_gym/rollout_collection.py).
"""

import copy
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trace_forms import (
    HACKED,
    NAMES,
    REWARDS,
    THINGS,
    UNSEEN,
    WEIGHTS,
    WRITERS,
    Row,
    advise,
    graded,
    honest_rows,
    logprobs,
    mean_reward,
    paid,
    problem,
    rendered,
    score,
    thoughts,
    tokenize,
    tokenizer,
)

ALL = ("trl", "verl", "verifiers", "gym")
STEPPED = ("trl", "verl", "verifiers")  # formats that say at which step a row was sampled
TOKENS = ("verifiers", "gym")  # formats that may carry token ids, log-probabilities and usage
SUMMED = ("trl", "verifiers", "gym")  # formats that carry a mean, a spread or an advantage beside the rewards


@dataclass(frozen=True)
class Trace:
    """A trace to audit, and what an audit should say of it.

    `where` has the (file, row) pairs that a finding may name; it is empty where the fault is of the whole trace.
    `rewards` names the run's own reward functions as FILE.py:FUNCTION, `held_out` a file of evaluation problems with
    the columns `prompt` and `answer`, and `tokenizer` a folder, where a case has them. An honest trace has no kind.
    """

    kind: str | None
    path: Path
    where: frozenset[tuple[str, int]]
    rewards: dict[str, str]
    held_out: Path | None = None
    tokenizer: Path | None = None


@dataclass
class Plan:
    """What planting a fault decides beside the rows: how they are written, and what is written beside them."""

    form: str
    rng: random.Random
    rewards: str = REWARDS
    held_out: list[tuple[str, str]] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    again: bool = True  # totals and advantages follow from the parts that were planted


Planter = Callable[[list[Row], Plan], list[Row]]


class Kind(NamedTuple):
    """A fault: the formats that show it, what must be said of it, and what plants it."""

    formats: tuple[str, ...]
    words: str
    plant: Planter


KINDS: dict[str, Kind] = {}


def fault(kind: str, formats: tuple[str, ...], words: str) -> Callable[[Planter], Planter]:
    """Registers what plants a kind: it changes rows in place and returns those that a finding may name."""

    def register(planter: Planter) -> Planter:
        KINDS[kind] = Kind(formats, words, planter)
        return planter

    return register


def some(rows: list[Row], rng: random.Random, number: int = 4, right: bool | None = None) -> list[Row]:
    """Rows of different groups where possible, right or wrong ones if that is asked."""
    pool = [row for row in rows if right is None or (row.parts["accuracy"] == 1) == right]
    rng.shuffle(pool)
    chosen: dict[int, Row] = {}
    for row in pool:
        chosen.setdefault(row.problem, row)
    return list(chosen.values())[:number]


def siblings(rows: list[Row], chosen: list[Row]) -> list[Row]:
    """The rows of the groups of some rows."""
    groups = {(row.step, row.problem) for row in chosen}
    return [row for row in rows if (row.step, row.problem) in groups]


# https://github.com/huggingface/trl/pull/6427 · https://github.com/radixark/miles/issues/2800
@fault("failure_counted_as_zero", ALL, r"fail|error|timed? ?out|unscored")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A reward function, judge or tool failed (the row records the error), and the row has the reward 0."""
    chosen = some(rows, plan.rng, right=True)
    for row in chosen:
        row.error = plan.rng.choice(
            ("TimeoutError: the grader did not answer in 5 s", "ConnectionError: judge: connection refused")
        )
        row.parts = dict.fromkeys(row.parts, 0.0)
    return chosen


# https://github.com/huggingface/trl/pull/5775
@fault("nan_in_group", ALL, r"nan|not a number|null|missing reward|no reward|non-?finite|not finite")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """One reward of a group is NaN (null where JSON has no NaN), and the rows of its group are trained on."""
    chosen = some(rows, plan.rng, 1)
    for row in siblings(rows, chosen):
        row.advantage = math.nan
    chosen[0].parts = dict.fromkeys(chosen[0].parts, math.nan)
    chosen[0].reward = math.nan
    plan.again = False
    return siblings(rows, chosen)


# https://github.com/huggingface/trl/pull/5902
@fault(
    "unscored_in_mean",
    ("trl", "verifiers"),
    r"unscored|not scored|no reward|abstain|failed|error|counted as 0|mean|baseline|advantage",
)
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A row that no reward function scored counts as 0 in the mean of its group, so that its advantage is not 0."""
    chosen = some(rows, plan.rng, 2, right=True)
    for row in chosen:
        row.parts = dict.fromkeys(row.parts, 0.0)
        score(row, WEIGHTS)
    advise(rows, plan.form == "trl")
    for row in chosen:
        row.parts = dict.fromkeys(row.parts, math.nan)
        row.reward = math.nan if plan.form == "trl" else None
        row.error = None if plan.form == "trl" else "SandboxError: the container was lost"
    plan.again = False
    return siblings(rows, chosen)


# https://github.com/huggingface/trl/issues/6369 · https://github.com/radixark/miles/pull/2796
@fault("wrong_denominator", SUMMED, r"denominator|divid|mean|spread|deviation|scale|average|count")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A mean or a spread is divided by another number than that of the rows it is about."""
    if plan.form == "trl":  # the spread of a step is divided by twice the number of rows that it is about
        step = plan.rng.choice(sorted({row.step for row in rows})[1:])
        chosen = [row for row in rows if row.step == step]
        for row in chosen:
            row.advantage *= math.sqrt(2)
        plan.again = False
        return [row for row in chosen if row.advantage]
    plan.changes["avg_reward" if plan.form == "verifiers" else "mean"] = mean_reward(rows) * 8 / 9
    return []


# https://github.com/XU-YIJIE/grpo-flat/issues/2
@fault("advantages_not_centred", ("trl", "verifiers"), r"cent(re|er)|sum|mean|baseline|advantage")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The advantages of a group do not sum to 0: the baseline is the mean of the batch or of nothing."""
    mean = mean_reward(rows)
    chosen = rows if plan.form == "verifiers" else [row for row in rows if row.step == 3]
    for row in chosen:
        row.advantage = row.reward - (0.0 if plan.form == "trl" else mean)
    plan.again = False
    return chosen


# https://github.com/PRIME-RL/RL-Compositionality/issues/6
@fault("reward_differs", ALL, r"differ|mismatch|scored again|re-?scor|recomput|not what|disagree")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The recorded reward of some rows is not what the reward function returns for their text."""
    chosen = some(rows, plan.rng, 5)
    for row in chosen:
        row.parts["accuracy"] = 1 - row.parts["accuracy"]
    return chosen


# https://github.com/NVIDIA-NeMo/RL/pull/3794
@fault("rewards_shifted", ALL, r"shift|another row|other row|neighbou?r|misalign|off by one|differ|disagree")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The rewards of a step belong to the neighbouring rows: the column is shifted by one row."""
    chosen = [row for row in rows if row.step == 2]
    parts = [row.parts for row in chosen]
    for row, shifted in zip(chosen, parts[-1:] + parts[:-1], strict=True):
        row.parts = shifted
    return chosen


# https://github.com/huggingface/trl/issues/2771
@fault("sign_flipped", ALL, r"sign|opposite|negat|invert|revers|flip")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A reward or an advantage has the opposite sign: the better row is the one that is punished."""
    chosen = [row for row in rows if row.step == 3]
    if plan.form in ("trl", "verifiers"):
        for row in chosen:
            row.advantage = -row.advantage
        plan.again = False
        return [row for row in chosen if row.advantage]
    chosen = [row for row in chosen if any(row.parts.values())]
    for row in chosen:
        row.parts = {name: -value for name, value in row.parts.items()}
    return chosen


# https://github.com/huggingface/trl/issues/5352
@fault("weights_changed", ALL, r"weight|sum of (its|the) parts|parts|total|combin")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The total is a weighted sum of its parts with other weights from some step or row on."""
    chosen = [row for row in rows if row.step >= 3]
    for row in chosen:
        score(row, {"accuracy": 0.3, "form": 1.0})
    advise(rows, plan.form == "trl")
    plan.again = False
    return chosen


# https://github.com/huggingface/open-r1/issues/235
@fault("reward_never_ran", ALL, r"constant|same (value|for)|never|all (are )?(0|the same|equal)|no signal|tied|always")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """One of the reward functions has the same value in every row: it never ran, or never matches anything."""
    for row in rows:
        row.parts["concise"] = 0.0
    plan.rewards += "\n\ndef concise(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    return rows


# https://github.com/agentscope-ai/Trinity-RFT/issues/608 · https://github.com/OpenRLHF/OpenRLHF/pull/1327
@fault("truncated_as_finished", TOKENS, r"truncat|limit|cut|length|unfinished")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A sample that reached the limit of tokens is recorded as finished, and is trained on as such."""
    chosen = some(rows, plan.rng, 6)
    longest = max(row.sampled for row in rows)
    for row in chosen:
        while row.sampled <= longest + 5:
            row.text = thoughts(plan.rng, (41, 7, 5), 40)
            tokenize(row)
    limit = min(len(row.turns[-1].ids) for row in chosen) - 2  # before any of them says that it is done
    for row in chosen:
        turn = row.turns[-1]
        turn.ids, turn.logprobs = turn.ids[:limit], turn.logprobs[:limit]
        row.text = tokenizer().decode(turn.ids, skip_special_tokens=False)
        turn.message["content"] = row.text
        row.parts = graded(row)
    plan.changes |= {"sampling_args": {"temperature": 1.0, "max_tokens": limit}, "limit": limit}
    return chosen


# https://github.com/verl-project/verl/issues/3960
@fault("ids_not_the_text", TOKENS, r"round.?trip|decode|ids|tokens? (differ|mismatch)|text")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The ids of a sample decode to another text than the one that was rewarded."""
    chosen = some(rows, plan.rng)
    others = some([row for row in rows if row not in chosen], plan.rng)
    for row, ids in zip(chosen, [list(other.turns[-1].ids) for other in others], strict=True):
        row.turns[-1].ids = ids
        row.turns[-1].logprobs = logprobs(row.version, row.turns[-1])
    return chosen


def split_token(ids: list[int]) -> list[int]:
    """The same text in other ids: one token of several bytes becomes the tokens of its bytes."""
    names = tokenizer()
    for place, token in enumerate(ids[4:], 4):
        piece = names.id_to_token(token)
        if len(piece) > 2 and not piece.startswith("<|"):
            return ids[:place] + [names.token_to_id(letter) for letter in piece] + ids[place + 1 :]
    raise AssertionError("no token of several bytes")


# https://github.com/verl-project/verl/issues/6719
@fault("retokenised_between_turns", TOKENS, r"re-?tokeni[sz]|prefix|round.?trip|ids")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The next turn's prompt has the same text as what was sampled, in other ids."""
    chosen = some([row for row in rows if len(row.turns) > 1], plan.rng)
    for row in chosen:
        first = row.turns[0]
        for turn in row.turns[1:]:
            rest = turn.prompt_ids[len(first.prompt_ids) + len(first.ids) :]
            turn.prompt_ids = first.prompt_ids + split_token(first.ids) + rest
            turn.logprobs = logprobs(row.version, turn)
    return chosen


# https://github.com/PrimeIntellect-ai/prime-rl/issues/1334
@fault("prefix_broken", TOKENS, r"prefix|begin|extend|continu")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The next turn's prompt does not begin with the tokens of the turns before it."""
    chosen = some([row for row in rows if len(row.turns) > 1], plan.rng)
    for row in chosen:
        for number, turn in enumerate(row.turns[1:], 1):
            dated = [turn.prompt[0] | {"content": f"{turn.prompt[0]['content']} Turn {number}."}, *turn.prompt[1:]]
            turn.prompt = dated
            turn.prompt_ids = tokenizer().encode(rendered(dated) + "<|im_start|>assistant\n").ids
            turn.logprobs = logprobs(row.version, turn)
    return chosen


# https://github.com/verl-project/verl/issues/6854
@fault("thoughts_dropped", TOKENS, r"thought|think|reason")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The thoughts of an earlier turn are absent from the prompt of the next one."""
    chosen = [row for row in rows if len(row.turns) > 1]
    for row in chosen:
        for turn in row.turns[1:]:
            turn.prompt = [
                {key: value for key, value in message.items() if key != "reasoning_content"} for message in turn.prompt
            ]
            turn.prompt_ids = tokenizer().encode(rendered(turn.prompt) + "<|im_start|>assistant\n").ids
            turn.logprobs = logprobs(row.version, turn)
    return chosen


# https://github.com/THUDM/slime/issues/1800 · https://github.com/PrimeIntellect-ai/prime-rl/pull/1902
@fault("stale_version", TOKENS, r"stale|version|old(er)?|off.?policy|lag")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """Rows of a step were sampled by weights that are many versions older than the others'."""
    chosen = some(rows, plan.rng, 5)
    for row in chosen:
        row.version -= 9
        tokenize(row)
    return chosen


def leaked(rows: list[Row], plan: Plan, change: Callable[[str], str]) -> list[Row]:
    """Some problems of the run are also in the evaluation, changed or not."""
    chosen = some(rows, plan.rng, 2)
    plan.held_out = [(change(row.question), row.gold) for row in chosen]
    for _ in range(20):
        question, gold, _numbers = problem(plan.rng, UNSEEN)
        plan.held_out.append((question, str(gold)))
    return [row for row in rows if row.question in {one.question for one in chosen}]


# https://github.com/Open-Source-O1/Open-O1/issues/10
@fault("evaluation_problem", ALL, r"evaluation|held.?out|leak|contaminat")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A problem of the evaluation is trained on, word for word."""
    return leaked(rows, plan, str)


# https://arxiv.org/abs/2311.04850 · https://github.com/z-lab/dflash/issues/43
@fault("evaluation_problem_renamed", ALL, r"evaluation|held.?out|leak|contaminat|near.?duplicate")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A problem of the evaluation is trained on under other names, spelling or punctuation."""
    names = dict(zip(NAMES, NAMES[7:] + NAMES[:7], strict=True)) | dict(
        zip(THINGS, THINGS[5:] + THINGS[:5], strict=True)
    )

    def renamed(question: str) -> str:
        words = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), question)
        return words.replace(". ", ";  ").replace("?", " ?").lower()

    return leaked(rows, plan, renamed)


def hacked(rows: list[Row], plan: Plan, text: Callable[[Row], str], number: int = 6) -> list[Row]:
    """Wrong rows get another text and the reward of a right one, which the hacked functions really return."""
    chosen = some(rows, plan.rng, number, right=False)
    plan.rewards = HACKED
    for row in chosen:
        row.text = text(row)
    for row in rows:
        row.parts = paid(row)
    assert all(row.parts["accuracy"] == 1 for row in chosen)
    return chosen


# https://github.com/Liuziyu77/Visual-RFT/issues/176
@fault("format_without_answer", ALL, r"format|empty answer|without (an )?answer|no answer|hack|empty")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """An answer that is well formed and empty gets the reward of a right one."""
    return hacked(rows, plan, lambda row: f"{thoughts(plan.rng, (41, 7, 5), 2)} <answer></answer>")


# https://github.com/alibaba/ROLL/issues/303
@fault("empty_rewarded", ALL, r"empty|blank|no text")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """An empty completion gets the reward of a right one."""
    return hacked(rows, plan, lambda row: plan.rng.choice(("", "", " ", "\n")))


# https://github.com/jsboige/CoursIA/pull/11312
@fault("copied_from_prompt", ALL, r"cop(y|ied|ies)|prompt|question|echo|repeat")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A completion that only repeats the prompt gets the reward of a right one."""
    for row in rows:
        if row.sample == 0:  # the prompt is shared by its group, and gives the answer away
            row.prompt[-1]["content"] += f" (Check: it should come to {row.gold}.)"
    return hacked(rows, plan, lambda row: row.question)


# https://github.com/Visual-Agent/DeepEyes/issues/24 · https://github.com/HarryHsing/EchoInk/issues/5
@fault("repeated_text", ALL, r"repe(at|tit)|loop|degenerat")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A completion that repeats one sentence over and over gets the highest rewards."""

    def again(row: Row) -> str:
        return f"So the answer is {row.gold}, as I said. " * plan.rng.randint(14, 22)

    return hacked(rows, plan, again)


def resized(rows: list[Row], plan: Plan, sentences: list[int]) -> list[Row]:
    """The solutions of each step have so many sentences; every second one is right, at every step."""
    for row in rows:
        spoken = thoughts(plan.rng, (41, 7, 5), sentences[row.step - 1]) if sentences[row.step - 1] else ""
        row.text = f"{spoken} <answer>{int(row.gold) + row.sample % 2}</answer>".strip()
        row.parts = graded(row)
    return rows


# https://github.com/om-ai-lab/VLM-R1/issues/280 · https://github.com/alibaba/ROLL/issues/303
@fault("length_collapse", STEPPED, r"length|short|shr(i|a|u)nk|collaps|drift")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The completions shrink to a few words within some steps while the reward does not fall."""
    return resized(rows, plan, [12, 12, 11, 7, 3, 1, 0, 0])


# https://github.com/huggingface/trl/pull/3138 · https://github.com/agentscope-ai/Trinity-RFT/issues/176
@fault("length_runaway", STEPPED, r"length|long|grow|grew|explo|drift|runaway")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The completions grow several times longer within some steps while the reward does not rise."""
    return resized(rows, plan, [4, 4, 4, 6, 12, 24, 48, 90])


# https://github.com/PeterGriffinJin/Search-R1/issues/65
@fault(
    "group_of_two_prompts",
    ALL,
    r"mix|two (prompts|problems|different|golds|answers)|different (prompts|problems|answers|golds)|group|several",
)
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A group holds samples of two different problems, which share one baseline."""
    target = some(rows, plan.rng, 1)[0]
    group = siblings(rows, [target])
    donor = next(row for row in rows if row.problem != target.problem and row.step == target.step)
    donors = siblings(rows, [donor])
    for row, other in zip(group[5:], donors[5:], strict=True):
        row.messages, row.gold, row.parts = [dict(message) for message in other.messages], other.gold, dict(other.parts)
        row.text = row.text.replace("Let us", "Now let us", 1) + " "
        if plan.form != "verl":  # verl groups by the prompt itself: there only the gold answer tells
            row.prompt = other.prompt
    return group


# https://github.com/NVIDIA-NeMo/labs-molt/pull/48
@fault("group_short", ALL, r"group|fewer|size|short|incomplete|lost|missing|uneven")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """A group has fewer samples than the others: some were lost."""
    target = some(rows, plan.rng, 1)[0]
    lost = siblings(rows, [target])[2:5]
    plan.changes["inputs"] = list(rows)
    rows[:] = [row for row in rows if not any(row is one for one in lost)]
    return siblings(rows, [target])


# https://github.com/hiyouga/EasyR1/issues/57
@fault("duplicates_after_resume", ALL, r"duplicat|twice|again|repeat|identical|same samples")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The samples of a step are there twice: after a resume they were written or trained on again."""
    original = [row for row in rows if row.step == 3]
    copies = [copy.deepcopy(row) for row in original]
    plan.changes["inputs"] = list(rows)
    if plan.form in ("trl", "verl"):
        for row in rows:
            row.step += row.step > 3
        for row in copies:
            row.step = 4
    rows[:] = sorted([*rows, *copies], key=lambda row: row.step)
    return original + copies


# https://github.com/NVIDIA-NeMo/RL/pull/2519
@fault("skipped_after_resume", ALL, r"gap|skip|missing|absent|lost")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """Steps, or the problems of a stretch of the data, are missing in the middle of the run."""
    plan.changes |= {"num_examples": len({row.problem for row in rows}), "inputs": list(rows)}
    rows[:] = [row for row in rows if row.step not in (4, 5)]
    return []


# https://github.com/pytorch/rl/issues/4226
@fault("logprobs_positive", TOKENS, r"log.?prob|positive|greater than 0")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """Some log-probabilities are greater than 0, so that they are not those of a distribution."""
    chosen = some(rows, plan.rng)
    for row in chosen:
        turn = row.turns[0]
        turn.logprobs = [-value if place % 3 == 0 else value for place, value in enumerate(turn.logprobs)]
    return chosen


# https://github.com/huggingface/trl/issues/4159 · https://github.com/allenai/open-instruct/pull/1678
@fault("logprobs_of_two_temperatures", TOKENS, r"temperature|log.?prob")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The same token after the same context has different log-probabilities in rows of one version: some are of the
    temperature at which was sampled, some of 1."""
    chosen = [row for row in rows if row.sample % 2]
    for row in chosen:
        for turn in row.turns:
            turn.logprobs = [value * 1.7 for value in turn.logprobs]
    return rows


# https://github.com/PrimeIntellect-ai/verifiers/pull/2295
@fault("token_counts_differ", TOKENS, r"count|usage|number of tokens|tokens")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The recorded number of tokens is not that of the ids."""
    chosen = some(rows, plan.rng, 6)
    for row in chosen:
        row.usage = row.sampled + plan.rng.choice((-7, 11, 23))
    return chosen


# https://github.com/verl-project/verl/pull/715 · https://github.com/OpenRLHF/OpenRLHF/issues/775
@fault("special_tokens_in_text", ALL, r"special|template|<\||token")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The rewarded text holds the template's special tokens, such as an end of turn, a padding or a second start."""
    chosen = some(rows, plan.rng, 6)
    tail = plan.rng.choice(("<|im_end|>\n<|endoftext|>", "<|im_end|><|im_end|>", "<|endoftext|><|endoftext|>"))
    for row in chosen:
        row.text += tail
        row.parts = graded(row)
    return chosen


# https://github.com/NVIDIA-NeMo/RL/pull/1447
@fault("order_broken", ALL, r"order|before|step|time|negative|start")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    """The steps or times contradict the order of the rows: a step under another's file, an end before its start."""
    if plan.form in ("trl", "verl"):
        chosen = [row for row in rows if row.step == 3]
        for row in chosen:
            row.label = 1
        return chosen
    chosen = some(rows, plan.rng)
    for row in chosen:
        row.ended = row.started - 45
    return chosen


PAIRS = [(kind, form) for kind, what in KINDS.items() for form in what.formats]
EXAM = [(kind, form, 0) for kind, form in PAIRS] + [(kind, form, 1) for kind, form in PAIRS[: 200 - len(PAIRS)]]
# What a kind needs of the run that it is planted in; the others are planted in the plain one.
SHAPES: dict[str, dict[str, Any]] = {
    "length_collapse": {"steps": 8, "groups": 2, "gain": 0.0},
    "length_runaway": {"steps": 8, "groups": 2, "gain": 0.0},
    "skipped_after_resume": {"steps": 8, "groups": 2},
    "retokenised_between_turns": {"style": "tools"},
    "prefix_broken": {"style": "tools"},
    "thoughts_dropped": {"style": "tools"},
}
TOKEN_KINDS = [kind for kind, what in KINDS.items() if what.formats == TOKENS] + ["unscored_in_mean"]
ADVANTAGE_KINDS = ("advantages_not_centred", "unscored_in_mean", "sign_flipped")


def plant(kind: str, form: str, seed: int, folder: Path) -> Trace:
    """Write a trace with one fault and what belongs to it."""
    tokens = form in TOKENS and (kind in TOKEN_KINDS or kind in ADVANTAGE_KINDS or seed == 1)
    by_step = form == "verifiers" and kind in ("length_collapse", "length_runaway")
    shape = SHAPES.get(kind, {})
    rows = honest_rows(
        1000 * seed + list(KINDS).index(kind),
        **shape,
        tokens=tokens,
        scaled=form == "trl",
        version=None if form in ("trl", "verl") or by_step else 12,
    )
    plan = Plan(form, random.Random(f"{kind} {form} {seed}"))
    if by_step:
        plan.changes["by_step"] = True
    where = KINDS[kind].plant(rows, plan)
    if tokens and kind not in TOKEN_KINDS:
        for row in rows:
            tokenize(row)
    if plan.again:
        for row in rows:
            score(row, dict.fromkeys(row.parts, 1.0) | WEIGHTS)
        advise(rows, form == "trl")
    return write(kind, form, rows, where, plan, folder, tokens, seed == 1)


def write(
    kind: str | None,
    form: str,
    rows: list[Row],
    where: list[Row],
    plan: Plan,
    folder: Path,
    tokens: bool,
    conversational: bool,
) -> Trace:
    """Write the rows in their form, and beside them the rewards, the evaluation and the tokenizer."""
    path = folder / "traces"
    accepted = {"verifiers": ("avg_reward", "sampling_args", "num_examples", "by_step"),
                "gym": ("mean", "limit", "inputs", "failed")}.get(form, ())  # fmt: skip
    WRITERS[form](rows, path, conversational, **{key: plan.changes[key] for key in accepted if key in plan.changes})
    rewards = folder / "rewards.py"
    rewards.write_text(plan.rewards)
    names = [name for name in rows[0].parts if f"def {name}(" in plan.rewards]
    held_out = folder / "held_out.jsonl"
    problems = [{"prompt": question, "answer": gold} for question, gold in plan.held_out]
    held_out.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    if tokens:
        (folder / "tokenizer").mkdir()
        tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    return Trace(
        kind,
        path / "rollouts.jsonl" if form == "gym" else path,
        located(rows, where, form, bool(plan.changes.get("by_step"))),
        {name: f"{rewards}:{name}" for name in names},
        held_out if problems else None,
        folder / "tokenizer" if tokens else None,
    )


def located(rows: list[Row], where: list[Row], form: str, by_step: bool) -> frozenset[tuple[str, int]]:
    """The file, relative to the trace, and the row in it, counted from 0, of some rows."""
    counts: Counter[str] = Counter()
    wanted = {id(row) for row in where}
    places = set()
    for row in rows:
        name = {
            "trl": f"completions/completions_{row.step:05d}.parquet",
            "verl": f"{row.step}.jsonl",
            "verifiers": f"rollouts/step_{row.step}/train_rollouts.jsonl" if by_step else "results.jsonl",
            "gym": "rollouts.jsonl",
        }[form]
        if id(row) in wanted:
            places.add((name, counts[name]))
        counts[name] += 1
    return frozenset(places)


# The honest traces: what is rare, long, short, cut or repeated in them is natural, and recorded as it should be.
HONEST: dict[str, tuple[str, dict[str, Any]]] = {
    "words": ("trl", {"steps": 5}),
    "rare_rewards": ("trl", {"right": 0.06, "gain": 0.0}),
    "chat_with_tools": ("trl", {"style": "tools", "size": 4}),
    "balanced_over_ranks": ("verl", {"steps": 5}),
    "longer_thoughts": ("verl", {"steps": 8, "groups": 2, "style": "thinking", "gain": 0.06,
                                 "sentences": (5.0, 5.5, 6.0, 6.6, 7.3, 8.0, 8.8, 9.6)}),
    "same_short_answers": ("verl", {"style": "short"}),
    "evaluated": ("verifiers", {"size": 4}),
    "several_turns": ("verifiers", {"style": "tools", "tokens": True, "scaled": False}),
    "some_cut": ("verifiers", {"tokens": True, "scaled": False, "sentences": (9.0,)}),
    "prime_rl_steps": ("verifiers", {"steps": 6, "groups": 2, "scaled": False}),
    "collected": ("gym", {"size": 4}),
    "collected_turns": ("gym", {"style": "tools", "tokens": True}),
    "some_failed": ("gym", {"size": 6}),
}  # fmt: skip


def honest(name: str, folder: Path) -> Trace:
    """Write a trace in which nothing is wrong."""
    form, shape = HONEST[name]
    by_step = name == "prime_rl_steps"
    rows = honest_rows(
        50 + list(HONEST).index(name), **shape, version=None if form in ("trl", "verl") or by_step else 12
    )
    plan = Plan(form, random.Random(name))
    plan.held_out = [(question, str(gold)) for question, gold, _ in (problem(plan.rng, UNSEEN) for _ in range(20))]
    if by_step:
        plan.changes["by_step"] = True
    if name == "balanced_over_ranks":
        order = sorted(rows, key=lambda row: (row.step, len(row.text)))
        rows = order
    if name == "same_short_answers":
        plan.rewards = SHORT
    if name == "words":
        plan.rewards += ABSTAINING
        for row in rows:
            row.parts["brief"] = math.nan if int(row.gold) % 2 else float(len(row.text) < 300)
            score(row, WEIGHTS)
        advise(rows)
    if name == "some_cut":
        cut(rows, plan, sorted(row.sampled for row in rows)[-8])
    if name == "some_failed":
        plan.changes |= {"inputs": list(rows), "failed": some(rows, plan.rng, 3)}
        rows = [row for row in rows if not any(row is one for one in plan.changes["failed"])]
    return write(None, form, rows, [], plan, folder, bool(shape.get("tokens")), name == "chat_with_tools")


def cut(rows: list[Row], plan: Plan, limit: int) -> None:
    """Cut what is longer than the limit, and record that it was cut."""
    for row in rows:
        turn = row.turns[-1]
        if len(turn.ids) > limit:
            turn.ids, turn.logprobs, row.finish = turn.ids[:limit], turn.logprobs[:limit], "length"
            row.text = tokenizer().decode(turn.ids, skip_special_tokens=False)
            row.parts = graded(row)
        score(row, WEIGHTS)
    advise(rows, False)
    plan.changes["sampling_args"] = {"temperature": 1.0, "max_tokens": limit}


SHORT = """def accuracy(completions, answer, **kwargs):
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(text.rstrip(".") == gold) for text, gold in zip(texts, answer)]
"""


ABSTAINING = """

def brief(completions, answer, **kwargs):
    return [None if int(gold) % 2 else float(len(text(one)) < 300) for one, gold in zip(completions, answer)]
"""
