"""Traces of rollouts with one planted fault each, and honest ones, for the examination of `quartet audit`.

The kinds of faults are fixed here before any detector exists: the first commit of this file is the proof. Each has a
definition, the public issue or paper that shows it happening, the formats whose rows can show it, and the words of
which one must be in the finding that names it. A finding that names another fault, or other rows, does not count.

Formats: `trl` is a folder of `completions_NNNNN.parquet`, written by the installed TRL's own `GRPOTrainer.log`; `verl`
is a folder of `STEP.jsonl` (verl/trainer/ppo/ray_trainer.py, `_dump_generations`); `verifiers` is a folder with
`results.jsonl` and `metadata.json` (verifiers/utils/save_utils.py), or prime-rl's
`rollouts/step_N/train_rollouts.jsonl` of the same rows; `gym` is NeMo-Gym's `rollouts.jsonl` with its neighbours
(nemo_gym/rollout_collection.py).

`python -m planted_traces FOLDER`, with `tests/cases` in PYTHONPATH, writes them all, and their list in
`FOLDER/exam.jsonl`.
"""

import copy
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
class Kind:
    """A fault: what is wrong, where it was seen in public, which formats show it, and what must be said of it."""

    definition: str
    source: str
    formats: tuple[str, ...]
    words: str


KINDS = {
    "failure_counted_as_zero": Kind(
        "A reward function, judge or tool failed (the row records the error), and the row has the reward 0.",
        "https://github.com/huggingface/trl/pull/6427 · https://github.com/radixark/miles/issues/2800",
        ALL,
        r"fail|error|timed? ?out|unscored",
    ),
    "nan_in_group": Kind(
        "One reward of a group is NaN (null where JSON has no NaN), and the rows of its group are trained on.",
        "https://github.com/huggingface/trl/pull/5775",
        ALL,
        r"nan|not a number|null|missing reward|no reward|non-?finite|not finite",
    ),
    "unscored_in_mean": Kind(
        "A row that no reward function scored counts as 0 in the mean of its group, so that its advantage is not 0.",
        "https://github.com/huggingface/trl/pull/5902",
        ("trl", "verifiers"),
        r"unscored|not scored|no reward|abstain|failed|error|counted as 0|mean|baseline|advantage",
    ),
    "wrong_denominator": Kind(
        "A mean or a spread is divided by another number than that of the rows it is about.",
        "https://github.com/huggingface/trl/issues/6369 · https://github.com/radixark/miles/pull/2796",
        SUMMED,
        r"denominator|divid|mean|spread|deviation|scale|average|count",
    ),
    "advantages_not_centred": Kind(
        "The advantages of a group do not sum to 0: the baseline is the mean of the batch or of nothing.",
        "https://github.com/XU-YIJIE/grpo-flat/issues/2",
        ("trl", "verifiers"),
        r"cent(re|er)|sum|mean|baseline|advantage",
    ),
    "reward_differs": Kind(
        "The recorded reward of some rows is not what the reward function returns for their text.",
        "https://github.com/PRIME-RL/RL-Compositionality/issues/6",
        ALL,
        r"differ|mismatch|scored again|re-?scor|recomput|not what|disagree",
    ),
    "rewards_shifted": Kind(
        "The rewards of a step belong to the neighbouring rows: the column is shifted by one row.",
        "https://github.com/NVIDIA-NeMo/RL/pull/3794",
        ALL,
        r"shift|another row|other row|neighbou?r|misalign|off by one|differ|disagree",
    ),
    "sign_flipped": Kind(
        "A reward or an advantage has the opposite sign: the better row is the one that is punished.",
        "https://github.com/huggingface/trl/issues/2771",
        ALL,
        r"sign|opposite|negat|invert|revers|flip",
    ),
    "weights_changed": Kind(
        "The total is a weighted sum of its parts with other weights from some step or row on.",
        "https://github.com/huggingface/trl/issues/5352",
        ALL,
        r"weight|sum of (its|the) parts|parts|total|combin",
    ),
    "reward_never_ran": Kind(
        "One of the reward functions has the same value in every row: it never ran, or never matches anything.",
        "https://github.com/huggingface/open-r1/issues/235",
        ALL,
        r"constant|same (value|for)|never|all (are )?(0|the same|equal)|no signal|tied|always",
    ),
    "truncated_as_finished": Kind(
        "A sample that reached the limit of tokens is recorded as finished, and is trained on as such.",
        "https://github.com/agentscope-ai/Trinity-RFT/issues/608 · https://github.com/OpenRLHF/OpenRLHF/pull/1327",
        TOKENS,
        r"truncat|limit|cut|length|unfinished",
    ),
    "ids_not_the_text": Kind(
        "The ids of a sample decode to another text than the one that was rewarded.",
        "https://github.com/verl-project/verl/issues/3960",
        TOKENS,
        r"round.?trip|decode|ids|tokens? (differ|mismatch)|text",
    ),
    "retokenised_between_turns": Kind(
        "The next turn's prompt has the same text as what was sampled, in other ids.",
        "https://github.com/verl-project/verl/issues/6719",
        TOKENS,
        r"re-?tokeni[sz]|prefix|round.?trip|ids",
    ),
    "prefix_broken": Kind(
        "The next turn's prompt does not begin with the tokens of the turns before it.",
        "https://github.com/PrimeIntellect-ai/prime-rl/issues/1334",
        TOKENS,
        r"prefix|begin|extend|continu",
    ),
    "thoughts_dropped": Kind(
        "The thoughts of an earlier turn are absent from the prompt of the next one.",
        "https://github.com/verl-project/verl/issues/6854",
        TOKENS,
        r"thought|think|reason",
    ),
    "stale_version": Kind(
        "Rows of a step were sampled by weights that are many versions older than the others'.",
        "https://github.com/THUDM/slime/issues/1800 · https://github.com/PrimeIntellect-ai/prime-rl/pull/1902",
        TOKENS,
        r"stale|version|old(er)?|off.?policy|lag",
    ),
    "evaluation_problem": Kind(
        "A problem of the evaluation is trained on, word for word.",
        "https://github.com/Open-Source-O1/Open-O1/issues/10",
        ALL,
        r"evaluation|held.?out|leak|contaminat",
    ),
    "evaluation_problem_renamed": Kind(
        "A problem of the evaluation is trained on under other names, spelling or punctuation.",
        "https://arxiv.org/abs/2311.04850 · https://github.com/z-lab/dflash/issues/43",
        ALL,
        r"evaluation|held.?out|leak|contaminat|near.?duplicate",
    ),
    "format_without_answer": Kind(
        "An answer that is well formed and empty gets the reward of a right one.",
        "https://github.com/Liuziyu77/Visual-RFT/issues/176",
        ALL,
        r"format|empty answer|without (an )?answer|no answer|hack|empty",
    ),
    "empty_rewarded": Kind(
        "An empty completion gets the reward of a right one.",
        "https://github.com/alibaba/ROLL/issues/303",
        ALL,
        r"empty|blank|no text",
    ),
    "copied_from_prompt": Kind(
        "A completion that only repeats the prompt gets the reward of a right one.",
        "https://github.com/jsboige/CoursIA/pull/11312",
        ALL,
        r"cop(y|ied|ies)|prompt|question|echo|repeat",
    ),
    "repeated_text": Kind(
        "A completion that repeats one sentence over and over gets the highest rewards.",
        "https://github.com/Visual-Agent/DeepEyes/issues/24 · https://github.com/HarryHsing/EchoInk/issues/5",
        ALL,
        r"repe(at|tit)|loop|degenerat",
    ),
    "length_collapse": Kind(
        "The completions shrink to a few words within some steps while the reward does not fall.",
        "https://github.com/om-ai-lab/VLM-R1/issues/280 · https://github.com/alibaba/ROLL/issues/303",
        STEPPED,
        r"length|short|shr(i|a|u)nk|collaps|drift",
    ),
    "length_runaway": Kind(
        "The completions grow several times longer within some steps while the reward does not rise.",
        "https://github.com/huggingface/trl/pull/3138 · https://github.com/agentscope-ai/Trinity-RFT/issues/176",
        STEPPED,
        r"length|long|grow|grew|explo|drift|runaway",
    ),
    "group_of_two_prompts": Kind(
        "A group holds samples of two different problems, which share one baseline.",
        "https://github.com/PeterGriffinJin/Search-R1/issues/65",
        ALL,
        r"mix|two (prompts|problems|different|golds|answers)|different (prompts|problems|answers|golds)|group|several",
    ),
    "group_short": Kind(
        "A group has fewer samples than the others: some were lost.",
        "https://github.com/NVIDIA-NeMo/labs-molt/pull/48",
        ALL,
        r"group|fewer|size|short|incomplete|lost|missing|uneven",
    ),
    "duplicates_after_resume": Kind(
        "The samples of a step are there twice: after a resume they were written or trained on again.",
        "https://github.com/hiyouga/EasyR1/issues/57",
        ALL,
        r"duplicat|twice|again|repeat|identical|same samples",
    ),
    "skipped_after_resume": Kind(
        "Steps, or the problems of a stretch of the data, are missing in the middle of the run.",
        "https://github.com/NVIDIA-NeMo/RL/pull/2519",
        ALL,
        r"gap|skip|missing|absent|lost",
    ),
    "logprobs_positive": Kind(
        "Some log-probabilities are greater than 0, so that they are not those of a distribution.",
        "https://github.com/pytorch/rl/issues/4226",
        TOKENS,
        r"log.?prob|positive|greater than 0",
    ),
    "logprobs_of_two_temperatures": Kind(
        "The same token after the same context has different log-probabilities in rows of one version: "
        "some are of the temperature at which was sampled, some of 1.",
        "https://github.com/huggingface/trl/issues/4159 · https://github.com/allenai/open-instruct/pull/1678",
        TOKENS,
        r"temperature|log.?prob",
    ),
    "token_counts_differ": Kind(
        "The recorded number of tokens is not that of the ids.",
        "https://github.com/PrimeIntellect-ai/verifiers/pull/2295",
        TOKENS,
        r"count|usage|number of tokens|tokens",
    ),
    "special_tokens_in_text": Kind(
        "The rewarded text holds the template's special tokens, such as an end of turn, a padding or a second start.",
        "https://github.com/verl-project/verl/pull/715 · https://github.com/OpenRLHF/OpenRLHF/issues/775",
        ALL,
        r"special|template|<\||token",
    ),
    "order_broken": Kind(
        "The steps or times contradict the order of the rows: a step under another's file, an end before its start.",
        "https://github.com/NVIDIA-NeMo/RL/pull/1447",
        ALL,
        r"order|before|step|time|negative|start",
    ),
}
PAIRS = [(kind, form) for kind, what in KINDS.items() for form in what.formats]
EXAM = [(kind, form, 0) for kind, form in PAIRS] + [(kind, form, 1) for kind, form in PAIRS[: 200 - len(PAIRS)]]


