"""Each detector looks for one cause because of which a run does not learn, and gives two sentences: what is wrong, with
the number it rests on, and what to change. Causes stand before their consequences, which they explain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from grpo.algorithm.alarms import FEATURES, SAID, Moments, judged
from grpo.cli.diagnose.record import FEW, Record
from rewards.built_in.gsm8k import MARKED
from rewards.config.names import recorded_options
from rewards.ties import tied as is_tied

LEAST_STEPS = 3  # of which a correlation is believed
SURE = 0.75  # of the completions of a group give one answer
SPECIAL = re.compile(r"(?:<\|[^|<>\s]{1,30}\|>|</s>|<eos>|<end_of_turn>)\s*[^\s<]")  # with text after it
FORMS = ("gsm8k", "gsm8k_flexible", "gsm8k_boxed", "gsm8k_lm_eval")  # rewards that say None where there is no answer


class Cause(NamedTuple):
    what: str
    change: str


def failed(record: Record) -> Cause | None:
    end = next((event for event in reversed(record.events) if event["event"] in ("end", "resume")), {})
    what = f"The run ended with an error after step {end.get('after_step') or 0}: {end.get('error')}."
    return Cause(what, "mend that first, and go on with --resume auto") if end.get("how") == "failed" else None


def unmarked(record: Record) -> Cause | None:
    lost, errors = record.mean("reward/abstained"), sum(record.series("reward/errors"))
    what = f"{lost:.0%} of the completions have no mark; rewards failed {errors:.0f} times."
    change = "see reward_error in events.jsonl, and try the reward: quartet reward test"
    return Cause(what, change) if lost > 0.05 or errors else None


def temperature(record: Record) -> Cause | None:
    alike = record.share(record.groups, lambda group: group.is_one_text)
    if alike < 0.9 or float(record.options.get("rollout.temperature", 1.0)) > 0.3:
        return None
    what = f"In {alike:.0%} of the groups all completions are the same text, so that none can be better than another."
    return Cause(what, f"raise {record.option('rollout.temperature')} to 1")


def rate_high(record: Record) -> Cause | None:
    """A step that moves the policy by many nats a completion throws away what the policy could do."""
    rows = [row for row in record.rows if row.get("policy/step_kl") is not None]
    moves = {row["step"]: row["policy/step_kl"] * row.get("completion/length_mean", 1.0) for row in rows}
    step = max(moves, key=lambda step: moves[step], default=0)
    nats, (before, after, z) = moves.get(step, 0.0), record.rise
    if nats < 30 and (nats < 5 or z > -3):
        return None
    what = f"Step {step} moved the policy by a KL of {nats:.3g} nats a completion, where one or two are many, and the "
    what += f"marks went from {before:.3g} to {after:.3g}."
    factor = 10 ** max(1, round(math.log10(nats) / 2))
    return Cause(what, f"lower {record.option('learner.learning_rate')}, {factor} times perhaps")


def stop_token(record: Record) -> Cause | None:
    lines = [line for group in record.groups for line in group.lines] or [{"text": ""}]
    cut = fmean(line.get("finish_reason") == "length" for line in lines)
    on = fmean(len(MARKED.findall(line["text"])) > 1 or bool(SPECIAL.search(line["text"])) for line in lines)
    if cut < 0.5 or on < 0.5:
        return None
    what = f"{cut:.0%} of the completions were cut, and {on:.0%} go on after their answer or after a stop token."
    change = "name the token that ends an answer as eos_token_id in generation_config.json of"
    return Cause(what, f"{change} {record.option('model')}")


def sign_flipped(record: Record) -> Cause | None:
    if record.right is None or record.right > -0.6:
        return None
    what = (
        f"Wrong answers get the better marks: inside groups the score and being right correlate by {record.right:.2f}."
    )
    return Cause(what, "turn the sign of the reward, or of its weight in rewards")


def reward_constant(record: Record) -> Cause | None:
    """All completions have the same mark though some are right and some are wrong."""
    if len(record.groups) < FEW or not is_tied([min(record.marks), max(record.marks)]):
        return None
    mark, wrong = record.marks[0], record.wrong_at_best
    agree = fmean(group.majority[1] for group in record.groups)
    if wrong is not None and (wrong > 0.1 if mark > 0 else wrong < 0.9):
        why = f"and {1 - wrong:.0%} of them are right by the gold answers"
    elif wrong is None and (mark not in (0.0, 1.0) or (mark == 1.0 and agree < 0.8)):
        why = f"and {agree:.0%} of a group have one answer"
    else:
        return None
    what = f"All {len(record.marks)} completions got the mark {mark:g} of {record.first_reward}, {why}."
    return Cause(what, f"mend the reward: quartet reward test {record.rewards[0].get('function')}")


def template(record: Record) -> Cause | None:
    """The policy was taught with prompts of another form, or does not write what the reward reads."""
    ours, model = record.options.get("data.template"), Path(str(record.options.get("model")))
    theirs, start = _template_of(model), fmean(record.marks[: len(record.marks) // 3] or [record.top]) / record.top
    none = record.share(record.early, lambda group: group.majority[0] is None)
    if theirs and theirs != ours and start < 0.6:
        what = f"Prompts are {ours!r}, {model} was taught with {theirs!r}, and it begins with {start:.0%} of the marks."
        return Cause(what, f"set data.template to {theirs!r}")
    if none < 0.7 or record.first_reward not in FORMS:
        return None
    what = f"In {none:.0%} of the groups most completions have no answer in the form that {record.first_reward} reads."
    change = f"show the form in {record.option('data.template')} or by data.few_shot, or teach it by warm_start.steps"
    return Cause(what, f"{change}; a chat model needs data.template: chat")


def _template_of(model: Path) -> str | None:
    """The template of the run that a policy comes from, or `chat` where its tokenizer has a template."""
    for folder in (model, model.parent):
        if (folder / "config.yaml").is_file():
            return recorded_options(folder / "config.yaml")[1].get("data", {}).get("template")
    file, own = model / "tokenizer_config.json", model / "chat_template.jinja"
    return "chat" if own.is_file() or (file.is_file() and '"chat_template"' in file.read_text("utf-8")) else None


def answer_column(record: Record) -> Cause | None:
    """An answer that nearly all completions of a group give is right more often than not, if gold answers are."""
    sure = [group for group in record.early if group.majority[0] is not None and group.majority[1] >= SURE]
    if not record.are_verdicts or len(sure) < max(FEW, 0.35 * len(record.early)):
        return None
    best = [dict(sorted(zip(group.answers, group.marks, strict=True), key=lambda pair: pair[1])) for group in sure]
    right = fmean(marks[group.majority[0]] for group, marks in zip(sure, best, strict=True))
    if right > 0.3:
        return None
    what = f"In {len(sure)} of {len(record.early)} groups {SURE:.0%} or more of the completions give one and the same "
    what += f"answer, and in {right:.0%} of them it is the gold one: gold answers are hardly those of the problems."
    return Cause(what, f"compare them: {record.option('data.solution_column')}, rewards.columns, the rows of the data")


def all_solved(record: Record) -> Cause | None:
    right = record.share(record.early, lambda group: group.all_have(record.top))
    what = f"From the start on {right:.0%} of the groups get full marks alone: there is little left to learn."
    change = f"take harder problems: {_data(record)}; or curriculum.by_difficulty: true"
    return Cause(what, change) if right >= 0.7 else None


def none_solved(record: Record) -> Cause | None:
    low = min(record.marks, default=0.0)
    none = record.share(record.groups, lambda group: group.all_have(low))
    if none < 0.9 or low >= record.top:
        return None
    what = f"In {none:.0%} of the groups no completion gets more than {low:g}, so that none is better than another."
    change = f"take easier problems: {_data(record)}; or warm_start.steps, or a reward with parts; see that a gold "
    return Cause(what, change + "solution gets full marks: quartet reward test")


def _data(record: Record) -> str:
    return record.option("data.levels" if record.options.get("data.name") == "word_problems" else "data.name")


def tied(record: Record) -> Cause | None:
    """The marks of nearly all groups are equal, some at the top and some at the bottom."""
    ties = record.mean("group/tied")
    told = next((event for event in record.events if event["event"] == "nothing_learned"), {})
    why = told.get("why") or "some problems are too easy and others too hard"
    ways = told.get("change") or ["curriculum.by_difficulty: true", f"raise {record.option('rollout.group_size')}"]
    return (
        Cause(f"{ties:.0%} of the groups are tied and teach nothing: {why}.", "; ".join(ways)) if ties > 0.9 else None
    )


def rate_low(record: Record) -> Cause | None:
    """By Pinsker's inequality a step of this KL changes the probability of any event by at most √(KL / 2), and steps
    add up at most."""
    rows = [row for row in record.rows if row.get("policy/step_kl") is not None]
    bounds = [(max(row["policy/step_kl"], 0.0) * row.get("completion/length_mean", 1.0) / 2) ** 0.5 for row in rows]
    steps = max(int(record.options.get("steps") or 0), record.steps)
    bound = math.fsum(bounds) * steps / max(record.steps, 1)
    if len(rows) < 3 or bound > 0.2:
        return None
    what = f"Nothing moves: all {steps} steps together can change the share of right answers by {bound:.1%} at most."
    factor = 10 ** max(1, round(-math.log10(max(bound, 1e-9))))
    return Cause(what, f"raise {record.option('learner.learning_rate')}, {factor} times perhaps")


def hacked(record: Record) -> Cause | None:
    """The alarms of a run, over all of its steps."""
    each = {kind: record.series(*record.watched(kind)) for kind in (*FEATURES, "format")}
    values = {kind: median(of) for kind, of in each.items() if len(of) >= LEAST_STEPS}
    kind = judged(values) if len(set(record.marks)) > 1 else None
    change = "pay for the answer: a reward that compares it with the gold one, with the largest weight in rewards"
    return Cause(f"The score {SAID[kind].format(value=values[kind])}.", change) if kind else None


def other_part(record: Record) -> Cause | None:
    """What differs inside groups, and is learned, is another part of the score than the first."""
    names = [reward.get("name") or str(reward.get("function")).rpartition(":")[2] for reward in record.rewards]
    r: dict[str, float] = {}
    for name in names:
        moments = [
            Moments.of(
                [(row["parts"][name], row["reward"]) for row in group.lines if row["parts"].get(name) is not None]
            )
            for group in record.groups
        ]
        total = sum(moments, Moments())
        r[name] = total.r or 0.0 if total.groups >= FEW else 0.0
    first, other = names[0], max(names, key=lambda name: r[name])
    if r[other] < 0.7 or r[first] > 0.3:
        return None
    what = f"Inside groups the score goes with {other} (r = {r[other]:.2f}), and not with {first} (r = {r[first]:.2f})."
    return Cause(what, f"lower the weight of {other} in rewards, or begin with problems for which {first} differs")


def noise(record: Record) -> Cause | None:
    marks: dict[tuple[str, str], list[float]] = {}
    for group in record.groups:
        for line, mark in zip(group.lines, group.marks, strict=True):
            marks.setdefault((line["prompt_id"], line["text"]), []).append(mark)
    apart = [max(values) - min(values) for values in marks.values() if len(values) > 1]
    differ = [difference for difference in apart if difference > 1e-6]
    if len(apart) < FEW or len(differ) < 0.1 * len(apart):
        return None
    what = f"Of {len(apart)} texts that came twice or more for one prompt {len(differ)} got different marks, by "
    return Cause(
        f"{what}{fmean(differ):.3g} on average.", "make rewards give one text one mark: seeds, a judge at temperature 0"
    )


def tiny_differences(record: Record) -> Cause | None:
    """Marks that differ in the third digit become as large as real differences where they are divided by their
    spread."""
    spreads = [max(group.marks) - min(group.marks) for group in record.groups if not is_tied(group.marks)]
    size = max(map(abs, record.marks), default=0.0)
    small = fmean(spread < size / 100 for spread in spreads) if len(spreads) >= FEW else 0.0
    what = f"In {small:.0%} of the groups that are not tied the marks differ by less than a hundredth of {size:.3g}."
    return (
        Cause(what, f"round the reward, or set {record.option('loss.scale_rewards')} to none") if small > 0.5 else None
    )


def group_size(record: Record) -> Cause | None:
    size = int(record.options.get("rollout.group_size") or 8)
    what = f"Groups have {size} completions, and {record.mean('group/tied'):.0%} of them are tied."
    return Cause(what, f"raise {record.option('rollout.group_size')}, to 8 perhaps") if size < 4 else None


def weights(record: Record) -> Cause | None:
    limits = {"mismatch/weight_mean": (1, 0.2), "policy/ratio_mean": (1, 0.2), "mismatch/logprob_abs_mean": (0, 0.1)}
    values = {name: record.typical(name) for name in limits}
    far = [
        name for name, value in values.items() if value is not None and abs(value - limits[name][0]) > limits[name][1]
    ]
    if not far:
        return None
    what = (
        f"{far[0]} is {values[far[0]]:.3g}: the completions are of another policy than the one that learns from them."
    )
    ways = map(record.option, ("rollout.ahead", "learner.updates_per_batch", "rollout.quantization"))
    return Cause(what, f"lower {', '.join(ways)}, or see why sampler and learner differ (mismatch/*)")


def entropy(record: Record) -> Cause | None:
    late = record.groups[len(record.groups) // 2 :]
    one = record.share(late, lambda group: group.is_one_text and not group.all_have(record.top))
    values = record.series("policy/entropy") or [0.0]
    if one < 0.5:
        return None
    what = f"In {one:.0%} of the later groups all completions are one text without full marks; the entropy went from "
    ways = map(record.option, ("rollout.temperature", "loss.entropy_coef"))
    return Cause(f"{what}{values[0]:.3g} to {values[-1]:.3g} nats a token.", f"raise {' or '.join(ways)}")


def clipped(record: Record) -> Cause | None:
    values = record.series("completion/clipped")
    cut = fmean(values[len(values) // 2 :] or [0.0])
    change = f"raise {record.option('rollout.max_completion_tokens')}, or pay for brevity by a second reward"
    return Cause(f"{cut:.0%} of the later completions are cut before their end.", change) if cut > 0.25 else None


def evaluation(record: Record) -> Cause | None:
    """Held-out accuracy of so few problems cannot show a gain as large as that on training problems. With 80 % power at
    95 % confidence it needs (1.96 + .84)² (p₁q₁ + p₂q₂) / d² problems."""
    rows = [row for row in record.rows if row.get("eval/accuracy") is not None and row.get("eval/prompts")]
    gain = record.rise[1] - record.rise[0]
    if len(rows) < 2 or record.rise[2] < 2 or gain < 0.01:
        return None
    p, q, problems = rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"], rows[-1]["eval/prompts"]
    chance = 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / problems)
    hoped = min(p + gain, 1.0)
    needed = math.ceil(2.8**2 * (p * (1 - p) + hoped * (1 - hoped)) / gain**2)
    if abs(q - p) > chance or problems >= needed:
        return None
    what = (
        f"Marks rose by {gain:.2g} in training, and held-out accuracy went from {p:.2f} to {q:.2f} on {problems:.0f} "
    )
    what += f"problems, of which chance alone makes ±{chance:.2f}."
    return Cause(what, f"raise {record.option('eval.limit')} to {needed}, or take {math.ceil(needed / problems)} seeds")


DETECTORS: tuple[Callable[[Record], Cause | None], ...] = (
    *(failed, unmarked, temperature, rate_high, stop_token, sign_flipped, reward_constant, template, answer_column),
    *(all_solved, none_solved, tied, rate_low, hacked, other_part, noise, tiny_differences, group_size, weights),
    *(entropy, clipped, evaluation),
)
TIED = {"all_solved", "none_solved", "tied", "rate_low", "hacked", "entropy"}
EXPLAINED: dict[str, set[str]] = {  # the consequences of a cause, which are left out after it
    "rate_high": TIED | {"stop_token", "template", "answer_column", "clipped"},
    "stop_token": TIED | {"template", "answer_column", "clipped"},
    "template": TIED | {"answer_column", "clipped"},
    **dict.fromkeys(("sign_flipped", "reward_constant"), TIED | {"answer_column"}),
    **dict.fromkeys(("temperature", "answer_column", "all_solved", "none_solved", "tied"), TIED),
}