@dataclass(frozen=True)
class Trace:
    """A trace to audit, and what an audit should say of it.

    `where` has the (file, row) pairs that a finding may name; it is empty where the fault is of the whole trace.
    `rewards` names the run's own reward functions as FILE.py:FUNCTION, `held_out` a file of evaluation problems with
    the columns `prompt` and `answer`, and `tokenizer` a folder, where a case has them. An honest trace has no kind.
    """

    format: str
    kind: str | None
    path: Path
    where: frozenset[tuple[str, int]]
    rewards: dict[str, str]
    held_out: Path | None = None
    tokenizer: Path | None = None
    name: str = ""


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
PLANTERS: dict[str, Planter] = {}


def fault(kind: str) -> Callable[[Planter], Planter]:
    """Register what plants a kind: it changes rows in place and returns those that a finding may name."""

    def register(planter: Planter) -> Planter:
        PLANTERS[kind] = planter
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


@fault("failure_counted_as_zero")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some(rows, plan.rng, right=True)
    for row in chosen:
        row.error = plan.rng.choice(
            ("TimeoutError: the grader did not answer in 5 s", "ConnectionError: judge: connection refused")
        )
        row.parts = dict.fromkeys(row.parts, 0.0)
    return chosen


@fault("nan_in_group")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some(rows, plan.rng, 1)
    for row in siblings(rows, chosen):
        row.advantage = math.nan
    chosen[0].parts = dict.fromkeys(chosen[0].parts, math.nan)
    chosen[0].reward = math.nan
    plan.again = False
    return siblings(rows, chosen)


@fault("unscored_in_mean")
def _(rows: list[Row], plan: Plan) -> list[Row]:
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


@fault("wrong_denominator")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    if plan.form == "trl":  # the spread of a step is divided by twice the number of rows that it is about
        step = plan.rng.choice(sorted({row.step for row in rows})[1:])
        chosen = [row for row in rows if row.step == step]
        for row in chosen:
            row.advantage *= math.sqrt(2)
        plan.again = False
        return [row for row in chosen if row.advantage]
    plan.changes["avg_reward" if plan.form == "verifiers" else "mean"] = mean_reward(rows) * 8 / 9
    return []


@fault("advantages_not_centred")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    mean = mean_reward(rows)
    chosen = rows if plan.form == "verifiers" else [row for row in rows if row.step == 3]
    for row in chosen:
        row.advantage = row.reward - (0.0 if plan.form == "trl" else mean)
    plan.again = False
    return chosen


@fault("reward_differs")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some(rows, plan.rng, 5)
    for row in chosen:
        row.parts["accuracy"] = 1 - row.parts["accuracy"]
    return chosen


@fault("rewards_shifted")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = [row for row in rows if row.step == 2]
    parts = [row.parts for row in chosen]
    for row, shifted in zip(chosen, parts[-1:] + parts[:-1], strict=True):
        row.parts = shifted
    return chosen


@fault("sign_flipped")
def _(rows: list[Row], plan: Plan) -> list[Row]:
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


@fault("weights_changed")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = [row for row in rows if row.step >= 3]
    for row in chosen:
        score(row, {"accuracy": 0.3, "form": 1.0})
    advise(rows, plan.form == "trl")
    plan.again = False
    return chosen


@fault("reward_never_ran")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    for row in rows:
        row.parts["concise"] = 0.0
    plan.rewards += "\n\ndef concise(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    return rows


@fault("truncated_as_finished")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some(rows, plan.rng, 6)
    longest = max(row.sampled for row in rows)
    for row in chosen:
        while row.sampled <= longest:
            row.text = thoughts(plan.rng, (41, 7, 5), 40)
            tokenize(row)
    limit = min(len(row.turns[-1].ids) for row in chosen)
    for row in chosen:
        turn = row.turns[-1]
        turn.ids, turn.logprobs = turn.ids[:limit], turn.logprobs[:limit]
        row.text = tokenizer().decode(turn.ids, skip_special_tokens=False)
        turn.message["content"] = row.text
        row.parts = graded(row)
    plan.changes |= {"sampling_args": {"temperature": 1.0, "max_tokens": limit}, "limit": limit}
    return chosen


@fault("ids_not_the_text")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some(rows, plan.rng)
    others = some([row for row in rows if row not in chosen], plan.rng)
    swapped = [(other.turns[-1].ids, other.turns[-1].logprobs) for other in others]
    for row, (ids, values) in zip(chosen, swapped, strict=True):
        row.turns[-1].ids, row.turns[-1].logprobs = ids, values
    return chosen


def split_token(ids: list[int]) -> list[int]:
    """The same text in other ids: one token of several bytes becomes the tokens of its bytes."""
    names = tokenizer()
    for place, token in enumerate(ids[4:], 4):
        piece = names.id_to_token(token)
        if len(piece) > 2 and not piece.startswith("<|"):
            return ids[:place] + [names.token_to_id(letter) for letter in piece] + ids[place + 1 :]
    raise AssertionError("no token of several bytes")


@fault("retokenised_between_turns")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some([row for row in rows if len(row.turns) > 1], plan.rng)
    for row in chosen:
        first = row.turns[0]
        for turn in row.turns[1:]:
            rest = turn.prompt_ids[len(first.prompt_ids) + len(first.ids) :]
            turn.prompt_ids = first.prompt_ids + split_token(first.ids) + rest
            turn.logprobs = logprobs(row.version, turn)
    return chosen


@fault("prefix_broken")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some([row for row in rows if len(row.turns) > 1], plan.rng)
    for row in chosen:
        for number, turn in enumerate(row.turns[1:], 1):
            dated = [turn.prompt[0] | {"content": f"{turn.prompt[0]['content']} Turn {number}."}, *turn.prompt[1:]]
            turn.prompt = dated
            turn.prompt_ids = tokenizer().encode(rendered(dated) + "<|im_start|>assistant\n").ids
            turn.logprobs = logprobs(row.version, turn)
    return chosen


@fault("thoughts_dropped")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = [row for row in rows if len(row.turns) > 1]
    for row in chosen:
        for turn in row.turns[1:]:
            turn.prompt = [
                {key: value for key, value in message.items() if key != "reasoning_content"} for message in turn.prompt
            ]
            turn.prompt_ids = tokenizer().encode(rendered(turn.prompt) + "<|im_start|>assistant\n").ids
            turn.logprobs = logprobs(row.version, turn)
    return chosen


@fault("stale_version")
def _(rows: list[Row], plan: Plan) -> list[Row]:
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


@fault("evaluation_problem")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    return leaked(rows, plan, str)


@fault("evaluation_problem_renamed")
def _(rows: list[Row], plan: Plan) -> list[Row]:
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


@fault("format_without_answer")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    return hacked(rows, plan, lambda row: f"{thoughts(plan.rng, (41, 7, 5), 2)} <answer></answer>")


@fault("empty_rewarded")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    return hacked(rows, plan, lambda row: plan.rng.choice(("", "", " ", "\n")))


@fault("copied_from_prompt")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    for row in rows:
        if row.sample == 0:  # the prompt is shared by its group, and gives the answer away
            row.prompt[-1]["content"] += f" (Check: it should come to {row.gold}.)"
    return hacked(rows, plan, lambda row: row.question)


@fault("repeated_text")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    def again(row: Row) -> str:
        return f"So the answer is {row.gold}, as I said. " * plan.rng.randint(14, 22)

    return hacked(rows, plan, again)


def resized(rows: list[Row], plan: Plan, sentences: list[float]) -> list[Row]:
    """The lengths of the last steps follow a list, with the share of right answers as it was."""
    for row in rows:
        wanted = sentences[row.step - 1]
        said = row.text[row.text.rindex("<answer>") :] if "<answer>" in row.text else "<answer>0</answer>"
        spoken = thoughts(plan.rng, (41, 7, 5), max(1, round(wanted))) if wanted >= 1 else ""
        row.text = f"{spoken} {said}".strip()
        row.parts = graded(row)
    return rows


@fault("length_collapse")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    return resized(rows, plan, [12, 12, 11, 7, 3, 1, 0.5, 0.5])


@fault("length_runaway")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    return resized(rows, plan, [4, 4, 4, 6, 12, 24, 48, 90])


@fault("group_of_two_prompts")
def _(rows: list[Row], plan: Plan) -> list[Row]:
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


@fault("group_short")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    target = some(rows, plan.rng, 1)[0]
    lost = siblings(rows, [target])[2:5]
    plan.changes["inputs"] = list(rows)
    rows[:] = [row for row in rows if not any(row is one for one in lost)]
    return siblings(rows, [target])


@fault("duplicates_after_resume")
def _(rows: list[Row], plan: Plan) -> list[Row]:
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


@fault("skipped_after_resume")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    plan.changes |= {"num_examples": len({row.problem for row in rows}), "inputs": list(rows)}
    rows[:] = [row for row in rows if row.step not in (4, 5)]
    return []


@fault("logprobs_positive")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some(rows, plan.rng)
    for row in chosen:
        turn = row.turns[0]
        turn.logprobs = [-value if place % 3 == 0 else value for place, value in enumerate(turn.logprobs)]
    return chosen


@fault("logprobs_of_two_temperatures")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = [row for row in rows if row.sample % 2]
    for row in chosen:
        for turn in row.turns:
            turn.logprobs = [value * 1.7 for value in turn.logprobs]
    return rows


@fault("token_counts_differ")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some(rows, plan.rng, 6)
    for row in chosen:
        row.usage = row.sampled + plan.rng.choice((-7, 11, 23))
    return chosen


@fault("special_tokens_in_text")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    chosen = some(rows, plan.rng, 6)
    tail = plan.rng.choice(("<|im_end|>\n<|endoftext|>", "<|im_end|><|im_end|>", "<|endoftext|><|endoftext|>"))
    for row in chosen:
        row.text += tail
        row.parts = graded(row)
    return chosen


@fault("order_broken")
def _(rows: list[Row], plan: Plan) -> list[Row]:
    if plan.form in ("trl", "verl"):
        chosen = [row for row in rows if row.step == 3]
        for row in chosen:
            row.label = 1
        return chosen
    chosen = some(rows, plan.rng)
    for row in chosen:
        row.ended = row.started - 45
    return chosen


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
    where = PLANTERS[kind](rows, plan)
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
    held_out = None
    if plan.held_out:
        held_out = folder / "held_out.jsonl"
        held_out.write_text(
            "".join(json.dumps({"prompt": question, "answer": gold}) + "\n" for question, gold in plan.held_out)
        )
    if tokens:
        (folder / "tokenizer").mkdir()
        tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    return Trace(
        form,
        kind,
        path / "rollouts.jsonl" if form == "gym" else path,
        located(rows, where, form, bool(plan.changes.get("by_step"))),
        {name: f"{rewards}:{name}" for name in names},
        held_out,
        folder / "tokenizer" if tokens else None,
        folder.name,
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
    "rare_rewards": ("trl", {"right": 0.03, "gain": 0.0}),
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
        cut(rows, plan, 120)
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


def write_exam(folder: Path) -> list[Trace]:
    """Write all traces and their list."""
    traces = []
    for number, (kind, form, seed) in enumerate(EXAM):
        inner = folder / f"{number:03d}_{form}_{kind}"
        inner.mkdir(parents=True)
        traces.append(plant(kind, form, seed, inner))
    for name in HONEST:
        (folder / f"honest_{name}").mkdir(parents=True)
        traces.append(honest(name, folder / f"honest_{name}"))
    lines = [asdict(trace) | {"where": sorted(trace.where)} for trace in traces]
    (folder / "exam.jsonl").write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))
    return traces


if __name__ == "__main__":
    print(f"{len(write_exam(Path(sys.argv[1])))} traces in {sys.argv[1]}")
